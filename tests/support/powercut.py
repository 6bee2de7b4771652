"""Power cuts on real file systems, without cutting any power.

A `Disk` is a file system of its own in a sparse file on a loop device. `Disk.cut` is its
shutdown ioctl with "do not flush the log": from then on nothing reaches the device any more,
neither data nor journal, just as if the plug had been pulled, and what was in the page cache
only is gone. `Disk.recover` mounts it again, which replays the log.

A cut at any odd moment sees little: between two syncs the kernel keeps everything in memory,
so a wrong order of writes leaves no trace. Real machines have other processes that sync, and
kernels that write pages back when they like. That is the `Adversary`: during the job it syncs
the files of the chain at random moments. It has favourites, drawn once for each cut, because
one that syncs everything equally often makes good what the job has forgotten.

A `Moment` says when to cut: when a fault rule has stopped the job at the n-th event of a kind,
which reaches places that no clock would find (between clearing bits and freeing space), or
when so many bits of the bitmap have changed, which strikes within a system call.

What is not shown: a disk that loses what it promised to have written. The loop device keeps
what it was given; barriers are the kernel's and the disk's affair.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from support.promises import Promise
from support.victim import PATIENCE, Victim

MiB = 1024 * 1024

#: _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN, which XFS calls XFS_IOC_GOINGDOWN.
SHUTDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125
#: Its argument: lose the log as well.
NO_LOG_FLUSH = 2

#: How each file system is made: its size, and mkfs with what keeps it quick and quiet. The
#: smallest XFS has 300 MiB.
KINDS = {
    "ext4": (256 * MiB, ["-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"]),
    "xfs": (320 * MiB, ["-q"]),
}

#: Events at which a job is worth stopping, and how often they come while 16 MiB are worked on
#: in small steps; what several processes share comes less often in each of them, and a job that
#: is never stopped is cut after its end. Those around a sync are drawn more often.
EVENTS = {
    "commit": {
        "backing_write": 80,
        "data_sync": 34,
        "publish": 32,
        "bitmap_update": 60,
        "bitmap_sync": 50,
        "punch": 36,
    },
    "flatten": {
        "image_write": 60,
        "data_sync": 20,
        "publish": 20,
        "bitmap_update": 20,
        "bitmap_sync": 20,
        "punch": 6,
        "header_write": 1,
    },
    "io": {
        "image_write": 50,
        "cow_write": 16,
        "data_sync": 8,
        "bitmap_update": 12,
        "bitmap_sync": 6,
    },
    "rebase": {
        "image_write": 60,
        "data_sync": 20,
        "directory_sync": 1,
        "publish": 20,
        "bitmap_update": 20,
        "bitmap_sync": 20,
        "header_write": 3,
    },
    # A resize has the same few steps whatever the size.
    "resize": {
        "image_cut": 1,
        "cow_write": 1,
        "data_sync": 3,
        "bitmap_update": 2,
        "bitmap_sync": 2,
        "resize": 2,
    },
    "reset": {
        "bitmap_cut": 1,
        "bitmap_grow": 1,
        "bitmap_sync": 2,
        "header_write": 1,
        "punch": 1,
        "header_read": 2,
    },
    # What is lent does not cost more for a bigger image.
    "export": {
        "header_write": 3,
        "bitmap_sync": 5,
        "punch": 8,
        "create": 3,
        "twin_write": 8,
        "twin_link": 3,
        "directory_sync": 3,
        "data_sync": 6,
    },
    "import": {
        "header_write": 3,
        "image_write": 6,
        "cow_write": 4,
        "bitmap_update": 4,
        "bitmap_sync": 4,
        "punch": 6,
        "twin_write": 3,
        "twin_unlink": 3,
        "directory_sync": 3,
        "data_sync": 7,
    },
    "convert": {"target_write": 100, "data_sync": 30, "publish": 30, "directory_sync": 1},
}
SIZE_OF_EVENTS = 16 * MiB
OFTEN = {"data_sync": 4, "bitmap_sync": 4, "punch": 4}


class UnavailableError(Exception):
    """There are no power cuts to be had here; the text says why."""


class ToolMissingError(UnavailableError):
    """A tool of the system is not installed."""


# ---- file systems ----


class Disk:
    """A mounted file system that can lose its power. Made by :func:`loop_disk`."""

    def __init__(self, kind: str, device: str, mountpoint: Path) -> None:
        self.kind = kind
        self.mountpoint = mountpoint
        self._device = device

    def mount(self) -> None:
        """Mount it, replaying its log."""
        run("mount", "-t", self.kind, self._device, str(self.mountpoint))

    def unmount(self) -> None:
        """Unmount it; nothing may be in use any more."""
        run("umount", str(self.mountpoint))

    def cut(self) -> None:
        """Let nothing reach the device from now on."""
        fd = os.open(self.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("=I", NO_LOG_FLUSH))
        except OSError as error:
            raise UnavailableError(f"{self.kind} cannot be shut down here: {error}") from error
        finally:
            os.close(fd)

    def recover(self) -> None:
        """Bring it back with what had reached the device, and no more."""
        self.unmount()
        self.mount()

    @contextlib.contextmanager
    def directory(self) -> Iterator[Path]:
        """Return a new directory on it, which is gone afterwards."""
        place = Path(tempfile.mkdtemp(dir=self.mountpoint))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def loop_disk(kind: str, directory: Path) -> Iterator[Disk]:
    """Make a file system in ``directory``, and leave neither mount nor loop device behind."""
    require(kind)
    size, options = KINDS[kind]
    image, mountpoint = directory / f"{kind}.img", directory / kind
    mountpoint.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(image.unlink)
        with image.open("wb") as file:
            file.truncate(size)
        run(f"mkfs.{kind}", *options, str(image))
        device = run("losetup", "--find", "--show", str(image)).strip()
        stack.enter_context(_guarded(device, mountpoint))
        disk = Disk(kind, device, mountpoint)
        disk.mount()
        yield disk


def require(kind: str) -> None:
    """Raise :class:`UnavailableError` where this cannot work."""
    for name in ("losetup", "mount", "umount", f"mkfs.{kind}"):
        if shutil.which(name) is None:
            raise ToolMissingError(f"{name} is not installed")
    if os.geteuid() != 0:
        raise UnavailableError("power cuts need root, for loop devices and mounts")
    known = Path("/proc/filesystems").read_text().split()
    if kind not in known and shutil.which("modprobe"):
        subprocess.run(["modprobe", kind], capture_output=True, check=False)
        known = Path("/proc/filesystems").read_text().split()
    if kind not in known:
        raise UnavailableError(f"this kernel has no {kind}")


def run(*words: str) -> str:
    """Run a tool of the system and return what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise UnavailableError(f"{' '.join(words)}: {' '.join(done.stderr.split())}")
    return done.stdout


