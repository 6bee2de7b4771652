"""What a job moves: decided before its first byte, and not changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from addcow_mp.device.copying import CopyOptions, clonable
from addcow_mp.device.files import File
from addcow_mp.device.filesystem import can_share
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.selection import Selection
from addcow_mp.engine.targets import Target
from addcow_mp.engine.tasks import TASK_BYTES, Task


def _do_nothing() -> None:
    """Change nothing before the first byte."""


def _device(file: File) -> int:
    return file.first_status.st_dev


@dataclass(frozen=True)
class TransferPlan:
    """Moves the clusters of ``selection``, cut into ``tasks``, into ``target``.

    ``bit``: the value that the overlay's bits get for what was moved, None = they stay; the bits of
    an add-cow target are published before them. ``changed``: the layers whose manifests become
    invalid. ``prepare``: called when nothing can be refused any more, before the first byte.
    ``restarts``: nothing records what has been moved, so a job that was stopped starts again.
    """

    selection: Selection
    target: Target
    tasks: list[Task]
    bit: int | None = None
    changed: tuple[Layer, ...] = ()
    prepare: Callable[[], object] = _do_nothing
    restarts: bool = False

    @property
    def published(self) -> Overlay | None:
        """The overlay whose bits change, if they do."""
        layer = self.selection.layer
        return layer if self.bit is not None and isinstance(layer, Overlay) else None

    @property
    def frees(self) -> bool:
        """Whether the space of what was moved is freed: no cluster with a cleared bit needs it."""
        return self.bit == 0

    @cached_property
    def gives_back(self) -> bool:
        """Whether the space that is freed is in the target's file system."""
        source, target = self.selection.nearest, self.target.file
        return self.frees and source is not None and _device(source) == _device(target)

    @property
    def weight(self) -> int:
        """About how many bytes are moved."""
        return sum(task.weight for task in self.tasks)

    def may_clone(self, options: CopyOptions) -> bool:
        """Return whether long runs of the nearest source are cloned."""
        source, target = self.selection.nearest, self.target.file
        first, stop = clonable(options, 0, TASK_BYTES, target.block_size)
        return source is not None and first < stop and can_share(source, target)
