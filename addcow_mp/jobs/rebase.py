"""Rebase: an overlay gets another backing file, and its guest sees the same disk.

Only clusters that are not allocated can look different over the new backing file. Those in which
the old and the new backing file differ are copied up from the old one. All others stay unallocated.
The guest sees the same disk at any moment. After an interruption the same command continues. The
order is:

1. The new backing file and its chain are synced, with their directories. Clusters stay unallocated
   because the new file holds the same data. So this data must be on the disk, not only in memory.
2. At each checkpoint: differing clusters, sync, their bits, sync. The header still names the old
   backing file.
3. The header names the new backing file (:mod:`addcow_mp.device.renaming`).

Without a new backing file every cluster is allocated, as by flatten. Then one write of the header
removes the name and sets ALL_ALLOCATED.

An *unsafe* rebase changes only the name, so the guest may see another disk. It is for a backing
file that was renamed or moved. The old backing file need not exist.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from addcow_mp.device.access import Access
from addcow_mp.device.chain import READ, REBASE, Uses, open_below, open_chain, sync_chain
from addcow_mp.device.files import File, free_bytes, identity_at
from addcow_mp.device.hardlinks import refuse_linked
from addcow_mp.device.layer import Layer
from addcow_mp.device.manifest_file import (
    is_manifest,
    manifest_of,
    refuse_unremovable_manifests,
)
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.renaming import (
    drop_backing,
    has_leftovers,
    name_backing,
    name_of_backing,
    refuse_no_room,
)
from addcow_mp.engine.allocation import alignment, stretches_of, unallocated_stretches
from addcow_mp.engine.differences import KnownDifferences, cannot_compare, find_differences
from addcow_mp.engine.scan import ScanHooks, ScanOptions
from addcow_mp.engine.selection import DifferingClusters
from addcow_mp.engine.space import SpaceNeeded
from addcow_mp.engine.targets import RawTarget
from addcow_mp.engine.tasks import cut
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.engine.worker import Failed
from addcow_mp.errors import FileError, ImageError, ManifestError, SpaceError, UsageError
from addcow_mp.format.bitmap import SparseBits
from addcow_mp.format.geometry import Geometry
from addcow_mp.format.header import BACKING_NAME_LIMIT, RAW, format_name
from addcow_mp.format.leaves import LEAF
from addcow_mp.format.manifest import differing_leaves, read_head
from addcow_mp.format.names import path_combine
from addcow_mp.jobs import manifest
from addcow_mp.jobs.backing import refuse_disguised, refuse_image_as_backing, roots_needed
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.flatten import flatten_plan, refuse_no_room_for_bits
from addcow_mp.jobs.following import Follower, RebaseFollower
from addcow_mp.jobs.naming import Located, beside, locate
from addcow_mp.jobs.narrowing import narrow_image, refuse_unnarrowable
from addcow_mp.jobs.options import ALONE, DEFAULTS, NO_HOOKS, Hooks, RunOptions, Shared
from addcow_mp.jobs.readback import Proof, reading_back
from addcow_mp.jobs.report import Estimate, Outcome, Report, reporting
from addcow_mp.jobs.transfer_job import estimated, move, refuse_unwritable


@dataclass(frozen=True)
class NewBacking:
    """The backing file that overlays get.

    ``name``: the path as typed; empty = no backing file. ``format_``: ``raw`` or ``add-cow``; None
    = the format of the old backing file. ``by_path``: a relative name begins in the working
    directory, and is stored relative to each overlay. ``unsafe``: only the name changes.
    ``trusts_manifests``: manifests say where the backing files differ, and their data is not
    compared. ``known``: where they differ; None = the job finds it. ``is_durable``: the new backing
    file is synced already.
    """

    name: str
    format_: str | None = None
    by_path: bool = False
    unsafe: bool = False
    trusts_manifests: bool = False
    known: KnownDifferences | None = None
    is_durable: bool = False

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for options that contradict each other."""
        if not self.name and self.format_ is not None:
            problem = f'-b "" names no backing file: leave -F {self.format_} out'
            raise UsageError(message=problem)
        if self.unsafe and self.trusts_manifests:
            raise UsageError(message="-u compares nothing: leave --trust-manifests out")

    def located(self, overlay: str) -> Located | None:
        """The file, and the name that the overlay at the path ``overlay`` stores."""
        if not self.name:
            return None
        if self.by_path and not self.name.startswith("/"):
            return beside(overlay, os.path.abspath(self.name))
        return locate(overlay, self.name)


