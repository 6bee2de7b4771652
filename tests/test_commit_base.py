"""Tests of `addcow commit -b`: a layer further down gets what the guest sees.

No view of a layer above it changes, also after an interruption, and the same command finishes the
job. test_faults walks through every fault point, and test_powercut cuts the power.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import addcow_mp
import oracle
from addcow_mp.jobs.commit_base import commit_into
from addcow_mp.jobs.options import RunOptions
from support import command, model
from support.availability import missing
from support.call_trace import Call, Trace, judge
from support.chains import can_commit_into_some, wild_chain
from support.command import (
    ALL_ALLOCATED,
    KiB,
    addcow,
    bits,
    overlay_bytes,
    patch,
    refused,
    same_content,
    snapshot,
    stored_bytes,
    succeed,
    tool,
)
from support.fault_rules import Rules, rule, rules_for
from support.file_systems import fill, free
from support.processes import running
from support.promises import CommitInto, bases_of
from support.properties import tried
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

#: Small clusters, since the tests read bitmaps byte by byte.
CLUSTER = 4 * KiB
BIG = command.CLUSTER
draw = partial(command.draw, cluster=CLUSTER)
draw_raw = partial(command.draw_raw, cluster=CLUSTER)
look = partial(command.look, cluster=CLUSTER)
guest_picture = partial(command.guest_picture, cluster=CLUSTER)

BASE, LOW, MID, TOP = "base.img", "low.add-cow", "mid.add-cow", "top.add-cow"
INTO = ("commit", "-b", BASE)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Three overlays over a raw file; the upper ones hide some clusters of the lower ones."""
    (tmp_path / "here").mkdir()
    return laid(tmp_path / "here")


PICTURES = ("-l-M----", "--N---n-", "T--t-U--")


def laid(
    here: Path, low: str = PICTURES[0], mid: str = PICTURES[1], top: str = PICTURES[2]
) -> Path:
    draw_raw(here / BASE, "ABCDEFGH")
    draw(here / LOW, low)
    draw(here / MID, mid, LOW, backing_format="add-cow")
    draw(here / TOP, top, MID, backing_format="add-cow")
    return here


def views(here: Path) -> list[str]:
    """What guests see of the three overlays."""
    return [guest_picture(here / name) for name in (LOW, MID, TOP)]


VIEWS = ["ABCMEFGH", "ABNMEFGH", "TBNMEUGH"]
COMMITTED = VIEWS[-1]


# ---- what it does ----


def test_base_shows_what_the_guest_sees_and_every_other_view_stays(here: Path) -> None:
    before = snapshot(here)
    told = succeed(*INTO, "--output", "json", TOP, cwd=here).json
    assert (told["operation"], told["bytes-moved"]) == ("commit", 7 * CLUSTER)
    assert look(here / BASE) == COMMITTED
    assert views(here) == VIEWS
    assert bits(here / LOW) == "1.11.1.."  # what the base has changed under it, and no more
    after = snapshot(here)
    assert {name for name in after if after[name] != before[name]} == {BASE, LOW, "low.raw"}
    for name in (LOW, MID, TOP):
        assert addcow("check", name, cwd=here).status in (0, 3)
    assert succeed(*INTO, TOP, cwd=here).stdout == "Image committed.\n"
    assert (look(here / BASE), views(here), bits(here / LOW)) == (COMMITTED, VIEWS, "1.11.1..")


@pytest.mark.long
def test_backing_file_itself_is_what_commit_d_changes(here: Path) -> None:
    before = snapshot(here)
    succeed("commit", "-b", MID, TOP, cwd=here)
    assert views(here) == [VIEWS[0], COMMITTED, COMMITTED]
    after = snapshot(here)
    assert {name for name in after if after[name] != before[name]} == {MID, "mid.raw"}


def test_add_cow_base_gets_bits_and_its_own_base_stays(here: Path) -> None:
    succeed("commit", "-b", LOW, TOP, cwd=here)
    assert look(here / BASE) == "ABCDEFGH"
    assert views(here) == [COMMITTED, *VIEWS[1:]]
    assert bits(here / LOW) == "1.11.1.."
    assert bits(here / MID) == "1.1..1.."


