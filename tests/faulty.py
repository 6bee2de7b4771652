"""Commands that meet a fault on purpose, and the processes they consist of.

Two ways to run addcow, because they answer different questions:

`Warm` answers "what is left on the disk after a fault at this place?" and does so hundreds of
times.  A server process loads the package once and forks for every command, which then runs
as `python -m addcow_mp` does, with its own rules, directory and output.  The server waits for
it in the kernel and tells when it stops and how it ends.

`Job` answers "which processes are there, and what becomes of them?".  It is the real command
in a process group of its own: whatever the command starts, orphans included, is found by that
group in /proc, and whatever a test leaves behind is killed by its number.

Instants are chosen by rules, never by time: a rule stops a process at a named event, the test
sees it stopped, does what it has to do, and lets it go on or kills it.  A rule with `once`
leaves a marker file beside the rule file when it strikes, which is how a walk over "the first,
the second, the third time" knows when there is no further time.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from command import KiB, MiB, local_clusters, overlay_bytes, stored_bytes, succeed

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import oracle

VARIABLE = "ADDCOW_FAULTS"

#: Far beyond what anything here takes; whatever is waited for longer will never come.
PATIENCE = 60

#: Between two looks at /proc, which has no way to wait for another's child to stop.
LOOK_AGAIN = 0.004


# ---- rules ----


def rule(event: str, action: int | str = "error", **more: int | str) -> str:
    """Return one section of a rule file."""
    words = {"event": event, "action": action, **more}
    return "[inject-error]\n" + "".join(f'{key} = "{value}"\n' for key, value in words.items())


@dataclass(frozen=True)
class Rules:
    """A rule file in a directory of its own, where no other file is looked at."""

    path: Path

    @classmethod
    def write(cls, directory: Path, *sections: str) -> Rules:
        """Write the file; markers of the rules that were there before are taken away."""
        directory.mkdir(exist_ok=True)
        for old in directory.iterdir():
            old.unlink()
        path = directory / "rules"
        path.write_text("\n".join(sections))
        return cls(path)

    @property
    def hits(self) -> list[int]:
        """The numbers of the rules with `once` that have struck."""
        return [int(one.suffix.split("-")[1]) for one in self.path.parent.glob("rules.hit-*")]

    @property
    def struck(self) -> bool:
        """Whether some rule with `once` has struck."""
        return bool(self.hits)


# ---- the server that forks ----


class Ended(NamedTuple):
    """How a command ended: a negative status is the signal that killed it."""

    status: int
    stdout: str
    stderr: str


class Command:
    """A command forked by the server."""

    def __init__(self, pid: int, answers: Iterator[str], outputs: tuple[Path, Path]) -> None:
        self.pid = pid
        self._answers = answers
        self._outputs = outputs
        self._has_ended = False

    def wait(self) -> Ended | None:
        """Wait until it ends, or stops itself, which is None."""
        answer = next(self._answers).strip()
        if answer == "stopped":
            return None
        self._has_ended = True
        out, err = (path.read_text() for path in self._outputs)
        assert "Traceback" not in err, err
        return Ended(int(answer), out, err)

    def end(self) -> Ended:
        """Wait until it ends; it must not stop."""
        ended = self.wait()
        assert ended is not None, "it stopped"
        return ended

    def abandon(self) -> None:
        """Kill what a test that failed has left."""
        while not self._has_ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Warm:
    """The server; one command at a time."""

    def __init__(self, outputs: Path) -> None:
        self._outputs = outputs / "stdout", outputs / "stderr"
        self._command: Command | None = None
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments: str, cwd: Path, rules: Rules | None = None) -> Command:
        """Begin a command."""
        self._clear()
        for path in self._outputs:
            path.unlink(missing_ok=True)  # what a killed one leaves running may still write there
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        faults = "" if rules is None else str(rules.path)
        request = [str(cwd), faults, *map(str, self._outputs), *arguments]
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answers = iter(self._server.stdout)
        self._command = Command(int(next(answers)), answers, self._outputs)
        return self._command

    def _clear(self) -> None:
        if self._command is not None:
            self._command.abandon()

    def run(self, *arguments: str, cwd: Path, rules: Rules | None = None) -> Ended:
        """Run a command to its end."""
        return self.start(*arguments, cwd=cwd, rules=rules).end()

    def close(self) -> None:
        """End the server."""
        self._clear()
        self._server.communicate()


def _serve() -> None:
    import addcow_mp

    for module in pkgutil.walk_packages(addcow_mp.__path__, "addcow_mp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(*json.loads(line))
        _answer(pid)
        while os.WIFSTOPPED(status := os.waitpid(pid, os.WUNTRACED)[1]):
            _answer("stopped")
        _answer(os.waitstatus_to_exitcode(status))


def _answer(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _become(cwd: str, faults: str, out: str, err: str, *arguments: str) -> NoReturn:
    """Be the command from here on."""
    from addcow_mp.device import faults as points

    signal.alarm(PATIENCE)  # one that hangs is killed by this
    os.chdir(cwd)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, _NEW), (2, err, _NEW)):
        os.dup2(os.open(name, flags, 0o600), number)
    if faults:
        os.environ[VARIABLE] = faults
        importlib.reload(points)  # which is when the rules are read
    sys.argv[:] = ["addcow", *arguments]
    runpy.run_module("addcow_mp", run_name="__main__", alter_sys=True)
    sys.exit("the command did not exit")


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# ---- real processes ----


class Process(NamedTuple):
    """A line of /proc: the state is a letter, T for stopped."""

    pid: int
    state: str
    command: str

    @property
    def is_worker(self) -> bool:
        """Whether it is a worker, as opposed to Python's own tracker of resources."""
        return "spawn_main" in self.command


