"""The type of a mounted file system."""

from __future__ import annotations

import os
from contextlib import suppress


def filesystem_type(device: int) -> str:
    """The type of the file system on a device, as the driver calls it; empty if it is unknown."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with (
        suppress(OSError),
        open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines,
    ):
        for line in lines:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return ""
