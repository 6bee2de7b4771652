"""The overlays around the images of one command, searched once for all of them.

A job on one image looks for overlays that need what it changes. A thousand jobs in one directory
would read each header in it a thousand times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from addcow_mp.device.access import Access
from addcow_mp.farm.dependency_index import REFRESH_SECONDS, DependencyIndex
from addcow_mp.jobs.options import ALONE, Shared


class SharedSearch:
    """What the jobs on ``paths`` share; a job on a single image looks for itself."""

    def __init__(self, paths: Sequence[str], access: Access) -> None:
        self._index = DependencyIndex(paths, access) if len(paths) > 1 else None
        self._farm = {} if self._index is None else {one.path: one for one in self._index.farm}
        self._searched = time.monotonic()

    def shared(self, path: str) -> Shared:
        """What the job on ``path``, which changes only its own files, is told."""
        named = self._farm.get(path)
        if self._index is None or named is None:
            return ALONE
        if time.monotonic() - self._searched >= REFRESH_SECONDS:
            self._index.refresh()
            self._searched = time.monotonic()
        return Shared(nearby=self._index.around(named, as_backing=False))

    def removed(self, path: str) -> None:
        """The overlay at ``path`` was removed: what it stood on is not needed by it any more."""
        named = self._farm.get(path)
        if self._index is not None and named is not None:
            self._index.graph.remove_user(named)