class Job:
    """A running command with all that it starts."""

    def __init__(self, *arguments: str, cwd: Path, rules: Rules | None = None) -> None:
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "addcow_mp", *arguments],
            cwd=cwd,
            env={**os.environ, VARIABLE: "" if rules is None else str(rules.path)},
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )
        self._end = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """The number of the parent, and of the group."""
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What all its processes have complained of so far."""
        return os.pread(self._err.fileno(), 1 << 20, 0).decode()

    def members(self) -> list[Process]:
        """The processes of the group that have not ended."""
        return [one for one in _group(self.pid) if one.state not in "ZX"]

    def workers(self) -> list[int]:
        """The numbers of the workers that have not ended."""
        return [one.pid for one in self.members() if one.is_worker]

    def stopped(self, count: int = 1) -> list[int]:
        """Wait until ``count`` processes have stopped; return their numbers."""
        found: list[int] = []

        def look() -> bool:
            assert not self.has_ended, f"it ended without stopping: {self.stderr}"
            found[:] = [one.pid for one in self.members() if one.state == "T"]
            return len(found) >= count

        self.until(look, f"{count} processes to stop")
        return found

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Look until the condition holds; fail when it does not within all patience."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}: {self.stderr}"
            select.select([self._end], [], [], LOOK_AGAIN)

    @property
    def has_ended(self) -> bool:
        """Whether the parent has ended."""
        return bool(select.select([self._end], [], [], 0)[0])

    def signal(self, number: int, *pids: int) -> None:
        """Send a signal to processes of the job, to the parent when none is named."""
        for pid in pids or (self.pid,):
            os.kill(pid, number)

    def has_met(self, number: int) -> bool:
        """Whether the parent has met this signal once: it catches only the first."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return not int(caught.split()[1], 16) >> (number - 1) & 1

    def is_round(self) -> Callable[[], bool]:
        """Return what says whether the parent, which waits by turns, has gone round since now."""
        before = self._rests()
        return lambda: self._rests() >= before + 2

    def _rests(self) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    def end(self) -> Ended:
        """Wait for the parent's end."""
        status = self._process.wait(PATIENCE)
        assert "Traceback" not in self.stderr, self.stderr
        return Ended(status, os.pread(self._out.fileno(), 1 << 20, 0).decode(), self.stderr)

    def all_gone(self) -> None:
        """Wait until no process of the job is left."""
        self._process.wait(PATIENCE)
        self.until(lambda: not self.members(), "the last process to end")
        assert "Traceback" not in self.stderr, self.stderr

    def close(self) -> None:
        """Kill what is left, by number."""
        while left := self.members():
            for one in left:
                with suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
            self._process.wait(PATIENCE)
        os.close(self._end)
        self._out.close()
        self._err.close()


@contextmanager
def running(*arguments: str, cwd: Path, rules: Rules | None = None) -> Iterator[Job]:
    """Run a command during the block; nothing of it is left afterwards."""
    job = Job(*arguments, cwd=cwd, rules=rules)
    try:
        yield job
    finally:
        job.close()


def _group(number: int) -> Iterator[Process]:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it may end while it is looked at
            stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
            state, _, group = stat[stat.rindex(")") + 1 :].split()[:3]
            if int(group) == number:
                command = Path(f"/proc/{entry}/cmdline").read_text(errors="replace")
                yield Process(int(entry), state, command)


# ---- images of several tasks ----


WIDE_CLUSTER = 256 * KiB

#: A task moves 64 MiB; weights count whole clusters or data in many small pieces as full.
TASK_CLUSTERS = 64 * MiB // WIDE_CLUSTER

BASE_DATA, IMAGE_DATA, ODD = 0, 2, 15


