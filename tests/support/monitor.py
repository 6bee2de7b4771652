"""Running QEMUs with a monitor: qemu-storage-daemon, or any other, and a client to drive it."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from support.availability import missing
from support.command import PATIENCE, tool
from support.processes import until


def need(*programs: str) -> None:
    """Skip where a program, or the package that speaks QMP, is not installed."""
    for name in programs:
        if shutil.which(name) is None:
            missing(f"{name} is not installed")
    if find_spec("qemu") is None or find_spec("qemu.qmp") is None:
        missing("qemu.qmp is not installed")


class RefusalError(Exception):
    """QEMU refused a command."""


class Qemu:
    """A running QEMU: its process, and commands for a monitor of its own."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        until(lambda: self._socket.connect_ex(str(path)) == 0, "the monitor to listen")
        self._lines = self._socket.makefile("r")

    def __enter__(self) -> Qemu:
        self._lines.readline()
        self.execute("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """The answer to a command; underscores in names stand for hyphens."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": given}).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if "error" in answer:
                raise RefusalError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
        raise AssertionError("QEMU has ended")

    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        found = self.execute("query-version")["qemu"]
        return found["major"], found["minor"]

    def jobs(self) -> list[dict[str, Any]]:
        """Its block jobs."""
        found: list[dict[str, Any]] = self.execute("query-block-jobs")
        return found

    def until_copied(self) -> None:
        """Wait until a job has copied something."""
        until(lambda: any(one["offset"] for one in self.jobs()), "the job to copy")

    def limit_files(self, size: int) -> None:
        """Let its writes behind this offset fail with EFBIG."""
        hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def quit(self) -> None:
        """End it."""
        with suppress(AssertionError, OSError):
            self.execute("quit")
        self.process.wait(PATIENCE)


@contextmanager
def running(here: Path, *words: str) -> Iterator[Qemu]:
    """Run a QEMU with two monitors: `q` for the command that is tested, `own` for the test."""
    with subprocess.Popen(
        ["env", "--ignore-signal=XFSZ", *words], cwd=here, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ready = here / "own"
            until(lambda: ready.exists() or process.poll() is not None, "the monitor")
            assert process.poll() is None, process.communicate()[1]
            with Qemu(process, ready) as qemu:
                yield qemu
                qemu.quit()
        finally:
            process.kill()
            process.wait()
            for name in ("own", "q", "nbd"):
                (here / name).unlink(missing_ok=True)


@contextmanager
def storage_daemon(
    here: Path, *blockdevs: dict[str, Any], export: str = "", objects: tuple[str, ...] = ()
) -> Iterator[Qemu]:
    """Run qemu-storage-daemon with these nodes; ``export``: the node to offer over NBD."""
    words = [word for one in objects for word in ("--object", one)]
    words += [word for one in blockdevs for word in ("--blockdev", json.dumps(one))]
    if export:
        words += ["--nbd-server", "addr.type=unix,addr.path=nbd", "--export"]
        words += [f"type=nbd,id=disk,node-name={export},name=disk,writable=on"]
    for name in ("q", "own"):
        words += ["--chardev", f"socket,path={name},server=on,wait=off,id={name}"]
        words += ["--monitor", f"chardev={name}"]
    with running(here, "qemu-storage-daemon", *words) as qemu:
        yield qemu


@contextmanager
def virtual_machine(here: Path, *words: str) -> Iterator[Qemu]:
    """Run a paused virtual machine without a guest."""
    machine = ("-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-m", "64")
    monitors = [
        word for name in ("q", "own") for word in ("-qmp", f"unix:{name},server=on,wait=off")
    ]
    with running(here, "qemu-system-x86_64", *machine, *monitors, *words) as qemu:
        yield qemu


#: A disk that a storage daemon offers.
NBD = "nbd+unix:///disk?socket=nbd"


def write_over_nbd(here: Path, *commands: str) -> None:
    """Run commands of qemu-io over NBD, as a guest writes."""
    words = [word for each in commands for word in ("-c", each)]
    told = tool("qemu-io", "-f", "raw", *words, NBD, cwd=here)
    assert "rror" not in told, told
