"""What a job promises about the files of its chain, however it ended.

A `Promise` is made before the job begins, from what the files hold then. `broken` looks at
them again, after a crash or after the end, and lists what has not been kept. Everything is
read by `tools/oracle.py` or as plain bytes: nothing here knows the package.

commit: the guest's view never changes. The backing changes only where clusters were allocated, the
layers beneath it not at all. Bits are only ever cleared. Once it has said that it is done, the
backing shows what the guest saw and no cluster is allocated. With -d the overlay and its image
stay as they are.

commit -b: no view of a layer above the base ever changes. Only the layer directly above the base
gets clusters, and only those that the base is about to change under it. Each sector of the base is
old or what the guest sees, and nothing below it changes. Once it is done the base shows what the
guest sees.

flatten: the guest's view never changes, nor any file below. Bits are only ever set. Once it is
done ALL_ALLOCATED is set, and the image alone is the disk; with --discard the overlay is gone,
which may never be so while the image is not the disk.

io: what was flushed is there. A sector shows what it held at the last flush, or something
written to it since. A cluster that was not allocated at that flush is old as a whole or, with its
bit, at least as new as the next flush: never what the image happened to hold. Nothing changes
in clusters that were not written, nor in any file below.

resize: the guest's view is the old one or, cut or continued with zeros, the new one. No file below
changes. Once it is done the view is the new one, and no bit past the last cluster is set.

reset: the guest's view is all that it was or all of the backing file's, and no file below changes.
Once it is done it is the backing file's, no cluster is allocated, and the image takes no space.

rebase: the guest's view never changes, nor any file below. Bits are only ever set. The header names
the old backing file or the new one; once it is done, the new one.

convert: no file of the chain changes, and once it is done the new file is the guest's view.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar, NamedTuple

import oracle
from support.model import (
    ALL_ALLOCATED,
    SECTOR,
    Files,
    KiB,
    contents,
    read_bits,
    read_file,
    span,
    stray_bits,
)

VIEW = "the guest's view"


class Promise:
    """What one job promises about one chain, whose files are as they are now.

    ``stdin`` is what the job reads; ``copy_options`` are options that do not change the result.
    """

    job: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    has_jobs: ClassVar[bool] = True
    #: Whether a bigger image has more events.
    grows: ClassVar[bool] = True
    copy_options: tuple[str, ...] = ()
    stdin = ""
    stdout = ""
    done = False

    def __init__(self, files: Files) -> None:
        self.files = files
        self.cluster_size = oracle.read_header(files.path).cluster_size
        self.bits = frozenset(oracle.allocated(files.path))
        self.stored_bits = read_bits(files.path)
        self.view = oracle.guest_bytes(files.path)
        self.size = len(self.view)
        self.before = contents(files.everything)

    def again(self) -> Promise:
        """Return what the same command promises when it is run once more."""
        return self

    def command(self, jobs: int) -> list[str]:
        """Return the command line behind `addcow`."""
        how = [*self.copy_options, "--jobs", str(jobs)] if self.has_jobs else []
        return [self.job, *self.options, *how, self.files.link or self.files.path]

    def synced_by_others(self) -> list[str]:
        """Return files that another process may sync during the job."""
        return self.files.everything

    def part_changed(self) -> float:
        """Return how far the bitmap has got from where it was to where it will be."""
        left = self._bits_to_change
        try:
            changed = len(read_bits(self.files.path) ^ self.stored_bits)
        except OSError:
            return 1.0  # discarded
        return changed / left if left else 1.0

    @property
    def _bits_to_change(self) -> int:
        return 0

    def broken(self, *, done: bool, stdout: str = "") -> list[str]:
        """Return what has not been kept, a line each.

        ``done``: the job has said that it is; ``stdout`` is what else it has said.
        """
        self.done, self.stdout = done, stdout
        try:
            return list(self._broken(done))
        except (OSError, ValueError, oracle.OracleError) as error:
            return [f"cannot be read any more: {error!r}"]

    def _broken(self, done: bool) -> Iterator[str]:
        raise NotImplementedError

    def make_way(self) -> None:
        """Remove what an interrupted job may leave in the way of the next try."""

    # Parts of promises

    def _same_view(self) -> Iterator[str]:
        yield from differs(VIEW, oracle.guest_bytes(self.files.path), self.view)

    def _untouched(self, paths: list[str]) -> Iterator[str]:
        for path in paths:
            yield from differs(os.path.basename(path), read_file(path), self.before[path])

    def _same_header(self) -> Iterator[str]:
        """All of it but the one flag that a job may change."""
        path = self.files.path
        end = max(4 * KiB, self.cluster_size)
        now, then = bytearray(read_file(path)[:end]), bytearray(self.before[path][:end])
        now[32] &= ~ALL_ALLOCATED
        then[32] &= ~ALL_ALLOCATED
        yield from differs("the header", bytes(now), bytes(then))

    def _no_stray_bits(self) -> Iterator[str]:
        stray = stray_bits(self.files.path)
        if stray:
            yield f"bits past the last cluster: {sorted(stray)}"


class Commit(Promise):
    """Commit, and what it leaves in the backing."""

    job = "commit"

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        assert files.backing is not None
        self.backing = files.backing
        self.below = self._backing_view()

    def _backing_view(self) -> bytes:
        path = self.backing.path
        if path != self.backing.image:
            return oracle.guest_bytes(path)
        return read_file(path)  # all of its bytes

    @property
    def _bits_to_change(self) -> int:
        return len(self.stored_bits)

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._same_view()
        yield from self._untouched(self.backing.below)
        yield from self._elsewhere(self._backing_view())
        yield from self._overlay()
        if done:
            whole = self._backing_view()[: self.size]
            yield from differs("the backing", whole, self.view)
            yield from self._emptied()

    def _elsewhere(self, now: bytes) -> Iterator[str]:
        """The backing outside the clusters that were allocated, and its length."""
        grown = max(len(self.below), self.size)
        if len(now) not in (len(self.below), grown):
            yield f"the backing is {len(now)} bytes long, neither {len(self.below)} nor {grown}"
            return
        expected = bytearray(self.below.ljust(len(now), b"\0"))
        for cluster in self.bits:
            start, stop = span(cluster, self.cluster_size, min(self.size, len(now)))
            expected[start:stop] = now[start:stop]
        yield from differs("the backing where nothing was local", now, bytes(expected))

    def _overlay(self) -> Iterator[str]:
        yield from self._same_header()
        new = frozenset(oracle.allocated(self.files.path)) - self.bits
        if new:
            yield f"clusters became local: {sorted(new)}"

    def _emptied(self) -> Iterator[str]:
        local = oracle.allocated(self.files.path)
        if local:
            yield f"clusters are still local: {local}"
        yield from self._no_stray_bits()

    def leftovers(self) -> int:
        """Return the first place in the image that still takes space; -1 when none does."""
        with open(self.files.image, "rb") as image:
            try:
                return os.lseek(image.fileno(), 0, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return -1


class CommitKeeping(Commit):
    """Commit -d: the overlay stays what it is."""

    options = ("-d",)

    def _overlay(self) -> Iterator[str]:
        yield from self._untouched(self.files.own)

    def _emptied(self) -> Iterator[str]:
        yield from ()


def layers_of(files: Files) -> list[Files]:
    """Return the layers of a chain, from the top down."""
    return [files, *(layers_of(files.backing) if files.backing else [])]


def falls_through(files: Files, depth: int, sectors: int | None = None) -> list[bool]:
    """Return for each sector of a view whether it comes from the layer at ``depth`` or below."""
    if depth == 0 and sectors is not None:
        return [True] * sectors  # behind its end it shows zeros, as they do who look at it
    own = oracle.virtual_size(files.path) // SECTOR
    count = own if sectors is None else sectors
    if depth == 0:
        return [True] * count
    assert files.backing is not None
    below = falls_through(files.backing, depth - 1, count)
    local = frozenset(oracle.allocated(files.path))
    each = oracle.read_header(files.path).cluster_size // SECTOR
    return [at < own and at // each not in local and below[at] for at in range(count)]


def bases_of(files: Files) -> list[int]:
    """Return the depths of the layers that can receive all that the guest sees."""
    size = oracle.virtual_size(files.path)
    return [
        depth
        for depth, layer in enumerate(layers_of(files))
        if depth and (layer.path == layer.image or oracle.virtual_size(layer.path) >= size)
    ]


class CommitInto(Promise):
    """Commit -b into the layer at ``depth``."""

    job = "commit"
    options = ("-b",)

    def __init__(self, files: Files, depth: int) -> None:
        super().__init__(files)
        layers = layers_of(files)
        self.above, self.base, self.over = layers[:depth], layers[depth], layers[depth - 1]
        self.views = {one.path: oracle.guest_bytes(one.path) for one in self.above}
        self.old = self._base_view()
        self.new = self.view + self.old[self.size :]
        self.over_bits = frozenset(oracle.allocated(self.over.path))
        self.lacking = self._lacking(falls_through(files, depth - 1))

    def _lacking(self, falls: list[bool]) -> frozenset[int]:
        """The clusters that the layer above the base does not have, and that the base changes."""
        each = oracle.read_header(self.over.path).cluster_size // SECTOR
        own = oracle.virtual_size(self.over.path) // SECTOR
        changed = {at // each for at, falling in enumerate(falls[:own]) if not falling}
        return frozenset(changed) - self.over_bits

    def command(self, jobs: int) -> list[str]:
        job, option, *words = super().command(jobs)
        return [job, option, self.base.path, *words]

    def part_changed(self) -> float:
        new = frozenset(oracle.allocated(self.over.path)) - self.over_bits
        return len(new) / len(self.lacking) if self.lacking else 1.0

    def _base_view(self) -> bytes:
        path = self.base.path
        return read_file(path) if path == self.base.image else oracle.guest_bytes(path)

    def _broken(self, done: bool) -> Iterator[str]:
        for path, then in self.views.items():
            yield from differs(
                f"{VIEW} of {os.path.basename(path)}", oracle.guest_bytes(path), then
            )
        between = [path for one in self.above[:-1] for path in one.own]
        yield from self._untouched([*between, *self.base.below])
        yield from self._headers()
        yield from self._over(done)
        now = self._base_view()
        if done:
            yield from differs("the base", now, self.new)
        else:
            yield from self._old_or_new(now)

    def _headers(self) -> Iterator[str]:
        for layer in (self.over, self.base):
            if layer.path != layer.image:
                end = oracle.read_header(layer.path).header_size
                now, then = read_file(layer.path)[:end], self.before[layer.path][:end]
                yield from differs(f"the header of {os.path.basename(layer.path)}", now, then)

    def _over(self, done: bool) -> Iterator[str]:
        local = frozenset(oracle.allocated(self.over.path))
        if self.over_bits - local:
            yield f"clusters are no longer local: {sorted(self.over_bits - local)}"
        new = local - self.over_bits
        if new - self.lacking or (done and new != self.lacking):
            yield f"clusters became local: {sorted(new)}, to be: {sorted(self.lacking)}"

    def _old_or_new(self, now: bytes) -> Iterator[str]:
        if len(now) not in (len(self.old), len(self.new)):
            yield f"the base is {len(now)} bytes long"
        old, new = self.old.ljust(len(self.new), b"\0"), self.new
        for at in range(0, len(now), SECTOR):
            sector = slice(at, min(at + SECTOR, len(now)))
            if now[sector] not in (old[sector], new[sector]):
                yield f"the base at {at} is {now[at : at + 8]!r}, neither old nor new"
                return


class Flatten(Promise):
    """Flatten, with its overlay left in place."""

    job = "flatten"

    @property
    def _bits_to_change(self) -> int:
        return -(-self.size // self.cluster_size) - len(self.stored_bits)

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._same_view()
        yield from self._untouched(self.files.below)
        yield from self._same_header()
        lost = self.stored_bits - frozenset(oracle.allocated(self.files.path))
        if lost:
            yield f"clusters are no longer local: {sorted(lost)}"
        yield from self._image(done)
        if done and not oracle.read_header(self.files.path).all_allocated:
            yield "ALL_ALLOCATED is not set"

    @property
    def lengths(self) -> list[int]:
        """What the image file's length may be: bytes behind the virtual size are left alone."""
        return [len(self.before[self.files.image])]

    def _image(self, whole: bool) -> Iterator[str]:
        data = read_file(self.files.image)
        if len(data) not in self.lengths:
            yield f"the image is {len(data)} bytes long"
        if whole:
            yield from differs(f"{VIEW}, which is the image now,", data[: self.size], self.view)