@dataclass(frozen=True)
class Wide:
    """A chain for `commit` or `flatten` that is cut into several tasks and holds little data.

    Of sixteen clusters, the first has 4 KiB of data in the base, the third and the last in the
    image.  The last is the only one that is local for flatten and that is not for commit, so
    that both jobs move all others: those are `selected`.  `seen` is the guest's view, digests of
    the clusters that are not zero.
    """

    here: Path
    job: str
    clusters: int
    selected: frozenset[int]
    seen: dict[int, str]

    @classmethod
    def lay(cls, here: Path, job: str, tasks: int = 3) -> Wide:
        """Make the files."""
        clusters = tasks * TASK_CLUSTERS
        for name, places in (("base.img", (BASE_DATA,)), ("top.raw", (IMAGE_DATA, ODD))):
            with (here / name).open("wb") as file:
                file.truncate(clusters * WIDE_CLUSTER)
                for number in (n for n in range(clusters) if n % 16 in places):
                    file.seek(number * WIDE_CLUSTER)
                    file.write(f"{name} {number} ".encode().ljust(4 * KiB, b"."))
        odd = frozenset(range(ODD, clusters, 16))
        selected = frozenset(range(clusters)) - odd
        cow = overlay_bytes(
            image="top.raw",
            size=clusters * WIDE_CLUSTER,
            backing="base.img",
            cluster=WIDE_CLUSTER,
            local=selected if job == "commit" else odd,
        )
        (here / "top.add-cow").write_bytes(cow)
        seen = view(here / "top.add-cow", here / "base.img", here / "top.raw")
        return cls(here, job, clusters, selected, seen)

    @property
    def top(self) -> Path:
        """The overlay."""
        return self.here / "top.add-cow"

    @property
    def target(self) -> Path:
        """The file that receives the data."""
        return self.here / ("base.img" if self.job == "commit" else "top.raw")

    @property
    def source(self) -> Path:
        """The file that the data comes from."""
        return self.here / ("top.raw" if self.job == "commit" else "base.img")

    @property
    def writes(self) -> str:
        """The event of writing into the target."""
        return "backing_write" if self.job == "commit" else "image_write"

    @property
    def reads(self) -> str:
        """The event of reading the source."""
        return "image_read" if self.job == "commit" else "backing_read"

    def moved(self, task: int) -> list[int]:
        """The clusters with data that a task moves."""
        place = IMAGE_DATA if self.job == "commit" else BASE_DATA
        return list(range(task * TASK_CLUSTERS + place, (task + 1) * TASK_CLUSTERS, 16))

    def published(self) -> set[int]:
        """The clusters whose bits say that they are done."""
        local = set(local_clusters(self.top))
        return set(range(self.clusters)) - local if self.job == "commit" else local

    def holds(self) -> None:
        """Assert that the guest sees what it saw, and that no file is shorter."""
        assert view(self.top, self.here / "base.img", self.here / "top.raw") == self.seen
        for name in ("base.img", "top.raw"):
            assert (self.here / name).stat().st_size == self.clusters * WIDE_CLUSTER

    def is_done(self) -> None:
        """Assert that the target alone is the disk, and that the bits say so."""
        self.holds()
        assert view(self.target, self.target) == self.seen
        assert self.published() == set(range(self.clusters))
        if self.job == "commit":
            assert stored_bytes(self.here / "top.raw") == 0

    def again(self) -> None:
        """Run the same command once more, without faults, to its right end."""
        succeed(self.job, "--jobs", "2", "top.add-cow", cwd=self.here)
        self.is_done()


def view(path: Path, *files: Path) -> dict[int, str]:
    """Return digests of what a guest sees in the clusters that are not zero.

    Only where one of the files has data is there anything to see, whatever the bits say.
    """
    with ExitStack() as stack:
        layers = [oracle.open_layer(str(path), "raw", stack)[0]]
        if path.suffix == ".add-cow":
            layers = oracle.open_chain(str(path), stack)
        places = sorted(set().union(*map(clusters_with_data, files)))
        pieces = ((n, oracle.read_layers(layers, n * WIDE_CLUSTER, WIDE_CLUSTER)) for n in places)
        return {n: hashlib.sha256(piece).hexdigest() for n, piece in pieces if piece.strip(b"\0")}


def clusters_with_data(path: Path) -> set[int]:
    """Return the clusters in which a file has anything but holes."""
    found: set[int] = set()
    position = 0
    with path.open("rb") as file, suppress(OSError):  # there is an end, ENXIO, to what is there
        while True:
            start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found |= set(range(start // WIDE_CLUSTER, -(-position // WIDE_CLUSTER)))
    return found


if __name__ == "__main__":
    _serve()
