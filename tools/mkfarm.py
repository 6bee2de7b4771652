#!/usr/bin/env python3
"""Build a farm of add-cow images from a seed, and print what a check of it must find.

A farm consists of raw bases, overlays over them and over each other, and, by default, faults:
overlays that each break one rule, and those that suffer from it. This script shares no code with
the package, because the package's checks are measured by it: it builds header and bitmap in a few
lines, and each fault in the source stands beside its expected findings. These come from
docs/format.md and from the documentation of the checks, never from running the tool.

Healthy overlays are as varied as the format allows, because a false alarm is as wrong as a missed
fault: chains, unaligned sizes, names of every spelling, written zeros in clusters that are not
allocated, bytes behind the last sector, backing files that ALL_ALLOCATED makes unnecessary. Only a
fault's own helpers stand on a faulty overlay, so each consequence is known. All files are sparse:
ten thousand images take some hundred megabytes and a few seconds. The same arguments give the same
names and bytes, wherever the farm lies.

Not planted: faults that root can read in spite of (the finding `file`), and faults in what
ALL_ALLOCATED makes irrelevant.

The script prints one JSON document: the seed, the numbers of overlays and bases, and under
"expected" everything that is not clean: by file name the exit status and names of findings, and the
findings about the graph with the overlays that each of them names.
"""

import argparse
import json
import os
import random
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

KiB = 1024
MiB = 1024 * KiB
SECTOR = 512

SMALLEST_HEADER = 4 * KiB
SMALLEST_CLUSTER, LARGEST_CLUSTER = 4 * KiB, 2 * MiB
ALL_ALLOCATED = 1
RAW, ADD_COW = b"raw", b"add-cow"

#: Directories of the bases: in order of names, one before all overlays and one behind them.
BASES = ("bases", "templates")

#: Overlays in one directory: a farm's directories are neither one nor one for each.
CROWD = 100

#: A backing overlay is one of so many made last: chains then keep growing to their full depth.
RECENT = 200

#: Bytes of noise in one place: a block of the file system holds them, whatever their number.
GRAIN = 64

#: A file system's usual block: so many written zeros take space, and show as data to a search.
BLOCK = 4 * KiB

#: Clusters of a faulted overlay's disk, enough for a third byte of bitmap that is partly used,
#: and those of them that are allocated and hold data.
FAULTY_CLUSTERS = 20
LOCAL = (0, 1, 5)

#: A cluster of it that is not allocated, with a bit in the bitmap's second byte.
NOT_LOCAL = 11

#: Overlays in the longest chain that is allowed.
LONGEST_CHAIN = 30


class FarmError(Exception):
    """The farm cannot be built there; the text says why."""


# ---- the format ----

# magic, backing name offset and size, image name offset and size, cluster bits,
# features, compatible features, header size, backing format, image format
LAYOUT = struct.Struct("<4sIIIIIQQI16s16s")


class Fixed(NamedTuple):
    """The fixed header, field by field as in the file, valid or not."""

    magic: bytes
    backing_offset: int
    backing_size: int
    image_offset: int
    image_size: int
    cluster_bits: int
    features: int
    compatible: int
    header_size: int
    backing_format: bytes
    image_format: bytes


#: Fields of the header that say something else than is true.
Lie = dict[str, int | bytes]

#: Bytes and the place where they stand.
Extent = tuple[int, bytes]


