"""Sizes, times and shares as users write and read them: ``10G``, ``1.5 MiB``, ``90s``, ``5%``."""

from __future__ import annotations

import re
from typing import NamedTuple

from addcow_mp.errors import UsageError

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB
EiB = 1024 * 1024 * TiB

#: The unit of every virtual size: a guest's disk consists of whole sectors.
SECTOR = 512

#: Offsets are signed 64-bit numbers in every system call.
MAX_SIZE = 8 * EiB - 1

#: Numbers from here on have three digits before the decimal point.
THREE_DIGITS = 100

_UNITS = {"": 1, "b": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB, "p": 1024 * TiB, "e": EiB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|0x[0-9a-f]+)([bkmgtpe]?)", re.IGNORECASE | re.ASCII)

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%", re.ASCII)

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)", re.IGNORECASE | re.ASCII)


def parse_size(text: str, what: str = "size") -> int:
    """Parse a size in bytes with qemu-img's suffixes (``k``, ``M``, ... powers of 1024).

    A fraction needs a suffix ("1.5G"). Raises :class:`UsageError`, which calls the value ``what``.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise _invalid(what, text, "give bytes, or a number with k, M, G, T, P or E")
    number, suffix = match.groups()
    size = _scale(number, _UNITS[suffix.lower()])
    if size > MAX_SIZE:
        raise _invalid(what, text, "more than 8 EiB")
    return size


class SizeChange(NamedTuple):
    """A virtual size as the user gives it: ``amount`` bytes, or so many more (1) or less (-1)."""

    amount: int
    sign: int = 0

    def applied(self, size: int) -> int:
        """The new size in whole sectors. Raises :class:`UsageError` when there is none."""
        new = size * abs(self.sign) + self.amount * (self.sign or 1)
        if not 0 < new <= MAX_SIZE:
            change = f"{self.sign * self.amount:+}" if self.sign else str(self.amount)
            problem = f"the disk has {size} bytes, and can have 1 byte to 8 EiB"
            raise _invalid("size", change, problem)
        return round_up(new, SECTOR)


def parse_size_change(text: str) -> SizeChange:
    """Parse ``10G``, ``+1G`` or ``-1G``. Raises :class:`UsageError`."""
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    return SizeChange(parse_size(text[abs(sign) :]), sign)


def parse_duration(text: str, what: str) -> float:
    """Parse a time in seconds, or with a suffix s, m, h or d ("90s", "1.5h").

    Raises :class:`UsageError`, which calls the value ``what``.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise _invalid(what, text, "give seconds, or a number with s, m, h or d")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_share(text: str, what: str) -> float:
    """Parse a percentage ("5%", "0.5%"); returns a share above 0 and up to 1.

    Raises :class:`UsageError`, which calls the value ``what``.
    """
    match = _PERCENT.fullmatch(text.strip())
    share = float(match[1]) / 100 if match is not None else 0.0
    if not 0 < share <= 1:
        raise _invalid(what, text, "give a percentage up to 100%, as in 5%")
    return share


def _invalid(what: str, text: str, problem: str) -> UsageError:
    return UsageError(message=f"invalid {what} '{text}': {problem}")


def _scale(number: str, unit: int) -> int:
    """``number`` times ``unit``, in integers: a float would lose digits of a large size."""
    if number.lower().startswith("0x"):
        return int(number, 16) * unit
    whole, _, fraction = number.partition(".")
    return int(whole) * unit + int(fraction or 0) * unit // int(10 ** len(fraction))


def human_size(size: float) -> str:
    """Write a size as qemu-img does: three significant digits and a binary unit."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = max((one for one in range(len(units)) if size >= 1024**one), default=0)
    number = size / 1024**power
    return (
        f"{number:.0f} {units[power]}" if number >= THREE_DIGITS else f"{number:.3g} {units[power]}"
    )


def round_down(value: int, unit: int) -> int:
    """The greatest multiple of ``unit`` that is not above ``value``."""
    return value - value % unit


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``value``."""
    return round_down(value + unit - 1, unit)
