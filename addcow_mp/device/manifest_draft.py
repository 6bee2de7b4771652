"""The draft of a manifest: a file beside it that one process writes, and then renames.

A manifest is there whole or not at all. Another process that wants to write the same manifest
waits until the writer has ended, as long as the writer makes progress. What a killed writer left
is overwritten; a draft that was not renamed is removed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from addcow_mp.device import faults
from addcow_mp.device.access import Access
from addcow_mp.device.files import claim_alone, identity_of, sync_entry
from addcow_mp.device.manifest_file import SUFFIX, draft_of, manifest_of
from addcow_mp.device.permissions import Readers, set_readers
from addcow_mp.device.turns import waiting
from addcow_mp.errors import FileError, ImageError, RestartsError
from addcow_mp.format.manifest import DRAFT_MAGIC, MAGIC, FileState

#: Seconds between looks at whether the other writer has ended.
LOOK_AGAIN = 0.1

#: Seconds without a write after which the writer makes no progress: digests come for 64 MiB each.
STANDSTILL = 10.0


@contextlib.contextmanager
def errors_naming(path: str, action: str) -> Iterator[None]:
    """Name the file and the action in an error of the system."""
    try:
        yield
    except OSError as error:
        raise FileError.of(path, action, error) from error


class ManifestDraft:
    """The draft of the manifest of the layer at ``layer_path``, held by this process alone.

    ``readers``: who may read the manifest. ``access``: whether it is locked and synced. ``note``:
    called when this process has to wait.
    """

    def __init__(
        self,
        layer_path: str,
        readers: Readers,
        *,
        access: Access,
        stopping: Callable[[], bool],
        note: Callable[[str], None],
    ) -> None:
        self.path = manifest_of(layer_path)
        self._draft = draft_of(layer_path)
        self._readers = readers
        self._access = access
        self._stopping = stopping
        self._note = note

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The descriptor of the empty draft, which is removed at the end unless it was renamed."""
        fd = self._claim_or_wait()
        try:
            self._refuse_foreign(fd)
            with errors_naming(self._draft, "restrict its readers to those of the layer"):
                os.ftruncate(fd, 0)
                set_readers(fd, self._readers)
            try:
                yield fd
            finally:
                if self._is_draft(fd):
                    with contextlib.suppress(OSError):
                        os.unlink(self._draft)
        finally:
            os.close(fd)

    def publish(self, fd: int) -> None:
        """Make the draft durable, and give it the name of the manifest."""
        durable = self._access.durable
        with errors_naming(self.path, "make it durable"):
            if durable:
                with waiting():
                    os.fsync(fd)
            if faults.armed:
                faults.hit("manifest_rename")
            os.rename(self._draft, self.path)
        if durable:
            sync_entry(self.path, "make its name durable", "it is there, and may be gone")

    def _claim_or_wait(self) -> int:
        fd = self._claim()
        if fd is None:
            self._note(f"{self.path}: another process is writing it; waiting until that has ended")
        state, since = None, time.monotonic()
        while fd is None:
            if self._stopping():
                raise RestartsError(path=self.path.removesuffix(SUFFIX))
            with contextlib.suppress(OSError):
                now = FileState.of(os.stat(self._draft, follow_symlinks=False))
                if now != state:
                    state, since = now, time.monotonic()
            if time.monotonic() - since > STANDSTILL:
                problem = "another process is writing it and makes no progress"
                raise ImageError(path=self.path, problem=f"{problem}; try again when it has ended")
            time.sleep(LOOK_AGAIN)
            fd = self._claim()
        return fd

    def _claim(self) -> int | None:
        """The draft, locked; None if another process has it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with errors_naming(self.path, "write it"):
            fd = os.open(self._draft, flags, self._readers.mode)
        try:
            # The other process may have renamed the file before it was locked here.
            if claim_alone(self.path, fd, locking=self._access.locking) and self._is_draft(fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _is_draft(self, fd: int) -> bool:
        """Whether this file still has the name of the draft."""
        try:
            found = os.stat(self._draft, follow_symlinks=False)
            return identity_of(found) == identity_of(os.fstat(fd))
        except OSError:
            return False

    def _refuse_foreign(self, fd: int) -> None:
        """Raise for a file that no writer of manifests has left: it may be a disk."""
        with errors_naming(self._draft, "write it"):
            is_alone = os.fstat(fd).st_nlink == 1
            if not is_alone or os.pread(fd, len(MAGIC), 0) not in (b"", DRAFT_MAGIC, MAGIC):
                problem = "it exists and is no manifest; move it away"
                raise ImageError(path=self._draft, problem=problem)
