"""Manifest: write down what each layer of a chain holds, so that anybody can check it later.

From the bottom up, each layer that has no manifest gets one; what the guest of an overlay sees
is put together from its own digests and those of the layers below, which are not read again. A
manifest that is there is taken if it is of these files as they are now, and never replaced
unless that is asked for.

It is written beside the layer under another name, made durable and then renamed: a manifest is
there whole or not at all. A layer that changes while it is read gets none. Whoever finds another
process at it waits, and takes what that has made: overlays that share a base can be done side by
side.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from addcow_mp.device.chain import open_layer, readers_of_chain
from addcow_mp.device.files import claim_alone, identity_at, identity_of, sync_entry
from addcow_mp.device.layer import Layer
from addcow_mp.device.magic import refuse_as_raw
from addcow_mp.device.manifest_file import SUFFIX, draft_of, is_manifest, manifest_of
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.permissions import Readers, set_readers
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.allocation import data_stretches
from addcow_mp.engine.layer_digest import LeafHasher, cow_digests, file_of, is_fully_allocated
from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import Task, cut
from addcow_mp.engine.worker import Failed
from addcow_mp.errors import FileError, ImageError, ManifestError, RestartsError
from addcow_mp.format.geometry import Geometry
from addcow_mp.format.header import ADD_COW
from addcow_mp.format.manifest import (
    DIGEST,
    DRAFT_MAGIC,
    GROUP,
    HEAD,
    MAGIC,
    FileState,
    Head,
    Manifest,
    content_of,
    digest_of_file,
    guest_blocks,
    guest_digest,
    is_rounded_down,
)
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions

#: Seconds between looks at whether another process has ended that writes the same manifest.
LOOK_AGAIN = 0.1

#: Seconds in which it writes something, or does not get on: digests come by tasks of 64 MiB.
STANDSTILL = 10.0


@dataclass(frozen=True)
class Made:
    """The manifest of one layer; ``written`` unless it was there already."""

    path: str
    guest_digest: str
    written: bool


def create(
    path: str,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    *,
    format_: str = ADD_COW,
    replaces: bool = False,
) -> list[Made]:
    """Write a manifest for each layer of ``path`` that has none, the deepest first.

    Raises :class:`ManifestError` for one that is there and not of these files, unless it
    ``replaces`` those.
    """
    layer = open_layer(path, format_, access=options.access)
    try:
        if isinstance(layer, RawLayer) and not options.access.force:
            refuse_as_raw(layer.file)
        made: list[Made] = []
        below: list[Manifest] = []
        layers = list(layers_of(layer))
        _refuse_own(layers)
        for one in reversed(layers):
            manifest, written = _manifest_of(one, below, options, hooks, replaces=replaces)
            below.insert(0, manifest)
            made.append(Made(manifest.path, manifest.head.guest_digest, written))
        return made
    finally:
        layer.close()


def layers_of(layer: Layer | None) -> Iterator[Layer]:
    """``layer`` and all below it."""
    while layer is not None:
        yield layer
        layer = layer.backing if isinstance(layer, Overlay) else None


def _refuse_own(layers: list[Layer]) -> None:
    """Raise where a file of the chain has the name that a manifest of it would have."""
    used = {file_of(one).identity for one in layers}
    used |= {one.cow.identity for one in layers if isinstance(one, Overlay)}
    for one in layers:
        for path in (manifest_of(one.path), draft_of(one.path)):
            if identity_at(path) in used:
                problem = "it is a disk of this chain, and lies where the manifest would; rename it"
                raise ImageError(path=path, problem=problem)


def _manifest_of(
    layer: Layer, below: list[Manifest], options: RunOptions, hooks: Hooks, *, replaces: bool
) -> tuple[Manifest, bool]:
    """The manifest of a layer, and whether it had to be written."""
    path = manifest_of(layer.path)
    wanted = head_of(layer, below)
    there = _found(layer, path, wanted, replaces=replaces)
    if there is not None:
        return there, False
    readers, locking = readers_of_chain(layer), options.access.locking
    with _draft(path, draft_of(layer.path), readers, hooks, locking=locking) as fd:
        # Another process may have written it until now: overlays share their base.
        there = _found(layer, path, wanted, replaces=replaces)
        if there is not None:
            return there, False
        _write(fd, layer, wanted, below, options, hooks)
        if head_of(layer, below) != wanted:
            raise ImageError(path=layer.path, problem="it was changed meanwhile; try again")
        with _saying(path, "make it durable"):
            os.fsync(fd)
            os.rename(draft_of(layer.path), path)
        sync_entry(path, "make its name durable", "it is there, and may be gone")
    return Manifest.load(path), True


def _found(layer: Layer, path: str, wanted: Head, *, replaces: bool) -> Manifest | None:
    """The manifest that is there already, unless it is a useless one that may be replaced.

    Raises :class:`ManifestError` for a useless one that may not.
    """
    try:
        return _sound(layer, path, wanted) if os.path.exists(path) else None
    except ManifestError:
        if not replaces:
            raise
        return None


def _sound(layer: Layer, path: str, wanted: Head) -> Manifest:
    with _saying(path, "read it"):
        if os.path.getsize(path) and not is_manifest(path):
            raise ImageError(path=path, problem="it is there and no manifest; move it away")
        manifest = Manifest.load(path)
    if replace(manifest.head, guest_digest="", groups=0) != wanted:
        raise ManifestError(path=path, problem=_difference(layer, manifest.head))
    return manifest


def _difference(layer: Layer, head: Head) -> str:
    """Why a manifest with this ``head`` is not one of ``layer`` as it is now."""
    if isinstance(layer, RawLayer) and is_rounded_down(head.virtual_size, layer.held):
        return f"it was made without the last, partial sector of {layer.path}"
    return f"it is of another state of {layer.path} or of what lies below"


def head_of(layer: Layer, below: list[Manifest]) -> Head:
    """What a manifest of ``layer``, as it is now, says before any leaf is looked at."""
    files = {"image": FileState.of(file_of(layer).status)}
    if not isinstance(layer, Overlay):
        return Head("raw", layer.size, all_local=True, files=files)
    header, bitmap = cow_digests(layer)
    size = layer.header.header_size
    head = Head(ADD_COW, layer.size, layer.all_allocated, files, size, header, bitmap)
    files["cow"] = FileState.of(layer.cow.status)
    if below:
        known = below[0].head
        head = replace(head, backing_digest=known.guest_digest, backing_size=known.virtual_size)
    return head


# Writing


@contextlib.contextmanager
def _saying(path: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError.of(path, action, error) from error


@contextlib.contextmanager
def _draft(path: str, part: str, readers: Readers, hooks: Hooks, *, locking: bool) -> Iterator[int]:
    """The file ``part`` beside ``path``, empty and nobody else's; waits for others to end.

    What a killed writer left is begun anew; what was not renamed is removed.
    """
    fd = _claimed(path, part, readers, hooks, locking=locking)
    try:
        _refuse_foreign(fd, part)
        with _saying(part, "let no more users read it than may read what it is of"):
            os.ftruncate(fd, 0)
            set_readers(fd, readers)
        yield from _named(fd, part)
    finally:
        os.close(fd)


def _claimed(path: str, part: str, readers: Readers, hooks: Hooks, *, locking: bool) -> int:
    """``part``, opened, and held by this process alone; waits for another one that gets on."""
    fd = _claim(path, part, readers, locking=locking)
    if fd is None:
        hooks.note(f"{path}: another process is writing it; waiting until that has ended")
    patience = _Patience(part)
    while fd is None:
        if hooks.stopping():
            raise RestartsError(path=path.removesuffix(SUFFIX))
        if patience.is_over:
            problem = (
                "another process is writing it and does not get on; try again when it has ended"
            )
            raise ImageError(path=path, problem=problem)
        time.sleep(LOOK_AGAIN)
        fd = _claim(path, part, readers, locking=locking)
    return fd


class _Patience:
    """How long to wait for the writer of a file: as long as it writes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._since = time.monotonic()
        self._state: FileState | None = None

    @property
    def is_over(self) -> bool:
        """Whether the file has been the same for too long."""
        with contextlib.suppress(OSError):
            state = FileState.of(os.stat(self._path, follow_symlinks=False))
            if state != self._state:
                self._state, self._since = state, time.monotonic()
        return time.monotonic() - self._since > STANDSTILL


