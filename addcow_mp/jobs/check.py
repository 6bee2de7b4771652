"""Check: run every named check on an overlay, and report what is damaged or could not be examined.

Each check examines one thing and reports findings: a *corruption* (a rule of the format is
broken), a *leak* (data in clusters that are not allocated: lost space, no harm) or a *check-error*
(something could not be examined). A check that cannot work without the result of an earlier one
reports nothing: the earlier check has reported why.

Nothing is changed here.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator

from bitarray import bitarray

from addcow_mp.device.access import Access
from addcow_mp.device.chain import refuse_lent
from addcow_mp.device.discovery import twin_of_image
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
from addcow_mp.errors import AddcowError, FormatError, LentError, NotAddcowError
from addcow_mp.findings import CheckReport, Finding, Severity
from addcow_mp.format.header import (
    ADD_COW,
    BACKING_NAME_LIMIT,
    IMAGE_NAME_LIMIT,
    RAW,
    Header,
    Violation,
    format_name,
    violations,
)
from addcow_mp.units import human_size


def foreign_twin_finding(twin: str) -> Finding:
    """The finding on an overlay that is not lent, and whose image QEMU may write through a twin."""
    message = (
        f"QEMU may write its image file through '{twin}', and the overlay is not marked as lent: "
        "one of the two came from elsewhere; restore the other one"
    )
    return Finding("twin", Severity.CORRUPTION, message)


def check(path: str, access: Access | None = None, *, alone: bool = True) -> CheckReport:
    """Run every check on the overlay at ``path``. A damaged overlay raises no error.

    ``alone``: false within the check of a farm, which looks for foreign twins itself.

    Raises :class:`LentError` for an overlay that is lent where ``access`` shares it with a writer:
    QEMU's twin, and not the bitmap, says what is allocated.
    """
    report = CheckReport(path)
    with contextlib.ExitStack() as opened:
        run = _Check(path, report, opened, access or Access(), alone=alone)
        try:
            for name, examine in run.checks():
                run.guarded(name, examine)
        except NotAddcowError as error:
            report.is_addcow = False
            run.note("header", Severity.CHECK_ERROR, str(error))
    return report


class _Check:
    """One run of all checks; keeps what earlier checks have opened and read for later ones."""

    def __init__(
        self,
        path: str,
        report: CheckReport,
        opened: contextlib.ExitStack,
        access: Access,
        *,
        alone: bool,
    ) -> None:
        self.path = path
        self.access = access
        self.report = report
        self._opened = opened
        self._alone = alone
        self.cow: File | None = None
        self.header: Header | None = None
        self.broken: list[Violation] = []
        self.names: dict[str, str] = {}
        self.overlay: Overlay | None = None
        self.seen: dict[tuple[int, int], str] = {}

    def checks(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """All checks; each comes after those whose results it needs."""
        return (
            ("file", self.open_cow),
            ("header", self.check_header),
            ("names", self.check_names),
            ("reserved-bytes", self.check_reserved),
            ("formats", lambda: self._note_broken("formats")),
            ("image-file", self.check_image),
            ("backing-file", self.check_backing),
            ("bitmap-length", self.check_bitmap_length),
            ("stray-bits", self.check_stray),
            ("leaks", self.check_leaks),
        )

    def guarded(self, name: str, examine: Callable[[], None]) -> None:
        """Run one check; an error becomes a check-error."""
        try:
            examine()
        except (NotAddcowError, LentError):
            raise
        except AddcowError as error:
            self.note(name, Severity.CHECK_ERROR, str(error))

    def note(self, name: str, severity: Severity, message: str, count: int = 1) -> None:
        """Add a finding."""
        self.report.findings.append(Finding(name, severity, message, count))

    def corrupt(self, name: str, message: str) -> None:
        """Add a broken rule."""
        self.note(name, Severity.CORRUPTION, message)

    # The header

    def open_cow(self) -> None:
        """Open the ``.add-cow`` file."""
        cow = open_claimed(self.access, self.path, READING, COW, named=True)
        self.cow = self._opened.enter_context(contextlib.closing(cow))
        self.access = self.access.beside(cow.base)
        self.report.warnings += link_warnings([cow])
        self.seen[self.cow.identity] = f"the overlay {self.path}"

    def check_header(self) -> None:
        """Check that the fixed header is there and its numbers are legal."""
        if self.cow is None:
            return
        try:
            self.header = peek_header(self.cow)
        except FormatError as error:
            self.corrupt("header", error.fields["problem"])
            return
        if self._alone and self.header.lent and self.access.share:
            refuse_lent(self.cow, self.header, changes=False)
        # A guest may be writing the image file of an overlay that is lent.
        self.access = self.access._replace(share=self.access.share or self.header.lent)
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
        """Check that the names lie in the header region and are names."""
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
        """Check that every header byte that no name uses is 0.

        Others are left by a rebase that was interrupted. No reader looks at them.
        """
        header, cow = self.header, self.cow
        if header is None or cow is None or self._is_broken("header", "names"):
            return
        region = bytearray(header.header_size)
        cow.read_into(memoryview(region), 0)
        unused = header.unused_ranges()
        stray = sum(stop - start - region.count(0, start, stop) for start, stop in unused)
        if stray:
            first = next(at for run in unused for at in range(*run) if region[at])
            what = f"{stray} bytes of the header that no name uses are not 0"
            message = f"{what}, the first at {first}"
            # No clusters leak.
            self.note("reserved-bytes", Severity.LEAK, message, count=0)

    # The files

    def check_image(self) -> None:
        """Check that the image file exists, is used once, and has the declared format."""
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
        """Whether the first bytes agree with the format; a raw file may begin with any bytes."""
        if contradicts(file, declared):
            self.corrupt("formats", f"{what} is declared {declared}, but is not")
            return False
        seems = resembles(file) if declared == RAW else None
        if seems is not None:
            message = f"{what} is declared raw and read as raw, but begins as {seems} does"
            finding = Finding("formats", Severity.CORRUPTION, message, bars=False)
            self.report.findings.append(finding)
        return True

    def _note_lending(self, cow: File, header: Header, image: File) -> None:
        from addcow_mp.device.twin import holder_name, twin_of

        twin = twin_of(cow.base, header)
        holder = holder_name(header, twin)
        self.report.is_lent = True
        if twin is None:
            self.corrupt("header", f"it is lent to {holder}; move that back")
        else:
            self.report.notes.append(f"{self.path}: it is lent to {holder}")
            self._check_data_file(twin, image)

    def _refuse_foreign_twin(self, cow: File, image: File) -> None:
        twin = twin_of_image(os.path.dirname(cow.base), image.identity)
        if twin is not None:
            self.report.findings.append(foreign_twin_finding(twin))

    def _check_data_file(self, path: str, image: File) -> None:
        from addcow_mp.device.twin import other_data_file, twin_header

        twin = twin_header(path)
        other = None if twin is None else other_data_file(twin, image.identity)
        if other is not None:
            self.corrupt(
                "twin",
                f"'{path}' names '{other}' as its data file, and not {image.path}: a program that "
                f"is given '{path}' alone writes there; 'addcow qemu import' removes it",
            )

    def _open_overlay(self, image: File) -> None:
        if self.cow is None or self.header is None or self._is_broken("header"):
            return
        if self.header.lent_id is not None:
            self._note_lending(self.cow, self.header, image)
        elif self._alone:
            self._refuse_foreign_twin(self.cow, image)
        if self.header.lent:
            return  # QEMU's twin, and not the bitmap, says what is allocated
        self.overlay = Overlay(self.cow, image, None, self.header)
        self.report.total_clusters = self.overlay.geometry.clusters
        self.report.allocated_clusters = self.overlay.allocated_clusters
        size = self.overlay.size
        if image.length > size:
            rest = f"its last {image.length - size} bytes, from {size} on, are not part of the disk"
            self.report.notes.append(f"{image.path}: {rest}; flatten --discard cuts them off")

    def _open(self, holder: File, name: str, what: str, *, optional: bool = False) -> File | None:
        """Open what ``holder`` names, or report why that fails."""
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
        """Whether the chain has not used this file before; else report that as ``name``."""
        other = self.seen.get(file.identity)
        if other is not None:
            self.corrupt(name, f"{what} is the same file as {other}")
            return False
        self.seen[file.identity] = what
        return True

    def check_backing(self) -> None:
        """Check that every backing file exists, has its declared format, and is used once."""
        holder, header, name = self.cow, self.header, self.names.get("backing")
        for depth in range(1, MAX_DEPTH + 1):
            if holder is None or header is None or name is None:
                return
            if depth == MAX_DEPTH and format_name(header.backing_format) == ADD_COW:
                break
            # With ALL_ALLOCATED the backing may be absent.
            backing = self._open(holder, name, "backing file", optional=header.all_allocated)
            if backing is None:
                return
            what = f"backing file '{name}' of {holder.path}"
            # A raw file that is used twice serves two purposes; an overlay closes a cycle.
            is_image = self.seen.get(backing.identity, "").startswith("image file")
            if not self._is_new(backing, "same-file" if is_image else "chain-cycle", what):
                return
            holder = backing
            header, name = self._below(backing, format_name(header.backing_format), what)
        if name is not None:
            self.corrupt("chain", f"the chain is deeper than {MAX_DEPTH} overlays")

    def _below(self, file: File, format_: str, what: str) -> tuple[Header | None, str | None]:
        """Examine one backing file; its header and backing name if it is an overlay."""
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
        """Check that the file does not end inside its bitmap."""
        overlay = self.overlay
        if overlay is not None and overlay.bitmap.short:
            wanted = overlay.header.header_size + overlay.geometry.bitmap_length
            self.corrupt(
                "bitmap-length",
                f"the file ends inside its bitmap: {overlay.cow.length} bytes instead of {wanted}",
            )

    def check_stray(self) -> None:
        """Check that no bit past the last cluster is set."""
        stray = 0 if self.overlay is None else self.overlay.bitmap.stray()
        if stray:
            self.corrupt("stray-bits", f"{stray} bits past the last cluster are set")

    def check_leaks(self) -> None:
        """Check that the image file holds no data in clusters that are not allocated."""
        if self.overlay is None:
            return
        clusters = sum(1 for _ in leaked_clusters(self.overlay))
        if clusters:
            size = human_size(clusters * self.overlay.cluster_size)
            what = f"{clusters} clusters that are not allocated hold data in the image file"
            self.note("leaks", Severity.LEAK, f"{what} ({size})", clusters)


def leaked_clusters(overlay: Overlay) -> Iterator[int]:
    """The clusters that are not allocated although the image file holds nonzero bytes there.

    Where the file ends inside its bitmap the missing bits may have been set. The data of those
    clusters may be the only copy, and is no leak.
    """
    image, geometry = overlay.image.file, overlay.geometry
    examined = 0
    for run in image.data_runs(0, geometry.span(0, overlay.bitmap.known)[1]):
        first, stop = geometry.touched(*run)
        for cluster in _unallocated(overlay, max(first, examined), stop):
            if _has_data(image, *geometry.span(cluster, cluster + 1)):
                yield cluster
        examined = stop


def _unallocated(overlay: Overlay, first: int, stop: int) -> Iterable[int]:
    """The clusters in ``[first, stop)`` that are not allocated."""
    if stop - first == 1:  # the usual case where an image has many runs of data
        return () if overlay.is_allocated(first) else (first,)
    runs = overlay.runs_by_allocation(0, first, stop)
    return (cluster for run in runs for cluster in range(*run))


def _has_data(file: File, start: int, stop: int) -> bool:
    buffer = memoryview(bytearray(min(BUFFER_SIZE, stop - start)))
    for offset in range(start, stop, BUFFER_SIZE):
        view = buffer[: stop - offset]
        file.read_into(view, offset)
        if bitarray(buffer=view).any():
            return True
    return False
