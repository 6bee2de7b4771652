"""The progress of a job or of a farm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Bytes and images, done and in all. A job on one image counts no images."""

    bytes_done: int = 0
    bytes: int = 0
    images_done: int = 0
    images: int = 0

    @property
    def share(self) -> float:
        """The share that is done, by bytes, or by images if there are no bytes to move."""
        if self.bytes:
            return min(1.0, self.bytes_done / self.bytes)
        return self.images_done / self.images if self.images else 1.0

    @property
    def is_complete(self) -> bool:
        """Whether everything is done."""
        if self.images:
            return self.images_done == self.images
        return self.bytes_done >= self.bytes
