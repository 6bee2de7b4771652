"""Tests of what the public functions do: the same as the commands, in the calling process.

Each function runs in one directory and its command in a copy of it; then the files are compared.
Nothing is printed, no signal handler is installed, and any thread may call.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import addcow_mp
from addcow_mp import Access
from addcow_mp.jobs.report import Outcome
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    MiB,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    pair,
    patch,
    ran,
    snapshot,
)
from support.warm import Warm

#: Enough clusters for several steps of one task.
MANY = 24 * MiB // CLUSTER

TOP, LEAF = "top.add-cow", "leaf.add-cow"


def make_farm(here: Path) -> Path:
    """A chain of two overlays over a base, an overlay of another base, and one that is full."""
    here.mkdir()
    pair(here, "ABCDEF0H", "-X-Y----")
    draw(here / LEAF, "--Z-----", TOP, backing_format="add-cow")
    draw_raw(here / "second.img", "KLMN")
    draw(here / "other.add-cow", "P--Q", "second.img")
    draw(here / "full.add-cow", "RSTU", "second.img", compatible=ALL_ALLOCATED)
    draw_raw(here / "unnamed.img", "KLMN")
    return here


class Case(NamedTuple):
    """A call, and the words of the command that does the same."""

    call: Callable[[], Any]
    words: str
    #: What is only compared by its presence: it has random numbers, inodes or times.
    loose: tuple[str, ...] = ()


FORCE = Access(force=True)

CHANGES = {
    "create": Case(
        lambda: addcow_mp.create(
            "new.add-cow", backing="base.img", backing_format="raw", cluster_size=4096
        ),
        "create -b base.img -F raw -o cluster_size=4k new.add-cow",
    ),
    "create, size and image": Case(
        lambda: addcow_mp.create("new.add-cow", size=70000, image="disk.raw"),
        "create -o image_file=disk.raw new.add-cow 70000",
    ),
    "create raw": Case(lambda: addcow_mp.create_raw("new.raw", 700), "create -f raw new.raw 700"),
    "snapshot": Case(
        lambda: addcow_mp.snapshot(LEAF, "new.add-cow"), f"snapshot {LEAF} new.add-cow"
    ),
    "convert": Case(
        lambda: addcow_mp.convert(LEAF, "new.raw", jobs=0),
        f"convert -O raw --jobs 0 --output json {LEAF} new.raw",
    ),
    "convert, raw": Case(
        lambda: addcow_mp.convert("base.img", "new.raw", source_format="raw", sparse=0, jobs=0),
        "convert -f raw -O raw -S 0 --jobs 0 --output json base.img new.raw",
    ),
    "repair": Case(
        lambda: addcow_mp.repair("bad.add-cow"), "check -r leaks --output json bad.add-cow"
    ),
    "repair all": Case(
        lambda: addcow_mp.repair("bad.add-cow", "all"), "check -r all --output json bad.add-cow"
    ),
    "commit": Case(lambda: addcow_mp.commit(LEAF, jobs=0), f"commit --jobs 0 --output json {LEAF}"),
    "commit, keep and verify": Case(
        lambda: addcow_mp.commit(LEAF, keep=True, verify=True, jobs=0),
        f"commit -d --verify --jobs 0 --output json {LEAF}",
    ),
    "commit, base": Case(
        lambda: addcow_mp.commit(LEAF, base="base.img", verify=True, jobs=0),
        f"commit -b base.img --verify --jobs 0 --output json {LEAF}",
    ),
    "commit, force": Case(
        lambda: addcow_mp.commit(TOP, jobs=0, copy="buffer", access=FORCE),
        f"commit --force --copy buffer --jobs 0 --output json {TOP}",
    ),
    "flatten": Case(
        lambda: addcow_mp.flatten(LEAF, jobs=0, sparse=4096, direct=True),
        f"flatten --jobs 0 -S 4k -t none --output json {LEAF}",
    ),
    "flatten, discard": Case(
        lambda: addcow_mp.flatten(LEAF, discard=True, verify=True, jobs=0),
        f"flatten --discard --verify --jobs 0 --output json {LEAF}",
    ),
    "resize": Case(lambda: addcow_mp.resize(LEAF, "+1M"), f"resize --output json {LEAF} +1M"),
    "resize, shrink": Case(
        lambda: addcow_mp.resize(LEAF, 70144, shrink=True),
        f"resize --shrink --output json {LEAF} 70144",
    ),
    "rebase": Case(
        lambda: addcow_mp.rebase(LEAF, "second.img", backing_format="raw", verify=True, jobs=0),
        f"rebase -b second.img -F raw --verify --jobs 0 --output json {LEAF}",
    ),
    "rebase, none": Case(
        lambda: addcow_mp.rebase(LEAF, None, jobs=0),
        f'rebase -b "" --jobs 0 --output json {LEAF}',
    ),
    "rebase, unsafe": Case(
        lambda: addcow_mp.rebase(LEAF, "unnamed.img", backing_format="raw", unsafe=True),
        f"rebase -u -b unnamed.img -F raw --output json {LEAF}",
    ),
    "farm_rebase": Case(
        lambda: addcow_mp.farm_rebase(".", "unnamed.img", base="second.img", jobs=0),
        "farm rebase -b unnamed.img --from second.img --jobs 0 --output json .",
    ),
    "farm_rebase, dry run": Case(
        lambda: addcow_mp.farm_rebase(
            ["."], "unnamed.img", base="second.img", dry_run=True, jobs=0
        ),
        "farm rebase -b unnamed.img --from second.img --dry-run --jobs 0 --output json .",
    ),
    "reset": Case(lambda: addcow_mp.reset(LEAF), f"reset --output json {LEAF}"),
    "drop": Case(lambda: addcow_mp.drop("full.add-cow"), "drop --output json full.add-cow"),
    "manifest_create": Case(
        lambda: addcow_mp.manifest_create(LEAF, jobs=0),
        f"manifest create --jobs 0 {LEAF}",
        (".manifest",),
    ),
    "qemu_export": Case(
        lambda: addcow_mp.qemu_export("other.add-cow", "vm.qcow2", crash="relaxed"),
        "qemu export --crash relaxed other.add-cow vm.qcow2",
        (".qcow2", "other.add-cow"),
    ),
    "farm_commit": Case(
        lambda: addcow_mp.farm_commit(".", jobs=0), "farm commit --jobs 0 --output json ."
    ),
    "farm_flatten": Case(
        lambda: addcow_mp.farm_flatten(["."], discard=True, verify=True, jobs=0),
        "farm flatten --discard --verify --jobs 0 --output json .",
    ),
    "farm_reset": Case(
        lambda: addcow_mp.farm_reset(["."], access=Access(exclude=("full*",)), jobs=0),
        "farm reset --exclude full* --jobs 0 --output json .",
    ),
    "farm_manifest_create": Case(
        lambda: addcow_mp.farm_manifest_create(["."], jobs=0),
        "farm manifest create --jobs 0 .",
        (".manifest",),
    ),
}


def files_of(here: Path, loose: tuple[str, ...]) -> dict[str, str]:
    """The digest of each file; of those that are ``loose`` only their names."""
    found = snapshot(here)
    return {name: "" if name.endswith(loose) else one for name, one in found.items()}


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", CHANGES)
def test_function_does_what_the_command_does(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CHANGES[name]
    here, there = make_farm(tmp_path / "here"), make_farm(tmp_path / "there")
    if name.startswith("repair"):
        for one in (here, there):
            draw(one / "bad.add-cow", "v-W-", "second.img")
            patch(one / "bad.add-cow", 2000, b"x")
    monkeypatch.chdir(here)
    result = case.call()
    ended = warm.run(*shlex.split(case.words), cwd=there)
    assert files_of(here, case.loose) == files_of(there, case.loose)
    if isinstance(result, addcow_mp.FarmResult | addcow_mp.CheckReport):
        assert result.exit_code == ended.status
    else:
        assert ended.status == 0, ended
    if isinstance(result, addcow_mp.Report | addcow_mp.CheckReport):
        assert timeless(result.as_json()) == timeless(json_of(ended.stdout))
    if isinstance(result, addcow_mp.FarmResult):
        told = [(one["filename"], one["state"]) for one in json_of(ended.stdout)["images"]]
        assert [(one.path, one.state) for one in result.images] == told


def json_of(text: str) -> Any:
    return json.loads(text)


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in ("seconds", "backup")}


# ---- looking ----


def numbers(call: Callable[[], addcow_mp.Estimate | None]) -> list[int]:
    """The bytes and the space of an estimate."""
    one = call()
    assert one is not None
    return [one.weight, one.space.peak, one.space.kept, one.space.freed]


LOOKS: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Any]]] = {
    "info": (
        lambda: [addcow_mp.info(LEAF).virtual_size, addcow_mp.info(LEAF).allocated_clusters],
        f"info --output json {LEAF}",
        lambda it: [it["virtual-size"], it["format-specific"]["data"]["allocated-clusters"]],
    ),
    "chain_info": (
        lambda: [
            (one.depth, one.about.filename, one.about.allocated_size, one.used_by)
            for one in addcow_mp.chain_info(TOP).layers
        ],
        f"info --backing-chain --output json {TOP}",
        lambda it: [
            (one["depth"], one["filename"], one["allocated-size"], one["used-by"]) for one in it
        ],
    ),
    "extents": (
        lambda: [(one.start, one.length, one.depth) for one in addcow_mp.extents(LEAF)],
        f"map --output json {LEAF}",
        lambda it: [(one["start"], one["length"], one["depth"]) for one in it],
    ),
    "check": (
        lambda: addcow_mp.check(LEAF).as_json(),
        f"check --output json {LEAF}",
        lambda it: it,
    ),
    "compare": (
        lambda: addcow_mp.compare(LEAF, "base.img", other_format="raw", every=True).differing,
        f"compare -F raw --output json {LEAF} base.img",
        lambda it: [
            (one["start"], one["start"] + one["length"]) for one in it["differing-extents"]
        ],
    ),
    "verify": (
        lambda: [(one.path, one.exit_code) for one in addcow_mp.verify(LEAF, jobs=0).layers],
        f"verify --output json {LEAF}",
        lambda it: [(one["filename"], one["exit"]) for one in it["layers"]],
    ),
    "qemu_status": (
        lambda: addcow_mp.qemu_status(LEAF).as_json(),
        f"qemu status --output json {LEAF}",
        lambda it: it,
    ),
    "farm_ls": (
        lambda: [(one.filename, one.depth, one.state) for one in addcow_mp.farm_ls(".").overlays],
        "farm ls --output json .",
        lambda it: [(one["filename"], one["depth"], one["state"]) for one in it["images"]],
    ),
    "farm_graph": (
        lambda: sorted(node.path for node in addcow_mp.farm_graph(["."]).nodes),
        "farm graph --output json .",
        lambda it: sorted(one["filename"] for key in ("images", "files") for one in it[key]),
    ),
    "farm_check": (
        lambda: [(one.path, one.exit_code) for one in addcow_mp.farm_check(["."], jobs=0).images],
        "farm check --output json .",
        lambda it: [(one["filename"], one["exit"]) for one in it["images"]],
    ),
    "farm_plan": (
        lambda: [
            (one.path, one.state) for one in addcow_mp.farm_plan(".", "commit", jobs=0).images
        ],
        "farm plan commit --output json .",
        lambda it: [(one["filename"], one["state"]) for one in it["images"]],
    ),
    **{
        f"{job}_estimate": (
            partial(numbers, call),
            f"{words} --dry-run --output json {LEAF}",
            lambda it: [it[key] for key in ("bytes", "space-needed", "space-kept", "space-freed")],
        )
        for job, call, words in (
            ("commit", lambda: addcow_mp.commit_estimate(LEAF), "commit"),
            (
                "commit, base",
                lambda: addcow_mp.commit_estimate(LEAF, base="base.img"),
                "commit -b base.img",
            ),
            (
                "rebase",
                lambda: addcow_mp.rebase_estimate(LEAF, "second.img", backing_format="raw", jobs=0),
                "rebase -b second.img -F raw --jobs 0",
            ),
            ("reset", lambda: addcow_mp.reset_estimate(LEAF), "reset"),
        )
    },
    "flatten_estimate": (
        lambda: [getattr(addcow_mp.flatten_estimate(LEAF, discard=True), "weight", None)],
        f"farm plan flatten --discard --output json {LEAF}",
        lambda it: [it["images"][0]["bytes"]],
    ),
    "farm_verify": (
        lambda: sorted((one.path, one.exit_code) for one in addcow_mp.farm_verify(".").all),
        "farm verify --output json .",
        lambda it: sorted(
            (one["filename"], one["exit"]) for key in ("images", "files") for one in it[key]
        ),
    ),
    "farm_scrub_run": (
        lambda: sorted(
            (one.path, one.exit_code)
            for one in addcow_mp.farm_scrub_run(".", "../one.db", jobs=0).layer_reports
        ),
        "farm scrub run --state ../two.db --output json .",
        lambda it: sorted((one["filename"], one["exit"]) for one in it["layers"]),
    ),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", LOOKS)
def test_function_finds_what_the_command_finds(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call, words, part = LOOKS[name]
    here = make_farm(tmp_path / "here")
    if "verify" in name or "scrub" in name:
        assert warm.run("farm", "manifest", "create", "-q", ".", cwd=here).status == 0
        patch(here / "base.img", 5, b"flipped")
    monkeypatch.chdir(here)
    before = snapshot(here)
    found = call()
    assert found == part(json_of(warm.run(*words.split(), cwd=here).stdout))
    assert found, "nothing was compared"
    assert snapshot(here) == before


def test_scrub_status_and_qemu_args_are_those_of_the_commands(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_farm(tmp_path / "here")
    monkeypatch.chdir(here)
    addcow_mp.manifest_create("other.add-cow", jobs=0)
    addcow_mp.farm_scrub_run(["other.add-cow"], "../state.db", sample=0.5, jobs=0)
    words = ("farm", "scrub", "status", "--state", "../state.db", "--output", "json")
    told = json_of(warm.run(*words, cwd=here).stdout)
    status = addcow_mp.farm_scrub_status("../state.db")
    assert [one.path for one in status.layers] == [one["filename"] for one in told["layers"]]
    assert [one.sample for one in status.runs] == [0.5]

    twin = addcow_mp.qemu_export("other.add-cow", crash="relaxed").twin
    args = addcow_mp.qemu_args("other.add-cow")
    assert args.blockdev["file"]["filename"] == os.path.realpath(twin)
    for form, text in (("json", None), ("libvirt", args.libvirt)):
        printed = warm.run("qemu", "args", "--output", form, "other.add-cow", cwd=here).stdout
        assert printed == f"{text}\n" if text else json_of(printed) == args.blockdev
    printed = warm.run("qemu", "args", "other.add-cow", cwd=here).stdout
    assert shlex.split(printed) == args.options
    assert addcow_mp.qemu_import("other.add-cow").state_before == "lent"
    assert addcow_mp.qemu_status("other.add-cow").state == "here"


# ---- refusals ----

MISSING: dict[str, Callable[[], object]] = {
    "open": lambda: addcow_mp.open("none.add-cow"),
    "info": lambda: addcow_mp.info("none.add-cow"),
    "chain_info": lambda: addcow_mp.chain_info("none.add-cow"),
    "extents": lambda: list(addcow_mp.extents("none.add-cow")),
    "create": lambda: addcow_mp.create("new.add-cow", backing="none.img", backing_format="raw"),
    "create_raw": lambda: addcow_mp.create_raw("none/new.raw", 512),
    "snapshot": lambda: addcow_mp.snapshot("none.add-cow", "new.add-cow"),
    "convert": lambda: addcow_mp.convert("none.add-cow", "new.raw"),
    "compare": lambda: addcow_mp.compare("none.add-cow", TOP),
    "verify": lambda: addcow_mp.verify("none.add-cow"),
    "manifest_create": lambda: addcow_mp.manifest_create("none.add-cow"),
    "commit": lambda: addcow_mp.commit("none.add-cow"),
    "flatten": lambda: addcow_mp.flatten("none.add-cow"),
    "resize": lambda: addcow_mp.resize("none.add-cow", 512),
    "rebase": lambda: addcow_mp.rebase("none.add-cow", None),
    "reset": lambda: addcow_mp.reset("none.add-cow"),
    "drop": lambda: addcow_mp.drop("none.add-cow"),
    "qemu_export": lambda: addcow_mp.qemu_export("none.add-cow"),
    "qemu_import": lambda: addcow_mp.qemu_import("none.add-cow"),
    "qemu_args": lambda: addcow_mp.qemu_args("none.add-cow"),
    "qemu_status": lambda: addcow_mp.qemu_status("none.add-cow"),
    "qemu_stream": lambda: addcow_mp.qemu_stream("none.add-cow", "none.qmp"),
    "commit_estimate": lambda: addcow_mp.commit_estimate("none.add-cow"),
    "flatten_estimate": lambda: addcow_mp.flatten_estimate("none.add-cow"),
    "rebase_estimate": lambda: addcow_mp.rebase_estimate("none.add-cow", None),
    "reset_estimate": lambda: addcow_mp.reset_estimate("none.add-cow"),
    "farm_ls": lambda: addcow_mp.farm_ls("none"),
    "farm_graph": lambda: addcow_mp.farm_graph("none"),
    "farm_check": lambda: addcow_mp.farm_check("none"),
    "farm_plan": lambda: addcow_mp.farm_plan("none", "reset"),
    "farm_commit": lambda: addcow_mp.farm_commit("none"),
    "farm_flatten": lambda: addcow_mp.farm_flatten("none"),
    "farm_rebase": lambda: addcow_mp.farm_rebase("none", None),
    "farm_reset": lambda: addcow_mp.farm_reset("none"),
    "farm_verify": lambda: addcow_mp.farm_verify("none"),
    "farm_manifest_create": lambda: addcow_mp.farm_manifest_create("none"),
    "farm_scrub_run": lambda: addcow_mp.farm_scrub_run("none", "../state.db"),
    "farm_scrub_status": lambda: addcow_mp.farm_scrub_status("none.db"),
}

REFUSALS: dict[str, tuple[Callable[[], object], type[Exception]]] = {
    **{f"{name}, missing": (call, addcow_mp.AddcowError) for name, call in MISSING.items()},
    "compare, missing": (MISSING["compare"], addcow_mp.CompareError),
    "commit, missing": (MISSING["commit"], addcow_mp.FileError),
    "farm_commit, missing": (MISSING["farm_commit"], addcow_mp.ImageError),
    "info, no overlay": (lambda: addcow_mp.info("base.img"), addcow_mp.NotAddcowError),
    "commit, dependants": (lambda: addcow_mp.commit("other.add-cow"), addcow_mp.DependantsError),
    "commit_estimate, dependants": (
        lambda: addcow_mp.commit_estimate("other.add-cow"),
        addcow_mp.DependantsError,
    ),
    "commit, base that is no layer": (
        lambda: addcow_mp.commit(LEAF, base="second.img"),
        addcow_mp.AddcowError,
    ),
    "manifest of a function that changes nothing": (
        lambda: addcow_mp.convert(LEAF, "new.raw", manifest=False),  # type: ignore[call-arg]
        TypeError,
    ),
    "reset, dependants": (lambda: addcow_mp.reset(TOP), addcow_mp.DependantsError),
    "resize, dependants": (
        lambda: addcow_mp.resize(TOP, 512, shrink=True),
        addcow_mp.DependantsError,
    ),
    "resize, shrinks": (lambda: addcow_mp.resize(LEAF, "-1k"), addcow_mp.ImageError),
    "rebase, missing backing": (
        lambda: addcow_mp.rebase(LEAF, "none.img", backing_format="raw"),
        addcow_mp.AddcowError,
    ),
    "rebase, format": (
        lambda: addcow_mp.rebase(LEAF, "base.img", backing_format="qcow2"),
        addcow_mp.UsageError,
    ),
    "rebase, empty name": (lambda: addcow_mp.rebase(LEAF, ""), addcow_mp.UsageError),
    "rebase, format of none": (
        lambda: addcow_mp.rebase(LEAF, None, backing_format="raw"),
        addcow_mp.UsageError,
    ),
    "rebase, unsafe with manifests": (
        lambda: addcow_mp.rebase(LEAF, "base.img", unsafe=True, trust_manifests=True),
        addcow_mp.UsageError,
    ),
    "farm_rebase, several bases": (
        lambda: addcow_mp.farm_rebase(".", "unnamed.img"),
        addcow_mp.UsageError,
    ),
    "drop, not whole": (lambda: addcow_mp.drop(LEAF), addcow_mp.ImageError),
    "create, exists": (lambda: addcow_mp.create(TOP, size=512), addcow_mp.ImageError),
    "create, cluster size": (
        lambda: addcow_mp.create("new.add-cow", size=512, cluster_size=5000),
        addcow_mp.UsageError,
    ),
    "create_raw, exists": (lambda: addcow_mp.create_raw("base.img", 512), addcow_mp.ImageError),
    "snapshot, exists": (lambda: addcow_mp.snapshot(TOP, LEAF), addcow_mp.ImageError),
    "convert, exists": (lambda: addcow_mp.convert(TOP, "base.img"), addcow_mp.AddcowError),
    "write, dependants": (lambda: write(TOP), addcow_mp.DependantsError),
    "qemu_import, abandon": (
        lambda: addcow_mp.qemu_import(TOP, abandon=True),
        addcow_mp.UsageError,
    ),
    "qemu_args, not lent": (lambda: addcow_mp.qemu_args(TOP), addcow_mp.ImageError),
    "qemu_export, crash": (
        lambda: addcow_mp.qemu_export(LEAF, crash="never"),  # type: ignore[arg-type]
        addcow_mp.UsageError,
    ),
    "farm_check, no place": (lambda: addcow_mp.farm_check([]), addcow_mp.UsageError),
    "farm_plan, operation": (
        lambda: addcow_mp.farm_plan(".", "drop"),  # type: ignore[arg-type]
        addcow_mp.UsageError,
    ),
    "farm_plan, discard": (
        lambda: addcow_mp.farm_plan(".", "reset", discard=True),
        addcow_mp.UsageError,
    ),
    "farm_scrub_run, sample": (
        lambda: addcow_mp.farm_scrub_run(".", "../state.db", sample=5),
        addcow_mp.UsageError,
    ),
    "farm_scrub_status, other file": (
        lambda: addcow_mp.farm_scrub_status("base.img"),
        addcow_mp.ImageError,
    ),
    "verify, format": (
        lambda: addcow_mp.verify(TOP, file_format="qcow2"),
        addcow_mp.UsageError,
    ),
    "repair, what": (
        lambda: addcow_mp.repair(TOP, "everything"),  # type: ignore[arg-type]
        addcow_mp.UsageError,
    ),
    **{
        f"{keyword} {value}": (
            lambda keyword=keyword, value=value: addcow_mp.farm_commit(".", **{keyword: value}),  # type: ignore[misc]
            addcow_mp.UsageError,
        )
        for keyword, value in (
            ("jobs", -1),
            ("rate", -5),
            ("time_limit", -0.5),
            ("time_limit", float("nan")),
            ("sparse", 511),
            ("sparse", -512),
            ("copy", "rsync"),
            ("on_error", "ask"),
        )
    },
    **{
        f"{keyword} {value!r}": (
            lambda keyword=keyword, value=value: addcow_mp.farm_commit(".", **{keyword: value}),  # type: ignore[misc]
            TypeError,
        )
        for keyword, value in (
            ("jobs", "2"),
            ("rate", "1M"),
            ("time_limit", "2h"),
            ("sparse", 1.5),
            ("progress", 5),
            ("stopping", "now"),
            ("counted", ()),
            ("log", "farm.log"),
            ("note", True),
            ("prgress", print),
        )
    },
    "keyword of another group": (
        lambda: addcow_mp.verify(LEAF, copy="clone"),  # type: ignore[call-arg]
        TypeError,
    ),
    "roots, one name": (
        lambda: addcow_mp.info(LEAF, access=Access(roots="/")),  # type: ignore[arg-type]
        TypeError,
    ),
    "exclude, one pattern": (
        lambda: addcow_mp.farm_ls(".", access=Access(exclude="*")),  # type: ignore[arg-type]
        TypeError,
    ),
    "places, no name": (lambda: addcow_mp.farm_ls(5), TypeError),  # type: ignore[arg-type]
    "size, text": (
        lambda: addcow_mp.create("new.add-cow", size="1G"),  # type: ignore[arg-type]
        TypeError,
    ),
}


def write(path: str) -> None:
    with addcow_mp.open(path, writable=True) as disk:
        disk.write(0, b"x")


@pytest.mark.sample(30)
@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_raises_its_class_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call, kind = REFUSALS[name]
    here = make_farm(tmp_path / "here")
    monkeypatch.chdir(here)
    before = snapshot(here)
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert snapshot(here) == before
    assert not (tmp_path / "state.db").exists()


@pytest.mark.parametrize("name", ["loop", "directory", "nul\0byte", "", "x" * 300, "fifo"])
@pytest.mark.parametrize("function", [one for one in MISSING if not one.startswith("farm_")])
@pytest.mark.sample(6)
def test_file_of_any_kind_is_refused_by_an_error_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = set(tmp_path.rglob("*"))
    functions: dict[str, Callable[[], object]] = {
        "create": lambda: addcow_mp.create("new.add-cow", backing=name, backing_format="raw"),
        "create_raw": lambda: addcow_mp.create_raw(f"{name}/x", 512),
        "snapshot": lambda: addcow_mp.snapshot(name, "new.add-cow"),
        "convert": lambda: addcow_mp.convert(name, "new.raw"),
        "compare": lambda: addcow_mp.compare(name, name),
        "resize": lambda: addcow_mp.resize(name, 512),
        "rebase": lambda: addcow_mp.rebase(name, None),
        "rebase_estimate": lambda: addcow_mp.rebase_estimate(name, None),
        "qemu_stream": lambda: addcow_mp.qemu_stream(name, name),
        "extents": lambda: list(addcow_mp.extents(name)),
    }
    usual: Callable[[str], object] = getattr(addcow_mp, function)
    call = functions.get(function, lambda: usual(name))
    if (function, name) in (("create_raw", "directory"), ("create_raw", "")):
        pytest.skip("that can be made")
    with pytest.raises(addcow_mp.AddcowError):
        call()
    assert set(tmp_path.rglob("*")) == before


def test_image_in_use_is_refused_in_one_process_as_in_two(tmp_path: Path) -> None:
    path = pair(tmp_path, "AB", "-X")
    with addcow_mp.open(path, writable=True):
        before = snapshot(tmp_path)
        with pytest.raises(addcow_mp.LockedError):
            addcow_mp.commit(path, jobs=0)
        assert snapshot(tmp_path) == before


# ---- progress, stop, time limit ----


def large(here: Path, name: str = "top") -> Path:
    """An overlay with so much data that its job has several steps."""
    draw_raw(here / f"{name}-base.img", "A" * MANY)
    draw(here / f"{name}.add-cow", "X-" * (MANY // 2), f"{name}-base.img")
    return here / f"{name}.add-cow"


class Watch:
    """Counts the calls of ``progress``, and says after the first with bytes that it is enough."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.asked = 0

    def progress(self, done: int, total: int) -> None:
        self.seen.append((done, total))

    def stopping(self) -> bool:
        self.asked += 1
        return any(done for done, _ in self.seen)

    def stopping_once(self) -> bool:
        """Say it once only."""
        is_first = self.stopping()
        self.seen.clear()
        return is_first

    def is_complete(self) -> None:
        """The numbers have only grown, and ended with everything."""
        done = [one for one, _ in self.seen]
        assert done == sorted(done)
        assert self.seen
        assert self.seen[-1][0] == self.seen[-1][1] > 0, self.seen


