"""The main job on real input, judged by standard tools.

mke2fs makes a base disk from real files. An overlay over it is changed through the device: its file
system gets a new file. One copy of the overlay is committed, another one flattened, both by several
processes. Then e2fsck, qemu-img and debugfs say whether the results are the expected disk.

At the end a guest in QEMU writes through an overlay and then runs from its raw disk alone, where
this machine has what a guest needs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import addcow_mp
import guest
from addcow_mp.units import KiB, MiB, human_size

TOOLS = {
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "qemu-img": "qemu-utils",
}

DISK_SIZE = 512 * MiB

#: Real files for the base disk: the standard library of the Python that runs this.
REAL_FILES = Path(sysconfig.get_paths()["stdlib"])

#: What is compared and written at a time while the overlay is changed: a file system block.
BLOCK = 4 * KiB

#: A new file of 32 MiB without two equal lines.
LETTER = b"".join(b"line %08d through the overlay\n" % line for line in range(MiB))

#: What the guest does first: it deletes files and writes new ones.
GUEST_WRITES = """
rm -r email
dd if=/dev/urandom of=new bs=1M count=8 2>/dev/null
sync
sha256sum new
"""

#: And what it looks for when it boots again.
GUEST_LOOKS = "test ! -e email\nsha256sum new\n"


def main() -> int:
    """Run the demo in a temporary directory and return an exit status."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        print(f"the demo needs: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="addcow-demo-") as directory:
        os.chdir(directory)
        build_base()
        wanted = change_overlay()
        for copy in ("commit", "flatten"):
            shutil.copytree("disk", copy, copy_function=copy_sparse)
        commit(wanted)
        flatten(wanted)
        print("\nAll good: both results are the expected disk.\n")
        run_guest()
    return 0


def run(*command: str, stdin: str | None = None) -> str:
    """Run a command, show it, stop the demo when it fails; returns what it printed."""
    print(f"  $ {' '.join(command)}")
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def addcow(*arguments: str) -> str:
    """Run the command that this project installs."""
    return run(str(Path(sys.executable).with_name("addcow")), *arguments)


def copy_sparse(source: str, target: str) -> str:
    """Copy a file with its holes."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
    return target


def build_base() -> None:
    """An ext4 file system with real files."""
    print(f"1. A base disk of {human_size(DISK_SIZE)}: ext4 with the files of {REAL_FILES.name}")
    files = Path("files")
    keep_out = shutil.ignore_patterns("__pycache__", "site-packages", "test")
    shutil.copytree(REAL_FILES, files, ignore=keep_out, symlinks=True)
    Path("disk").mkdir()
    run("mke2fs", "-q", "-t", "ext4", "-d", "files", "disk/base.img", str(DISK_SIZE // KiB) + "k")
    count = sum(1 for path in files.rglob("*") if path.is_file())
    print(f"   {count} files, {human_size(os.stat('disk/base.img').st_blocks * 512)} on disk")


def change_overlay() -> str:
    """An overlay over the base, changed through the device; returns the disk it must show."""
    print("2. An overlay over it; a new file is written into its file system")
    print(addcow("create", "-b", "base.img", "-F", "raw", "disk/top.add-cow"), end="")
    wanted = str(Path("wanted.img").absolute())
    copy_sparse("disk/base.img", wanted)
    Path("letter").write_bytes(LETTER)
    run("debugfs", "-w", "-R", "write letter letter", wanted)
    with addcow_mp.open("disk/top.add-cow", writable=True) as disk:
        written = sum(write_block(disk, offset, block) for offset, block in changes(wanted))
    print(f"   {human_size(written)} written through the device")
    print(addcow("check", "disk/top.add-cow"), end="")
    return wanted


def changes(wanted: str) -> Iterator[tuple[int, bytes]]:
    """The blocks in which ``wanted`` differs from the base."""
    with open("disk/base.img", "rb") as base, open(wanted, "rb") as changed:
        for offset in range(0, DISK_SIZE, BLOCK):
            block = changed.read(BLOCK)
            if base.read(BLOCK) != block:
                yield offset, block


def write_block(disk: addcow_mp.Overlay, offset: int, block: bytes) -> int:
    """Write one block through the device."""
    disk.write(offset, block)
    return len(block)


def commit(wanted: str) -> None:
    """Commit one copy: its base is then the wanted disk."""
    print("3. One copy is committed")
    print(timed("commit", "commit/top.add-cow"))
    prove("commit/base.img", wanted)


def flatten(wanted: str) -> None:
    """Flatten the other: its raw image file alone is then the wanted disk."""
    print("4. The other is flattened, and its .add-cow file thrown away")
    print(timed("flatten", "--discard", "flatten/top.add-cow"))
    if os.path.exists("flatten/top.add-cow"):
        sys.exit("flatten --discard left the .add-cow file")
    prove("flatten/top.raw", wanted)


def run_guest() -> None:
    """Boot a guest from an overlay, and again from the raw disk that becomes of it."""
    print("5. A guest in QEMU writes through an overlay, and then runs from its raw disk alone")
    lacking = guest.lacking()
    if lacking:
        print(f"   left out: a guest needs {', '.join(lacking)}")
        return
    copy_sparse("disk/base.img", "golden.img")
    print(addcow("create", "-b", "golden.img", "-F", "raw", "vm1.add-cow"), end="")
    print(addcow("qemu", "export", "vm1.add-cow"), end="")
    print("   A guest boots with these arguments. It deletes files and writes 8 MiB:")
    written = boot(shlex.split(addcow("qemu", "args", "vm1.add-cow")), GUEST_WRITES)
    for command in ("qemu import", "check", "flatten --discard"):
        print(addcow(*command.split(), "vm1.add-cow"), end="")
    run("mv", "golden.img", "away.img")
    print("   It boots again, from vm1.raw alone:")
    if boot(guest.raw_disk("vm1.raw"), GUEST_LOOKS) != written:
        sys.exit("vm1.raw: the guest does not find what it wrote")
    print(f"   e2fsck: {run('e2fsck', '-fn', 'vm1.raw').strip().splitlines()[-1]}")
    print("\nAll good: the guest finds in the raw disk what it wrote, without its base.")


def boot(disk: list[str], orders: str) -> str:
    """Boot a guest and show what it prints before it is done, which is returned."""
    start = time.monotonic()
    try:
        said = guest.boot(Path(), disk, orders).partition(guest.DONE)[0].strip()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        sys.exit(str(error))
    print(f"   guest: {said}\n   {time.monotonic() - start:.1f} s from start to power off")
    return said


def timed(*arguments: str) -> str:
    """Run a job and print how fast it was."""
    start = time.monotonic()
    said = addcow(*arguments, "--jobs", "2")
    return f"   {said.strip()} {time.monotonic() - start:.2f} s, start-up included"


def prove(result: str, wanted: str) -> None:
    """Check ``result`` with independent tools."""
    print(f"   e2fsck: {run('e2fsck', '-fn', result).strip().splitlines()[-1]}")
    compared = run("qemu-img", "compare", "-f", "raw", "-F", "raw", result, wanted)
    print(f"   qemu-img: {compared.strip()}")
    if run("debugfs", "-R", "cat letter", result).encode() != LETTER:
        sys.exit(f"{result}: the letter does not read back")
    print("   debugfs: the new file reads back byte for byte")


if __name__ == "__main__":
    sys.exit(main())