@contextlib.contextmanager
def _guarded(device: str, mountpoint: Path) -> Iterator[None]:
    """Unmount and release a loop device afterwards, even if this process is killed.

    A process that waits for the end of a pipe does it: the pipe ends with us in any case.
    """
    words = [
        "sh",
        "-c",
        'read -r _; umount -l "$1"; losetup -d "$2"',
        "sh",
        str(mountpoint),
        device,
    ]
    guard = subprocess.Popen(
        words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        guard.communicate(timeout=PATIENCE)


def make_durable(directory: Path) -> None:
    """Let a directory and all below it reach the device."""
    for path in (*directory.rglob("*"), directory, directory.parent):
        sync(path)


def sync(path: str | Path) -> None:
    """Let a file or a directory reach the device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- what happens meanwhile ----


class Adversary:
    """Another process that syncs some of these files at random moments. A context manager.

    A file that is not there, as yet or any more, is passed over.
    """

    def __init__(self, paths: Sequence[str], rng: random.Random) -> None:
        self.favourites = rng.sample(paths, rng.choice([1, 1, 1, 2, len(paths)]))
        self._rng = random.Random(rng.random())
        self._over = threading.Event()
        self._rounds = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live)

    def __enter__(self) -> Adversary:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _live(self) -> None:
        while not self._over.wait(self._rng.uniform(0, 0.02)):
            with contextlib.suppress(OSError):  # the power is off
                sync(self._rng.choice(self.favourites))
            self._rounds.release()

    def go_on(self, rounds: int) -> None:
        """Return when it has synced so many more times."""
        while self._rounds.acquire(blocking=False):
            pass
        for _ in range(rounds):
            self._rounds.acquire(timeout=PATIENCE)


@dataclass(frozen=True)
class Moment:
    """When a job is cut off: at an event, or when a part of the bits has changed.

    ``linger``: seconds that the job may still run then. ``rounds``: how often the adversary
    syncs something before the cut.
    """

    event: str = ""
    after: int = 0
    part: float = 0.0
    linger: float = 0.0
    rounds: int = 0

    @classmethod
    def draw(
        cls, rng: random.Random, promise: Promise, *, by_event: bool, scale: float = 1.0
    ) -> Moment:
        """Return a random moment in the job, which is ``scale`` times as big as in the table."""
        if not by_event:
            linger, rounds = rng.uniform(0, 0.002), rng.choice([0, 0, 0, 1, 3])
            return cls(part=rng.random(), linger=linger, rounds=rounds)
        events = EVENTS[promise.job] | ({"discard": 1} if "--discard" in promise.options else {})
        event = rng.choices(list(events), [OFTEN.get(name, 1) for name in events])[0]
        after = int(events[event] * (scale if promise.grows else 1) * rng.random())
        return cls(event, after=after, rounds=rng.randint(1, 4))

    @property
    def rules(self) -> str:
        """The rule file that stops the job there."""
        words = f"[inject-error]\nevent = {self.event}\naction = stop\nafter = {self.after}\n"
        return words if self.event else ""

    def wait(self, victim: Victim, promise: Promise) -> None:
        """Return when it has come, or when the job has ended before."""
        if self.event:
            for _ in victim.watch():
                if victim.stopped:
                    return
            return
        # Bits change for a moment shorter than any pause: look all the time.
        for _ in victim.watch(tick=0):
            if promise.part_changed() >= self.part:
                victim.linger(self.linger)
                return

    def __str__(self) -> str:
        when = f"{self.event} {self.after}" if self.event else f"{self.part:.0%} of the bits"
        return f"at {when}, {1000 * self.linger:.1f} ms and {self.rounds} syncs later"


class Cut(NamedTuple):
    """What is known of a job when the power comes back."""

    done: bool  # it had ended, saying that all went well
    stdout: str
    story: str


def lose_power(
    disk: Disk,
    promise: Promise,
    moment: Moment,
    rng: random.Random,
    scratch: Path,
    *,
    jobs: int,
    order: str = "right",
) -> Cut:
    """Start the job of ``promise`` on ``disk``, cut the power at ``moment``, and recover."""
    words = promise.command(jobs)
    with Victim(words, scratch, stdin=promise.stdin, rules=moment.rules, order=order) as victim:
        with Adversary(promise.synced_by_others(), rng) as adversary:
            moment.wait(victim, promise)
            adversary.go_on(moment.rounds)
            disk.cut()
        victim.destroy()
        status = victim.status
    disk.recover()
    favourites = ", ".join(map(os.path.basename, adversary.favourites))
    story = f"{victim} on {disk.kind}, order {order}, cut {moment}, syncing {favourites}"
    return Cut(status == 0, victim.stdout, f"{story}: status {status} {victim.stderr.strip()}")