def rebase(
    path: str,
    backing: NewBacking,
    *,
    verifies: bool = False,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    shared: Shared = ALONE,
) -> Report:
    """Give the overlay at ``path`` another backing file.

    ``verifies``: the guest's view is read back from the disk. Raises :class:`AddcowError`. A
    refused rebase changes nothing.
    """
    if verifies:
        refuse_nothing_to_verify(backing)
    with reporting("rebase", path) as report, _opened(path, backing, options.access) as change:
        if not change.is_done:
            change.refuse(options, shared)
            plan = change.plan(options, partial(narrow_image, change.overlay, report))
            proof = change.proof if verifies else None
            again = change.reopening(options)
            follower = change.follower(report, options, hooks)
            with reading_back(change.overlay, proof, again, hooks, report) as job_hooks:
                change.make_durable()
                if plan is None:
                    report.warnings = change.overlay.warnings()
                else:
                    move([plan], report, options, job_hooks, shared.pool, follower)
                report.begin_changes()
                change.carry_out(follower)
            follower.renew()
        report.warnings += change.warnings
        report.outcome = Outcome.DONE
    return report


def refuse_nothing_to_verify(backing: NewBacking) -> None:
    """Raise :class:`UsageError` for a rebase that writes no data to be read back."""
    if backing.unsafe:
        raise UsageError(message="-u writes no data that could be read back: leave --verify out")


def estimate(
    path: str, backing: NewBacking, options: RunOptions, shared: Shared = ALONE
) -> Estimate | None:
    """Return what a rebase of ``path`` would do; None when there is nothing to do.

    Raises the error with which the rebase would be refused.
    """
    with _opened(path, backing, options.access, writes=False) as change:
        overlay, access = change.overlay, options.access
        if change.is_done:
            return None
        change.refuse(options, shared)
        plan, image = change.plan(options), overlay.image.file
        for file in (overlay.cow, image):
            access.refuse_unwritable(file)
        refuse_unremovable_manifests(overlay)
        if plan is None:
            return Estimate(0, SpaceNeeded(), image.path, image.first_status.st_dev)
        refuse_unwritable(plan, [], access)
        refuse_unnarrowable(overlay)
        return estimated(plan, options, bitmap_space=overlay.bitmap.hole_bytes())


def compared_estimate(
    path: str, backing: NewBacking, options: RunOptions = DEFAULTS, hooks: Hooks = NO_HOOKS
) -> Estimate | None:
    """Return the estimate of :func:`estimate`, counting only what differs.

    The backing files are compared for it. Raises what :func:`estimate` raises.
    """
    with open_bases(path, backing, options.access) as bases:
        known = bases.differences(backing, options, hooks)
    found = estimate(path, replace(backing, known=known), options)
    if found is not None:
        free = free_bytes(os.statvfs(found.target))
        if found.space.peak > free:
            raise SpaceError(path=found.target, needed=found.space.peak, free=free)
    return found


@dataclass(frozen=True)
class Bases:
    """The old and the new backing file of overlays; None = no backing file, which reads as zeros.

    ``unit``: bytes of a cluster of the overlay at ``path``, which errors name.
    """

    old: Layer | None
    new: Layer | None
    unit: int
    path: str

    def differences(
        self, backing: NewBacking, options: RunOptions, hooks: Hooks, unit: int | None = None
    ) -> KnownDifferences | None:
        """Where they differ, in units of ``unit`` bytes; None when the rebase compares nothing.

        ``unit``: None = a cluster. Raises :class:`AddcowError`.
        """
        if backing.unsafe or not backing.name or _is_same_file(self.old, self.new):
            return None
        if backing.trusts_manifests:
            return _by_manifests(self.old, self.new, options)
        size = max(side.size for side in (self.old, self.new) if side is not None)
        geometry = Geometry(size, self.unit if unit is None else unit)
        failed = partial(_raise_failure, self.path)
        scan_hooks = ScanHooks(self.path, failed, hooks.stopping, progress=hooks.progress)
        scan_options, shares = ScanOptions(options.jobs, maps=True), _shares(options.access)
        return find_differences(
            self.old, self.new, geometry, scan_options, scan_hooks, shares=shares
        )


@contextmanager
def open_bases(path: str, backing: NewBacking, access: Access) -> Iterator[Bases]:
    """Open the old and the new backing file of the overlay at ``path``; the overlay is closed.

    Raises :class:`AddcowError`.
    """
    with _opened(path, backing, access, writes=False) as change:
        overlay = change.overlay
        overlay.bitmap.unmap()
        overlay.cow.close()
        overlay.image.close()
        yield Bases(overlay.backing, change.new, overlay.cluster_size, path)


