"""A real guest: Linux in QEMU without KVM, whose disk is what it is given.

The kernel comes from tools/setup.sh, which unpacks Debian's into the virtual environment. The rest
is busybox in an initramfs that is built for each boot. It mounts the disk, runs a script there (its
*orders*), unmounts the disk and switches the machine off. What the script prints is what the
machine prints on its serial line.
"""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

#: Where tools/setup.sh puts the kernel and its modules.
UNPACKED = Path(sys.prefix) / "guest"

TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
}

#: What a guest loads for its disk, each after those that it needs. Some kernels have some of them
#: built in, and no file for these.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_blk", "crc16", "crc32c_generic", "mbcache", "jbd2", "ext4"),
)

OPENERS: dict[str, Callable[[Path], bytes]] = {
    ".ko": Path.read_bytes,
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
}

#: Seconds for a guest from its start to its end. One alone takes about four.
PATIENCE = 120.0

#: What a guest prints when its orders are done and its disk is unmounted.
DONE = "guest: done"

INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in {" ".join(MODULES)}; do
    if [ -e /modules/$module.ko ]; then insmod /modules/$module.ko; fi
done
mount -t ext4 -o discard /dev/vda /disk && cd /disk && sh -e /orders && cd / && umount /disk &&
    echo "{DONE}"
poweroff -f
"""


def lacking() -> list[str]:
    """What a guest needs and this machine has not, as something to install."""
    found = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    busybox = shutil.which("busybox")
    if busybox is not None and _needs_libraries(busybox):
        found.append(TOOLS["busybox"])
    if not (UNPACKED / "vmlinuz").exists():
        found.append("a kernel, which tools/setup.sh unpacks on Debian")
    return found


def _needs_libraries(program: str) -> bool:
    """Whether a program is not linked statically: it names the loader of its libraries."""
    return b"/ld-linux" in Path(program).read_bytes()


def make_disk(path: Path, files: Path, size: int) -> None:
    """Make a disk of ``size`` bytes: an ext4 file system with the files of a directory."""
    path.touch()
    os.truncate(path, size)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", files, path], check=True)


def machine(directory: Path, orders: str) -> list[str]:
    """The command of a machine without a disk that runs ``orders``; its files are made here."""
    initramfs = _build_initramfs(directory, orders)
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-reboot", "-m", "256"),
        *("-display", "none", "-serial", "stdio", "-kernel", str(UNPACKED / "vmlinuz")),
        *("-initrd", str(initramfs), "-append", "console=ttyS0 quiet panic=-1"),
    ]


def boot(directory: Path, disk: Sequence[str], orders: str) -> str:
    """Run a guest on a disk, given in words of QEMU; return what it printed.

    Raises :class:`RuntimeError` if its orders fail.
    """
    done = subprocess.run(
        [*machine(directory, orders), *disk],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode or DONE not in done.stdout:
        raise RuntimeError(f"the guest failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def raw_disk(path: str) -> list[str]:
    """The words of QEMU for a raw file alone."""
    return ["-drive", f"file={path},format=raw,if=virtio"]


def _build_initramfs(directory: Path, orders: str) -> Path:
    """Make the first file system of a guest."""
    root = directory / "initramfs"
    with suppress(FileNotFoundError):
        shutil.rmtree(root)
    for name in ("bin", "proc", "sys", "dev", "disk", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), root / "bin" / "busybox")
    for module in MODULES:
        for path in UNPACKED.glob(f"{module}.ko*"):
            (root / "modules" / f"{module}.ko").write_bytes(OPENERS[path.suffix](path))
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    (root / "orders").write_text(orders)
    return _packed(root)


def _packed(root: Path) -> Path:
    """A directory as an archive that the kernel unpacks."""
    target = root.with_suffix(".cpio")
    names = "\n".join(str(one.relative_to(root)) for one in sorted(root.rglob("*")))
    with target.open("wb") as archive:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc"],
            cwd=root,
            input=names.encode(),
            stdout=archive,
            check=True,
        )
    return target