class FlattenDiscarding(Flatten):
    """Flatten --discard: the overlay goes when the image is the disk, and nothing but the disk."""

    options = ("--discard",)

    @property
    def lengths(self) -> list[int]:
        return [self.size, *(super().lengths if os.path.exists(self.files.path) else [])]

    def _broken(self, done: bool) -> Iterator[str]:
        if os.path.exists(self.files.path):
            if done:
                yield "the overlay is still there"
            yield from super()._broken(False)
            return
        yield from self._untouched(self.files.below)
        yield from self._image(True)


class Resize(Promise):
    """Resize to ``new`` bytes."""

    job = "resize"
    options = ("--shrink",)
    has_jobs = False
    grows = False

    def __init__(self, files: Files, new: int) -> None:
        super().__init__(files)
        self.new = new

    def command(self, jobs: int) -> list[str]:
        return [*super().command(jobs), str(self.new)]

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._untouched(self.files.below)
        yield from self._same_header()
        now = oracle.guest_bytes(self.files.path)
        new = self.view[: self.new].ljust(self.new, b"\0")
        if done or len(now) == self.new:
            yield from differs(VIEW, now, new)
        else:
            yield from differs(VIEW, now, self.view)
        if done:
            yield from self._no_stray_bits()


class Reset(Promise):
    """Reset, which has no state in between."""

    job = "reset"
    options = ("--force",)  # some overlays have ALL_ALLOCATED set
    has_jobs = False
    grows = False

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        assert files.backing is not None
        below = files.backing
        is_raw = below.path == below.image
        content = read_file(below.path) if is_raw else oracle.guest_bytes(below.path)
        self.below = content[: self.size].ljust(self.size, b"\0")

    @property
    def _bits_to_change(self) -> int:
        return len(self.stored_bits)

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._untouched(self.files.below)
        yield from self._same_header()
        now = oracle.guest_bytes(self.files.path)
        if done or now != self.view:
            yield from differs(VIEW, now, self.below)
        if done and oracle.allocated(self.files.path):
            yield "clusters are still local"


