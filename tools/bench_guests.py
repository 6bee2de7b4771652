"""The cases in which a guest uses an overlay: over NBD, and in QEMU through a twin.

*NBD.* fio sends random requests to a server, 16 at a time over one connection. The peers of
`addcow serve` are an nbdkit plugin in Python that answers without touching a disk, which is the
most that any plugin of ours could reach; qemu-nbd on a qcow2 file with the same content; and
nbdkit's file plugin on a raw file with the same content. Every run starts a server of its own.
After the warm-up, what the server shows is compared, or fio verifies what it has written.

*Twins.* `qemu-img bench` writes past the page cache, each request into another cluster, through
the qcow2 file that `addcow qemu export` makes, and into a plain qcow2 overlay of the same base.
Each run has files of its own: *fresh* ones, or ones whose same clusters were *written* before.

The seconds are those that fio and `qemu-img bench` report, requests alone, in milliseconds.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import addcow_mp
from addcow_mp.units import KiB, MiB
from bench_files import (
    CLUSTER,
    OLD,
    BenchError,
    CannotError,
    alternating,
    remove,
    tool,
    write_chain,
    write_raw,
)
from bench_runs import (
    ADDCOW,
    ENVIRONMENT,
    PATIENCE,
    Around,
    Case,
    Contender,
    Disk,
    Stage,
    nothing,
)

#: Requests at a time, as in the figures that the targets come from.
DEPTH = 16

#: The disk is a quarter of the guest data, so that it stays in the page cache with its peers.
PART = 4

#: Nothing is measured with fewer requests.
FEWEST = 64

#: Seconds of a run that both tools report as 0: half of their last digit.
SHORTEST = 0.0005

#: What random writes write, so that fio can verify it.
PATTERN = "0x5a"

EMPTY_PLUGIN = '''"""An nbdkit plugin that answers every request and touches no disk."""

import nbdkit

API_VERSION = 2
SIZE = {size}


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return 1


def get_size(disk):
    return SIZE


def pread(disk, buffer, offset, flags):
    pass


def pwrite(disk, buffer, offset, flags):
    pass


def flush(disk, flags):
    pass
'''


# ---- servers ----


@dataclass
class Server:
    """A server of one disk on the Unix socket ``socket`` in the directory ``here``."""

    name: str
    words: tuple[str, ...]
    here: Path
    socket: str
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        """Its address, for a client that runs in the same directory."""
        return f"nbd+unix:///?socket={self.socket}"

    def start(self) -> None:
        """Start it, and wait until it accepts a connection."""
        process = subprocess.Popen(
            self.words,
            cwd=self.here,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        deadline = time.monotonic() + PATIENCE
        while not self._accepts():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise BenchError(f"{self.name} does not start: {process.communicate()[1].strip()}")
            time.sleep(0.01)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.here / self.socket))
            except OSError:
                return False
        return True

    def stop(self) -> None:
        """End it, and remove its socket."""
        while self.running:
            process = self.running.pop()
            process.terminate()
            process.communicate(timeout=PATIENCE)
        remove(self.here / self.socket)


def _ours(here: Path) -> Server:
    words = (ADDCOW, "serve", "--socket", "ours.sock", "top.add-cow")
    return Server("addcow serve", words, here, "ours.sock")


def _empty(here: Path) -> Server:
    words = ("nbdkit", "--foreground", "--unix", "empty.sock", "python", "empty.py")
    return Server("empty nbdkit plugin", words, here, "empty.sock")


def _qemu_nbd(here: Path) -> Server:
    words = ("qemu-nbd", "-t", "-e", "4", "-f", "qcow2", "--cache=writeback")
    where = ("-k", str(here / "qemu.sock"), "top.qcow2")
    return Server("qemu-nbd, qcow2", (*words, *where), here, "qemu.sock")


def _file(here: Path) -> Server:
    words = ("nbdkit", "--foreground", "--unix", "file.sock", "file", "all.raw")
    return Server("nbdkit file plugin", words, here, "file.sock")


# ---- fio ----


def _served_files(here: Path, total: int) -> None:
    """A chain in short runs, its guest's view as a raw file, and the plugin that does nothing."""
    for name, package in (("fio", "fio"), ("nbdkit", "nbdkit"), ("qemu-nbd", "qemu-utils")):
        if shutil.which(name) is None:
            raise CannotError(f"{name} is needed: apt-get install {package}")
    write_chain(here, max(total // PART, 2 * MiB), CLUSTER)
    size = (here / "all.raw").stat().st_size
    (here / "empty.py").write_text(EMPTY_PLUGIN.format(size=size))


def _requests(verb: str, block: int, share: int) -> Callable[[Path, int], list[str]]:
    """The words of fio for one part in ``share`` of the guest data, in requests of ``block``."""

    def words(here: Path, total: int) -> list[str]:
        count = max(FEWEST, total // share // block)
        return [
            *("fio", "--name=guest", "--ioengine=nbd", f"--rw={verb}", f"--bs={block}"),
            *(f"--iodepth={DEPTH}", "--norandommap", "--randseed=1"),
            *(f"--size={(here / 'all.raw').stat().st_size}", f"--io_size={count * block}"),
        ]

    return words


def _fio(server: Server, words: list[str]) -> float:
    """The seconds that fio reports for its requests to ``server``."""
    report = server.here / "fio.json"
    asked = (*words, f"--uri={server.uri}", "--output-format=json", f"--output={report}")
    tool(*asked, cwd=server.here)
    (job,) = json.loads(report.read_text())["jobs"]
    done = job["read"]["total_ios"] + job["write"]["total_ios"]
    if job["error"] or not done:
        raise BenchError(f"fio has done nothing with {server.name}: error {job['error']}")
    milliseconds = int(job["read"]["runtime"] + job["write"]["runtime"])
    return max(SHORTEST, milliseconds / 1000)


def _client(
    server: Server, words: list[str], verify: Callable[[], None], *, counted: bool
) -> Contender:
    shown = f"{' '.join(words)}, served by {' '.join(server.words)}"
    shown = shown.replace(ADDCOW, "addcow").replace(f"{server.here}/", "")
    around = Around(before=server.start, verify=verify, after=server.stop)
    return Contender(server.name, shown, lambda: _fio(server, words), around, counted)


def _served(verb: str, block: int, share: int, *, empty: bool) -> Callable[..., list[Contender]]:
    """Ours and its peers; with ``empty`` only the empty plugin counts, else only real servers."""
    request = _requests(verb, block, share)

    def contenders(here: Path, total: int) -> list[Contender]:
        words = request(here, total)

        def verify(server: Server) -> None:
            if verb == "randread":
                tool(
                    "qemu-img", "compare", "-f", "raw", "-F", "raw", "all.raw", server.uri, cwd=here
                )
            else:
                pattern = ("--verify=pattern", f"--verify_pattern={PATTERN}", "--verify_only=1")
                tool(*words, *pattern, f"--uri={server.uri}", "--output=fio.out", cwd=here)

        if verb == "randwrite":
            words.append(f"--buffer_pattern={PATTERN}")
        ours, *others = _ours(here), _qemu_nbd(here), _file(here)
        made = [_client(ours, words, partial(verify, ours), counted=True)]
        if empty:
            made.append(_client(_empty(here), words, nothing, counted=True))
        made += [_client(one, words, partial(verify, one), counted=not empty) for one in others]
        return made

    return contenders


SERVED_HOT = ("top.add-cow", "top.raw", "base.raw", "top.qcow2", "all.raw")


def _served_case(verb: str, block: int, share: int, target: float | None) -> Case:
    size = f"{block // MiB}m" if block >= MiB else f"{block // KiB}k"
    what = verb.removeprefix("rand")
    against = "an empty plugin" if target else "qemu-nbd and nbdkit's file plugin"
    return Case(
        name=f"serve-{what}-{size}",
        title=f"serve, random {what}s of {size}, against {against}",
        contenders=_served(verb, block, share, empty=target is not None),
        hot=SERVED_HOT,
        target=target,
    )


#: Larger requests move more bytes, in fewer requests. Reading comes first: writing changes files.
SERVED = tuple(
    _served_case(verb, block, share, target if block == 4 * KiB else None)
    for verb, target in (("randread", 0.7), ("randwrite", 0.5))
    for block, share in ((4 * KiB, 32), (64 * KiB, 8), (MiB, 4))
)


# ---- twins ----


def _base_file(here: Path, total: int) -> None:
    runs = alternating(max(total // PART, 2 * MiB), MiB, 0)
    write_raw(here / "base.raw", runs[-1][1], runs, OLD)


def _new_twin(here: Path, crash: str) -> None:
    """An empty overlay of the base, lent through its twin."""
    addcow_mp.create(here / "top.add-cow", backing="base.raw", backing_format="raw")
    words = ("qemu", "export", "--quiet", "--absolute-data-file", "--crash", crash, "top.add-cow")
    try:
        tool(ADDCOW, *words, cwd=here)
    except BenchError as error:
        raise CannotError(f"no {crash} twin: {error}") from error


def _new_plain(here: Path) -> None:
    options = ("-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "plain.qcow2")
    tool("qemu-img", "create", *options, cwd=here)


def _bench_words(here: Path, total: int, name: str) -> tuple[str, ...]:
    """Writes of 4 KiB, each into another cluster, all over the disk, past the page cache."""
    clusters = (here / "base.raw").stat().st_size // CLUSTER
    count = min(clusters, max(FEWEST, total // MiB))
    step = clusters // count * CLUSTER
    how = ("-w", "-t", "none", "-d", str(DEPTH), "-c", str(count), "-s", "4096", "-S", str(step))
    return ("qemu-img", "bench", *how, "-f", "qcow2", name)


def _guest(
    here: Path, words: tuple[str, ...], name: str, make: Callable[[], None], *, fresh: bool
) -> Contender:
    """``qemu-img bench`` on files that ``make`` makes, fresh or with the same requests done."""

    def before() -> None:
        make()
        if not fresh:
            tool(*words, cwd=here)

    def run() -> float:
        found = re.search(r"completed in ([0-9.]+) seconds", tool(*words, cwd=here))
        if found is None:
            raise BenchError(f"{' '.join(words)} says no time")
        return max(SHORTEST, float(found[1]))

    made = ("top.add-cow", "top.raw", "top.qcow2", "plain.qcow2")
    around = Around(
        before=before,
        verify=lambda: _check(here / words[-1]),
        after=lambda: remove(*(here / one for one in made)),
    )
    return Contender(name, " ".join(words), run, around)


def _check(path: Path) -> None:
    tool("qemu-img", "check", "-q", "-f", "qcow2", path)


def _twins(crash: str, *, fresh: bool) -> Callable[[Path, int], list[Contender]]:
    def contenders(here: Path, total: int) -> list[Contender]:
        ours, plain = (_bench_words(here, total, name) for name in ("top.qcow2", "plain.qcow2"))
        return [
            _guest(here, ours, f"{crash} twin", lambda: _new_twin(here, crash), fresh=fresh),
            _guest(here, plain, "plain qcow2", lambda: _new_plain(here), fresh=fresh),
        ]

    return contenders


def _twin_cases(prefix: str) -> tuple[Case, ...]:
    return tuple(
        Case(
            name=f"{prefix}-{crash}-{'fresh' if fresh else 'written'}",
            title=f"qemu-img bench, 4k writes to {'fresh' if fresh else 'written'} clusters "
            f"of a {crash} twin, against plain qcow2",
            contenders=_twins(crash, fresh=fresh),
            hot=("base.raw",),
        )
        for crash in ("strict", "relaxed")
        for fresh in (True, False)
    )


#: Space: chain, twin and raw file of a quarter of the data; base and two overlays of a quarter.
GUEST_STAGES = (
    Stage(build=_served_files, cases=SERVED, room=1.2),
    Stage(build=_base_file, cases=_twin_cases("twin"), room=1),
    Stage(build=_base_file, cases=_twin_cases("xfs"), room=1, disk=Disk.XFS),
)
