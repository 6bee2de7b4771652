"""Tests of the oracle against files made by hand.

The oracle judges the package in other tests, so nothing of the package takes part here.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import oracle
from support.command import ran
from support.golden import (
    CASES,
    INVALID,
    ROOT,
    Facts,
    Result,
    assemble,
    expand,
    file_sha256,
    header_bytes,
    patch,
    sha256,
    top,
    usual_header,
)

pytestmark = pytest.mark.sample(3)

KiB = 1024
CLUSTER = 4 * KiB

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))


# Pictures: "AB." is a cluster of A, one of B, one of zeros


def paint(picture: str) -> bytes:
    return b"".join((b"\0" if mark == "." else mark.encode()) * CLUSTER for mark in picture)


def layer_facts(name: str, backing: str | None, backing_format: str = "raw") -> Facts:
    return {
        "image": f"{name}.raw",
        "backing": backing,
        "backing_format": backing_format if backing else None,
        "cluster_size": CLUSTER,
    }


def overlay(
    folder: Path, name: str, image: bytes, bits: bytes, backing: str | None, fmt: str = "raw"
) -> str:
    """Write NAME.add-cow and NAME.raw; ALL_ALLOCATED is clear, whatever the backing."""
    header = {**usual_header(layer_facts(name, backing, fmt)), "compatible_features": 0}
    (folder / f"{name}.raw").write_bytes(image)
    path = folder / f"{name}.add-cow"
    path.write_bytes(header_bytes(header) + bits)
    return str(path)


def run_oracle(*words: str | Path) -> Result:
    command = [sys.executable, ROOT / "tools" / "oracle.py", *words]
    done = ran(command)
    return Result(done.returncode, done.stdout, done.stderr)


# The reference's images


@each_case
def test_facts_alone_make_the_files_of_the_reference(case: Facts, tmp_path: Path) -> None:
    path = assemble(case, tmp_path / "case")
    made = {name: file_sha256(tmp_path / "case" / name) for name in os.listdir(tmp_path / "case")}
    assert made == {
        name: fact["sha256"] for name, fact in case["files"].items() if name != "source.raw"
    }
    assert oracle.digest(str(path)) == case["expected_sha256"]
    assert oracle.allocated(str(path)) == expand(top(case)["allocated"])


@each_case
def test_oracle_reads_any_range_as_part_of_the_whole(case: Facts, tmp_path: Path) -> None:
    path = str(assemble(case, tmp_path / "case"))
    whole = oracle.guest_bytes(path)
    size, cluster = len(whole), case["cluster_size"]
    marks = {0, 1, 511, cluster - 1, cluster + 1, size // 2 + 3, size - 1, size}
    for start in marks:
        stop = min(size, start + cluster + 2)
        assert oracle.guest_bytes(path, start, stop) == whole[start:stop]
    assert oracle.guest_bytes(path, size - 100) == whole[-100:]


# Chains and odd lengths


def test_oracle_reads_a_chain(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(paint("abcdef"))
    overlay(tmp_path, "mid", paint("xBxDx"), b"\x0a", "root")
    path = overlay(tmp_path, "top", paint("Uyyyyyy"), b"\x01", "mid.add-cow", "add-cow")
    # The middle layer ends after five clusters: its backing's sixth stays hidden.
    assert oracle.guest_bytes(path) == paint("UBcDe..")


def test_oracle_reads_zeros_without_a_backing(tmp_path: Path) -> None:
    path = overlay(tmp_path, "top", paint("xAx"), b"\x02", None)
    assert oracle.guest_bytes(path) == paint(".A.")
    assert oracle.allocated(path) == [1]


def test_oracle_reads_zeros_after_a_shorter_backing(tmp_path: Path) -> None:
    # All bytes of the backing count, also the 7 behind its last whole sector.
    (tmp_path / "base").write_bytes(b"b" * (CLUSTER + 512 + 7))
    path = overlay(tmp_path, "top", paint("xxA"), b"\x04", "base")
    seen = b"b" * (CLUSTER + 512 + 7) + bytes(CLUSTER - 512 - 7) + paint("A")
    assert oracle.guest_bytes(path) == seen


def test_oracle_rounds_a_raw_disk_up_to_a_sector(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * 300)
    path = overlay(tmp_path, "top", bytes(512), b"\x00", "base")
    assert oracle.guest_bytes(path) == b"b" * 300 + bytes(212)


def test_oracle_reads_a_partial_last_cluster(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(paint("bbb"))
    path = overlay(tmp_path, "top", paint("xA")[: CLUSTER + 1024 + 100], b"\x02", "base")
    assert oracle.virtual_size(path) == CLUSTER + 1024
    assert oracle.guest_bytes(path) == paint("bA")[: CLUSTER + 1024]


def test_oracle_reads_an_image_shorter_than_a_sector_as_empty(tmp_path: Path) -> None:
    path = overlay(tmp_path, "top", b"x" * 511, b"\xff", None)
    assert oracle.virtual_size(path) == 0
    assert oracle.guest_bytes(path) == b""
    assert oracle.allocated(path) == []


def test_oracle_ignores_bitmap_and_backing_with_all_allocated(tmp_path: Path) -> None:
    path = overlay(tmp_path, "top", paint("ABC"), b"\0", "no-such-backing", "qcow2")
    patch(Path(path), [(32, "01")])
    assert oracle.guest_bytes(path) == paint("ABC")
    assert oracle.allocated(path) == [0, 1, 2]


def test_oracle_reads_missing_bits_as_zero(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(paint("bbbbbbbbbb"))
    path = overlay(tmp_path, "top", paint("AxxxxxxxAx"), b"\x01", "base")
    assert oracle.guest_bytes(path) == paint("Abbbbbbbbb")
    assert oracle.allocated(path) == [0]


def test_oracle_ignores_bits_past_the_last_cluster(tmp_path: Path) -> None:
    path = overlay(tmp_path, "top", paint("AB"), b"\xff\xff", None)
    assert oracle.allocated(path) == [0, 1]
    assert oracle.guest_bytes(path) == paint("AB")


def test_oracle_resolves_names_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base").write_bytes(paint("bb"))
    path = overlay(tmp_path / "deep", "top", paint("xA"), b"\x02", "../base")
    assert oracle.guest_bytes(path) == paint("bA")
    path = overlay(tmp_path / "deep", "other", paint("xB"), b"\x02", str(tmp_path / "base"))
    assert oracle.guest_bytes(path) == paint("bB")


# Refusals


@pytest.mark.parametrize("invalid", INVALID["cases"], ids=lambda case: str(case["file"]))
def test_oracle_refuses_what_the_format_forbids(invalid: Facts, tmp_path: Path) -> None:
    case = {"base": INVALID["base"], "layers": [INVALID["layer"]], "files": INVALID["files"]}
    path = assemble({**case, "header": usual_header(INVALID["layer"])}, tmp_path / "case")
    patch(path, invalid["pwrite"])
    if invalid["truncate"] is not None:
        os.truncate(path, invalid["truncate"])
    assert file_sha256(path) == invalid["sha256"]
    if invalid["exit"]["io"] == 0:
        assert oracle.digest(str(path)) == INVALID["files"]["base.img"]["sha256"]
    else:
        with pytest.raises((oracle.OracleError, FileNotFoundError)):
            oracle.guest_bytes(str(path))


def test_oracle_refuses_a_cycle(tmp_path: Path) -> None:
    overlay(tmp_path, "one", paint("."), b"\0", "two.add-cow", "add-cow")
    path = overlay(tmp_path, "two", paint("."), b"\0", "one.add-cow", "add-cow")
    with pytest.raises(oracle.OracleError, match="used twice"):
        oracle.guest_bytes(path)


@pytest.mark.parametrize("name", ["nbd:localhost:10809", "json:{}", "file:base"])
def test_oracle_refuses_a_name_with_a_protocol(tmp_path: Path, name: str) -> None:
    path = overlay(tmp_path, "top", paint("."), b"\0", name)
    with pytest.raises(oracle.OracleError, match="not a path"):
        oracle.guest_bytes(path)


@pytest.mark.parametrize("cut", [(0, CLUSTER * 2 + 1), (CLUSTER, 0), (-1, 5)])
def test_oracle_refuses_a_range_outside_the_disk(tmp_path: Path, cut: tuple[int, int]) -> None:
    path = overlay(tmp_path, "top", paint("AB"), b"\3", None)
    with pytest.raises(oracle.OracleError, match="not within"):
        oracle.guest_bytes(path, *cut)


# The command line


def write_sample(folder: Path) -> str:
    (folder / "base").write_bytes(paint("bb"))
    return overlay(folder, "top", paint("xA"), b"\x02", "base")


def test_oracle_commands_print_one_answer(tmp_path: Path) -> None:
    path = write_sample(tmp_path)
    assert run_oracle("size", path).out == f"{2 * CLUSTER}\n"
    assert run_oracle("digest", path).out == sha256(paint("bA")) + "\n"
    assert json.loads(run_oracle("allocated", path).out) == [1]
    assert run_oracle("dump", path).out == paint("bA").decode()


def broken_magic(path: Path) -> None:
    patch(path, [(0, "42")])


def missing_backing(path: Path) -> None:
    (path.parent / "base").unlink()


@pytest.mark.parametrize("harm", [broken_magic, missing_backing])
def test_oracle_failure_is_one_line_and_exit_1(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = write_sample(tmp_path)
    harm(Path(path))
    result = run_oracle("digest", path)
    assert (result.exit, result.out) == (1, "")
    assert result.err.startswith("oracle: ")
    assert result.err.count("\n") == 1
