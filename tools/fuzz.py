#!/usr/bin/env python3
"""Fuzzing: chains of images with any kind of damage, read by all commands.

A *scene* is a directory of small or sparse files: a valid chain of overlays with damage: header
fields at their limits, names that lead outside, files that are cut, lengthened, linked to each
other, or not regular files. In some of them the top is lent to QEMU, and the tables of its twin are
damaged too. Hypothesis draws the scenes and shrinks those that show a fault.

A scene is *examined* by running every reading command on it, inside this process:

- the exit status is one of the documented ones, and JSON output is JSON;
- every line on stderr comes from the program: no traceback, no "unexpected";
- nothing outside the directory is opened: an audit hook sees what Python opens, an inotify watch on
  a directory beside it sees every other way of opening;
- no file changes, and no command takes long or uses much memory; only `qemu import`, which comes
  last, may change files, and does not when it is refused;
- the output of convert is what the independent reader reads, and it accepts what convert accepts;
- the check of the farm reports for each image what the check of that image alone reports.

The search runs in a separate process, which saves each scene before it examines it: a scene that
kills the process (a signal, a hang in C code, the memory limit) is a find too.

A find is saved as a small JSON file. It contains the scene itself and not the random choices that
led to it, so it stays the same when the drawing changes. tests/test_fuzz_finds.py replays all.

    fuzz.py [--seconds N] [--seed N] [--finds DIR]    search; exit status 1 with finds
    fuzz.py --replay FILE...                          examine saved scenes
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import oracle  # noqa: E402 - a module beside this script
from addcow_mp.format import qcow2, qcow2_write  # noqa: E402 - to draw a valid twin
from watch import Watch  # noqa: E402

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
FINDS = ROOT / "tests" / "fuzz_finds"

#: Documented exit statuses of the commands that only read.
STATUSES = {0, 1, 2, 3, 63, 64}
#: Seconds for one command: a thousand times what files of this size need.
PATIENCE = 10
#: Address space of the process: more is a MemoryError, and does not stop the machine.
ADDRESSES = 8 * GiB
#: What a command may add to the resident memory of the process.
MEMORY = 200 * MiB
#: Exit status of a search with finds; any other but 0 is a search that was killed.
FOUND = 3
#: Signals that no fault of the program sends: a search that one ends shows nothing.
STOPPED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Killed searches after which the search ends.
DEATHS = 5
#: Guests up to this size are compared byte by byte.
COMPARED = 8 * MiB

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("info", "{box}/top.add-cow"),
    ("info", "--backing-chain", "--output", "json", "{box}/top.add-cow"),
    ("map", "{box}/top.add-cow"),
    ("map", "--output", "json", "{box}/top.add-cow"),
    ("check", "{box}/top.add-cow"),
    ("check", "--output", "json", "{box}/top.add-cow"),
    ("io", "-r", "-c", "read 0 4k", "-c", "read -v 1k 64", "-c", "map", "{box}/top.add-cow"),
    ("convert", "-O", "raw", "--jobs", "0", "{box}/top.add-cow", "{out}/new.raw"),
    ("farm", "ls", "--output", "json", "{box}"),
    ("farm", "graph", "{box}"),
    ("farm", "graph", "--output", "json", "{box}"),
    ("farm", "plan", "commit", "--jobs", "0", "--output", "json", "{box}"),
    ("farm", "plan", "flatten", "--discard", "--jobs", "0", "--output", "json", "{box}"),
    ("farm", "check", "--jobs", "0", "--output", "json", "{box}"),
    ("verify", "--jobs", "0", "--output", "json", "{box}/top.add-cow"),
    ("farm", "verify", "--jobs", "0", "--output", "json", "{box}"),
    ("farm", "scrub", "run", "--jobs", "0", "--output", "json", "{box}", "--state", "{out}/state"),
    ("farm", "scrub", "status", "--output", "json", "--state", "{out}/state"),
    ("qemu", "status", "--output", "json", "{box}/top.add-cow"),
    ("qemu", "args", "--output", "json", "{box}/top.add-cow"),
    ("qemu", "import", "--adopt", "{box}/top.add-cow"),
)


# ---- scenes ----

Extent = tuple[int, bytes, int]
"""Offset, bytes, and how often they are repeated."""


@dataclass
class Entry:
    """One name in the directory: a file of ``length`` bytes, or something else."""

    path: str
    kind: str = "file"
    length: int = 0
    extents: list[Extent] = field(default_factory=list)
    target: str = ""

    def as_json(self) -> dict[str, Any]:
        """The entry without what it has by default."""
        extents = [[at, data.hex(), times] for at, data, times in self.extents]
        every = {
            "kind": self.kind,
            "length": self.length,
            "extents": extents,
            "target": self.target,
        }
        usual = {"kind": "file", "length": 0, "extents": [], "target": ""}
        return {"path": self.path, **{k: v for k, v in every.items() if v != usual[k]}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Entry:
        """The entry that :meth:`as_json` described."""
        extents = [(at, bytes.fromhex(data), times) for at, data, times in found.get("extents", [])]
        return cls(**{**found, "extents": extents})


@dataclass
class Scene:
    """A directory, and the reason why it was kept."""

    entries: list[Entry]
    why: str = ""

    def as_json(self) -> str:
        """The scene as the text of a file."""
        entries = ",\n  ".join(json.dumps(entry.as_json()) for entry in self.entries)
        return f'{{"why": {json.dumps(self.why)},\n "entries": [\n  {entries}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """The scene that :meth:`as_json` described."""
        found = json.loads(text)
        return cls([Entry.from_json(each) for each in found["entries"]], found["why"])


def build(scene: Scene, box: str) -> None:
    """Make the files of a scene; a name that cannot be made is left out."""
    for entry in scene.entries:
        with contextlib.suppress(OSError, ValueError):
            _MAKERS[entry.kind](entry, os.path.join(box, entry.path))


def _make_file(entry: Entry, path: str) -> None:
    with open(path, "xb") as file:
        file.truncate(entry.length)
        for at, data, times in entry.extents:
            file.seek(at)
            file.write((data * times)[: max(0, entry.length - at)])


def _make_socket(_: Entry, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


_MAKERS: dict[str, Any] = {
    "file": _make_file,
    "link": lambda entry, path: os.symlink(entry.target, path),
    "hardlink": lambda entry, path: os.link(
        os.path.join(os.path.dirname(path), entry.target), path
    ),
    "fifo": lambda _, path: os.mkfifo(path),
    "directory": lambda _, path: os.mkdir(path),
    "socket": _make_socket,
}


# ---- examining ----


class HangError(BaseException):
    """A command took too long. Not an Exception: the command must not catch it."""


@dataclass
class _Guard:
    """Paths that Python opens although the command must not."""

    allowed: tuple[str, ...] = ()
    active: bool = False
    opened: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event == "open" and isinstance(arguments[0], str | bytes):
            self.active = False  # what this looks up is its own business
            path = _led_to(os.fsdecode(arguments[0]), arguments[2])
            if not f"{path}/".startswith(self.allowed) and not _KERNELS.fullmatch(path):
                self.opened.append(path)
            self.active = True


def _led_to(path: str, flags: int) -> str:
    """The file that such a call opens; not every call follows a link at the end."""
    if flags & os.O_NOFOLLOW:
        directory, name = os.path.split(path)
        return os.path.join(os.path.realpath(directory), name)
    return os.path.realpath(path)


#: Where the program looks for the holder of a lock, and for the type of a file system.
_KERNELS = re.compile(
    r"/proc/\d+/(fdinfo/\d+|comm|mountinfo)|/proc/swaps|/sys/(block|class|dev|devices)/.*|/dev/loop[\dp]+"
)

_guard = _Guard()


def _arm() -> None:
    """Install the audit hook, once: it cannot be removed."""
    if not _guard.allowed:
        homes = {sys.prefix, sys.base_prefix, str(ROOT / "addcow_mp")}
        _guard.allowed = tuple(os.path.realpath(home) + "/" for home in homes)
        sys.addaudithook(_guard)


@contextlib.contextmanager
def _limited(box: str, out: str) -> Iterator[None]:
    """Watch what is opened and limit the time within the block."""

    def ring(*_: object) -> None:
        raise HangError

    _arm()
    homes, _guard.opened = _guard.allowed, []
    _guard.allowed = (*homes, box + "/", out + "/")
    _guard.active = True
    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        _guard.active = False
        _guard.allowed = homes


@dataclass(frozen=True)
class Outcome:
    """The result of one command."""

    status: int
    out: str
    err: str


def run(arguments: Sequence[str]) -> Outcome:
    """Run a command line in this process, its output as a terminal in UTF-8 would take it."""
    from addcow_mp.cli.main import run as command

    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))
    return Outcome(status, *texts)


def examine(scene: Scene, commands: Sequence[Sequence[str]] = COMMANDS) -> str | None:
    """Run the commands on a scene; return the first fault that they show, or None."""
    with tempfile.TemporaryDirectory(prefix="addcow-fuzz-") as name:
        top = os.path.realpath(name)
        box, out, outside = (os.path.join(top, part) for part in ("box", "out", "outside"))
        for directory in (box, out, outside):
            os.mkdir(directory)
        with open(os.path.join(outside, "secret.img"), "wb") as file:
            file.write(b"S" * 64 * KiB)
        build(scene, box)
        places = {"box": box, "out": out, "outside": outside}
        with Watch(outside, os.path.join(outside, "secret.img")) as watch:
            for command in commands:
                fault = _examine([word.format(**places) for word in command], places, watch)
                if fault is not None:
                    return f"{' '.join(command)}: {fault}"
    return None


def _examine(command: list[str], places: dict[str, str], watch: Watch) -> str | None:
    before, memory, outcome = _fingerprint(places["box"]), _forget_peak(), None
    try:
        with _limited(places["box"], places["out"]):
            outcome = run(command)
    except HangError:
        return f"it took more than {PATIENCE} seconds"
    except BaseException as error:
        return f"it raised {type(error).__name__}: {error}"
    opened = set(_guard.opened + [event.path for event in watch.events()])
    if command[0] == "farm":
        # A link in a place that the user named is a file of that place, wherever it leads.
        opened -= set(_linked(places["box"]))
    if opened:
        return f"it opened {min(opened)}, which lies outside"
    may_change = command[:2] == ["qemu", "import"] and outcome.status == 0
    if not may_change and _fingerprint(places["box"]) != before:
        return "a file was changed"
    if _peak() - memory > MEMORY:
        return f"it took {(_peak() - memory) // MiB} MiB of memory"
    return _judge(command, outcome, places)


def _linked(box: str) -> Iterator[str]:
    """The files that links in the box lead to, but those of the kernel."""
    for entry in os.scandir(box):
        path = os.path.realpath(entry.path)
        if entry.is_symlink() and os.path.isfile(path) and not path.startswith(("/proc", "/sys")):
            yield path


def _fingerprint(box: str) -> list[tuple[object, ...]]:
    """Attributes that change with a file's content, and not when it is read."""
    found: list[tuple[object, ...]] = []
    for entry in sorted(os.scandir(box), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        told = (status.st_mode, status.st_ino, status.st_size, status.st_ctime_ns)
        found.append((entry.name, *told))
    return found


def _forget_peak() -> int:
    """Reset the peak of resident memory, and return its current value."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _peak()


def _peak() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * KiB


def _judge(command: list[str], outcome: Outcome, places: dict[str, str]) -> str | None:
    """The fault in the exit status or the output of a command, if any."""
    if outcome.status not in STATUSES:
        return f"exit status {outcome.status}"
    for line in outcome.err.removesuffix("\n").split("\n") if outcome.err else ():
        if not _is_told(line, command[0]) or "unexpected" in line or "Traceback" in line:
            return f"it said {line!r}"
    if outcome.status == 1 and not outcome.err + outcome.out:
        return "it failed without a word"
    if "json" in command and outcome.status != 1:
        try:
            json.loads(outcome.out)
        except ValueError as error:
            return f"its JSON is none: {error}"
    judge = {"convert": _compare, "farm check": _compare_checks}
    verb = " ".join(command[: 1 + (command[0] == "farm")])
    return judge[verb](command, outcome, places) if verb in judge else None


def _compare_checks(_: list[str], outcome: Outcome, places: dict[str, str]) -> str | None:
    if outcome.status == 1 and not outcome.out:
        return None
    for image in json.loads(outcome.out)["images"]:
        with _limited(places["box"], places["out"]):
            words = ("--root", places["box"], "--output", "json", image["filename"])
            alone = run(("check", *words))
        findings = json.loads(alone.out)["findings"] if alone.out else []
        if (image["exit"], image["findings"]) != (alone.status, findings):
            return f"of {image['filename']} it says {image}, alone {alone.status}: {findings}"
    return None


def _is_told(line: str, verb: str) -> bool:
    # io prints qemu-io's words for a failure.
    return line.startswith("addcow: ") or (verb == "io" and "failed: " in line)


def _compare(command: list[str], outcome: Outcome, places: dict[str, str]) -> str | None:
    new = command[-1]
    if outcome.status != 0:
        return "it failed and left its file" if os.path.lexists(new) else None
    size = os.path.getsize(new)
    if size > COMPARED:
        return None
    try:
        wanted = oracle.guest_bytes(os.path.join(places["box"], "top.add-cow"))
    except oracle.OracleError as error:
        return f"it accepted what the format forbids: {error}"
    except OSError as error:
        # Resolving a path removes a slash behind a file's name.
        return None if error.errno == errno.ENOTDIR else f"it opened what is not there: {error}"
    with open(new, "rb") as file:
        if file.read() != wanted:
            return "it wrote something else than the guest's view"
    return None


# ---- drawing ----

LAYOUT = struct.Struct("<4sIIIIIQQI16s16s")
FIELDS = (
    *("magic", "backing_offset", "backing_size", "image_offset", "image_size", "cluster_bits"),
    *("features", "compatible_features", "header_size", "backing_format", "image_format"),
)

QCOW2_FIELDS = [
    (struct.calcsize(">" + "".join(before.code for before in qcow2.FIELDS[:number])), one.code)
    for number, one in enumerate(qcow2.FIELDS)
    if one.code in "IQ"
]

EDGES_32 = (0, 1, 11, 12, 16, 21, 22, 63, 64, 75, 76, 77, 1023, 1024, 4095, 4096, 4097, 8192,
            65535, 65536, 65537, 2**21, 2**31 - 1, 2**31, 2**32 - 4096, 2**32 - 1)  # fmt: skip
EDGES_64 = (0, 1, 2, 3, 2**31, 2**32, 2**63, 2**64 - 1)
LENGTHS = (0, 1, 4, 75, 76, 77, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193, 65536, 131072,
           MiB, GiB, 2**32 - 512, 2**32 + 512, TiB, 3 * TiB + 512, 16 * TiB - 4096)  # fmt: skip
FORMATS = (
    b"",
    b"raw",
    b"add-cow",
    b"qcow2",
    b"qed",
    b"raw\0x",
    b"RAW",
    b"r" * 16,
    b"\xff\xfe",
    b"vdi",
)
NAMES = (
    *(
        b"",
        b".",
        b"..",
        b"/",
        b"top.add-cow",
        b"./top.add-cow",
        b"top.raw",
        b"one.raw",
        b"base.img",
    ),
    *(b"./base.img", b"base.img/", b"base.img\0", b"x\0y", b"\xff\xfe", b"a\nb", b"\x1b[2J", b" "),
    *(b"../outside/secret.img", b"../box/base.img", b"../box/../outside/secret.img", b"odd"),
    *(b"odd/secret.img", b"odd/base.img", b"/etc/passwd", b"/proc/version", b"/proc/self/mem"),
    *(b"/dev/zero", b"/dev/stdin", b"/sys/kernel/profiling", b"/proc/self/cwd/x", b"a" * 255),
    *(b"a" * 1023, b"a" * 1024, b"a/" * 2040, b"nbd:localhost:1", b"json:{}", b"file:base.img"),
    *(b":", b"./:", b"fd:0", b"http://127.0.0.1/x", b"base.img:x", b"%s%n", b"{box}"),
)
TARGETS = (
    *("base.img", "odd", "../outside/secret.img", "../outside", ".", "..", "/", "/etc/passwd"),
    *("top.add-cow", "/proc/self/root", "/proc/self/fd", "nowhere", "/dev/zero", "/proc/version"),
)
KINDS = ("link", "fifo", "directory", "socket", "missing")


@dataclass
class _Layer:
    """An overlay that is being drawn: its header before the damage."""

    name: str
    cluster_bits: int
    length: int
    held: int
    local: int
    backing: bytes
    backing_format: bytes
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def cluster(self) -> int:
        return 1 << min(self.cluster_bits, 21)

    @property
    def image(self) -> str:
        return f"{self.name}.raw"

    def entries(self) -> list[Entry]:
        """The overlay's file and its image file."""
        header_size = max(4 * KiB, self.cluster)
        clusters = -(-(self.length // 512 * 512) // self.cluster)
        bitmap = -(-clusters // (8 * self.cluster)) * self.cluster
        bits = (self.local & ((1 << clusters) - 1)).to_bytes(-(-clusters // 8), "little")
        header = self._header(header_size)
        extents: list[Extent] = [(0, header, 1)]
        if bits.strip(b"\0"):
            extents.append((header_size, bits, 1))
        cow = Entry(f"{self.name}.add-cow", length=header_size + bitmap, extents=extents)
        return [cow, Entry(self.image, length=self.length, extents=self._data())]

    def _header(self, header_size: int) -> bytes:
        backing: bytes = self.changes.get("backing", self.backing)
        image: bytes = self.changes.get("image", self.image.encode())
        values: dict[str, Any] = {
            "magic": b"ACOW",
            "backing_offset": 76 if backing else 0,
            "backing_size": len(backing),
            "image_offset": 76 + len(backing),
            "image_size": len(image),
            "cluster_bits": self.cluster_bits,
            "features": 0,
            "compatible_features": 0,
            "header_size": header_size,
            "backing_format": self.backing_format if backing else b"",
            "image_format": b"raw",
        }
        values.update({k: v for k, v in self.changes.items() if k in values})
        return LAYOUT.pack(*(values[name] for name in FIELDS)) + backing + image

    def _data(self) -> list[Extent]:
        letter = self.name[:1].upper().encode()
        held = (number for number in range(16) if self.held >> number & 1)
        return [(number * self.cluster, letter, self.cluster) for number in held]


@st.composite
def chains(draw: st.DrawFn) -> list[_Layer]:
    """A valid chain of one to three overlays."""
    layers = []
    depth = draw(st.integers(1, 3))
    for level in range(depth):
        last = level == depth - 1
        layers.append(
            _Layer(
                name=("top", "one", "two")[level],
                cluster_bits=draw(st.sampled_from((12, 13, 16, 21))),
                length=draw(st.integers(0, 14)) * 4 * KiB - 0,
                held=draw(st.integers(0, 2**16 - 1)),
                local=draw(st.integers(0, 2**16 - 1)),
                backing=b"base.img" if last else ("one", "two")[level].encode() + b".add-cow",
                backing_format=b"raw" if last else b"add-cow",
            )
        )
    return layers


field_changes = st.one_of(
    st.tuples(st.sampled_from(FIELDS[1:6] + FIELDS[8:9]), st.sampled_from(EDGES_32)),
    st.tuples(st.sampled_from(FIELDS[1:6] + FIELDS[8:9]), st.integers(0, 2**32 - 1)),
    st.tuples(st.sampled_from(FIELDS[6:8]), st.sampled_from(EDGES_64)),
    st.tuples(st.sampled_from(FIELDS[9:]), st.sampled_from(FORMATS)),
    st.tuples(st.sampled_from(("backing", "image")), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(("backing", "image")), st.binary(max_size=40)),
)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """A chain with some damage."""
    layers = draw(chains())
    twin = [draw(twins(layers[0]))] if draw(st.integers(0, 3)) == 3 else []
    for name, value in draw(st.lists(field_changes, max_size=3)):
        draw(st.sampled_from(layers)).changes[name] = value
    base = Entry("base.img", length=draw(st.integers(0, 14)) * 4 * KiB)
    base.extents = [(0, b"B", base.length)]
    entries = [entry for layer in layers for entry in layer.entries()] + [base, *twin]
    for damage in draw(st.lists(st.sampled_from(DAMAGES), max_size=3)):
        damage(draw, entries)
    return Scene([entry for entry in entries if entry.kind != "missing"])


LENT, LENT_ID = 1 << 63, 0x1234


@st.composite
def twins(draw: st.DrawFn, top: _Layer) -> Entry:
    """The file through which QEMU uses ``top``, which becomes lent, with some damage."""
    kind = draw(st.sampled_from(list(qcow2.Kind)))
    bits = qcow2.SECTOR_CLUSTER_BITS if kind is qcow2.Kind.SECTOR else top.cluster_bits
    extended = qcow2.EXTENDED_L2 if kind is qcow2.Kind.SECTOR else 0
    incompatible = qcow2.DATA_FILE | extended | draw(st.sampled_from((0, qcow2.DISABLED)))
    size = top.length // 512 * 512
    fixed = qcow2.Fixed(cluster_bits=bits, size=size, incompatible=incompatible)
    mark = qcow2.Mark(kind, LENT_ID, *[0] * 6)
    header = qcow2.Header(fixed, mark, top.backing, top.backing_format, b"/dev/null/x")
    spans = [(n * top.cluster, min((n + 1) * top.cluster, size)) for n in range(16)]
    runs = [span for n, span in enumerate(spans) if top.local >> n & 1 and span[0] < span[1]]
    parts = list(qcow2_write.chunks(qcow2_write.Image(header, lambda: iter(runs))))
    top.changes["features"] = LENT | LENT_ID
    twin = Entry("top.qcow2", length=max(at + len(data) for at, data in parts))
    twin.extents = [(at, data, 1) for at, data in parts]
    for _ in range(draw(st.integers(0, 3))):
        draw(st.sampled_from((_break_field, _break_entry)))(draw, twin)
    return twin


def _break_field(draw: st.DrawFn, twin: Entry) -> None:
    """Give a field of a twin's header a value at a limit."""
    place, code = draw(st.sampled_from(QCOW2_FIELDS))
    edges = EDGES_64 if code == "Q" else EDGES_32
    value = draw(
        st.sampled_from((*edges, *((64 * KiB * n for n in range(6)) if code == "Q" else ())))
    )
    twin.extents.append((place, struct.pack(f">{code}", value), 1))


def _break_entry(draw: st.DrawFn, twin: Entry) -> None:
    """Give an entry of a table another value: flags, and a place inside or outside of the file."""
    cluster = draw(st.sampled_from((4 * KiB, 16 * KiB, 64 * KiB)))
    place = draw(st.integers(1, 5)) * cluster + 8 * draw(st.integers(0, 6))
    flags = draw(st.sampled_from((0, 1, 1 << 62, 1 << 63, 1 << 63 | 1)))
    offset = draw(
        st.one_of(st.integers(0, 8).map(lambda n: n * cluster), st.sampled_from(EDGES_64))
    )
    value = (flags | offset) & (2**64 - 1)
    if place + 8 <= twin.length:
        twin.extents.append((place, struct.pack(">Q", value), 1))


def _lengthen(draw: st.DrawFn, entries: list[Entry]) -> None:
    length = st.one_of(st.sampled_from(LENGTHS), st.integers(0, 200 * KiB))
    draw(st.sampled_from(entries)).length = draw(length)


def _overwrite(draw: st.DrawFn, entries: list[Entry]) -> None:
    at = draw(st.one_of(st.integers(0, 80), st.sampled_from((4096, 8191, 65536, 65537))))
    data = st.one_of(
        st.binary(min_size=1, max_size=12), st.sampled_from((b"ACOW", b"QFI\xfb\0\0\0\3"))
    )
    draw(st.sampled_from(entries)).extents.append((at, draw(data), 1))


def _replace(draw: st.DrawFn, entries: list[Entry]) -> None:
    entry = draw(st.sampled_from(entries))
    # A file that the user names may lie anywhere: only other names must not lead outside.
    kinds = KINDS[1:] if entry.path == "top.add-cow" else KINDS
    entry.kind, entry.target = draw(st.sampled_from(kinds)), draw(st.sampled_from(TARGETS))
    entry.extents, entry.length = [], 0


def _add(draw: st.DrawFn, entries: list[Entry]) -> None:
    entry = Entry("odd", length=4096)
    entries.append(entry)
    entry.kind, entry.target = draw(st.sampled_from(KINDS)), draw(st.sampled_from(TARGETS))


def _cross(draw: st.DrawFn, entries: list[Entry]) -> None:
    """Replace one file by another one of the chain."""
    entry, other = draw(st.sampled_from(entries)), draw(st.sampled_from(entries))
    if entry is not other and not other.target:
        kind = draw(st.sampled_from(("hardlink", "link")))
        entry.kind, entry.target, entry.extents, entry.length = kind, other.path, [], 0
        entries.remove(entry)
        entries.append(entry)  # a hard link can be made when its file is there


DAMAGES = (_lengthen, _overwrite, _replace, _add, _cross)


# ---- searching ----


class FoundError(Exception):
    """A scene that shows a fault."""

    def __init__(self, scene: Scene, fault: str) -> None:
        super().__init__(fault)
        self.scene = scene
        self.fault = fault


def signature(fault: str) -> str:
    """The fault without what differs from scene to scene."""
    fault = re.sub(r"(it raised \w+):.*", r"\1", fault, flags=re.DOTALL)
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|0x[0-9a-f]+|\d+", "_", fault)


@dataclass
class Search:
    """Draws and examines scenes until its time is over. Each kind of fault is reported once."""

    deadline: float
    finds: Path
    pending: Path
    known: set[str] = field(default_factory=set)
    examined: int = 0
    shrinking: bool = False

    def attempt(self, scene: Scene) -> None:
        """Examine a scene; raises :class:`FoundError` for a fault that is new."""
        if time.monotonic() > self.deadline and not self.shrinking:
            return
        self.examined += 1
        self.pending.write_text(scene.as_json())
        faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)
        fault = examine(scene)
        faulthandler.cancel_dump_traceback_later()
        if fault is not None and signature(fault) not in self.known:
            self.shrinking = True
            raise FoundError(scene, fault)

    def round(self, number: int) -> None:
        """Draw some hundred scenes from a seed; save the first fault, shrunk."""
        self.shrinking = False
        try:
            seed(number)(_settings()(given(scenes())(self.attempt)))()
        except FoundError as found:
            self.known.add(signature(found.fault))
            save(found.scene, found.fault, self.finds)
        except Flaky as error:  # seen once, not again: worth a line, but nothing to keep
            print(f"seed {number}: {error.args[0].splitlines()[-1]}", flush=True)


def search(number: int, seconds: float, finds: Path, pending: Path) -> int:
    """Search from a seed on; return how many faults were found and saved."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    work = Search(time.monotonic() + seconds, finds, pending)
    while time.monotonic() < work.deadline:
        work.round(number)
        # Every time: the next round may be the one that kills this process.
        print(f"seed {number}: {work.examined} scenes, {len(work.known)} faults", flush=True)
        number += 1
    return len(work.known)


def _settings() -> settings:
    return settings(
        max_examples=500,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def save(scene: Scene, fault: str, finds: Path) -> None:
    """Write a find down."""
    scene.why = fault
    text = scene.as_json()
    path = finds / f"find-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
    finds.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"{path}: {fault}", flush=True)


def replay(paths: Iterable[str]) -> int:
    """Examine saved scenes; return how many show a fault."""
    faults = 0
    for path in paths:
        fault = examine(Scene.from_json(Path(path).read_text()))
        print(f"{path}: {fault or 'no fault'}", flush=True)
        faults += fault is not None
    return faults


def supervise(options: argparse.Namespace) -> int:
    """Search in another process, again when that one dies, until the time is over."""
    number = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    deadline, found, deaths = time.monotonic() + options.seconds, False, 0
    print(f"seed {number}", flush=True)
    with tempfile.TemporaryDirectory(prefix="addcow-fuzz-") as name:
        pending = Path(name) / "pending.json"
        while (left := deadline - time.monotonic()) > 1 and deaths < DEATHS:
            words = ("--inside", str(pending), "--seconds", str(left), "--seed", str(number))
            command = [sys.executable, __file__, *words, "--finds", str(options.finds)]
            status = subprocess.run(command, check=False).returncode
            if -status in STOPPED:
                print(f"another program stopped the search: {signal.Signals(-status).name}")
                return 1
            if status not in (0, FOUND):
                scene = Scene.from_json(pending.read_text())
                save(scene, f"the process ended with status {status}", options.finds)
                deaths, number = deaths + 1, number + 1000
            found |= status != 0
    return int(found)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Fuzz the reading commands.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--finds", type=Path, default=FINDS, help="where finds are saved")
    parser.add_argument("--replay", nargs="+", metavar="FILE")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay:
        return min(replay(options.replay), 1)
    if options.inside:
        found = search(options.seed, options.seconds, options.finds, options.inside)
        return FOUND if found else 0
    return supervise(options)


if __name__ == "__main__":
    sys.exit(main())
