"""Time limits of commands."""

from __future__ import annotations

import time

from addcow_mp.units import parse_duration


class Limit:
    """The time from which on nothing more is begun; none without ``text``."""

    def __init__(self, text: str | None) -> None:
        self._end = None
        if text is not None:
            self._end = time.monotonic() + parse_duration(text, "--time-limit")

    @property
    def is_reached(self) -> bool:
        """Whether it is over."""
        return self._end is not None and time.monotonic() >= self._end
