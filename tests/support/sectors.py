"""What a disk may hold after a power cut, sector by sector, and random requests to it.

A sector that was flushed since its last write holds that write. Any other holds what it held at
the last flush, or something that was written to it since. Requests are whole sectors, each full of
one byte. The bytes that a disk begins with come from `model`, in which no two sectors are equal.

There is one exception, for a disk that *keeps what zeros hide*: a qcow2 file with a data file makes
zeros in its tables and leaves the data. A sector that is written after that, and not flushed, may
show what the zeros hid.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from support.model import SECTOR

#: Requests of a few sectors up to two clusters; most guests write 4 KiB.
LENGTHS = (1, 8, 8, 8, 24, 127, 128, 256)

#: Sectors of a cluster of 64 KiB.
CLUSTER = 128

DISCARD = "discard"

ZEROS = bytes(SECTOR)


class Request(NamedTuple):
    """One request of a guest: a byte to fill sectors with, or 0 for zeros by other requests."""

    start: int
    stop: int
    fill: int
    verb: str

    def line(self, *, asynchronous: bool = False, durable: bool = False) -> str:
        """The command of qemu-io."""
        verb = ("aio_" if asynchronous else "") + self.verb
        verb += " -f" if durable else ""
        verb += f" -P {self.fill}" if self.fill else ""
        return f"{verb} {self.start * SECTOR} {(self.stop - self.start) * SECTOR}"


def random_request(rng: random.Random, sectors: int, verbs: tuple[str, ...]) -> Request:
    """A request somewhere on a disk of so many sectors."""
    start = rng.randrange(sectors)
    verb = rng.choice(verbs)
    # Only whole clusters are discarded.
    start -= start % (CLUSTER if verb == DISCARD else rng.choice([1, 8, 8, CLUSTER]))
    stop = min(start + (CLUSTER if verb == DISCARD else rng.choice(LENGTHS)), sectors)
    return Request(start, stop, rng.randrange(1, 256) if verb == "write" else 0, verb)


class Sectors:
    """A disk that begins with ``content``, and what it may hold now."""

    def __init__(self, content: bytes, *, keeps_hidden: bool = False) -> None:
        self._keeps_hidden = keeps_hidden
        self._hidden: dict[int, set[bytes]] = {}
        self._flushed = [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)]
        self._since: dict[int, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._flushed)

    def ask(self, request: Request) -> None:
        """Note that a request was sent: from now on the disk may hold it."""
        for sector in range(request.start, request.stop):
            self._since.setdefault(sector, []).append(bytes([request.fill]) * SECTOR)

    def flush(self, request: Request | None = None) -> None:
        """Note that all requests were answered, and a flush after them.

        With a ``request``: only this one is durable now.
        """
        sectors = range(request.start, request.stop) if request else list(self._since)
        for sector in sectors:
            written = self._since.pop(sector)
            if written[-1] == ZEROS and self._keeps_hidden:
                self._hidden.setdefault(sector, set()).update([self._flushed[sector], *written])
            else:
                self._hidden.pop(sector, None)
            self._flushed[sector] = written[-1]

    def lost(self, seen: bytes, *, unflushed: bool = True) -> list[str]:
        """A line for each sector of the guest's view that is neither old nor new.

        ``unflushed``: also those that the guest has written since the last flush.
        """
        assert len(seen) == len(self._flushed) * SECTOR
        found = []
        for sector, old in enumerate(self._flushed):
            now, since = seen[sector * SECTOR : (sector + 1) * SECTOR], self._since.get(sector, [])
            hidden = self._hidden.get(sector, set[bytes]()) if since else ()
            if now == old or now in since or now in hidden or (since and not unflushed):
                continue
            words = f"written since as {[one[:1] for one in since]}" if since else "not written"
            found.append(f"sector {sector}: {now[:8]!r}, was {old[:8]!r}, {words}")
        return found