class Rebase(Promise):
    """Rebase to ``new``, a file beside the overlay that holds ``content`` and is not synced."""

    job = "rebase"
    new = "new.raw"

    def __init__(self, files: Files, content: bytes) -> None:
        super().__init__(files)
        self.old = oracle.read_header(files.path).backing
        self.content = content
        self.make_way()

    def make_way(self) -> None:
        """Write the new backing file again that a power cut may have taken, unless it counts."""
        if not self._has_new:
            with open(os.path.join(os.path.dirname(self.files.path), self.new), "wb") as file:
                file.write(self.content)

    @property
    def _has_new(self) -> bool:
        name = oracle.read_header(self.files.path).backing
        return os.path.basename(name or "") == self.new

    def command(self, jobs: int) -> list[str]:
        return [*super().command(jobs), "-b", self.new, "-F", "raw"]

    def synced_by_others(self) -> list[str]:
        """The new backing file is synced by the job alone."""
        return self.files.everything

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._same_view()
        yield from self._untouched(self.files.below)
        lost = self.stored_bits - frozenset(oracle.allocated(self.files.path))
        if lost:
            yield f"clusters are no longer local: {sorted(lost)}"
        name = oracle.read_header(self.files.path).backing
        if not self._has_new and (done or name != self.old):
            yield f"the backing file is {name!r}"