@dataclass(frozen=True)
class Cow:
    """One ``.add-cow`` file. A fault is a lie, a mark where none belongs, or a wrong length."""

    image: bytes
    size: int
    backing: bytes = b""
    backing_format: bytes = b""
    cluster: int = 64 * KiB
    compatible: int = 0
    local: Sequence[int] = ()
    gap: int = 0
    """Bytes between the fixed header and the names."""
    lie: Lie = field(default_factory=dict)
    marks: Sequence[Extent] = ()
    length: int | None = None

    @property
    def header_size(self) -> int:
        """How long the header region is, and where the bitmap starts."""
        return max(SMALLEST_HEADER, self.cluster)

    @property
    def bitmap_length(self) -> int:
        """The bytes with a bit of some cluster, rounded up to whole clusters."""
        return round_up(-(-clusters(self.size, self.cluster) // 8), self.cluster)

    def fixed(self) -> bytes:
        """The bytes of the fixed header."""
        at = LAYOUT.size + self.gap
        true = Fixed(
            magic=b"ACOW",
            backing_offset=at if self.backing else 0,
            backing_size=len(self.backing),
            image_offset=at + len(self.backing),
            image_size=len(self.image),
            cluster_bits=self.cluster.bit_length() - 1,
            features=0,
            compatible=self.compatible,
            header_size=self.header_size,
            backing_format=self.backing_format,
            image_format=RAW,
        )
        said: dict[str, Any] = {**true._asdict(), **self.lie}
        return LAYOUT.pack(*Fixed(**said))

    def extents(self) -> list[Extent]:
        """The parts of the file that are not 0."""
        names = self.backing + self.image
        start: Extent = (0, self.fixed() + bytes(self.gap) + names)
        if self.gap > BLOCK:
            start = (0, self.fixed())
        far = [(LAYOUT.size + self.gap, names)] if self.gap > BLOCK else []
        return [start, *far, (self.header_size, bits_of(self.local)), *self.marks]

    def write(self, path: str) -> None:
        """Write the file."""
        length = self.header_size + self.bitmap_length if self.length is None else self.length
        write_sparse(path, length, self.extents())


def round_up(number: int, step: int) -> int:
    """Round NUMBER up to a multiple of STEP."""
    return -(-number // step) * step


def clusters(size: int, cluster: int) -> int:
    """How many clusters the disk of an image file of SIZE bytes has."""
    return -(-(size // SECTOR * SECTOR) // cluster)


def bits_of(numbers: Iterable[int]) -> bytes:
    """The bitmap, up to the last byte that is not 0, in which these bits are set."""
    bitmap = bytearray()
    for number in numbers:
        bitmap.extend(bytes(max(0, number // 8 + 1 - len(bitmap))))
        bitmap[number // 8] |= 1 << number % 8
    return bytes(bitmap)


def write_sparse(path: str, length: int, extents: Iterable[Extent]) -> None:
    """Make a new file of LENGTH bytes that holds EXTENTS, cut at its end, and holes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for at, content in extents:
            if content:
                os.pwrite(fd, content, at)
        os.ftruncate(fd, length)
    finally:
        os.close(fd)


# ---- the farm ----


@dataclass
class Farm:
    """A farm while it is being built. All paths are relative to its directory."""

    place: str
    seed: int
    size: int
    cluster: int
    bases: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    images: int = 0
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)
    graph: list[dict[str, Any]] = field(default_factory=list)

    def at(self, path: str) -> str:
        """Where PATH lies."""
        return os.path.join(self.place, path)

    def overlay(self, path: str, cow: Cow, *findings: str, status: int = 0) -> None:
        """Write an overlay; check will end with STATUS and report these FINDINGS."""
        cow.write(self.at(path))
        self.images += 1
        if findings:
            self.findings[path] = {"exit": status, "findings": sorted(findings)}

    def expect(self, name: str, paths: Iterable[str]) -> None:
        """Expect a finding about the graph that names the overlays at PATHS."""
        self.graph.append({"name": name, "filenames": sorted(paths)})

    def expected(self) -> dict[str, Any]:
        """Everything that a check must find."""
        graph = sorted(self.graph, key=lambda one: (one["name"], one["filenames"]))
        return {"images": dict(sorted(self.findings.items())), "graph": graph}


def stored(path: str, holder: str) -> str:
    """The name by which an overlay in the directory HOLDER calls PATH."""
    name = os.path.relpath(path, holder)
    # A colon before the first slash would make it the name of a protocol.
    return f"./{name}" if ":" in name.split("/", maxsplit=1)[0] else name


def noise(rng: random.Random) -> bytes:
    """Bytes that are not 0, and with which no format begins."""
    return b"\x01" + rng.randbytes(GRAIN - 1)


def lay_bases(farm: Farm, count: int) -> None:
    """Make the raw base files: of several sizes, mostly holes."""
    for directory in BASES:
        os.mkdir(farm.at(directory))
    rng = random.Random(f"{farm.seed} bases")
    for number in range(count):
        length = rng.choice((farm.size, farm.size, farm.size * 3 // 4, farm.size + 100))
        places = [rng.randrange(max(1, length - GRAIN)) for _ in range(4)]
        farm.bases.append(f"{BASES[number % 2]}/base-{number}.img")
        write_sparse(farm.at(farm.bases[-1]), length, [(at, noise(rng)) for at in places])


def lay_directories(farm: Farm, images: int) -> None:
    """Make the directories of the overlays, each with one for image files that lie apart."""
    for number in range(max(1, -(-images // CROWD))):
        farm.directories.append(f"dir-{number:03}")
        os.makedirs(farm.at(f"dir-{number:03}/disks"))


def lay_decoys(farm: Farm) -> None:
    """Make files that are no overlays, and that a search must skip."""
    write_sparse(farm.at("notes.txt"), 4, [(0, b"none")])
    write_sparse(farm.at("bases/empty.add-cow"), 0, [])
    write_sparse(farm.at("bases/not-one.add-cow"), 8 * KiB, [(0, b"WOCA")])
    # A search that follows it would never end.
    os.symlink("..", farm.at("bases/up"))


# ---- healthy overlays ----

#: Names of overlays. One in so many has an odd one; they take turns, for few farms are large.
ODDNESS = 10
USUAL = "vm-{}.add-cow"
ODD = (
    *("vm-{}.txt", "vm-{}", "vm-{}.raw.qcow2", "the vm {} (copy).add-cow", "-vm-{}.add-cow"),
    *(".vm-{}.add-cow", "größe-{}.add-cow", "仮想-{}.add-cow", "vm:{}.add-cow", "vm'{}\".add-cow"),
)


class Grown(NamedTuple):
    """A healthy overlay: where it lies, and how many overlays it takes down to a raw file."""

    path: str
    depth: int


@dataclass
class Grower:
    """Makes healthy overlays, each over the files that exist already."""

    farm: Farm
    depth: int
    rng: random.Random
    grown: list[Grown] = field(default_factory=list)

    def chance(self, percent: float) -> bool:
        """True in PERCENT of all cases."""
        return self.rng.random() * 100 < percent

    def grow(self, number: int) -> None:
        """Make one overlay with its image file."""
        directory = self.farm.directories[number // CROWD]
        pattern = ODD[number // ODDNESS % len(ODD)] if number % ODDNESS == 1 else USUAL
        path = f"{directory}/{pattern.format(f'{number:05}')}"
        name, image = self._image_names(directory, number)
        cow = Cow(os.fsencode(stored(name, directory)), self._size(), cluster=self._cluster())
        cow = replace(cow, gap=self._gap(cow), compatible=32 if self.chance(2) else 0)
        cow, depth = self._over_something(cow, directory)
        cow = self._with_disk(cow, image)
        self.farm.overlay(path, cow)
        if self.chance(2):
            self._name_again(path, f"{directory}/{self.rng.choice('az')}-second-{number:05}")
        self.grown.append(Grown(path, depth))

    def _name_again(self, path: str, other: str) -> None:
        """Give an overlay a second name, before or behind the first in order, or a link to it."""
        if self.chance(50):
            os.link(self.farm.at(path), self.farm.at(other))
        else:
            os.symlink(os.path.basename(path), self.farm.at(other))

    def _image_names(self, directory: str, number: int) -> tuple[str, str]:
        """What the image file is called, and where it lies: mostly beside, sometimes apart."""
        suffix = self.rng.choice((".raw", ".raw", ".raw", ".img", ""))
        beside = f"{directory}/image-{number:05}{suffix}"
        apart = f"{directory}/disks/image {number:05}{suffix}"
        if self.chance(1):
            os.symlink(stored(apart, directory), self.farm.at(beside))
            return beside, apart
        place = apart if self.chance(10) else beside
        return place, place

    def _size(self) -> int:
        """As large as the base, smaller or larger; not always whole clusters, or sectors."""
        size = self.farm.size
        if self.chance(60):
            return size
        if self.chance(2):
            return self.rng.choice((0, 1, SECTOR - 1, SECTOR))
        odd = self.rng.choice((0, SECTOR, 7 * SECTOR, 100, 4095))
        return self.rng.randrange(size // 4, size * 2) // (4 * KiB) * (4 * KiB) + odd

    def _cluster(self) -> int:
        return self.farm.cluster if self.chance(60) else 1 << self.rng.randint(12, 16)

    def _gap(self, cow: Cow) -> int:
        """Names may lie anywhere in the header region; the longest pair here has 300 bytes."""
        room = cow.header_size - LAYOUT.size - 300
        return self.rng.randrange(room) if self.chance(5) else 0

    def _over_something(self, cow: Cow, directory: str) -> tuple[Cow, int]:
        """Choose the backing: none, a base, an overlay, or one that is gone and not needed."""
        if self.chance(5):
            return cow, 1
        below = self.rng.choice(self.grown[-RECENT:]) if self.grown and self.chance(65) else None
        path, depth, kind = self.rng.choice(self.farm.bases), 0, RAW
        if below is not None and below.depth < self.depth:
            path, depth, kind = below.path, below.depth, ADD_COW
        if self.chance(5):
            cow = replace(cow, compatible=cow.compatible | ALL_ALLOCATED)
            path = "bases/gone.img" if self.chance(50) else path
        name = os.fsencode(stored(path, directory))
        return replace(cow, backing=name, backing_format=kind), depth + 1

    def _with_disk(self, cow: Cow, image: str) -> Cow:
        """Write the image file, and return the overlay with its allocated clusters."""
        total = clusters(cow.size, cow.cluster)
        wanted = self.rng.choice((0, 1, 1, 2, 3, total // 2, total))
        chosen = self.rng.sample(range(total), min(wanted, total))
        extents = [(self._within(cow, one), noise(self.rng)) for one in chosen[:3]]
        if self.chance(5) and total > len(chosen):  # zeros, although written, are no data
            free = next(one for one in range(total) if one not in chosen)
            extents.append((free * cow.cluster, bytes(BLOCK)))
        if cow.size % SECTOR:  # bytes behind the last whole sector belong to no disk
            extents.append((cow.size - 1, b"\x01"))
        write_sparse(self.farm.at(image), cow.size, extents)
        return cow if cow.compatible & ALL_ALLOCATED else replace(cow, local=chosen)

    def _within(self, cow: Cow, number: int) -> int:
        """A place for noise in a cluster; the last one may be short."""
        start = number * cow.cluster
        at = start + self.rng.randrange(cow.cluster - GRAIN)
        return at if at + GRAIN <= cow.size else start


# ---- faults ----


class Plot:
    """The place of one fault, with names that no other fault uses.

    A tag tells the overlays of one fault apart. They lie in a directory among healthy ones.
    """

    def __init__(self, farm: Farm, kind: str, number: int) -> None:
        self.farm = farm
        self.rng = random.Random(f"{farm.seed} {kind} {number}")
        self.number = number
        self.directory = self.rng.choice(farm.directories)
        self.base = os.fsencode(stored(self.rng.choice(farm.bases), self.directory))
        self.stem = f"{kind}-{number:03}"
        self.cluster = self.rng.choice((farm.cluster, 4 * KiB, 16 * KiB))
        self.size = FAULTY_CLUSTERS * self.cluster - SECTOR

    def name(self, suffix: str) -> str:
        """The name of a file of this fault, as another one beside it calls it."""
        return self.stem + suffix

    def path(self, suffix: str) -> str:
        """The same, as the farm calls it."""
        return f"{self.directory}/{self.name(suffix)}"

    def cow(self, tag: str = "", **changes: Any) -> Cow:
        """A sound overlay over a base; CHANGES make it what it has to be."""
        sound = Cow(
            image=os.fsencode(self.name(f"{tag}.raw")),
            size=self.size,
            backing=self.base,
            backing_format=RAW,
            cluster=self.cluster,
            local=LOCAL,
        )
        return replace(sound, **changes)

    def over(self, tag: str) -> dict[str, Any]:
        """The changes that put an overlay over the one with this TAG."""
        return {"backing": os.fsencode(self.name(f"{tag}.add-cow")), "backing_format": ADD_COW}

    def disk(self, suffix: str = ".raw", *, start: bytes = b"", more: Sequence[int] = ()) -> None:
        """Write an image file that has data in the usual clusters and in MORE."""
        extents = [(number * self.cluster, noise(self.rng)) for number in (*LOCAL, *more)]
        write_sparse(self.farm.at(self.path(suffix)), self.size, [*extents, (0, start)])

    def plant(self, cow: Cow, *findings: str, tag: str = "", status: int = 2) -> str:
        """Write an overlay without an image file; return the name that the farm has for it."""
        path = self.path(f"{tag}.add-cow")
        self.farm.overlay(path, cow, *findings, status=status)
        return path

    def whole(self, *findings: str, tag: str = "", status: int = 2, **changes: Any) -> str:
        """Write an overlay and its image file."""
        self.disk(f"{tag}.raw")
        return self.plant(self.cow(tag, **changes), *findings, tag=tag, status=status)


#: Plants one fault; its result is not used.
Fault = Callable[[Plot], object]

#: Invalid headers, and their findings. The first kinds in turn, so that
#: a farm with several of each has every one of them.
LIES: dict[str, tuple[tuple[str, ...], list[Lie]]] = {
    "header-cluster-bits": (
        ("header",),
        [{"cluster_bits": bits} for bits in (11, 22, 0, 63, 2**32 - 1)],
    ),
    "header-features": (("header",), [{"features": 1}, {"features": 1 << 61}]),
    # No power of two, larger than any cluster, larger than any file.
    "header-size": (("header",), [{"header_size": size} for size in (12288, 4 * MiB, 2**32 - 1)]),
    "names-image-offset": (("names",), [{"image_offset": at} for at in (75, 0, 2**32 - 1)]),
    "names-backing-offset": (("names",), [{"backing_offset": at} for at in (75, 2**32 - 1)]),
    "names-half-a-backing": (
        ("names",),
        [{"backing_size": 0}, {"backing_offset": 0, "backing_format": b""}],
    ),
    # 4095 is allowed, but then it ends behind the header, or has the header's zeros in it.
    "names-image-length": (("names",), [{"image_size": n} for n in (0, 4096, 4095, 2**32 - 1)]),
    "names-backing-length": (("names",), [{"backing_size": n} for n in (1024, 2**32 - 1)]),
    "formats-unknown": (
        ("formats",),
        [{"image_format": b"qcow3"}, {"backing_format": b"RAW"}, {"image_format": b"\xff"}],
    ),
    "formats-not-padded": (
        ("formats",),
        [
            {"image_format": b"raw\0raw"},
            {"backing_format": b"raw".ljust(15, b"\0") + b"x"},
            {"image_format": b"raw" * 5 + b"r"},
        ],
    ),
    "formats-empty": (("formats",), [{"image_format": b""}, {"backing_format": b""}]),
    # Nothing points at the backing's name any more: its bytes ought to be 0.
    "formats-of-nothing": (
        ("formats", "reserved-bytes"),
        [{"backing_offset": 0, "backing_size": 0}],
    ),
    "formats-not-so": (
        ("formats",),
        [{"image_format": b"qcow2"}, {"backing_format": b"luks"}, {"image_format": ADD_COW}],
    ),
    "backing-no-overlay": (("backing-file",), [{"backing_format": ADD_COW}]),
}


def liar(kind: str) -> Fault:
    """The fault of one line of LIES."""
    findings, lies = LIES[kind]
    return lambda plot: plot.whole(*findings, lie=lies[plot.number % len(lies)])


def header_cut(plot: Plot) -> None:
    """The file ends behind the names, within the header region."""
    plot.whole("header", length=plot.cow().header_size - plot.rng.choice((1, 1000)))


def header_bare(plot: Plot) -> None:
    """The file ends behind the fixed header: neither name is there."""
    plot.whole("header", "names", "names", length=LAYOUT.size)


def header_stub(plot: Plot) -> None:
    """The file ends within the fixed header, of which only the magic is valid."""
    plot.whole("header", length=(LAYOUT.size - 1, 4, 20)[plot.number % 3])


def names_nul(plot: Plot) -> None:
    """A NUL in a name: nothing can have that name."""
    which = ("image", "backing")[plot.number % 2]
    name = getattr(plot.cow(), which)
    plot.whole("names", **{which: name[:3] + b"\0" + name[3:]})


def reserved_bytes(plot: Plot) -> None:
    """A byte that is not 0 where no name is."""
    cow = plot.cow()
    behind = LAYOUT.size + len(cow.backing) + len(cow.image)
    at = (behind, cow.header_size - 1, 2000)[plot.number % 3]
    plot.whole("reserved-bytes", status=3, marks=[(at, b"x")])


def formats_magic(plot: Plot) -> None:
    """A raw image file begins as another format does."""
    start = (b"QFI\xfb\0\0\0\3", b"QED\0", b"KDMV", b"LUKS\xba\xbe")[plot.number % 4]
    plot.disk(start=start)
    plot.plant(plot.cow(), "formats")


def formats_magic_below(plot: Plot) -> None:
    """The same of the backing file."""
    plot.disk("-base.img", start=b"vhdxfile")
    plot.whole("formats", backing=os.fsencode(plot.name("-base.img")))


def formats_unseen(plot: Plot) -> None:
    """An image file of a format that is allowed and never opened."""
    vpc = plot.number % 2  # has no magic at its start; qcow2 has one
    plot.disk(start=b"" if vpc else b"QFI\xfb\0\0\0\3")
    plot.plant(plot.cow(lie={"image_format": b"vpc" if vpc else b"qcow2"}), "formats", status=1)


def formats_overlay_as_raw(plot: Plot) -> None:
    """A backing file that is declared raw and is a valid overlay, before or behind in order."""
    below, top = (("-a", "-b"), ("-b", "-a"))[plot.number % 2]
    plot.whole(tag=below)
    plot.whole("formats", tag=top, **{**plot.over(below), "backing_format": RAW})


def formats_overlay_as_image(plot: Plot) -> None:
    """An image file that is a sound overlay. Every cluster is allocated, so that nothing leaks."""
    plot.whole(tag="-other")
    other = plot.cow()
    size = other.header_size + other.bitmap_length
    local = range(clusters(size, plot.cluster))
    image = os.fsencode(plot.name("-other.add-cow"))
    plot.plant(plot.cow(image=image, size=size, local=local), "formats", tag="-top")


def image_outside(plot: Plot) -> None:
    """The image file's name leads out of the farm, by dots or by a link."""
    outside = f"../../outside-{plot.stem}.raw"
    if plot.number % 2:
        os.symlink(outside, plot.farm.at(plot.path(".raw")))
        outside = plot.name(".raw")
    plot.plant(plot.cow(image=os.fsencode(outside)), "image-file", status=1)


def image_protocol(plot: Plot) -> None:
    """The image file's name is no path."""
    plot.plant(plot.cow(image=f"nbd:{plot.stem}:10809".encode()), "image-file", status=1)


def image_no_file(plot: Plot) -> None:
    """What the image file's name stands for is a directory, a FIFO or a link to itself."""
    path = plot.farm.at(plot.path(".raw"))
    makers: list[Callable[[], None]] = [
        lambda: os.mkdir(path),
        lambda: os.mkfifo(path),
        lambda: os.symlink(plot.name(".raw"), path),
    ]
    makers[plot.number % 3]()
    plot.plant(plot.cow(), "image-file", status=1)


def backing_outside(plot: Plot) -> None:
    """The backing file's name leads out of the farm, or is no path."""
    names = f"../../outside-{plot.stem}.img", f"json:{plot.stem}"
    plot.whole("backing-file", status=1, backing=names[plot.number % 2].encode())


def backing_directory(plot: Plot) -> None:
    """The backing file is a directory, and there is a leak."""
    plot.disk(more=[NOT_LOCAL])
    cow = plot.cow(backing=b"../bases")
    plot.plant(cow, "backing-file", "leaks", status=1)


def backing_damaged(plot: Plot) -> None:
    """An overlay below has a header that forbids to open it, or names that are none."""
    if plot.number % 2:
        plot.whole("names", tag="-below", image=b"a\0b")
    else:
        plot.whole("header", tag="-below", lie={"features": 2})
    plot.whole("backing-file", tag="-top", **plot.over("-below"))


def missing_image(plot: Plot) -> None:
    """There is no image file, or a file where its directory should be."""
    plot.disk()
    name = (".gone", ".raw/disk")[plot.number % 2]
    plot.plant(plot.cow(image=os.fsencode(plot.name(name))), "missing-file")


def missing_backing(plot: Plot) -> None:
    """There is no backing file, and clusters that need one."""
    plot.whole("missing-file", backing=os.fsencode(plot.name(".gone")))


def missing_below(plot: Plot) -> None:
    """What is missing is the image file of the overlay below: both cannot be read."""
    plot.plant(plot.cow("-below"), "missing-file", tag="-below")
    plot.whole("missing-file", tag="-top", **plot.over("-below"))


def same_itself(plot: Plot) -> None:
    """An overlay is its own image file."""
    plot.plant(plot.cow(image=os.fsencode(plot.name(".add-cow"))), "same-file")


def same_as_backing(plot: Plot) -> None:
    """An overlay's image file is also its backing file, which the graph shows too."""
    path = plot.whole("same-file", backing=os.fsencode(plot.name(".raw")))
    plot.farm.expect("image-as-backing", [path])


def same_below(plot: Plot) -> None:
    """An overlay and the one below it have one image file; only from above can that be seen."""
    below = plot.whole(tag="-below")
    image = os.fsencode(plot.name("-below.raw"))
    top = plot.plant(plot.cow(image=image, **plot.over("-below")), "same-file", tag="-top")
    plot.farm.expect("shared-image", [below, top])


def same_bottom(plot: Plot) -> None:
    """An overlay's image file is the raw file at the bottom of its chain."""
    bottom = os.fsencode(plot.name("-top.raw"))
    middle = plot.whole(tag="-middle", backing=bottom)
    top = plot.whole("same-file", tag="-top", **plot.over("-middle"))
    plot.farm.expect("image-as-backing", [middle, top])


def cycle(plot: Plot) -> None:
    """One, two or three overlays back each other in a circle; sometimes one more stands on them."""
    count = plot.number % 3 + 1
    paths = [
        plot.whole("chain-cycle", tag=f"-{at}", **plot.over(f"-{(at + 1) % count}"))
        for at in range(count)
    ]
    plot.farm.expect("chain-cycle", paths)
    if plot.number % 2:
        plot.whole("chain-cycle", tag="-tail", **plot.over("-0"))


def cycle_by_link(plot: Plot) -> None:
    """An overlay backs itself under another name: only the inode shows that it is the same file."""
    # The other name is behind the first in order: a file is reported under its first.
    path = plot.whole("chain-cycle", **plot.over("_again"))
    os.link(plot.farm.at(path), plot.farm.at(plot.path("_again.add-cow")))
    plot.farm.expect("chain-cycle", [path])


def chain(plot: Plot) -> None:
    """A chain with two overlays more than may be; what lies below those two is sound."""
    plot.whole(tag="-01")
    for at in range(2, LONGEST_CHAIN + 3):
        findings = ("chain",) if at > LONGEST_CHAIN else ()
        plot.whole(*findings, tag=f"-{at:02}", **plot.over(f"-{at - 1:02}"))


def bitmap_length(plot: Plot) -> None:
    """The file ends within its bitmap. Data whose bit is missing is not reported as a leak."""
    cow = plot.cow()
    kept = (1, cow.bitmap_length - 1)[plot.number % 2]
    plot.disk(more=[NOT_LOCAL] if kept == 1 else [])
    plot.plant(replace(cow, length=cow.header_size + kept), "bitmap-length")


def stray_bits(plot: Plot) -> None:
    """A bit behind that of the last cluster: next to it, or at the bitmap's very end."""
    last = plot.cow().bitmap_length * 8 - 1
    plot.whole("stray-bits", local=(*LOCAL, (FAULTY_CLUSTERS, last)[plot.number % 2]))


def leaks(plot: Plot) -> None:
    """Data in clusters that are not allocated, also in the last one. Overlays above are clean."""
    plot.disk("-below.raw", more=[NOT_LOCAL, FAULTY_CLUSTERS - 1])
    plot.plant(plot.cow("-below"), "leaks", tag="-below", status=3)
    plot.whole(tag="-top", **plot.over("-below"))


def several(plot: Plot) -> None:
    """Several faults at once: none may hide another."""
    plot.disk(more=[NOT_LOCAL])
    cow = plot.cow(backing=b"gone/gone", local=(*LOCAL, FAULTY_CLUSTERS), marks=[(3000, b"x")])
    plot.plant(cow, "leaks", "missing-file", "reserved-bytes", "stray-bits")


def shared_image(plot: Plot) -> None:
    """Two or three overlays have one image file; with the same bits, each by itself is sound."""
    plot.disk()
    image = os.fsencode(plot.name(".raw"))
    tags = ("-a", "-b", "-c")[: 2 + plot.number % 2]
    plot.farm.expect("shared-image", [plot.plant(plot.cow(image=image), tag=tag) for tag in tags])


def shared_link(plot: Plot) -> None:
    """One image file with two names. What only one of its overlays holds leaks in the other."""
    one = plot.whole(tag="-a")
    os.link(plot.farm.at(plot.path("-a.raw")), plot.farm.at(plot.path("-b.raw")))
    other = plot.plant(plot.cow("-b", local=LOCAL[:1]), "leaks", tag="-b", status=3)
    plot.farm.expect("shared-image", [one, other])


def image_as_backing(plot: Plot) -> None:
    """An image file on which another overlay stands, as if it were a disk by itself."""
    owner = plot.whole(tag="-owner")
    image = os.fsencode(plot.name("-owner.raw"))
    tags = ("-user-a", "-user-b")[: 1 + plot.number % 2]
    users = [plot.whole(tag=tag, backing=image) for tag in tags]
    plot.farm.expect("image-as-backing", [owner, *users])


FAULTS: dict[str, Fault] = {
    **{kind: liar(kind) for kind in LIES},
    "header-cut": header_cut,
    "header-bare": header_bare,
    "header-stub": header_stub,
    "names-nul": names_nul,
    "reserved-bytes": reserved_bytes,
    "formats-magic": formats_magic,
    "formats-magic-below": formats_magic_below,
    "formats-unseen": formats_unseen,
    "formats-overlay-as-raw": formats_overlay_as_raw,
    "formats-overlay-as-image": formats_overlay_as_image,
    "image-outside": image_outside,
    "image-protocol": image_protocol,
    "image-no-file": image_no_file,
    "backing-outside": backing_outside,
    "backing-directory": backing_directory,
    "backing-damaged": backing_damaged,
    "missing-image": missing_image,
    "missing-backing": missing_backing,
    "missing-below": missing_below,
    "same-itself": same_itself,
    "same-as-backing": same_as_backing,
    "same-below": same_below,
    "same-bottom": same_bottom,
    "cycle": cycle,
    "cycle-by-link": cycle_by_link,
    "chain": chain,
    "bitmap-length": bitmap_length,
    "stray-bits": stray_bits,
    "leaks": leaks,
    "several": several,
    "shared-image": shared_image,
    "shared-link": shared_link,
    "image-as-backing": image_as_backing,
}


# ---- the command line ----


def build(args: argparse.Namespace, seed: int) -> Farm:
    """Build the farm that the command line asks for."""
    make_room(args.dir)
    farm = Farm(args.dir, seed, args.size, args.cluster)
    lay_bases(farm, args.bases)
    lay_directories(farm, args.images)
    lay_decoys(farm)
    grower = Grower(farm, args.depth, random.Random(f"{seed} overlays"))
    for number in range(args.images):
        grower.grow(number)
    for kind, fault in FAULTS.items():
        for number in range(args.faults):
            fault(Plot(farm, kind, number))
    return farm


def make_room(place: str) -> None:
    """Make the directory PLACE, or see that it is empty."""
    os.makedirs(place, exist_ok=True)
    if os.listdir(place):
        raise FarmError(f"{place}: it is not empty; name a new directory")


def size_of(text: str) -> int:
    """Read a number of bytes with a suffix, such as 64K."""
    power = "KMGT".find(text[-1:].upper()) + 1 if text else 0
    number = int(text[:-1] if power else text) << 10 * power
    if number < 1:
        raise ValueError(text)
    return number


def cluster_of(text: str) -> int:
    """Read a cluster size."""
    number = size_of(text)
    if not SMALLEST_CLUSTER <= number <= LARGEST_CLUSTER or number & (number - 1):
        raise ValueError(text)
    return number


def count_of(text: str) -> int:
    """Read a number that may be 0."""
    return size_of(text) if text != "0" else 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Build a farm of add-cow images from a seed.")
    parser.add_argument("dir", metavar="DIR", help="a directory that is empty or not there")
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--images", type=count_of, default=10000, help="healthy overlays")
    parser.add_argument("--bases", type=size_of, default=10, help="raw base files")
    parser.add_argument("--depth", type=size_of, default=5, help="overlays in the longest chain")
    parser.add_argument("--faults", type=count_of, default=1, help="of each kind")
    parser.add_argument("--no-faults", dest="faults", action="store_const", const=0)
    parser.add_argument("--size", type=size_of, default=MiB, help="of a base, about")
    parser.add_argument("--cluster", type=cluster_of, default=64 * KiB, help="of most overlays")
    return parser.parse_args()


def main() -> int:
    """Run the command line and return the exit status."""
    args = arguments()
    seed = random.SystemRandom().randrange(10**9) if args.seed is None else args.seed
    try:
        farm = build(args, seed)
    except (FarmError, OSError) as error:
        print(f"mkfarm: {error}", file=sys.stderr)
        return 1
    counts = {"seed": seed, "images": farm.images, "bases": len(farm.bases)}
    print(json.dumps({**counts, "expected": farm.expected()}, indent=4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
