"""Dependants: refuses a job when other overlays need a file that the job will change.

Overlays are looked for in the directories of the job's files and beneath the roots
(:mod:`addcow_mp.device.discovery`). Members of the job's own chain do not count.

A file or directory that cannot be read may hide an overlay. In the directories of the job's own
files it refuses every job that changes a file. Elsewhere beneath the roots it refuses jobs that
change what other overlays may stand on: a base, a ``.add-cow`` file. A job that changes only its
own image file is allowed: an overlay that shares the image lies beside it. What the user excludes
refuses nothing, and force overrides all of it.

Two overlays with the same image file take each other's clusters for garbage. That is always
refused; force overrides other dependants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from addcow_mp.device.access import Access
from addcow_mp.device.chain import refuse_lent
from addcow_mp.device.discovery import (
    BACKUP,
    Identity,
    Named,
    NearbyOverlays,
    Unexamined,
    overlays_near,
)
from addcow_mp.device.files import File
from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.errors import DependantsError, ImageError

_LENT_REMEDY = "they are lent to QEMU, and 'addcow qemu import' takes them back"
_REMEDY = "commit or flatten them first, or use --force to change it under them"


def refuse_dependants(
    overlay: Overlay,
    changed: list[File],
    access: Access,
    remedy: str = _REMEDY,
    around: NearbyOverlays | None = None,
    *,
    can_force: bool = True,
    can_force_lent: bool = True,
) -> None:
    """Raise :class:`DependantsError` when other overlays need a file of ``changed``.

    ``overlay`` is the top of the job's own chain. With ``access.force`` only a shared image file
    is refused, unless ``can_force`` other dependants too, and unless ``can_force_lent`` those that
    are lent to QEMU. ``around``: the overlays around it; None = look for them.
    """
    if not changed:
        return
    members = {one.cow.identity: one for one in _members(overlay)}
    _refuse_lent(overlay, {file.identity for file in changed})
    if around is None:
        near = [file.path for file in (*overlay.files(), *(one.cow for one in members.values()))]
        around = overlays_near(near, access)
    others = [one for one in around.overlays if not _is_member(one, members)]
    images = {one.image.file.identity for one in members.values()}
    for file in changed:
        if file.identity in images:
            refuse_shared_image(file, [one for one in others if one.image == file.identity])
        dependants = [one for one in others if file.identity in (one.backing, one.image)]
        lent = [one for one in dependants if one.is_lent]
        if lent and access.force and not can_force_lent:
            raise DependantsError(path=file.path, dependants=_listed(lent), remedy=_LENT_REMEDY)
        if dependants and not (access.force and can_force):
            listed = _listed(dependants, around.more)
            raise DependantsError(path=file.path, dependants=listed, remedy=remedy)
    if not access.force:
        own = overlay.image.file.identity
        only_image = all(file.identity == own for file in changed)
        refuse_unexamined(around.unread if only_image else (*around.unread, *around.hidden))


def _refuse_lent(overlay: Overlay, changed: set[Identity]) -> None:
    """Raise when QEMU reads a layer in or below which a file is ``changed``."""
    for layer in _members(overlay):
        below = {file.identity for file in layer.files()}
        below |= {one.cow.identity for one in _members(layer)}
        if below & changed:
            refuse_lent(layer.cow, layer.header, changes=True)


def refuse_unexamined(unread: Sequence[Unexamined]) -> None:
    """Raise :class:`ImageError` when something that may hide a dependant is ``unread``."""
    for one in unread:
        what = (
            "overlays cannot be looked for there, and one may need"
            if one.is_directory
            else "it cannot be read, and may be an overlay that needs"
        )
        raise ImageError(
            path=one.path,
            problem=f"{what} what is to be changed ({one.reason}); make it readable, leave it out "
            "with --exclude if it is known, or use --force",
        )


def refuse_shared_image(image: File, others: list[Named]) -> None:
    """Raise when ``others`` use ``image`` as their image file too."""
    if others:
        remedy = "two overlays cannot share an image file; give one of them a copy"
        raise DependantsError(path=image.path, dependants=_listed(others), remedy=remedy)


def _listed(overlays: list[Named], more: int = 0) -> str:
    return ", ".join(sorted(one.path for one in overlays)) + (f" and {more} more" if more else "")


def _is_member(one: Named, members: dict[Identity, Overlay]) -> bool:
    """Whether ``one`` belongs to the job's own chain, or is a repair's backup of a member."""
    # Under a hard link elsewhere the same names mean other files: that is another overlay.
    if one.identity in members and one.image == members[one.identity].image.file.identity:
        return True
    original = BACKUP.sub("", one.path)
    return original != one.path and any(
        member.cow.real == original and member.image.file.identity == one.image
        for member in members.values()
    )


def _members(layer: Layer | None) -> Iterator[Overlay]:
    while isinstance(layer, Overlay):
        yield layer
        layer = layer.backing