class Convert(Promise):
    """Convert into a new file beside the chain."""

    job = "convert"

    @cached_property
    def target(self) -> str:
        """The new file."""
        return os.path.join(os.path.dirname(self.files.path), "new.raw")

    def command(self, jobs: int) -> list[str]:
        return [*super().command(jobs), self.target, "-O", "raw"]

    def make_way(self) -> None:
        if os.path.exists(self.target):
            os.unlink(self.target)

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._untouched(self.files.everything)
        yield from self._same_view()
        if done:
            yield from differs("the new file", read_file(self.target), self.view)


class Write(NamedTuple):
    """One write of a guest; no pattern means zeros. Of no length: a flush."""

    start: int = 0
    stop: int = 0
    pattern: int = 0

    @property
    def is_flush(self) -> bool:
        """Whether nothing is written, but all that was becomes durable."""
        return self.start == self.stop

    def line(self) -> str:
        """The command of `addcow io`. After a flush, an answer shows that it is done."""
        if self.is_flush:
            return "flush\nlength\n"
        how = f"-P {self.pattern}" if self.pattern else "-z"
        return f"write {how} {self.start} {self.stop - self.start}\n"

    def into(self, data: bytearray, start: int) -> None:
        """Carry it out on the bytes that begin at ``start``."""
        first = max(self.start, start) - start
        stop = min(self.stop - start, len(data))
        if first < stop:
            data[first:stop] = bytes([self.pattern]) * (stop - first)