def _claim(path: str, part: str, readers: Readers, *, locking: bool) -> int | None:
    with _saying(path, "write it"):
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, readers.mode)
    try:
        # Before it was held, it may have been renamed: what it is called then is not to be written.
        alone = claim_alone(path, fd, locking=locking)
        if alone and _is_called(fd, part):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _is_called(fd: int, name: str) -> bool:
    """Whether this is the name of that file."""
    try:
        return identity_of(os.stat(name, follow_symlinks=False)) == identity_of(os.fstat(fd))
    except OSError:
        return False


def _refuse_foreign(fd: int, part: str) -> None:
    """Raise for a file of this name that no writer has left: it may be somebody's disk."""
    with _saying(part, "write it"):
        is_alone = os.fstat(fd).st_nlink == 1
        if not is_alone or os.pread(fd, len(MAGIC), 0) not in (b"", DRAFT_MAGIC, MAGIC):
            raise ImageError(path=part, problem="it is there and no manifest; move it away")


def _named(fd: int, part: str) -> Iterator[int]:
    try:
        yield fd
    finally:
        if _is_called(fd, part):
            with contextlib.suppress(OSError):
                os.unlink(part)


def _write(
    fd: int,
    layer: Layer,
    head: Head,
    below: list[Manifest],
    options: RunOptions,
    hooks: Hooks,
) -> None:
    with _saying(manifest_of(layer.path), "write it"), os.fdopen(os.dup(fd), "r+b") as file:
        file.write(DRAFT_MAGIC.ljust(HEAD, b"\0"))
        for records in _hashed(layer, options, hooks):
            file.write(records)
        file.flush()
        end = file.tell()
        own = content_of(fd, end, layer.path)
        draft = Manifest(layer.path, own, head, end)
        chain = [draft] if is_fully_allocated(layer) else [draft, *below]
        told = guest_digest(layer.size, guest_blocks(chain, layer.size))
        file.seek(0)
        file.write(replace(head, guest_digest=told, groups=len(draft.records)).pack())
        file.flush()
        file.seek(end)
        file.write(digest_of_file(fd, end))
        file.flush()
    assert os.fstat(fd).st_size == end + DIGEST  # noqa: S101 - nothing else was written


def _hashed(layer: Layer, options: RunOptions, hooks: Hooks) -> Iterator[bytes]:
    """The records of all groups, in order."""

    def failed(result: Failed) -> bytes:
        start, stop = (at * GROUP for at in (result.task.first, result.task.stop))
        action = f"hash what lies from {start} to {min(stop, layer.size)}"
        raise FileError(path=layer.path, action=action, reason=str(result.error))

    scan_hooks = ScanHooks(layer.path, failed, hooks.stopping, progress=hooks.progress)
    waiting: dict[int, bytes] = {}
    due = 0
    tasks = tasks_of(layer)
    for task, records in scan(LeafHasher(layer), tasks, options.scan_options, scan_hooks):
        waiting[task.number] = records
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def tasks_of(layer: Layer) -> list[Task]:
    """All groups of ``layer``, cut by the data that there is to read."""
    geometry = Geometry(layer.size, GROUP)
    return cut(data_stretches([file_of(layer)], geometry, 1), geometry.clusters)