@pytest.mark.parametrize("job", ["commit", "flatten", "rebase"])
def test_stopped_job_keeps_finished_work_and_a_second_call_finishes(
    tmp_path: Path, job: str
) -> None:
    path, watch = large(tmp_path), Watch()
    function: Callable[..., addcow_mp.Report] = getattr(addcow_mp, job)
    if job == "rebase":
        draw_raw(tmp_path / "new.img", "B" * MANY)
        function = partial(addcow_mp.rebase, backing=tmp_path / "new.img")
    view, before = guest_picture(path), bits(path).count("1")
    with pytest.raises(addcow_mp.StoppedError, match="the same command continues") as caught:
        function(path, jobs=0, progress=watch.progress, stopping=watch.stopping)
    report = caught.value.report
    assert isinstance(report, addcow_mp.Report)
    assert report.outcome is Outcome.STOPPED
    assert 0 < report.totals.clusters_moved < MANY // 2
    assert bits(path).count("1") != before, "finished work is published"
    assert guest_picture(path) == view
    rest = function(path, jobs=0)
    assert rest.totals.clusters_moved + report.totals.clusters_moved >= MANY // 2
    assert guest_picture(path) == view
    done = tmp_path / ("top-base.img" if job == "commit" else "top.raw")
    assert look(done) == view