class Heard(NamedTuple):
    """What a guest knows from the answers it got."""

    flushed: int  # the steps before the last flush that was answered
    following: int  # the steps before the flush after that one, or before the end
    failed: list[Write]


class Io(Promise):
    """A guest that writes and now and then flushes."""

    job = "io"
    has_jobs = False

    def __init__(self, files: Files, writes: list[Write]) -> None:
        super().__init__(files)
        self.writes = writes
        #: What has failed in some run: it may have been written in part, or in another run.
        self.failed: list[Write] = []
        #: Whether an earlier run has made clusters local that this one has begun to write again.
        self.is_repeated = False
        self.stdin = "".join(write.line() for write in writes)

    def again(self) -> Io:
        """The same once more: what a run that was cut short did not flush may be there or not.

        It may be seen now and be lost with the power later. But each sector holds what it held
        before the first run, or what one of the steps wrote: the runs have the same steps.
        """
        if self.done:
            return Io(self.files, self.writes)
        self.is_repeated = True
        return self

    @property
    def _bits_to_change(self) -> int:
        return len(self._written - self.stored_bits)

    @cached_property
    def _written(self) -> frozenset[int]:
        """The clusters that some write touches."""
        return self._touched_by(self.writes)

    def _touched_by(self, writes: list[Write]) -> frozenset[int]:
        size = self.cluster_size
        return frozenset(
            cluster
            for write in writes
            for cluster in range(write.start // size, -(-write.stop // size))
        )

    def _heard(self, done: bool) -> Heard:
        lines = iter(self.stdout.split("\n")[:-1])
        points, failed = [0], []
        for at, write in enumerate(self.writes):
            answer = next(lines, None)
            if answer is None:
                break
            if write.is_flush:
                points.append(at)
            elif answer.startswith("wrote"):
                next(lines, None)  # how fast
            else:
                failed.append(write)
        flushes = [at for at, write in enumerate(self.writes) if write.is_flush]
        last = len(self.writes) if done else points[-1]
        return Heard(last, ([at for at in flushes if at > last] + [len(self.writes)])[0], failed)

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._untouched(self.files.below)
        yield from self._same_header()
        heard = self._heard(done)
        flushed = self.bits | (self._touched_by(self.writes[: heard.flushed]))
        local = frozenset(oracle.allocated(self.files.path))
        self.failed += heard.failed
        unsure = self._touched_by(self.failed)
        if (flushed - unsure) - local or local - self.bits - self._written:
            yield f"clusters that are local or not without reason: {sorted(local ^ flushed)}"
        seen = oracle.guest_bytes(self.files.path)
        yield from self._unwritten(seen)
        for cluster in sorted(self._written - unsure):
            yield from self._cluster(cluster, seen, heard, cluster in flushed, cluster in local)
        for cluster in sorted(unsure):
            yield from self._unsure_cluster(cluster, seen)

    def _unwritten(self, seen: bytes) -> Iterator[str]:
        expected = bytearray(self.view)
        for cluster in self._written:
            start, stop = span(cluster, self.cluster_size, self.size)
            expected[start:stop] = seen[start:stop]
        yield from differs(f"{VIEW} where nothing was written", seen, bytes(expected))

    def _cluster(
        self, cluster: int, seen: bytes, heard: Heard, flushed: bool, local: bool
    ) -> Iterator[str]:
        """One cluster that was written, sector by sector, against what it may hold."""
        start, stop = span(cluster, self.cluster_size, self.size)
        states = self._states(start, stop)
        if flushed:
            allowed = states[heard.flushed :]
        else:
            first = 0 if self.is_repeated else heard.following
            allowed = states[first:] if local else states[:1]
        since = f"{heard.flushed} of {len(self.writes)} steps were flushed"
        yield from _one_of(allowed, seen[start:stop], start, since)

    def _unsure_cluster(self, cluster: int, seen: bytes) -> Iterator[str]:
        """One cluster with a write that failed, perhaps half done: every byte was asked for."""
        start, stop = span(cluster, self.cluster_size, self.size)
        alone = []
        for write in self.writes:
            data = bytearray(self.view[start:stop])
            write.into(data, start)
            alone.append(bytes(data))
        for at, now in enumerate(seen[start:stop]):
            if all(data[at] != now for data in alone):
                yield f"{VIEW} at {start + at} is {now}, which no write put there"
                return

    def _states(self, start: int, stop: int) -> list[bytes]:
        """The bytes ``[start, stop)`` after none of the steps, after the first, and so on."""
        data = bytearray(self.view[start:stop])
        states = [bytes(data)]
        for write in self.writes:
            write.into(data, start)
            states.append(bytes(data))
        return states


def _one_of(allowed: list[bytes], seen: bytes, start: int, why: str) -> list[str]:
    """Return a line unless every sector is that of one of the allowed states."""
    for at in range(0, len(seen), SECTOR):
        now = seen[at : at + SECTOR]
        if all(state[at : at + SECTOR] != now for state in allowed):
            return [f"{VIEW} at {start + at} is {now[:8]!r}, which it cannot be: {why}"]
    return []


def random_writes(rng: random.Random, size: int, count: int) -> Iterator[Write]:
    """Sectors here and there, often close to each other, and a flush at every eighth or so."""
    sectors = size // SECTOR
    place = 0
    for _ in range(count):
        place = rng.randrange(sectors) if rng.random() < 0.6 else min(place, sectors - 1)
        stop = min(place + rng.choice([1, 7, 8, 128, 300, 1024]), sectors)
        yield Write(place * SECTOR, stop * SECTOR, rng.randrange(256))
        place = stop
        if rng.random() < 0.15:
            yield Write()


#: What each command promises, by its words; `io` needs its writes as well.
KINDS: dict[str, type[Promise]] = {
    "commit": Commit,
    "commit -d": CommitKeeping,
    "flatten": Flatten,
    "flatten --discard": FlattenDiscarding,
    "convert": Convert,
    "reset": Reset,
}


def new_version(rng: random.Random, files: Files) -> bytes:
    """What a new version of the backing file holds."""
    assert files.backing is not None
    is_raw = files.backing.path == files.backing.image
    old = read_file(files.backing.path) if is_raw else oracle.guest_bytes(files.backing.path)
    new = bytearray(old)
    for _ in range(rng.randint(1, 60)):
        at = rng.randrange(max(1, len(new)))
        part = new[at : at + rng.choice([1, 512, 16 * KiB, 200 * KiB])]
        new[at : at + len(part)] = rng.choice([b"N", b"\0"]) * len(part)
    return bytes(new)


#: Ways to do the same.
MANNERS = (
    (),
    (),
    (),
    ("--copy", "buffer"),
    ("--copy", "range"),
    ("--copy", "map"),
    ("--copy", "clone"),
    ("-t", "none"),
    ("-S", "4k"),
)


#: How many jobs read back what they wrote.
READ_BACK = 0.2


def promise_of(words: str, files: Files, rng: random.Random) -> Promise:
    """Return what the command ``words`` promises about ``files``, with random copy options."""
    if words == "io":
        size = oracle.virtual_size(files.path)
        return Io(files, list(random_writes(rng, size, rng.randint(1, 40))))
    if words == "resize":
        sectors = oracle.virtual_size(files.path) // SECTOR
        return Resize(files, rng.randint(1, max(2, 2 * sectors)) * SECTOR)
    if words == "rebase":
        promise: Promise = Rebase(files, new_version(rng, files))
    elif words == "commit -b":
        promise = CommitInto(files, rng.choice(bases_of(files)))
    else:
        promise = KINDS[words](files)
    if not promise.has_jobs:
        return promise
    promise.copy_options = rng.choice(MANNERS)
    if words != "convert" and rng.random() < READ_BACK:
        promise.copy_options += ("--verify",)
    return promise


def differs(what: str, now: bytes, then: bytes) -> list[str]:
    """Return nothing when both are the same, else one line with the first difference."""
    if now == then:
        return []
    if len(now) != len(then):
        return [f"{what} is {len(now)} bytes long instead of {len(then)}"]
    wrong = [
        at for at in range(0, len(now), SECTOR) if now[at : at + SECTOR] != then[at : at + SECTOR]
    ]
    at = wrong[0]
    return [
        f"{what}: {len(wrong)} sectors differ, the first at {at}: "
        f"{now[at : at + 8]!r} instead of {then[at : at + 8]!r}"
    ]
