"""QEMU's own tools, and stand-ins for running guests, as holders of files.

A program that talks has answered a question when it is ready: nothing here guesses.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

from support.command import PATIENCE, tool


@contextmanager
def talking(here: Path, *words: str) -> Iterator[int]:
    """Keep a program open that answers ``length`` on its standard input; yields its pid."""
    with subprocess.Popen(
        words, cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            process.stdin.write("length\n")
            process.stdin.flush()
            assert "iB" in process.stdout.readline()
            yield process.pid
            process.stdin.close()
            assert process.wait() == 0
        finally:
            watchdog.cancel()
            process.kill()


def ended(pid: int) -> Callable[[], bool]:
    """Return a question that waits for the end of a process that is not a child."""
    descriptor = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)

    def wait() -> bool:
        try:
            return bool(poll.poll(PATIENCE * 1000))
        finally:
            os.close(descriptor)

    return wait


@contextmanager
def qemu_nbd(here: Path, *options: str) -> Iterator[int]:
    """Let qemu-nbd export a file; it says itself when it is ready."""
    daemon = ("--fork", "-t", "-k", str(here / "nbd"), "--pid-file", "pid")
    tool("qemu-nbd", *daemon, "-f", "raw", *options, cwd=here)
    pid = int((here / "pid").read_text())
    wait = ended(pid)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGTERM)
        assert wait()


# A process that holds the given bytes of the given file, and answers as qemu-io does.
STAND_IN = """
import fcntl, struct, sys
file = open(sys.argv[1], "r+b")
for byte in map(int, sys.argv[2:]):
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
for line in sys.stdin:
    print("1 MiB", flush=True)
"""


# qemu-io shares more than a guest's device does: what a running guest holds is taken by hand.
GUESTS = {"guest's disk": ("100", "101", "201"), "guest's backing": ("100", "201", "203")}


HOLDERS = ("reader", "writer", "nbd reader", "nbd writer", *GUESTS)


@contextmanager
def holding(kind: str, here: Path, name: str) -> Iterator[str]:
    """Let QEMU hold a file; yields the holder's name and pid as addcow has to tell them."""
    tool("qemu-io", "--version", cwd=here)
    options = ("-r",) if kind.endswith("reader") else ()
    if kind in GUESTS:
        holder = talking(here, sys.executable, "-c", STAND_IN, name, *GUESTS[kind])
    elif kind.startswith("nbd"):
        holder = qemu_nbd(here, *options, name)
    else:
        holder = talking(here, "qemu-io", *options, "-f", "raw", name)
    with holder as pid:
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        yield f"{comm} (pid {pid})"


def qemu_may(here: Path, name: str, *options: str) -> bool:
    """Ask qemu-io to open a file; False when another process holds it."""
    tool("qemu-io", "--version", cwd=here)
    done = subprocess.run(
        ["qemu-io", *options, "-f", "raw", "-c", "length", name],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        assert re.search(r'Failed to get (shared )?"[a-z ]+" lock', done.stderr), done
    return done.returncode == 0


def opened_for_writing(path: Path) -> str:
    """Let QEMU open a file for writing; return what it complains of."""
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "length", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == bool(done.stderr), done
    return done.stderr
