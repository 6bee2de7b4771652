"""Check: named checks, all of them run, and "damaged" kept apart from "could not look".

Each check looks at one thing and notes findings. A finding is a *corruption* (a rule of
the format is broken), a *leak* (data in clusters that are not local: space lost, nothing
else), or a *check-error* (something could not be looked at). A check whose premises are
gone, such as the bitmap's length without an image to give the virtual size, says nothing:
what took its premise away has been noted by the check before it.

Nothing is ever changed here.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from bitarray import bitarray

from addcow_mp.device.access import Access
from addcow_mp.device.files import BACKING, BUFFER_SIZE, COW, File
from addcow_mp.device.hardlinks import link_warnings
from addcow_mp.device.headers import (
    MAX_DEPTH,
    load_header,
    load_names,
    open_claimed,
    peek_header,
    read_name,
    resolve,
)
from addcow_mp.device.locks import READING
from addcow_mp.device.magic import contradicts, resembles
from addcow_mp.device.overlay import Overlay
from addcow_mp.errors import AddcowError, FormatError, NotAddcowError
from addcow_mp.format.header import (
    ADD_COW,
    BACKING_NAME_LIMIT,
    FIXED_SIZE,
    IMAGE_NAME_LIMIT,
    RAW,
    Header,
    Violation,
    format_name,
    violations,
)
from addcow_mp.jobs.findings import CheckReport, Finding, Severity
from addcow_mp.units import human_size


def check(path: str, access: Access | None = None) -> CheckReport:
    """Run every check on the overlay at ``path``; raises nothing for a damaged one."""
    report = CheckReport(path)
    with contextlib.ExitStack() as opened:
        run = _Check(path, report, opened, access or Access())
        try:
            for name, look in run.checks():
                run.guarded(name, look)
        except NotAddcowError as error:
            report.is_addcow = False
            run.note("header", Severity.CHECK_ERROR, str(error))
    return report


class _Check:
    """One run: what the checks so far have opened and read, for those that come later."""

    def __init__(
        self, path: str, report: CheckReport, opened: contextlib.ExitStack, access: Access
    ) -> None:
        self.path = path
        self.access = access
        self.report = report
        self._opened = opened
        self.cow: File | None = None
        self.header: Header | None = None
        self.broken: list[Violation] = []
        self.names: dict[str, str] = {}
        self.overlay: Overlay | None = None
        self.seen: dict[tuple[int, int], str] = {}

    def checks(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """All checks, in an order in which each finds its premises."""
        return (
            ("file", self.open_cow),
            ("header", self.check_header),
            ("names", self.check_names),
            ("reserved-bytes", self.check_reserved),
            ("formats", self.check_formats),
            ("image-file", self.check_image),
            ("backing-file", self.check_backing),
            ("bitmap-length", self.check_bitmap_length),
            ("stray-bits", self.check_stray),
            ("leaks", self.check_leaks),
        )

    def guarded(self, name: str, look: Callable[[], None]) -> None:
        """Run one check; what keeps it from looking is a check-error."""
        try:
            look()
        except NotAddcowError:
            raise
        except AddcowError as error:
            self.note(name, Severity.CHECK_ERROR, str(error))

    def note(self, name: str, severity: Severity, message: str, count: int = 1) -> None:
        """Note one finding."""
        self.report.findings.append(Finding(name, severity, message, count))

    def corrupt(self, name: str, message: str, count: int = 1) -> None:
        """Note a broken rule."""
        self.note(name, Severity.CORRUPTION, message, count)

    # The header

    def open_cow(self) -> None:
        """The ``.add-cow`` file can be opened."""
        cow = open_claimed(self.access, self.path, READING, COW, named=True)
        self.cow = self._opened.enter_context(contextlib.closing(cow))
        self.access = self.access.beside(cow.base)
        self.report.warnings += link_warnings([cow])
        self.seen[self.cow.identity] = f"the overlay {self.path}"

    def check_header(self) -> None:
        """The fixed header is there and its numbers are legal."""
        if self.cow is None:
            return
        try:
            self.header = peek_header(self.cow)
        except FormatError as error:
            self.corrupt("header", error.fields["problem"])
            return
        self.broken = list(violations(self.header))
        self._note_broken("header")
        if self.cow.length < self.header.header_size and not self._is_broken("header"):
            problem = f"the file is {self.cow.length} bytes, its header {self.header.header_size}"
            self.broken.append(Violation("header", problem))
            self.corrupt("header", problem)

    def _note_broken(self, rule: str) -> None:
        for name, problem in self.broken:
            if name == rule:
                self.corrupt(name, problem)

    def _is_broken(self, *rules: str) -> bool:
        return any(rule in rules for rule, _ in self.broken)

    def check_names(self) -> None:
        """The names lie in the header region and are names."""
        self._note_broken("names")
        header, cow = self.header, self.cow
        if header is None or cow is None or self._is_broken("names"):
            return
        for what, offset, size, limit in (
            ("image", header.image_offset, header.image_size, IMAGE_NAME_LIMIT),
            ("backing", header.backing_offset, header.backing_size, BACKING_NAME_LIMIT),
        ):
            if offset:
                try:
                    self.names[what] = read_name(cow, offset, size, limit)
                except FormatError as error:
                    self.corrupt("names", f"{what} {error.fields['problem']}")

    def check_reserved(self) -> None:
        """Every byte of the header region that no name points at is 0."""
        header, cow = self.header, self.cow
        if header is None or cow is None or self._is_broken("header", "names"):
            return
        region = bytearray(header.header_size)
        cow.read_into(memoryview(region), 0)
        for start, stop in ((0, FIXED_SIZE), *header.name_ranges()):
            region[start:stop] = bytes(stop - start)
        stray = len(region) - region.count(0)
        if stray:
            first = next(place for place, byte in enumerate(region) if byte)
            self.corrupt(
                "reserved-bytes",
                f"{stray} bytes of the header that no name uses are not 0, the first at {first}",
            )

    def check_formats(self) -> None:
        """The formats are written as they must be, and known."""
        self._note_broken("formats")

    # The files

    def check_image(self) -> None:
        """The image file is there, a file of its own, and what it is declared to be."""
        name, header, cow = self.names.get("image"), self.header, self.cow
        if name is None or header is None or cow is None:
            return
        image = self._open(cow, name, "image file")
        if image is None:
            return
        self.report.warnings += link_warnings([image])
        declared, what = format_name(header.image_format), f"image file '{name}'"
        if self._is_new(image, "same-file", what) and self._is_plausible(image, declared, what):
            if declared == RAW:
                self._open_overlay(image)
            elif not self.broken:
                self.note(
                    "formats",
                    Severity.CHECK_ERROR,
                    f"image file '{name}' is {declared}; only raw images can be looked into",
                )

    def _is_plausible(self, file: File, declared: str, what: str) -> bool:
        """Whether the first bytes agree with the format; a raw file is used all the same."""
        if contradicts(file, declared):
            self.corrupt("formats", f"{what} is declared {declared}, but is not")
            return False
        seems = resembles(file) if declared == RAW else None
        if seems is not None:
            told = f"{what} is declared raw and read as raw, but begins as {seems} does"
            self.report.findings.append(Finding("formats", Severity.CORRUPTION, told, bars=False))
        return True

    def _open_overlay(self, image: File) -> None:
        if self.cow is not None and self.header is not None and not self._is_broken("header"):
            self.overlay = Overlay(self.cow, image, None, self.header)
            self.report.total_clusters = self.overlay.geometry.clusters
            self.report.allocated_clusters = self.overlay.allocated_clusters
            self._note_hidden(image, self.overlay.size)

    def _note_hidden(self, image: File, size: int) -> None:
        """Name the bytes of the image file that are not part of the view."""
        if image.length > size:
            told = f"its last {image.length - size} bytes, from {size} on, are not part of the disk"
            self.report.notes.append(f"{image.path}: {told}; flatten --discard cuts them off")

    def _open(self, holder: File, name: str, what: str, *, optional: bool = False) -> File | None:
        """Open what ``holder`` names, or note why not."""
        try:
            target = resolve(holder, name)
            file = open_claimed(self.access, target, READING, BACKING, named=False)
        except AddcowError as error:
            if error.fields.get("errno") not in (errno.ENOENT, errno.ENOTDIR):
                self.note(what.replace(" ", "-"), Severity.CHECK_ERROR, str(error))
            elif not optional:
                self.corrupt("missing-file", f"{what} '{name}' of {holder.path} does not exist")
            return None
        return self._opened.enter_context(contextlib.closing(file))

    def _is_new(self, file: File, name: str, what: str) -> bool:
        """Whether this file was not met before; a file met twice is noted under ``name``."""
        other = self.seen.get(file.identity)
        if other is not None:
            self.corrupt(name, f"{what} is the same file as {other}")
            return False
        self.seen[file.identity] = what
        return True

    def check_backing(self) -> None:
        """Every file below is there, of its declared format, and not met before."""
        holder, header, name = self.cow, self.header, self.names.get("backing")
        for depth in range(1, MAX_DEPTH + 1):
            if holder is None or header is None or name is None:
                return
            if depth == MAX_DEPTH and format_name(header.backing_format) == ADD_COW:
                break
            # With ALL_ALLOCATED the backing may be absent.
            optional = header.all_allocated
            backing = self._open(holder, name, "backing file", optional=optional)
            if backing is None:
                return
            what = f"backing file '{name}' of {holder.path}"
            if not self._is_new(backing, self._sameness(backing), what):
                return
            holder = backing
            header, name = self._below(backing, format_name(header.backing_format), what)
        if name is not None:
            self.corrupt("chain", f"the chain is deeper than {MAX_DEPTH} overlays")

    def _sameness(self, backing: File) -> str:
        """An overlay met again closes a cycle; a raw file met again serves two purposes."""
        other = self.seen.get(backing.identity, "")
        return "same-file" if other.startswith("image file") else "chain-cycle"

    def _below(self, file: File, format_: str, what: str) -> tuple[Header | None, str | None]:
        """Look at one file below; its header and its backing's name if it is an overlay."""
        try:
            if format_ != ADD_COW:
                self._is_plausible(file, format_, what)
                return None, None
            header = load_header(file)
            names = load_names(file, header)
        except (FormatError, NotAddcowError) as error:
            self.corrupt("backing-file", str(error))
            return None, None
        image = self._open(file, names.image, "image file")
        if image is not None:
            self._is_new(image, "same-file", f"image file '{names.image}' of {file.path}")
        return header, names.backing

    # The bitmap

    def check_bitmap_length(self) -> None:
        """The bitmap is as long as the virtual size asks for."""
        overlay = self.overlay
        if overlay is not None and overlay.bitmap.short:
            wanted = overlay.header.header_size + overlay.geometry.bitmap_length
            self.corrupt(
                "bitmap-length",
                f"the file ends inside its bitmap: {overlay.cow.length} bytes instead of {wanted}",
            )

    def check_stray(self) -> None:
        """No bit past the last cluster is set."""
        stray = 0 if self.overlay is None else self.overlay.bitmap.stray()
        if stray:
            self.corrupt("stray-bits", f"{stray} bits past the last cluster are set")

    def check_leaks(self) -> None:
        """The image file holds no data in clusters that are not local."""
        if self.overlay is None:
            return
        clusters = sum(1 for _ in leaked_clusters(self.overlay))
        if clusters:
            size = human_size(clusters * self.overlay.cluster_size)
            self.note(
                "leaks",
                Severity.LEAK,
                f"{clusters} clusters that are not local hold data in the image file ({size})",
                clusters,
            )


def leaked_clusters(overlay: Overlay) -> Iterator[int]:
    """The clusters that are not local although the image file holds other bytes than 0 there.

    Where the file ends inside its bitmap the missing bits may have been set: the data of
    those clusters is perhaps all that is left of them, and no leak.
    """
    image, geometry = overlay.image.file, overlay.geometry
    data = -1
    for run in overlay.runs_by_allocation(0, 0, overlay.bitmap.known):
        place, stop = geometry.span(*run)
        while place < stop:
            if data < place:
                found = image.next_data(place)
                if found is None:
                    return
                data = found
            if data >= stop:
                break
            cluster = geometry.cluster_of(data)
            place, end = geometry.span(cluster, cluster + 1)
            if _has_data(image, place, end):
                yield cluster
            place = end


def _has_data(file: File, start: int, stop: int) -> bool:
    buffer = memoryview(bytearray(min(BUFFER_SIZE, stop - start)))
    for offset in range(start, stop, BUFFER_SIZE):
        view = buffer[: stop - offset]
        file.read_into(view, offset)
        if bitarray(buffer=view).any():
            return True
    return False