def test_interface_for_python_commits_into_a_base(here: Path) -> None:
    report = addcow_mp.commit(here / TOP, base=str(here / BASE).encode(), jobs=0)
    assert report.totals.bytes_moved == 7 * CLUSTER
    assert (look(here / BASE), views(here)) == (COMMITTED, VIEWS)


#: A seed, and the number of worker processes.
EXAMPLES = st.tuples(st.integers(0, 2**32), st.sampled_from([*[0] * 18, 1, 4]))


def random_chain(seed: int) -> tuple[model.Overlay, random.Random]:
    rng = random.Random(seed)
    while True:
        chain = wild_chain(rng, 128 * KiB, (2, 5))
        if can_commit_into_some(chain):
            return chain, rng


@given(EXAMPLES)
@tried(100)
def test_random_chains_keep_every_view_but_that_of_the_base(
    warm: Warm, example: tuple[int, int]
) -> None:
    """Sizes, odd tails, cluster sizes, garbage and stray bits differ from layer to layer."""
    seed, jobs = example
    chain, rng = random_chain(seed)
    with tempfile.TemporaryDirectory() as place:
        files = model.build(chain, place)
        promise = CommitInto(files, rng.choice(bases_of(files)))
        words = promise.command(jobs)
        if rng.random() < 0.2:
            words.insert(1, "--verify")
        for _ in range(2):
            ended = warm.run(*words, cwd=Path(place))
            assert (ended.status, promise.broken(done=True)) == (0, []), ended
        assert model.read_view(files.path) == bytes(model.view(chain))


# ---- against qemu-img ----

OVERLAYS = ("low", "mid", "top")


def as_qcow2(here: Path, base: str, overlays: list[str]) -> None:
    """Make the same chain in qcow2, over a raw file."""
    shutil.copy(here / base, here / "base-q.img")
    below, kind = "base-q.img", "raw"
    for name, picture in zip(OVERLAYS, overlays, strict=True):
        size = str(len(picture) * CLUSTER)
        words = ("-o", f"cluster_size={CLUSTER}", "-b", below, "-F", kind, f"{name}.qcow2", size)
        tool("qemu-img", "create", "-q", "-f", "qcow2", *words, cwd=here)
        for at, mark in enumerate(picture):
            if mark.isupper() or mark == "0":
                pattern = f"0x{ord(mark):02x}" if mark != "0" else "0"
                write = f"write -P {pattern} {at * CLUSTER} {CLUSTER}"
                tool("qemu-io", "-c", write, f"{name}.qcow2", cwd=here)
        below, kind = f"{name}.qcow2", "qcow2"


@pytest.mark.parametrize(
    "overlays",
    [
        [*PICTURES],
        ["-L------", "--M-", "T------U--0-"],  # a short layer in the middle, a long one at the top
        ["LL--------0-", "-M0-----", "T-T-"],  # layers above are shorter than the base
    ],
    ids=["equal", "short middle", "short top"],
)
def test_base_is_what_qemu_img_makes_of_it(here: Path, overlays: list[str]) -> None:
    laid(here, *overlays)
    as_qcow2(here, BASE, overlays)
    before = views(here)
    succeed(*INTO, TOP, cwd=here)
    tool("qemu-img", "commit", "-q", "-b", "base-q.img", "top.qcow2", cwd=here)
    assert views(here) == before
    same_content(BASE, "base-q.img", cwd=here)
    size = (here / "top.raw").stat().st_size
    assert (here / BASE).read_bytes()[:size] == oracle.guest_bytes(str(here / TOP))


# ---- sizes, clusters, flags ----


