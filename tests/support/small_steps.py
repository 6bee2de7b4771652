"""addcow in small steps, and when asked to, with its syncs in a wrong order.

    small_steps.py right COMMAND...
    small_steps.py right:waiting COMMAND...
    small_steps.py never:PATTERN COMMAND...
    small_steps.py late:PATTERN COMMAND...

A job on an image of a few MiB has one task and one checkpoint, so there is little to cut
into. Here tasks and checkpoints are small enough for dozens of each; nothing else differs
from the command, which is then run as it always is.

The two wrong orders exist for tests to show that they would see one. They strike at the
calls to the kernel, whatever the package looks like: files whose names match the pattern are
*never* synced, or *late*, which is after the next file that does not match. With that,
`late:*.raw` is a flatten that sets bits before their data is durable, and `late:*.add-cow` a
commit that frees space before the cleared bits are. A late sync is a fault point where it
happens, as it would be had it been written there.

Checkpoints run beside the copying, so that the sync of one carries data of the next to the
disk as well, and a wrong order does no harm that could be seen. A slow disk would not be so
kind. With `right:waiting`, and with every wrong order, copying waits for each checkpoint.

Workers run this module again under another name and take nothing from it: they neither cut
tasks nor publish.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

KiB = 1024
MiB = 1024 * KiB

SMALL = {
    "TASK_BYTES": 128 * KiB,
    "STEP": 32 * KiB,
    "CHECKPOINT_BYTES": 256 * KiB,
    "CHECKPOINT_SECONDS": 0.05,
}

Sync = Callable[[int], None]


def take_small_steps() -> None:
    """Replace the sizes wherever they were imported to, default arguments included."""
    # All that have them: later imports find the small ones at home.
    from addcow_mp.engine import (
        allocation,
        checkpoints,
        pool,
        run_marks,
        space,
        tasks,
        transfer,
        transfer_plan,
    )

    taken = set()
    modules = (tasks, pool, checkpoints, space, allocation, transfer, run_marks)
    for module in (*modules, transfer_plan):
        for name in SMALL.keys() & vars(module).keys():
            setattr(module, name, SMALL[name])
            taken.add(name)
    if taken != SMALL.keys():
        sys.exit(f"small_steps: {SMALL.keys() - taken} are not where they were")
    tasks.cut.__defaults__ = (SMALL["TASK_BYTES"],)


def spoil(order: str) -> None:
    """Let the kernel's syncs happen in ``order`` from now on."""
    how, _, pattern = order.partition(":")
    if pattern:
        threads: Any = threading
        threads.Thread = _WaitedFor
    if how != "right":
        spoilt = {"never": _never, "late": _late}[how]
        kernel: Any = os
        for name in ("fdatasync", "fsync"):
            setattr(kernel, name, spoilt(getattr(kernel, name), pattern))


class _WaitedFor(threading.Thread):
    """A thread beside which nothing else happens."""

    def start(self) -> None:
        super().start()
        self.join()


def _matches(fd: int, pattern: str) -> bool:
    return fnmatch(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), pattern)


def _never(sync: Sync, pattern: str) -> Sync:
    def spoilt(fd: int) -> None:
        if not _matches(fd, pattern):
            sync(fd)

    return spoilt


def _late(sync: Sync, pattern: str) -> Sync:
    from addcow_mp.device import faults

    owed: list[int] = []
    event = "bitmap_sync" if pattern.endswith(".add-cow") else "data_sync"

    def spoilt(fd: int) -> None:
        if _matches(fd, pattern):
            owed.append(os.dup(fd))
            return
        sync(fd)
        while owed:
            if faults.armed:
                faults.hit(event)
            sync(owed[0])
            os.close(owed.pop(0))

    return spoilt


def main() -> None:
    """Run the command line behind the order."""
    from addcow_mp.cli.main import run

    take_small_steps()
    spoil(sys.argv[1])
    sys.exit(run(sys.argv[2:]))


if __name__ == "__main__":
    main()
