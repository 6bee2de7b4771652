"""Whose an overlay is: its user's, or QEMU's, which uses it through its twin.

Two places say so together: the mark in the header of the ``.add-cow`` file, and a bit in the header
of the twin (:mod:`addcow_mp.device.twin`) with which QEMU refuses it. At most one of the two may be
written at any moment, whatever interrupts the way out or back:

======== ========= ==========================================================================
mark     twin      state
======== ========= ==========================================================================
none     none      *here*
none     disabled  *leftover*: the twin is removed by the next command
lent     disabled  *halfway*: no side can write, the bitmap is right; the way back finishes
lent     enabled   *lent*: QEMU's. Bitmap and image file do not say what the overlay is
lent     none      *twin-missing*: the twin was moved or removed
none     enabled   *foreign-twin*: QEMU may write the image file; the ``.add-cow`` file came from
                   elsewhere, or the twin did. Nothing may be written
reading  enabled   *lent-for-reading*: a layer below a lent overlay. It may be read and not changed
======== ========= ==========================================================================

A copy of a file has another inode or birth time than the twin's mark says. It is only taken for
the original when the user says so (adopting it).
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import NamedTuple

from addcow_mp.device.files import File
from addcow_mp.device.twin import Identity, lent_error, twins_in
from addcow_mp.errors import ImageError
from addcow_mp.format.header import Header
from addcow_mp.format.qcow2 import Header as TwinHeader
from addcow_mp.format.qcow2 import Mark


class State(StrEnum):
    """Whose an overlay is."""

    HERE = "here"
    LEFTOVER = "leftover"
    HALFWAY = "halfway"
    LENT = "lent"
    TWIN_MISSING = "twin-missing"
    FOREIGN_TWIN = "foreign-twin"
    LENT_FOR_READING = "lent-for-reading"


class Lending(NamedTuple):
    """The state of an overlay, and its twin where there is one."""

    state: State
    twin: str | None = None
    header: TwinHeader | None = None

    @property
    def mark(self) -> Mark:
        """The twin's mark; there must be a twin."""
        assert self.header is not None  # noqa: S101 - asked for only where there is a twin
        assert self.header.mark is not None  # noqa: S101 - without one it is no twin
        return self.header.mark


def lending_of(cow: File, header: Header, image: File) -> Lending:
    """The state of the overlay whose two files are open. Its directory is searched for twins."""
    twins = [(path, twin) for path, twin in twins_in(os.path.dirname(cow.base)) if twin.mark]
    if header.lent_id is not None:
        return _of_lent(cow, header, [one for one in twins if _id(one[1]) == header.lent_id])
    cow_id, image_id = Identity.of(cow), Identity.of(image)
    for path, twin in twins:
        mark = twin.mark
        if mark is None:
            continue
        if twin.disabled and (mark.cow_inode, mark.cow_birth) == cow_id:
            return Lending(State.LEFTOVER, path, twin)
        if not twin.disabled and (mark.image_inode, mark.image_birth) == image_id:
            return Lending(State.FOREIGN_TWIN, path, twin)
    return Lending(State.HERE)


def _id(twin: TwinHeader) -> int | None:
    return None if twin.mark is None else twin.mark.lent_id


def _of_lent(cow: File, header: Header, twins: list[tuple[str, TwinHeader]]) -> Lending:
    if not twins:
        return Lending(State.TWIN_MISSING)
    path, twin = _original(cow, twins)
    if header.lent_for_reading:
        return Lending(State.LENT_FOR_READING, path, twin)
    return Lending(State.HALFWAY if twin.disabled else State.LENT, path, twin)


def _original(cow: File, twins: list[tuple[str, TwinHeader]]) -> tuple[str, TwinHeader]:
    """The one of several twins with the same id that is no copy."""
    originals = [one for one in twins if is_original_twin(*one)]
    found = originals or twins
    if len(found) > 1:
        names = ", ".join(f"'{path}'" for path, _ in found)
        raise ImageError(
            path=cow.path,
            problem=f"several files claim to be what QEMU uses it through: {names}; move all but "
            "the right one to another directory",
        )
    return found[0]


def is_original_twin(path: str, twin: TwinHeader) -> bool:
    """Whether the file at ``path`` is the one that was made, and no copy of it."""
    mark = twin.mark
    if mark is None:
        return False
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    file = File(path, fd, writable=False)
    try:
        return Identity.of(file) == (mark.twin_inode, mark.twin_birth)
    finally:
        file.close()


def refuse_not_here(cow: File, header: Header, lending: Lending) -> None:
    """Raise unless the overlay may be changed: it is its user's, or has a leftover twin."""
    if lending.state in (State.HERE, State.LEFTOVER):
        return
    if lending.state is State.FOREIGN_TWIN:
        raise foreign_twin(cow.path, lending)
    raise lent_error(cow.path, header, lending.twin)


def not_lent(path: str, lending: Lending) -> ImageError:
    """The error for an overlay that QEMU does not use through its own twin at present."""
    remedy = _REMEDIES.get(lending.state, "'addcow qemu export' lends it")
    state = lending.state.replace("-", " ")
    return ImageError(path=path, problem=f"it is not lent to QEMU ({state}); {remedy}")


_REMEDIES = {
    State.HALFWAY: "'addcow qemu import' takes it back",
    State.TWIN_MISSING: "move its qcow2 file back beside it",
    State.FOREIGN_TWIN: "the .add-cow file, or the qcow2 file beside it, came from elsewhere",
    State.LENT_FOR_READING: "name the overlay above it that is lent",
}


def foreign_twin(path: str, lending: Lending) -> ImageError:
    """The error for an overlay whose image QEMU may write through a twin that it does not know."""
    return ImageError(
        path=path,
        problem=f"QEMU may write its image file through '{lending.twin}', which this file knows "
        "nothing of: it came from elsewhere; restore the one that was lent, or remove "
        f"'{lending.twin}' where the guest's changes can be lost",
    )
