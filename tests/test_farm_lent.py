"""A farm in which some overlays are lent to QEMU: they are counted apart, and bases go on.

``a`` and ``d`` are lent, ``b`` is lent for reading as the layer below ``d``, and ``c`` is not lent.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from support.availability import missing
from support.command import addcow, draw, draw_raw, patch, refused, succeed


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """A farm with manifests, of which a part is lent."""
    if shutil.which("qemu-img") is None:
        missing("qemu-img is not installed")
    draw_raw(tmp_path / "base.img", "BBBB")
    for name in "abc":
        draw(tmp_path / f"{name}.add-cow", "A---")
    draw(tmp_path / "d.add-cow", "-A--", "b.add-cow", backing_format="add-cow")
    succeed("farm", "manifest", "create", ".", cwd=tmp_path)
    for name in "ad":
        succeed("qemu", "export", f"{name}.add-cow", cwd=tmp_path)
    return tmp_path


def summary(farm: Path, *words: str, status: int = 0) -> dict[str, Any]:
    """What a farm command counts."""
    result = addcow("farm", *words, "--output", "json", ".", cwd=farm)
    assert result.status == status, result
    counts: dict[str, Any] = result.json["summary"]
    return counts


@pytest.mark.parametrize("share", [(), ("-U",)], ids=["locked", "shared"])
def test_farm_check_counts_lent_images_apart(farm: Path, share: tuple[str, ...]) -> None:
    counts = summary(farm, "check", *share)
    assert (counts["images"], counts["clean"], counts["lent"]) == (4, 1, 3)


def test_farm_check_finds_a_missing_twin(farm: Path) -> None:
    (farm / "a.qcow2").unlink()
    counts = summary(farm, "check", status=2)
    assert (counts["corrupt"], counts["lent"]) == (1, 2)


@pytest.mark.parametrize(("job", "done"), [("commit", 0), ("flatten", 1)])
def test_farm_jobs_count_lent_images_apart(farm: Path, job: str, done: int) -> None:
    # The overlay that is not lent has a base that lent ones need: it is not committed.
    before = (farm / "c.add-cow").read_bytes()
    counts = summary(farm, job, status=1)
    assert (counts["lent"], counts["done"], counts["refused"]) == (3, done, 1 - done)
    assert ((farm / "c.add-cow").read_bytes() == before) == (job == "commit")
    told = addcow("farm", job, ".", cwd=farm)
    assert "lent: ./a.add-cow: it is lent to QEMU through" in told.stderr


def test_farm_verify_and_scrub_go_on_below_lent_overlays(farm: Path) -> None:
    expected = {"as-they-were": 3, "unverified": 0, "different": 0, "lent": 2}
    assert expected.items() <= summary(farm, "verify").items()
    assert expected.items() <= summary(farm, "scrub", "run", "--state", "../scrub.db").items()
    patch(farm / "b.raw", 0, b"rotten")
    assert summary(farm, "verify", status=2)["different"] == 1


def test_farm_manifest_leaves_lent_overlays_out(farm: Path) -> None:
    result = addcow("farm", "manifest", "create", "--output", "json", ".", cwd=farm)
    assert result.json["summary"]["lent"] == 2
    assert (result.json["summary"]["written"], result.json["summary"]["failed"]) == (0, 0)


def test_manifest_of_a_layer_survives_lending(farm: Path) -> None:
    succeed("qemu", "import", "d.add-cow", cwd=farm)
    before = (farm / "b.add-cow.manifest").read_bytes()
    made = succeed("manifest", "create", "--output", "json", "d.add-cow", cwd=farm).json
    assert [one["written"] for one in made["manifests"]] == [False, False, True]
    assert (farm / "b.add-cow.manifest").read_bytes() == before
    succeed("verify", "d.add-cow", cwd=farm)


def test_check_that_shares_a_lent_overlay_is_refused(farm: Path) -> None:
    assert "'addcow qemu import' takes it back" in refused("check", "-U", "a.add-cow", cwd=farm)
    succeed("check", "-U", "b.add-cow", cwd=farm)