def test_shorter_raw_base_grows(here: Path) -> None:
    with (here / BASE).open("r+b") as file:
        file.truncate(3 * CLUSTER + 100)  # an odd end: all of its bytes count
    before = views(here)
    succeed(*INTO, TOP, cwd=here)
    assert views(here) == before
    content = (here / BASE).read_bytes()
    assert content == oracle.guest_bytes(str(here / TOP))
    assert content[3 * CLUSTER :][: CLUSTER // 2] == b"M" * (CLUSTER // 2)


@pytest.mark.long
def test_longer_raw_base_keeps_its_end(here: Path) -> None:
    with (here / BASE).open("ab") as file:
        file.write(b"tail of the base")
    succeed(*INTO, TOP, cwd=here)
    content = (here / BASE).read_bytes()
    assert content[8 * CLUSTER :] == b"tail of the base"
    assert (look(here / BASE)[:8], views(here)) == (COMMITTED, VIEWS)


@pytest.mark.parametrize("mid", ["--N", "---"], ids=["allocated", "falls through"])
def test_zeros_behind_a_short_middle_layer_reach_the_base(here: Path, mid: str) -> None:
    """The guest reads zeros behind the end of the middle layer, where the base has data.

    It ends within a cluster: the bytes before that end may come from the base.
    """
    laid(here, mid=mid)
    os.truncate(here / "mid.raw", 2 * CLUSTER + 512)
    before = [oracle.guest_bytes(str(here / name)) for name in (LOW, MID, TOP)]
    succeed(*INTO, TOP, cwd=here)
    assert [oracle.guest_bytes(str(here / name)) for name in (LOW, MID, TOP)] == before
    assert (here / BASE).read_bytes() == before[-1]
    assert before[-1][2 * CLUSTER + 512 : 5 * CLUSTER] == bytes(3 * CLUSTER - 512)


def test_clusters_of_several_sizes_are_copied_up_as_a_whole(tmp_path: Path) -> None:
    command.draw_raw(tmp_path / BASE, "AB-D")
    command.draw(tmp_path / LOW, "--lL")
    cow = overlay_bytes(
        image="top.raw",
        size=4 * BIG,
        backing=LOW,
        backing_format="add-cow",
        cluster=CLUSTER,
        local=[1, 40],
    )
    (tmp_path / TOP).write_bytes(cow)
    draw_raw(tmp_path / "top.raw", "t" * 64, cluster=CLUSTER)
    before = oracle.guest_bytes(str(tmp_path / TOP))
    assert command.guest_picture(tmp_path / LOW) == "AB0L"
    succeed(*INTO, TOP, cwd=tmp_path)
    assert bits(tmp_path / LOW) == "1.11"
    assert command.guest_picture(tmp_path / LOW) == "AB0L"
    assert oracle.guest_bytes(str(tmp_path / TOP)) == before
    assert (tmp_path / BASE).read_bytes() == before


def with_flag(here: Path, name: str, picture: str) -> None:
    backing = {LOW: BASE, MID: LOW, TOP: MID}[name]
    kind = "raw" if backing == BASE else "add-cow"
    draw(here / name, picture, backing, backing_format=kind, compatible=ALL_ALLOCATED)


@pytest.mark.parametrize("name", [LOW, MID, TOP])
def test_layer_with_all_allocated_covers_everything(here: Path, name: str) -> None:
    """Its bits are not consulted, and the layers below it are not visible through it."""
    with_flag(here, name, "x-y-X-Y-")
    before = views(here)
    succeed(*INTO, TOP, cwd=here)
    assert views(here) == before
    assert look(here / BASE) == before[-1]
    # The layer directly above the base keeps its view by its clusters, or by the flag.
    assert bits(here / LOW) == ("....1.1." if name == LOW else "11111111")


@pytest.mark.long
def test_base_with_all_allocated_does_not_need_its_backing_file(here: Path) -> None:
    with_flag(here, LOW, "x-y-X-Y-")
    (here / BASE).unlink()
    old = views(here)
    succeed("commit", "-b", LOW, TOP, cwd=here)
    assert views(here) == [old[2], *old[1:]]
    assert bits(here / LOW) == "....1.1."


@pytest.mark.long
def test_nothing_to_commit_changes_nothing(here: Path) -> None:
    laid(here, low="-l------", mid="------n-", top="---t----")
    succeed("manifest", "create", TOP, cwd=here)
    before = snapshot(here)
    succeed(*INTO, TOP, cwd=here)
    assert snapshot(here) == before
    assert "nothing to do" in succeed(*INTO, "--dry-run", TOP, cwd=here).stdout


# ---- how the base is named ----


def test_base_is_named_by_any_path_or_as_the_chain_names_it(here: Path, tmp_path: Path) -> None:
    (here / "link.img").symlink_to(BASE)
    (tmp_path / "elsewhere").mkdir()
    for cwd, base, top in (
        (here, BASE, TOP),
        (here, "./link.img", TOP),
        (tmp_path, f"here/{BASE}", f"here/{TOP}"),
        (tmp_path, str(here / BASE), f"here/{TOP}"),
        (tmp_path / "elsewhere", f"../here/{BASE}", f"../here/{TOP}"),
        (tmp_path / "elsewhere", BASE, f"../here/{TOP}"),  # as the chain stores it
    ):
        laid(here)
        succeed("commit", "-b", base, top, cwd=cwd)
        assert (look(here / BASE), views(here)) == (COMMITTED, VIEWS)


@pytest.mark.long
def test_name_in_the_chain_counts_beside_a_file_that_is_not_in_it(
    here: Path, tmp_path: Path
) -> None:
    draw_raw(tmp_path / BASE, "zzz")
    succeed("commit", "-b", BASE, f"here/{TOP}", cwd=tmp_path)
    assert (look(here / BASE), look(tmp_path / BASE)) == (COMMITTED, "zzz")


@pytest.mark.long
def test_name_of_two_layers_is_refused(here: Path, tmp_path: Path) -> None:
    """The name leads to one layer in the working directory, and names another one in the chain."""
    (here / "deep").mkdir()
    draw_raw(here / "deep" / LOW, "ABCDEFGH")
    draw(here / LOW, "-l-M----", f"deep/{LOW}")
    before = snapshot(here)
    line = refused("commit", "-b", LOW, f"../{TOP}", cwd=here / "deep")
    assert "several layers" in line
    assert snapshot(here) == before
    succeed("commit", "-b", f"./{LOW}", f"../{TOP}", cwd=here / "deep")
    assert (look(here / "deep" / LOW), views(here)) == (COMMITTED, VIEWS)


# ---- refusals ----


def sibling(here: Path) -> None:
    draw(here / "other.add-cow", "--------")


def sibling_of_an_add_cow_base(here: Path) -> None:
    draw(here / "other.add-cow", "--------", LOW, backing_format="add-cow")


def user_of_the_changed_image(here: Path) -> None:
    draw(here / "other.add-cow", "--------", "low.raw")


def image_of_two(here: Path) -> None:
    shutil.copy(here / LOW, here / "twin.add-cow")


def lend(here: Path, name: str) -> None:
    if shutil.which("qemu-img") is None:
        missing("qemu-img is not installed")
    succeed("qemu", "export", name, cwd=here)


def lent_above(here: Path) -> None:
    draw(here / "up.add-cow", "--------", MID, backing_format="add-cow")
    lend(here, "up.add-cow")


def lent_sibling(here: Path) -> None:
    sibling(here)
    lend(here, "other.add-cow")


def short_bitmap(here: Path) -> None:
    os.truncate(here / MID, CLUSTER)  # the end of its header


def disguised(here: Path) -> None:
    (here / BASE).write_bytes((here / MID).read_bytes().ljust(8 * CLUSTER, b"\0"))


def nothing(_: Path) -> None: ...


#: What prepares the files, the base, words of the refusal, and whether --force overrides it.
REFUSALS: dict[str, tuple[Callable[[Path], object], str, str, bool]] = {
    "not in the chain": (
        lambda here: draw_raw(here / "x.img", "A"),
        "x.img",
        "it is no layer below 'top.add-cow'; 'addcow info --backing-chain' lists them",
        False,
    ),
    "missing": (nothing, "gone.img", "gone.img: it is no layer below", False),
    "itself": (nothing, f"./{TOP}", "it is the overlay 'top.add-cow' itself", False),
    "its image": (nothing, "top.raw", "it is no layer below", False),
    "sibling": (sibling, BASE, "base.img: other overlays depend on it: ", True),
    "sibling of add-cow": (sibling_of_an_add_cow_base, LOW, "low.add-cow: other overlays", True),
    "image as a base": (user_of_the_changed_image, BASE, "low.raw: other overlays depend", True),
    "image of two": (image_of_two, BASE, "twin.add-cow", False),
    "lent": (lambda here: lend(here, TOP), BASE, "'addcow qemu import' takes it back", False),
    "lent above": (lent_above, BASE, "'addcow qemu import' takes it back", False),
    "lent sibling": (lent_sibling, BASE, "other overlays depend on it", False),
    "short bitmap": (short_bitmap, BASE, "mid.add-cow: the file ends inside its bitmap", False),
    "hard link": (lambda here: os.link(here / "low.raw", here / "x"), BASE, "2 hard links", True),
    "disguised": (disguised, BASE, "it is declared raw, but is an add-cow file", True),
    "shorter base": (
        lambda here: os.truncate(here / "low.raw", 7 * CLUSTER),
        LOW,
        "low.add-cow: it is shorter (28672 bytes) than the overlay (32768 bytes); resize it",
        False,
    ),
    "layer gone": (lambda here: (here / "mid.raw").unlink(), BASE, "mid.raw", False),
    "base gone": (lambda here: (here / BASE).unlink(), BASE, "base.img", False),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", REFUSALS)
def test_commit_b_is_refused_and_changes_nothing(here: Path, name: str) -> None:
    arrange, base, words, yields = REFUSALS[name]
    arrange(here)
    before = snapshot(here)
    for options in ((), ("--dry-run",), *([] if yields else [("--force",)])):
        assert words in refused("commit", "-b", base, *options, TOP, cwd=here)
        assert snapshot(here) == before
    if yields:
        succeed("commit", "-b", base, "--force", TOP, cwd=here)


def test_other_overlays_above_the_base_may_stand_and_keep_what_they_show(here: Path) -> None:
    """They read the base through the layer directly above it."""
    for name, backing in (("one", LOW), ("two", MID)):
        draw(here / f"{name}.add-cow", "-------W", backing, backing_format="add-cow")
    others = [here / "one.add-cow", here / "two.add-cow"]
    before = [guest_picture(path) for path in others]
    succeed(*INTO, TOP, cwd=here)
    assert [guest_picture(path) for path in others] == before
    assert (look(here / BASE), views(here)) == (COMMITTED, VIEWS)


@pytest.mark.long
@pytest.mark.parametrize("base", ["", "-"])
def test_empty_name_of_a_base_is_an_invalid_command_line(here: Path, base: str) -> None:
    refused("commit", "-b", base, TOP, cwd=here, status=64)


# ---- options ----


def test_dry_run_says_what_it_moves_and_changes_nothing(here: Path) -> None:
    before = snapshot(here)
    told = succeed(*INTO, "--dry-run", TOP, cwd=here).stdout
    assert told == "top.add-cow: commit; copies 28 KiB, takes 12 KiB\n"
    told = succeed(*INTO, "--dry-run", "--output", "json", TOP, cwd=here).json
    assert (told["state"], told["bytes"], told["space-needed"]) == (
        "ready",
        7 * CLUSTER,
        3 * CLUSTER,
    )
    assert snapshot(here) == before


@pytest.mark.long
def test_verify_reads_back_the_base_and_the_layer_above_it(here: Path) -> None:
    told = succeed(*INTO, "--verify", "--output", "json", TOP, cwd=here).json
    succeed("manifest", "create", "-f", "raw", BASE, cwd=here)
    assert re.fullmatch("[0-9a-f]{64}", told["guest-digest"])
    assert (look(here / BASE), views(here)) == (COMMITTED, VIEWS)


@pytest.mark.long
@pytest.mark.parametrize("name", [BASE, "low.raw"])
def test_verify_finds_a_byte_that_the_disk_lost(here: Path, name: str) -> None:
    rules = rules_for(here, rule("read_back", "stop", once="on"))
    with running(*INTO, "--verify", TOP, cwd=here, rules=rules) as command:
        command.stopped()
        patch(here / name, 5 * CLUSTER + 17, b"!")
        command.signal(signal.SIGCONT)
        ended = command.end()
    assert ended.status == 1, ended
    assert f"{name}: what was read back differs" in ended.stderr


@pytest.mark.long
@pytest.mark.parametrize("options", [("-t", "none"), ("-t", "unsafe"), ("-S", "4k"), ("-r", "9M")])
def test_options_of_copying_do_not_change_the_result(here: Path, options: tuple[str, ...]) -> None:
    succeed(*INTO, *options, "-q", TOP, cwd=here)
    assert (look(here / BASE), views(here)) == (COMMITTED, VIEWS)


@pytest.mark.long
def test_manifests_of_changed_layers_are_removed_and_others_stay_true(here: Path) -> None:
    succeed("manifest", "create", TOP, cwd=here)
    told = succeed(*INTO, "--output", "json", TOP, cwd=here).json
    assert {Path(one).name for one in told["manifests-removed"]} == {
        f"{BASE}.manifest",
        f"{LOW}.manifest",
    }
    left = {path.name for path in here.glob("*.manifest")}
    assert left == {f"{MID}.manifest", f"{TOP}.manifest"}
    succeed("manifest", "create", TOP, cwd=here)
    succeed("verify", TOP, cwd=here)


@pytest.mark.long
def test_copied_up_data_is_readable_by_no_more_users(here: Path) -> None:
    os.chmod(here / BASE, 0o600)
    os.chmod(here / "low.raw", 0o644)
    result = succeed(*INTO, TOP, cwd=here)
    assert (here / "low.raw").stat().st_mode & 0o777 == 0o600
    assert "its mode is now 0600" in result.stderr


# ---- space ----


def spread(here: Path, *pictures: str) -> None:
    """The same chain with clusters that are large compared with the metadata of a file system."""
    command.draw_raw(here / BASE, "ABCDEFGH")
    below, kind = BASE, "raw"
    for name, picture in zip((LOW, MID, TOP), pictures or PICTURES, strict=True):
        command.draw(here / name, picture, below, backing_format=kind)
        below, kind = name, "add-cow"


def big_views(here: Path) -> list[str]:
    """What guests see of the three overlays."""
    return [command.guest_picture(here / name) for name in (LOW, MID, TOP)]


@pytest.mark.parametrize("leave", [2, 8])
def test_space_of_what_is_copied_up_is_counted_before(disk: Path, leave: int) -> None:
    spread(disk)
    filler = fill(disk, leave=leave * BIG + 32 * KiB)
    before = snapshot(disk)
    if leave < 3:
        line = refused(*INTO, TOP, cwd=disk)
        assert f"{3 * BIG} bytes of free space are needed and {free(disk)} are free" in line
        assert snapshot(disk) == before
        filler.unlink()
    succeed(*INTO, TOP, cwd=disk)
    assert (command.look(disk / BASE), big_views(disk)) == (COMMITTED, VIEWS)


@pytest.mark.long
def test_space_of_both_layers_is_counted_together(disk: Path) -> None:
    """Both layers need equal space. There is room for either of them, but not for both."""
    spread(disk, "-" * 8, "-" * 8, "TT------UUUU")
    fill(disk, leave=5 * BIG)
    before = snapshot(disk)
    line = refused(*INTO, TOP, cwd=disk)
    assert f"{6 * BIG} bytes of free space are needed" in line
    assert snapshot(disk) == before


@pytest.mark.long
@pytest.mark.parametrize("after", [0, 1, 2])
def test_disk_that_fills_up_changes_no_view(
    warm: Warm, tmp_path: Path, disk: Path, after: int
) -> None:
    spread(disk)
    command.draw_raw(disk / BASE, "ABC-E-GH")
    before = big_views(disk)
    rules = Rules.write(tmp_path / "rules", rule("backing_write", "stop", once="on", after=after))
    run = warm.start(*INTO, "--jobs", "0", TOP, cwd=disk, rules=rules)
    assert run.wait() is None, "it did not stop"
    filler = fill(disk)
    os.kill(run.pid, signal.SIGCONT)
    ended = run.end()
    assert big_views(disk) == before
    assert ended.status == 0 or "No space left on device" in ended.stderr
    filler.unlink()
    succeed(*INTO, TOP, cwd=disk)
    assert (command.look(disk / BASE), big_views(disk)) == (before[-1], before)


# ---- order ----


UP = ["data low.raw", "sync low.raw", "bits low.add-cow", "sync low.add-cow"]


def test_base_changes_only_after_what_it_held_is_durable_above_it(here: Path, trace: Trace) -> None:
    for name in (BASE, LOW):
        (here / f"{name}.manifest").write_bytes(b"ADDCOW")
    commit_into(str(here / TOP), str(here / BASE), options=RunOptions(0))
    gone = [f"remove {BASE}.manifest", "sync here/", f"remove {LOW}.manifest", "sync here/"]
    assert trace.story() == [*gone, *UP, "data base.img", "sync base.img"]
    assert judge(trace.calls, here / LOW, {1: "low.raw"}) == 3


def test_bits_of_an_add_cow_base_come_last(here: Path, trace: Trace) -> None:
    commit_into(str(here / TOP), str(here / LOW), options=RunOptions(0))
    up = [line.replace("low", "mid") for line in UP]
    assert [line for line in trace.story() if not line.startswith("free")] == [*up, *UP]
    assert judge(trace.calls, here / LOW, {1: "low.raw"}) == 3
    assert judge(trace.calls, here / MID, {1: "mid.raw"}) == 2


def test_bits_that_an_interrupted_run_left_in_memory_are_made_durable(
    here: Path, trace: Trace
) -> None:
    """The bits are in the file, so nothing is copied up. The bits must be durable before BASE."""
    laid(here, low="ALCM-F--")
    commit_into(str(here / TOP), str(here / BASE), options=RunOptions(0))
    words = [(call.word, call.file) for call in trace.calls]
    first = words.index(("data", BASE))
    for word in ("sync", "synced"):
        assert (word, "low.raw") in words[:first]
        assert (word, LOW) in words[:first]
    assert words.index(("synced", "low.raw")) < words.index(("sync", LOW))


@pytest.mark.parametrize("end", [8 * CLUSTER, 6 * CLUSTER + 512], ids=["whole", "cut"])
def test_only_what_is_covered_is_written_into_the_base(here: Path, trace: Trace, end: int) -> None:
    """Bytes that fall through are never written to the file from which they are read."""
    laid(here, low="---M----", mid="--------", top="--------")
    os.truncate(here / "mid.raw", end)
    draw(here / TOP, "-", MID, backing_format="add-cow", cluster=8 * CLUSTER)
    commit_into(str(here / TOP), str(here / BASE), options=RunOptions(0))
    written = [
        (call.start, call.stop)
        for call in trace.calls
        if call.file == BASE and call.word in ("data", "free")
    ]
    # Where the middle layer ends, the layer above the base has an allocated cluster by then.
    behind = [] if end == 8 * CLUSTER else [(6 * CLUSTER, end), (end, 8 * CLUSTER)]
    assert written == [(3 * CLUSTER, 4 * CLUSTER), *behind]


@pytest.mark.long
@pytest.mark.parametrize("name", ["low.raw", LOW])
def test_failed_sync_above_leaves_the_base_alone(here: Path, trace: Trace, name: str) -> None:
    before = (here / BASE).read_bytes()
    trace.to_be(name)
    with pytest.raises(addcow_mp.SyncError):
        commit_into(str(here / TOP), str(here / BASE), options=RunOptions(0))
    assert trace.failed == [name]
    assert (here / BASE).read_bytes() == before
    assert not any(call.file == BASE for call in trace.calls if isinstance(call, Call))


# ---- killed and stopped ----


def seen(here: Path) -> list[bytes]:
    """What guests see of the three overlays, in bytes."""
    return [oracle.guest_bytes(str(here / name)) for name in (LOW, MID, TOP)]


def large(here: Path) -> list[bytes]:
    """Make the chain 30 times as long, so that each of several processes has several steps."""
    laid(here, *(30 * part for part in PICTURES))
    draw_raw(here / BASE, 30 * "ABCDEFGH")
    return seen(here)


KILLED_AT = [
    ("backing_write", 3),  # in the layer above the base
    ("backing_write", 110),  # in the base
    ("data_sync", 0),
    ("bitmap_update", 0),
    ("bitmap_sync", 0),
    ("data_sync", 1),
    ("bitmap_sync", 1),
    ("data_sync", 2),
]


@pytest.mark.long
@pytest.mark.parametrize(("event", "after"), KILLED_AT)
def test_killed_parent_leaves_every_view_and_the_same_command_finishes(
    here: Path, event: str, after: int
) -> None:
    before = large(here)
    rules = rules_for(here, rule(event, "stop", once="on", after=after))
    with running(*INTO, "--jobs", "2", TOP, cwd=here, rules=rules) as command:
        command.stopped()
        assert seen(here) == before
        command.signal(signal.SIGKILL)
        command.end()
        for pid in command.workers():
            command.signal(signal.SIGCONT, pid)
        command.all_gone()
    assert seen(here) == before
    succeed(*INTO, "--jobs", "2", TOP, cwd=here)
    assert ((here / BASE).read_bytes(), seen(here)) == (before[-1], before)


@pytest.mark.long
@pytest.mark.parametrize("after", [3, 60])
def test_killed_worker_is_replaced(here: Path, after: int) -> None:
    before = large(here)
    rules = rules_for(here, rule("backing_write", "stop", once="on", after=after))
    with running(*INTO, "--jobs", "1", TOP, cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        command.signal(signal.SIGKILL, worker)
        ended = command.end()
        command.all_gone()
    assert (ended.status, ended.stderr) == (0, "")
    assert ((here / BASE).read_bytes(), seen(here)) == (before[-1], before)
    assert bits(here / LOW) == 30 * "1.11.1.."


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (3, "stopped; finished work is kept, the same command continues from there"),
        (110, "stopped; nothing was lost, the same command starts again"),
    ],
    ids=["up", "down"],
)
def test_signal_stops_the_job_and_the_same_command_finishes(
    here: Path, asking: signal.Signals, after: int, told: str
) -> None:
    before = large(here)
    rules = rules_for(here, rule("backing_write", "stop", once="on", after=after))
    with running(*INTO, "--jobs", "1", TOP, cwd=here, rules=rules) as command:
        (worker,) = command.stopped()
        command.signal(asking)
        command.until(command.is_round(), "the signal to be met")
        command.signal(signal.SIGCONT, worker)
        ended = command.end()
        command.all_gone()
    assert ended.status == 128 + asking, ended
    assert told in ended.stderr
    assert seen(here) == before
    succeed(*INTO, TOP, cwd=here)
    assert ((here / BASE).read_bytes(), seen(here)) == (before[-1], before)


@pytest.mark.long
def test_stopped_job_takes_no_space_twice(here: Path) -> None:
    before = large(here)
    rules = rules_for(here, rule("backing_write", "kill", once="on", after=110))
    with running(*INTO, "--jobs", "0", TOP, cwd=here, rules=rules) as command:
        assert command.end().status == -signal.SIGKILL
    taken = stored_bytes(here / "low.raw")
    succeed(*INTO, TOP, cwd=here)
    assert stored_bytes(here / "low.raw") == taken
    assert seen(here) == before