def test_stop_that_is_asked_for_once_is_a_stop(tmp_path: Path) -> None:
    path, watch = large(tmp_path), Watch()
    with pytest.raises(addcow_mp.StoppedError):
        addcow_mp.commit(path, jobs=0, progress=watch.progress, stopping=watch.stopping_once)
    (tmp_path / "farm").mkdir()
    shelf(tmp_path / "farm", 5)
    with pytest.raises(addcow_mp.StoppedError):
        addcow_mp.farm_commit(
            tmp_path / "farm",
            jobs=0,
            rate=1 << 40,
            counted=watch.progress,
            stopping=watch.stopping_once,
        )


def test_time_limit_in_the_middle_of_a_job_is_an_error_of_its_own(tmp_path: Path) -> None:
    path, view = large(tmp_path), "XA" * (MANY // 2)
    begun = time.monotonic()

    def wait(done: int, _: int) -> None:
        while done and time.monotonic() < begun + 0.5:
            pass

    with pytest.raises(addcow_mp.TimeLimitError) as caught:
        addcow_mp.commit(path, jobs=0, time_limit=0.4, progress=wait)
    assert str(caught.value).startswith(
        f"{path}: the time limit was reached; finished work is kept"
    )
    assert caught.value.exit_code == 75
    assert 0 < caught.value.report.totals.clusters_moved < MANY // 2
    assert guest_picture(path) == view
    addcow_mp.commit(path, jobs=0, time_limit=600)
    assert look(tmp_path / "top-base.img") == view


LIMITED: dict[str, Callable[[Path], object]] = {
    "commit": lambda path: addcow_mp.commit(path, jobs=0, time_limit=0),
    "commit, keep": lambda path: addcow_mp.commit(path, keep=True, jobs=0, time_limit=0),
    "commit, verify": lambda path: addcow_mp.commit(path, verify=True, jobs=0, time_limit=0),
    "commit, base": lambda path: addcow_mp.commit(path, base="base.img", jobs=0, time_limit=0),
    "flatten": lambda path: addcow_mp.flatten(path, jobs=0, time_limit=0),
    "convert": lambda path: addcow_mp.convert(path, path.with_name("new"), jobs=0, time_limit=0),
    "compare": lambda path: addcow_mp.compare(path, path, jobs=0, time_limit=0),
    "manifest_create": lambda path: addcow_mp.manifest_create(path, jobs=0, time_limit=0),
    "verify": lambda path: addcow_mp.verify(path, jobs=0, time_limit=0),
    "farm_check": lambda path: addcow_mp.farm_check(path, jobs=0, time_limit=0),
    "farm_plan": lambda path: addcow_mp.farm_plan(path, "commit", jobs=0, time_limit=0),
    "farm_commit": lambda path: addcow_mp.farm_commit(path, jobs=0, time_limit=0),
    "farm_flatten": lambda path: addcow_mp.farm_flatten(path, jobs=0, time_limit=0),
    "farm_rebase": lambda path: addcow_mp.farm_rebase(path, None, jobs=0, time_limit=0),
    "rebase": lambda path: addcow_mp.rebase(path, None, jobs=0, time_limit=0),
    "farm_reset": lambda path: addcow_mp.farm_reset(path, jobs=0, time_limit=0),
    "farm_verify": lambda path: addcow_mp.farm_verify(path, jobs=0, time_limit=0),
    "farm_manifest_create": lambda path: addcow_mp.farm_manifest_create(path, jobs=0, time_limit=0),
    "farm_scrub_run": lambda path: addcow_mp.farm_scrub_run(
        path, path.parent.parent / "state.db", jobs=0, time_limit=0
    ),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", LIMITED)
def test_time_limit_of_zero_begins_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    path = pair(tmp_path / "here", "AB", "-X")
    if "verify" in name or "scrub" in name:
        addcow_mp.manifest_create(path, jobs=0)
    before = snapshot(tmp_path / "here")
    with pytest.raises(addcow_mp.TimeLimitError, match="the time limit was reached"):
        LIMITED[name](path)
    after = snapshot(tmp_path / "here")
    for one in before:
        # A job that may change a layer removes its manifest first.
        assert after.get(one) == before[one] or one.endswith(".manifest")
    assert set(after) <= set(before)


def test_stop_wins_over_a_time_limit_that_is_also_over(tmp_path: Path) -> None:
    path = pair(tmp_path, "AB", "-X")
    with pytest.raises(addcow_mp.StoppedError) as caught:
        addcow_mp.commit(path, jobs=0, time_limit=0, stopping=lambda: True)
    assert not isinstance(caught.value, addcow_mp.TimeLimitError)


def test_stopped_convert_leaves_no_file(tmp_path: Path) -> None:
    path, watch = large(tmp_path), Watch()
    with pytest.raises(addcow_mp.UnfinishedError):
        addcow_mp.convert(
            path, tmp_path / "new", jobs=0, progress=watch.progress, stopping=watch.stopping
        )
    assert not (tmp_path / "new").exists()


WATCHED: dict[str, Callable[[Path, Watch], object]] = {
    "commit": lambda path, it: addcow_mp.commit(path, jobs=0, progress=it.progress),
    "commit, processes": lambda path, it: addcow_mp.commit(path, jobs=2, progress=it.progress),
    "commit, base": lambda path, it: addcow_mp.commit(
        path, base="top-base.img", jobs=0, progress=it.progress
    ),
    "commit, verify": lambda path, it: addcow_mp.commit(
        path, verify=True, jobs=0, progress=it.progress
    ),
    "commit, manifests": lambda path, it: (
        addcow_mp.manifest_create(path, jobs=0),
        addcow_mp.commit(path, jobs=0, progress=it.progress),
    ),
    "flatten, manifests": lambda path, it: (
        addcow_mp.manifest_create(path, jobs=0),
        addcow_mp.flatten(path, jobs=0, progress=it.progress),
    ),
    "flatten": lambda path, it: addcow_mp.flatten(path, jobs=0, progress=it.progress),
    "flatten, verify": lambda path, it: addcow_mp.flatten(
        path, verify=True, jobs=0, progress=it.progress
    ),
    "convert": lambda path, it: addcow_mp.convert(
        path, path.with_name("new"), jobs=0, progress=it.progress
    ),
    "compare": lambda path, it: addcow_mp.compare(
        path, path, every=True, jobs=0, progress=it.progress
    ),
    "manifest_create": lambda path, it: addcow_mp.manifest_create(
        path, jobs=0, progress=it.progress
    ),
    "verify": lambda path, it: (
        addcow_mp.manifest_create(path, jobs=0),
        addcow_mp.verify(path, jobs=0, progress=it.progress),
    ),
    "farm_check": lambda path, it: addcow_mp.farm_check(path, jobs=0, progress=it.progress),
    "farm_commit": lambda path, it: addcow_mp.farm_commit(path, jobs=0, progress=it.progress),
    "farm_flatten": lambda path, it: addcow_mp.farm_flatten(path, jobs=0, progress=it.progress),
    "rebase": lambda path, it: addcow_mp.rebase(path, None, jobs=0, progress=it.progress),
    "farm_rebase": lambda path, it: addcow_mp.farm_rebase(path, None, jobs=0, progress=it.progress),
    "farm_reset": lambda path, it: addcow_mp.farm_reset(path, jobs=0, counted=it.progress),
    "farm_manifest_create": lambda path, it: addcow_mp.farm_manifest_create(
        path, jobs=0, progress=it.progress
    ),
    "farm_verify": lambda path, it: (
        addcow_mp.manifest_create(path, jobs=0),
        addcow_mp.farm_verify(path, jobs=0, progress=it.progress),
    ),
    "farm_scrub_run": lambda path, it: (
        addcow_mp.manifest_create(path, jobs=0),
        addcow_mp.farm_scrub_run(path, path.with_name("s.db"), jobs=0, progress=it.progress),
    ),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", WATCHED)
def test_progress_only_grows_and_ends_with_everything(tmp_path: Path, name: str) -> None:
    path, watch = large(tmp_path), Watch()
    WATCHED[name](path, watch)
    watch.is_complete()


@pytest.mark.parametrize("jobs", [0, 2])
@pytest.mark.parametrize("keyword", ["progress", "stopping"])
def test_error_in_a_callers_function_stops_the_job_and_is_raised(
    tmp_path: Path, keyword: str, jobs: int
) -> None:
    path, view = large(tmp_path), "XA" * (MANY // 2)
    calls: list[int] = []

    def fail(done: int = 1, _: int = 0) -> None:
        if done:
            calls.append(done)
            raise ZeroDivisionError

    keywords: dict[str, Any] = {keyword: fail}
    with pytest.raises(ZeroDivisionError):
        addcow_mp.commit(path, jobs=jobs, **keywords)
    assert len(calls) == 1, "it is not called again"
    assert guest_picture(path) == view
    addcow_mp.commit(path, jobs=0)
    assert look(tmp_path / "top-base.img") == view


@pytest.mark.parametrize("keyword", ["counted", "log"])
def test_error_in_a_function_of_a_farm_job_leaves_the_remaining_images(
    tmp_path: Path, keyword: str
) -> None:
    paths = shelf(tmp_path, 4)

    def fail(first: object, _: object = None) -> None:
        if first == 1 or isinstance(first, addcow_mp.ImageResult):
            raise ZeroDivisionError

    keywords: dict[str, Any] = {keyword: fail}
    with pytest.raises(ZeroDivisionError):
        addcow_mp.farm_commit(tmp_path, jobs=0, rate=1 << 40, **keywords)
    assert {guest_picture(path) for path in paths} == {"AX"}
    assert any(bits(path) == ".1" for path in paths), "some image is left"
    assert addcow_mp.farm_commit(tmp_path, jobs=0).exit_code == 0
    assert {bits(path) for path in paths} == {".."}


FOLLOWED: dict[str, Callable[[Path, bool], object]] = {
    "commit": lambda path, wanted: addcow_mp.commit(path, manifest=wanted, jobs=0),
    "flatten": lambda path, wanted: addcow_mp.flatten(path, manifest=wanted, jobs=0),
    "rebase": lambda path, wanted: addcow_mp.rebase(path, None, manifest=wanted, jobs=0),
    "reset": lambda path, wanted: addcow_mp.reset(path, manifest=wanted),
    "farm_commit": lambda path, wanted: addcow_mp.farm_commit(path, manifest=wanted, jobs=0),
    "farm_flatten": lambda path, wanted: addcow_mp.farm_flatten(path, manifest=wanted, jobs=0),
    "farm_rebase": lambda path, wanted: addcow_mp.farm_rebase(path, None, manifest=wanted, jobs=0),
    "farm_reset": lambda path, wanted: addcow_mp.farm_reset(path, manifest=wanted, jobs=0),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", FOLLOWED)
def test_manifest_follows_unless_it_is_not_wanted(tmp_path: Path, name: str, wanted: bool) -> None:
    path = pair(tmp_path, "AB", "-X")
    manifest = tmp_path / f"{TOP}.manifest"
    addcow_mp.manifest_create(path, jobs=0)
    FOLLOWED[name](path, wanted)
    assert manifest.exists() is wanted
    assert addcow_mp.verify(path, jobs=0).exit_code == int(not wanted)


def test_snapshot_gets_a_manifest_unless_it_is_not_wanted(tmp_path: Path) -> None:
    path = pair(tmp_path, "AB", "-X")
    addcow_mp.manifest_create(path, jobs=0)
    for name, wanted in (("one", True), ("two", False)):
        addcow_mp.snapshot(path, tmp_path / f"{name}.add-cow", manifest=wanted)
        assert (tmp_path / f"{name}.add-cow.manifest").exists() is wanted


def test_error_after_the_work_is_raised_too(tmp_path: Path) -> None:
    path = pair(tmp_path, "AB", "-X")

    def fail(done: int, total: int) -> None:
        if done == total:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        addcow_mp.flatten(path, jobs=0, progress=fail)
    assert guest_picture(path) == "AX"


# ---- farms ----


def shelf(here: Path, count: int) -> list[Path]:
    """Overlays with a base of their own each."""
    paths = [here / f"vm{number}.add-cow" for number in range(count)]
    for number, path in enumerate(paths):
        draw_raw(here / f"base{number}.img", "AB")
        draw(path, "-X", f"base{number}.img")
    return paths


@pytest.mark.parametrize("limited", [False, True])
def test_stopped_farm_job_has_a_report_and_a_second_call_finishes(
    tmp_path: Path, limited: bool
) -> None:
    paths, watch = shelf(tmp_path, 5), Watch()
    begun = time.monotonic()

    def counted(done: int, total: int) -> None:
        watch.progress(done, total)
        while limited and done and time.monotonic() < begun + 2.1:
            pass

    keywords: dict[str, Any] = {"time_limit": 2} if limited else {"stopping": watch.stopping}
    events: list[object] = []
    # With a rate an image is not joined to others, so that the job can end between two.
    with pytest.raises(addcow_mp.StoppedError) as caught:
        addcow_mp.farm_commit(
            tmp_path, jobs=0, rate=1 << 40, counted=counted, log=events.append, **keywords
        )
    assert isinstance(caught.value, addcow_mp.TimeLimitError) is limited
    result = caught.value.report
    assert isinstance(result, addcow_mp.FarmResult)
    states = sorted(one.state for one in result.images)
    assert states[0] == "done"
    assert "not-begun" in states
    assert isinstance(events[0], addcow_mp.Plan)
    assert events[-1] is result
    assert {guest_picture(path) for path in paths} == {"AX"}
    again = addcow_mp.farm_commit(tmp_path, jobs=0)
    assert {str(one.state) for one in again.images} == {"done", "nothing-to-do"}
    assert {look(tmp_path / f"base{number}.img") for number in range(5)} == {"AX"}


def test_farm_job_stops_at_a_refused_image_if_asked_to(tmp_path: Path) -> None:
    shelf(tmp_path, 3)
    draw_raw(tmp_path / "shared.img", "AB")
    for name in ("a1", "a2"):
        draw(tmp_path / f"{name}.add-cow", "-X", "shared.img")
    result = addcow_mp.farm_commit([tmp_path], jobs=0, on_error="stop")
    assert {str(one.state) for one in result.images} == {"refused", "not-begun"}
    result = addcow_mp.farm_commit([tmp_path], jobs=0)
    assert sorted(str(one.state) for one in result.images) == ["done"] * 3 + ["refused"] * 2
    refused = [one for one in result.images if one.problem is not None]
    assert {type(one.problem) for one in refused} == {addcow_mp.DependantsError}
    assert result.exit_code == 1


def test_scrub_reports_damage_also_at_its_time_limit(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    paths = shelf(here, 3)
    for path in paths:
        addcow_mp.manifest_create(path, jobs=0)
        patch(path.with_suffix(".raw"), CLUSTER + 9, b"flipped")
    for path in here.glob("*.img"):
        patch(path, 9, b"flipped")
    seen: list[int] = []

    def wait(done: int, _: int) -> None:
        begun = time.monotonic()
        while not seen and done and time.monotonic() < begun + 0.6:
            pass
        seen.append(done)

    found = addcow_mp.farm_scrub_run(
        here, tmp_path / "state.db", jobs=0, time_limit=0.5, progress=wait
    )
    if found.problem is not None:  # the limit came before the last layer
        assert isinstance(found.problem, addcow_mp.TimeLimitError)
        assert found.left
    assert found.exit_code == 2
    rest = addcow_mp.farm_scrub_run([here], tmp_path / "state.db", jobs=0)
    assert rest.problem is None
    assert len(addcow_mp.farm_scrub_status(tmp_path / "state.db").layers) == 6


# ---- threads, signals, output ----


def in_threads(*calls: Callable[[], object]) -> list[object]:
    """What calls return or raise, each in a thread, begun at the same time."""
    results: list[object] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("jobs", [0, 1])
def test_two_calls_in_two_threads_do_both_jobs(tmp_path: Path, jobs: int) -> None:
    one, two = large(tmp_path, "one"), large(tmp_path, "two")
    watches = Watch(), Watch()
    results = in_threads(
        lambda: addcow_mp.commit(one, jobs=jobs, progress=watches[0].progress),
        lambda: addcow_mp.flatten(two, jobs=jobs, progress=watches[1].progress),
    )
    for result, watch in zip(results, watches, strict=True):
        assert isinstance(result, addcow_mp.Report), result
        watch.is_complete()
    assert look(tmp_path / "one-base.img") == look(tmp_path / "two.raw") == "XA" * (MANY // 2)


@pytest.mark.long
def test_many_calls_in_threads_on_one_farm(tmp_path: Path) -> None:
    paths = shelf(tmp_path, 12)
    results = in_threads(
        *(lambda path=path: addcow_mp.commit(path, jobs=1) for path in paths[:6]),
        *(lambda path=path: addcow_mp.flatten(path, jobs=0, verify=True) for path in paths[6:]),
        *(lambda: addcow_mp.farm_ls(tmp_path) for _ in range(3)),
    )
    assert [one for one in results if isinstance(one, Exception)] == []
    assert {guest_picture(path) for path in paths} == {"AX"}


def test_two_threads_on_one_image_refuse_each_other(tmp_path: Path) -> None:
    path = large(tmp_path)
    inside = threading.Event()
    refused = threading.Event()

    def hold(done: int, _: int) -> None:
        inside.set()
        assert refused.wait(60) or not done

    def other() -> object:
        assert inside.wait(60)
        try:
            return addcow_mp.commit(path, jobs=0)
        finally:
            refused.set()

    first, second = in_threads(lambda: addcow_mp.commit(path, jobs=0, progress=hold), other)
    assert isinstance(first, addcow_mp.Report)
    assert isinstance(second, addcow_mp.LockedError)
    assert look(tmp_path / "top-base.img") == "XA" * (MANY // 2)


def test_scrub_state_is_read_and_refused_in_other_threads_during_a_run(tmp_path: Path) -> None:
    here, state = tmp_path / "here", tmp_path / "state.db"
    here.mkdir()
    for path in shelf(here, 2):
        addcow_mp.manifest_create(path, jobs=0)
    addcow_mp.farm_scrub_run(here, state, jobs=0)
    seen: list[object] = []

    def look_at_it(done: int, _: int) -> None:
        if done and not seen:
            seen.extend(
                in_threads(
                    lambda: addcow_mp.farm_scrub_status(state),
                    lambda: addcow_mp.farm_scrub_run(here, state, jobs=0),
                )
            )

    addcow_mp.farm_scrub_run(here, state, jobs=0, progress=look_at_it)
    status, other = seen
    assert isinstance(status, addcow_mp.ScrubStatus)
    assert isinstance(other, addcow_mp.ImageError)
    assert "another scrub is using it" in str(other)
    assert len(addcow_mp.farm_scrub_status(state).runs) == 2


def test_jobs_print_nothing_and_leave_signals_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = [one for one in signal.Signals if one not in (signal.SIGKILL, signal.SIGSTOP)]

    def handlers() -> list[object]:
        return [signal.getsignal(one) for one in numbers]

    before, during = handlers(), []

    def progress(*_: int) -> None:
        during.append(handlers())

    path = large(tmp_path)
    draw(tmp_path / "bad.add-cow", "v-W-", "none.img")
    addcow_mp.commit(path, jobs=1, progress=progress)
    addcow_mp.flatten(path, jobs=0, progress=progress, copy="buffer")
    addcow_mp.manifest_create(path, progress=progress)
    addcow_mp.verify(path, progress=progress)
    addcow_mp.farm_check(tmp_path, progress=progress)
    addcow_mp.farm_flatten(tmp_path, progress=progress)
    with pytest.raises(addcow_mp.AddcowError):
        addcow_mp.commit(tmp_path / "bad.add-cow")
    assert len(during) > 5
    assert all(one == before for one in during)
    assert handlers() == before
    assert capfd.readouterr() == ("", "")


def test_idle_priority_ends_with_the_call(tmp_path: Path) -> None:
    path = pair(tmp_path, "AB", "-X")
    during: list[str] = []
    before = io_priority()
    addcow_mp.commit(path, jobs=0, idle=True, progress=lambda *_: during.append(io_priority()))
    assert set(during) == {"idle"}
    assert io_priority() == before != "idle"


def io_priority() -> str:
    """The input/output priority of this thread, as ionice says it."""
    done = ran(["ionice", "-p", str(threading.get_native_id())])
    assert done.returncode == 0, done
    return done.stdout.split(":")[0].strip()
