"""Why a list is empty, on stderr."""

from __future__ import annotations

from collections.abc import Collection

from addcow_mp.cli.messages import say
from addcow_mp.farm.places import Found, reasons_for_nothing


def explain(found: Found, listed: Collection[str], *, quiet: bool = False) -> bool:
    """Say why places list nothing; whether that is an error.

    It is one when nothing at all is ``listed`` although files were named: they are no overlays.
    A directory without overlays is no error, and with ``quiet`` is not spoken of.
    """
    is_error = not listed and bool(found.named)
    for line in reasons_for_nothing(found, listed) if is_error or not quiet else ():
        say(line)
    return is_error
