"""How far work on a farm has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """How far the farm is: images and bytes, done and in all."""

    images_done: int
    images: int
    bytes_done: int
    bytes: int