@contextmanager
def _opened(
    path: str, backing: NewBacking, access: Access, *, writes: bool = True
) -> Iterator[_Change]:
    uses = REBASE if writes else READ
    with _opened_overlay(path, uses, access, backing) as overlay:
        located = backing.located(path)
        format_ = _format(overlay, backing)
        if located is None or (backing.unsafe and identity_at(located.path) is None):
            yield _Change(overlay, backing, located, format_, None)
            return
        if format_ == RAW and not access.force:
            refuse_image_as_backing(located.path)
        named = access.naming(located.path)
        with closing(open_below(overlay, located.path, format_, named)) as new:
            yield _Change(overlay, backing, located, format_, new)


def _opened_overlay(path: str, uses: Uses, access: Access, backing: NewBacking) -> Overlay:
    """Open the overlay. If its backing file is missing, the error suggests ``-u``."""
    try:
        return open_chain(path, uses, access, alone=backing.unsafe)
    except FileError as error:
        if error.fields.get("errno") != errno.ENOENT or ": backing file '" not in str(error):
            raise
        reason = f"{error.fields['reason']}; if it was renamed or moved, rebase with -u"
        raise FileError(**(error.fields | {"reason": reason})) from error


def _format(overlay: Overlay, backing: NewBacking) -> str:
    """The format of the new backing file: the given one, else that of the old backing file."""
    if backing.format_ is not None or not backing.name:
        return backing.format_ or ""
    if not overlay.header.has_backing:
        needs = f"backing file '{backing.name}' needs its format, which is never guessed"
        raise UsageError(message=f"{overlay.path}: {needs}: -F raw or -F add-cow")
    return format_name(overlay.header.backing_format)


