#!/usr/bin/env python3
"""Soak test: random chains, random jobs and random accidents, until the time is up.

    soak.py --minutes N [--seed S] [--case NUMBER] [--keep DIR] [--order ORDER]

A case is a random chain (`tests/support/chains.py`), a random job on it, and one to three accidents
to that job: its parent or a worker is killed, it is asked to stop, also at a low rate, a fault rule
makes some step fail, or, for root on a machine with loop devices, the power of its file system is
cut (`tests/support/powercut.py`). After each accident the promises of the job are checked
(`tests/support/promises.py`) by an independent reader. In the end the same command runs without any
accident and must complete. A job may also be one of the two ways of an overlay to QEMU and back
(`tests/support/lending_promises.py`).

Every other chain is reached through links: a symbolic link in another directory leads to its
overlay, and one within the chain to the layers below, which lie in a third. Beside each link lie
files with the names of the chain's files; nothing may change them.

At the first broken promise the script ends with status 1, prints seed, case and steps, and keeps
the files of the case. `--seed S --case NUMBER` runs that case again: the same chain, job and
accidents. The processes still run at their own speed, so a rare find may take several tries.
`--order` puts the job's syncs into a wrong order (`tests/support/small_steps.py`), to prove that
this is noticed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import oracle
from support.chains import can_commit, can_commit_into_some, wild_chain
from support.lending_promises import lending_of
from support.model import Files, MiB, Overlay, build, contents, view
from support.powercut import (
    EVENTS,
    SIZE_OF_EVENTS,
    Cut,
    Disk,
    Moment,
    UnavailableError,
    loop_disk,
    lose_power,
    make_durable,
)
from support.promises import Commit, Promise, promise_of
from support.victim import PATIENCE, Hang, Victim

#: Small enough for a case a second, big enough for several tasks and checkpoints.
LARGEST = 6 * MiB

#: Jobs, and how often they are drawn where the chain allows them; many cannot be committed. An
#: overlay to import was exported before, and a guest has written it with qemu-io.
JOBS = {
    "commit": 5,
    "commit -d": 2,
    "commit -b": 3,
    "flatten": 3,
    "flatten --discard": 2,
    "io": 3,
    "convert": 1,
    "rebase": 3,
    "reset": 2,
    "resize": 2,
    "export": 2,
    "import": 2,
}

#: Those that lend an overlay to QEMU, and take it back.
LENDING = ("export", "import")

#: The part of the chains that is reached through links.
LINKED = 0.5

#: Steps of reading and opening, at which every job can fail too.
READING = ("header_read", "bitmap_load", "image_read", "backing_read", "cow_read")

#: Bytes per second, below which a small image would take too long.
LOWEST_RATE = 64 * 1024

#: Seconds in which a job that is asked to stop must end, also on a busy machine.
SOON = 10.0

#: The exit statuses of a job after an accident that does not kill it.
ORDERLY = (0, 1, 130, 143)


class BrokenError(Exception):
    """A promise that was not kept."""


@dataclass
class Case:
    """One chain with one job, and the steps taken so far."""

    rng: random.Random
    place: Path
    scratch: Path
    promise: Promise
    size: int
    disk: Disk | None
    order: str
    steps: list[str] = field(default_factory=list)
    #: Files beside links, which have names of files of the chain, and their bytes.
    strangers: dict[str, bytes] = field(default_factory=dict)

    def jobs(self) -> int:
        """Return a number of worker processes."""
        return self.rng.choice([0, 0, 1, 2, 3])

    @property
    def scale(self) -> float:
        """What part of the events in the table to expect."""
        return max(0.1, self.size / SIZE_OF_EVENTS)

    def start(self, jobs: int, rules: str = "", more: tuple[str, ...] = ()) -> Victim:
        """Start the job, with ``more`` options."""
        words, stdin = [*self.promise.command(jobs), *more], self.promise.stdin
        return Victim(words, self.scratch, stdin=stdin, rules=rules, order=self.order)


# ---- accidents: each lets the job begin, and returns how it ended ----


def _ended(victim: Victim, status: int, what: str) -> Cut:
    return Cut(status == 0, victim.stdout, f"{victim}: {what}, status {status}: {victim.stderr}")


def _orderly(victim: Victim, status: int, what: str) -> Cut:
    """The end of a job that was not killed: orderly, and with a reason."""
    told = _ended(victim, status, what)
    if status not in ORDERLY or "Traceback" in victim.stderr:
        raise BrokenError(told.story)
    return told


def kill_parent(case: Case) -> Cut:
    """Kill -9 the parent; its workers must end by themselves."""
    with case.start(case.jobs()) as victim:
        _let_begin(case, victim)
        return _ended(victim, victim.kill_parent(), "parent killed")


def kill_worker(case: Case) -> Cut:
    """Kill -9 one worker; the job continues without it, or fails."""
    with case.start(case.rng.choice([1, 2, 3])) as victim:
        for _ in victim.watch():
            if victim.workers:
                break
        _let_begin(case, victim)
        if workers := victim.workers:
            _signal(case.rng.choice(workers).pid, signal.SIGKILL)
        return _ended(victim, victim.wait(), "worker killed")


def interrupt(case: Case) -> Cut:
    """SIGINT or SIGTERM: only finished work is published."""
    number = case.rng.choice([signal.SIGINT, signal.SIGTERM])
    with case.start(case.jobs()) as victim:
        _let_begin(case, victim)
        _signal(victim.pid, number)
        return _ended(victim, victim.wait(), f"asked to stop by {number.name}")


def stop_slowly(case: Case) -> Cut:
    """SIGINT or SIGTERM to a job with a low rate: it stops soon, and keeps its finished work."""
    if not case.promise.has_jobs:
        return interrupt(case)
    number = case.rng.choice([signal.SIGINT, signal.SIGTERM])
    rate = max(LOWEST_RATE, int(case.size / case.rng.uniform(1, 8)))
    with case.start(case.jobs(), more=("-r", str(rate))) as victim:
        victim.linger(case.rng.uniform(0.3, 3))
        begun = time.monotonic()
        _signal(victim.pid, number)
        cut = _ended(victim, victim.wait(), f"asked to stop by {number.name} at {rate} bytes/s")
    if time.monotonic() - begun > SOON:
        raise BrokenError(f"it took {time.monotonic() - begun:.1f} s to stop: {cut.story}")
    return cut


def fail(case: Case) -> Cut:
    """Some step fails: with an error, half done, or with a dying process."""
    events = [*EVENTS[case.promise.job], *READING]
    event, action = case.rng.choice(events), case.rng.choice(["error", "short", "kill"])
    words = {
        "event": event,
        "action": action,
        "errno": case.rng.choice([5, 28]),
        "after": int(40 * case.scale * case.rng.random() ** 2),
        "once": case.rng.choice(["on", "off"]),
    }
    rules = "[inject-error]\n" + "".join(f"{name} = {value}\n" for name, value in words.items())
    with case.start(case.jobs(), rules) as victim:
        status, what = victim.wait(), " ".join(rules.split())
        for marker in case.scratch.glob("rules.hit-*"):
            marker.unlink()
        return _ended(victim, status, what) if action == "kill" else _orderly(victim, status, what)


def cut_power(case: Case) -> Cut:
    """The power fails."""
    if case.disk is None:
        raise UnavailableError("this case has no power of its own")
    by_event = case.promise.job == "convert" or case.rng.random() < 0.5
    moment = Moment.draw(case.rng, case.promise, by_event=by_event, scale=case.scale)
    jobs = case.jobs()
    return lose_power(
        case.disk, case.promise, moment, case.rng, case.scratch, jobs=jobs, order=case.order
    )


def _let_begin(case: Case, victim: Victim) -> None:
    """Wait for a random point of the job, from its start to its end."""
    part = case.rng.uniform(-0.2, 1)
    for _ in victim.watch(tick=0):
        if case.promise.part_changed() >= part:
            break
    victim.linger(case.rng.choice([0, 0.01, 0.1]) * case.rng.random())


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


ACCIDENTS: dict[str, Callable[[Case], Cut]] = {
    "parent killed": kill_parent,
    "worker killed": kill_worker,
    "interrupted": interrupt,
    "stopped at a low rate": stop_slowly,
    "fault": fail,
}
POWER_CUT = "power cut"


# ---- one case ----


def new_case(rng: random.Random, place: Path, scratch: Path, disk: Disk | None, order: str) -> Case:
    """Make a random chain in ``place`` and draw a job for it."""
    chain = wild_chain(rng, LARGEST)
    able = [each for each in JOBS if _can(each, chain)]
    words = rng.choices(able, [JOBS[each] for each in able])[0]
    files = build(chain, str(place))
    linked = rng.random() < LINKED
    files, strangers = through_links(files, rng) if linked else (files, [])
    make_durable(place)
    if oracle.guest_bytes(files.path) != view(chain):
        raise BrokenError("the chain is not what it was meant to be")
    promise = lending_of(words, files, rng) if words in LENDING else promise_of(words, files, rng)
    order = order or rng.choice(["right", "right:waiting"])
    case = Case(rng, place, scratch, promise, chain.size, disk, order)
    case.strangers = contents(strangers)
    how = ", reached through links" if linked else ""
    case.steps.append(f"{words} {' '.join(promise.copy_options)}: {_described(chain)}{how}")
    return case


def _can(words: str, chain: Overlay) -> bool:
    """Whether a job is possible on this chain, on this machine."""
    if words in LENDING:
        return not chain.all_allocated and shutil.which("qemu-io") is not None
    if words in ("rebase", "reset"):
        return chain.backing is not None
    if words == "commit -b":
        return can_commit_into_some(chain)
    return can_commit(chain) or "commit" not in words


def through_links(files: Files, rng: random.Random) -> tuple[Files, list[str]]:
    """Move the layers below into a directory of their own, and reach all by links.

    Returns the chain, and the files that were planted beside the links.
    """
    home = os.path.dirname(files.path)
    below, strangers = files.backing, list[str]()
    if below is not None and below.path != below.image:
        deep = os.path.join(home, "deep")
        os.mkdir(deep)
        for path in below.everything:
            os.rename(path, os.path.join(deep, os.path.basename(path)))
        os.symlink(os.path.join("deep", os.path.basename(below.path)), below.path)
        strangers += _plant(home, [one for one in below.everything if one != below.path], rng)
        files = replace(files, backing=_moved(below, deep))
    desk = os.path.join(home, "desk")
    os.mkdir(desk)
    link = os.path.join(desk, "link.add-cow")
    os.symlink(os.path.join("..", os.path.basename(files.path)), link)
    strangers += _plant(desk, files.everything, rng)
    return replace(files, link=link), strangers


def _moved(files: Files, directory: str) -> Files:
    path, image = (
        os.path.join(directory, os.path.basename(one)) for one in (files.path, files.image)
    )
    backing = None if files.backing is None else _moved(files.backing, directory)
    return Files(path, image, backing)


def _plant(directory: str, paths: list[str], rng: random.Random) -> list[str]:
    """Make files in ``directory`` that are called as ``paths`` are."""
    planted = []
    for path in paths:
        name = os.path.basename(path)
        planted.append(os.path.join(directory, name))
        with open(planted[-1], "wb") as file:
            file.write(rng.randbytes(4096))
            file.truncate(LARGEST)
    return planted


def _described(layer: Overlay) -> str:
    flags = "all allocated, " if layer.all_allocated else ""
    told = f"{layer.size} bytes in clusters of {layer.cluster_size}, {flags}over "
    if isinstance(layer.backing, Overlay):
        return told + _described(layer.backing)
    return told + (f"{layer.backing.size} bytes raw" if layer.backing else "nothing")


def suffer(case: Case, what: str) -> None:
    """Make one accident happen to the job, and check the files."""
    case.promise.make_way()
    case.steps.append(what)
    cut = cut_power(case) if what.startswith(POWER_CUT) else ACCIDENTS[what](case)
    case.steps.append(cut.story)
    _look(case, cut.done, cut.stdout)
    case.promise = case.promise.again() if _is_there(case) else case.promise


def _is_there(case: Case) -> bool:
    return os.path.exists(case.promise.files.path)


def _look(case: Case, done: bool, stdout: str) -> None:
    broken = case.promise.broken(done=done, stdout=stdout)
    now = contents(case.strangers)
    broken += [f"{path} was changed" for path, was in case.strangers.items() if now[path] != was]
    if broken:
        raise BrokenError("\n".join(broken))


def finish(case: Case) -> None:
    """Run the same command again, and check the result."""
    case.promise.make_way()
    words = case.promise.command(case.jobs())
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", *words],
        input=case.promise.stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    case.steps.append(f"run to its end: status {done.returncode}: {done.stderr.strip()}")
    if done.returncode != 0:
        raise BrokenError("the same command does not complete")
    _look(case, True, done.stdout)
    if type(case.promise) is Commit and 0 <= case.promise.leftovers() < case.size - 64 * 1024:
        raise BrokenError(f"the image still takes space at {case.promise.leftovers()}")


# ---- all of them ----


@dataclass
class Soak:
    """The whole run: the directory of the cases, and the results so far."""

    seed: str
    home: Path
    keep: Path
    disks: list[Disk]
    order: str = ""
    survived: Counter[tuple[str, str]] = field(default_factory=Counter)
    cases: int = 0

    def run_case(self, number: int) -> None:
        """Run one case; raises :class:`BrokenError` after keeping its files."""
        rng = random.Random(f"{self.seed} {number}")
        accidents = self._accidents(rng)
        disk = self._disk_of(accidents, rng)
        with self._directories(disk) as (place, scratch):
            case = new_case(rng, place, scratch, disk, self.order)
            try:
                self._go_through(case, accidents)
            except Exception as error:
                raise BrokenError(self._kept(case, number, error)) from error
        self.cases += 1

    def _accidents(self, rng: random.Random) -> list[str]:
        known = [*ACCIDENTS, *[POWER_CUT] * (2 if self.disks else 0)]
        return rng.choices(known, k=rng.randint(1, 3))

    def _disk_of(self, accidents: list[str], rng: random.Random) -> Disk | None:
        return rng.choice(self.disks) if POWER_CUT in accidents else None

    @contextmanager
    def _directories(self, disk: Disk | None) -> Iterator[tuple[Path, Path]]:
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=self.home))
            if disk is None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.home)))
            else:
                place = stack.enter_context(disk.directory())
            yield place, Path(scratch)

    def _go_through(self, case: Case, accidents: list[str]) -> None:
        words = " ".join([case.promise.job, *case.promise.options])
        for what in accidents:
            if not _is_there(case):
                return  # discarded, with everything in order
            suffer(case, what)
            where = f" on {case.disk.kind}" if case.disk and what == POWER_CUT else ""
            self.survived[words, what + where] += 1
        if _is_there(case):
            finish(case)

    def _kept(self, case: Case, number: int, error: Exception) -> str:
        target = self.keep / f"soak-{self.seed}-{number}".replace("/", "-")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(case.place, target)
        what = str(error) if isinstance(error, (BrokenError, Hang)) else repr(error)
        steps = "\n".join(["steps:", *case.steps, "broken:", what])
        (target / "steps.txt").write_text(steps + "\n")
        again = f"again with: --seed {self.seed} --case {number}"
        return f"{steps}\n{again}\nits files are kept in {target}"


def table(survived: Counter[tuple[str, str]]) -> str:
    """Return the results: a line for each job, a column for each accident."""
    columns = sorted({what for _, what in survived})
    jobs = sorted({job for job, _ in survived})
    lines = [["", *columns]]
    lines += [[job, *(str(survived[job, what]) for what in columns)] for job in jobs]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def disks_here(stack: ExitStack, home: Path) -> list[Disk]:
    """Return the file systems of this machine whose power can be cut."""
    disks = []
    for kind in ("ext4", "xfs"):
        try:
            disks.append(stack.enter_context(loop_disk(kind, home)))
        except UnavailableError as error:
            print(f"no power cuts on {kind}: {error}", flush=True)
    return disks


def go_on(run: Soak, minutes: float, only: int | None) -> int:
    """Run cases until the time is up; return the exit status."""
    end = time.monotonic() + 60 * minutes
    number = 0 if only is None else only
    try:
        while run.cases == 0 or (only is None and time.monotonic() < end):
            run.run_case(number)
            number += 1
    except BrokenError as error:
        print(f"case {number} of seed {run.seed} is BROKEN\n{error}")
        return 1
    print(f"{run.cases} cases, {sum(run.survived.values())} accidents survived")
    print(table(run.survived))
    return 0


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Random accidents to random jobs.")
    parser.add_argument("--minutes", type=float, default=0, help="how long; default: one case")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**9)))
    parser.add_argument("--case", type=int, help="only this case of the seed")
    parser.add_argument("--keep", type=Path, default=Path(), help="where a broken case is kept")
    parser.add_argument("--order", default="", help="a wrong order of syncs, for a trial")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        disks = disks_here(stack, home)
        run = Soak(args.seed, home, args.keep.resolve(), disks, args.order)
        return go_on(run, args.minutes, args.case)


if __name__ == "__main__":
    sys.exit(main())