class _Change:
    """An open overlay and its new backing file.

    ``new``: None if there is none, or if an unsafe rebase names a file that does not exist.
    """

    def __init__(
        self,
        overlay: Overlay,
        backing: NewBacking,
        located: Located | None,
        format_: str,
        new: Layer | None,
    ) -> None:
        self.overlay = overlay
        self._backing = backing
        self._located = located
        self._format = format_
        self.new = new
        #: The warning that the old backing file was worth.
        self._told_before = roots_needed(overlay.path, overlay.image.file.path, self._old_path)
        self._name = (
            b"" if located is None else located.stored(overlay.path, "backing", BACKING_NAME_LIMIT)
        )

    # Refusals

    def refuse(self, options: RunOptions, shared: Shared) -> None:
        """Raise :class:`AddcowError` if the rebase must not be done."""
        overlay, access = self.overlay, options.access
        if self._name:
            refuse_no_room(overlay, self._name)
        if self.new is not None and not access.force:
            refuse_disguised(self.new)
        files = [overlay.cow, overlay.image.file]
        refuse_short(overlay)
        if self._backing.unsafe:
            if not access.force:
                self._refuse_other_disk()
            if not self._shows_the_same:
                remedy = "their guests would see another disk; rebase without -u, or use --force"
                refuse_dependants(overlay, files, access, remedy, shared.nearby)
        elif not overlay.all_allocated:
            refuse_dependants(overlay, files[1:], access, around=shared.nearby)
        refuse_linked(files, force=access.force)

    @property
    def _shows_the_same(self) -> bool:
        """Whether the guest sees the same disk although only the name changes."""
        overlay = self.overlay
        if overlay.all_allocated:
            return True
        if self._located is None or format_name(overlay.header.backing_format) != self._format:
            return False
        old = self._old_path
        identity = None if old is None else identity_at(old)
        return identity is not None and identity == identity_at(self._located.path)

    @property
    def _old_path(self) -> str | None:
        """The path of the old backing file; None if there is none."""
        name = os.fsdecode(name_of_backing(self.overlay))
        return path_combine(self.overlay.cow.base, name) if name else None

    def _refuse_other_disk(self) -> None:
        """Raise :class:`ImageError` when manifests say that the two backing files differ."""
        if self._located is not None and self._is_other_disk(self._located):
            problem = "its manifest says that this is another disk than the present backing file"
            remedy = "rebase without -u, or use --force to show the guest another disk"
            raise ImageError(path=self._located.path, problem=f"{problem}; {remedy}")

    def _is_other_disk(self, located: Located) -> bool:
        """Whether manifests say that the two backing files differ."""
        expected = _digest_in(self.overlay.path, "backing_digest")
        found = _digest_in(located.path, "guest_digest")
        return expected is not None and found is not None and expected != found

    @property
    def is_done(self) -> bool:
        """Whether the header names the new backing file, and nothing else is left to do."""
        header, overlay = self.overlay.header, self.overlay
        if has_leftovers(overlay):
            return False
        if not self._name:
            return not header.has_backing and (header.all_allocated or self._backing.unsafe)
        is_named = name_of_backing(overlay) == self._name
        return is_named and format_name(header.backing_format) == self._format

    # What is moved

    def plan(
        self, options: RunOptions, prepare: partial[None] | None = None
    ) -> TransferPlan | None:
        """Return what is copied up; None when nothing can differ."""
        overlay = self.overlay
        if self._backing.unsafe or overlay.all_allocated:
            return None
        if _is_same_file(overlay.backing, self.new):
            return None
        narrowing = prepare or (lambda: None)
        if not self._name:
            return flatten_plan(overlay, narrowing)
        refuse_no_room_for_bits(overlay)
        known = self._known(options)
        selection = DifferingClusters(overlay, self.new, known, shares=_shares(options.access))
        aligned = alignment(overlay.cluster_size)
        if known is not None:
            runs = selection.runs(0, overlay.geometry.clusters)
            stretches = stretches_of(runs, overlay.geometry, aligned)
        else:
            stretches = unallocated_stretches(overlay, aligned, self._files)
        tasks, target = cut(stretches, overlay.geometry.clusters), RawTarget(overlay.image.file)
        return TransferPlan(selection, target, tasks, bit=1, changed=(overlay,), prepare=narrowing)

    @property
    def _files(self) -> list[File]:
        """The raw files that are compared."""
        sides = (self.overlay.backing, self.new)
        return [file for side in sides if side is not None for file in side.files()]

    def _known(self, options: RunOptions) -> KnownDifferences | None:
        if self._backing.known is None and self._backing.trusts_manifests:
            return _by_manifests(self.overlay.backing, self.new, options)
        return self._backing.known

    # The change

    def make_durable(self) -> None:
        """Sync the new backing file: unallocated clusters will be read from it."""
        backing = self._backing
        if self.new is not None and not (backing.unsafe or backing.is_durable):
            sync_chain(self.new)

    def follower(self, report: Report, options: RunOptions, hooks: Hooks) -> Follower:
        """The follower of the manifest; it makes no new one if the new backing file is missing."""
        unsafe, located = self._backing.unsafe, self._located
        is_other = unsafe and (located is None or self._is_other_disk(located))
        if is_other or (self.new is None and self._name):
            return Follower(report, options, hooks)
        return RebaseFollower(self.overlay, self.new, report, options, hooks, unsafe=unsafe)

    def carry_out(self, follower: Follower) -> None:
        """Let the header name the new backing file. The bits must be durable before."""
        follower.remove([self.overlay], durable=self.overlay.cow.durable)
        if not self._name:
            drop_backing(self.overlay, whole=not self._backing.unsafe)
        else:
            name_backing(self.overlay, self._name, self._format)

    @property
    def proof(self) -> Proof:
        """What is read back: the guest's view."""
        return Proof(self.overlay, self.overlay, (self.overlay,))

    def reopening(self, options: RunOptions) -> RunOptions:
        """The options for opening the chain again.

        The user has named the new backing file, so its directory is a root.
        """
        if self._located is None:
            return options
        beneath = os.path.dirname(os.path.realpath(self._located.path))
        access = options.access
        return replace(options, access=access._replace(roots=(*access.roots, beneath)))

    @property
    def warnings(self) -> list[str]:
        """The warnings about the new backing file."""
        if self._located is None:
            return []
        overlay, path = self.overlay, self._located.path
        image = overlay.image.file.path
        told = roots_needed(overlay.path, image, path)
        if told == self._told_before:
            told = []
        if self.new is None:
            told.append(f"{overlay.path}: its backing file '{path}' does not exist yet")
        return told


def _is_same_file(old: Layer | None, new: Layer | None) -> bool:
    """Whether both backing files are the same file, also under different names."""
    if old is None or new is None or isinstance(old, Overlay) != isinstance(new, Overlay):
        return False
    one, other = (
        each.cow if isinstance(each, Overlay) else next(each.files()) for each in (old, new)
    )
    return one.identity == other.identity


def _by_manifests(old: Layer | None, new: Layer | None, options: RunOptions) -> KnownDifferences:
    """Where two backing files differ, as the manifests of all their layers say."""
    chains = [[] if side is None else manifest.existing(side, options) for side in (old, new)]
    known = KnownDifferences(LEAF, SparseBits())
    for leaf in differing_leaves(*chains):
        known.bits.set(leaf, leaf + 1)
    return known


def _shares(access: Access) -> bool:
    """Whether blocks that files share count as equal: locks keep other programs from writing."""
    return access.locking and not access.share


def _raise_failure(path: str, failure: Failed) -> NoReturn:
    raise cannot_compare(path, failure)


def _digest_in(path: str, key: str) -> str | None:
    """The digest ``key`` in the manifest of the layer at ``path``; None without one."""
    name = manifest_of(path)
    try:
        head = read_head(name) if is_manifest(name) else None
    except (OSError, FileError, ManifestError):
        return None
    digest: str | None = getattr(head, key, None)
    return digest
