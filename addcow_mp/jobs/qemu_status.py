"""Whose an overlay is, and which program holds it."""

from __future__ import annotations

from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.attributes import SYNCHRONOUS, has_attribute
from addcow_mp.device.chain import open_chain
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.twin import other_data_file, user_of
from addcow_mp.format.qcow2 import Kind
from addcow_mp.jobs.lending import Lending, State, lending_of


class LendingStatus(NamedTuple):
    """The state of one overlay: its twin, how a power cut is made harmless, and who has it open.

    ``streamed``: QEMU has removed the twin's backing file, after it copied all that it held.
    ``other_data_file``: the twin names this file, and not the image file; None = as it should be.
    """

    filename: str
    state: State
    twin: str | None
    lent_id: int | None
    kind: Kind | None
    synchronous: bool
    streamed: bool
    holder: str | None
    other_data_file: str | None

    def as_json(self) -> dict[str, object]:
        """The public keys."""
        return {
            "filename": self.filename,
            "state": self.state,
            "twin": self.twin,
            "id": None if self.lent_id is None else f"{self.lent_id:x}",
            "kind": None if self.kind is None else self.kind.name.lower(),
            "synchronous": self.synchronous,
            "streamed": self.streamed,
            "holder": self.holder,
            "other-data-file": self.other_data_file,
        }


def status(path: str, access: Access | None = None) -> LendingStatus:
    """Whose the overlay at ``path`` is. Raises :class:`AddcowError`."""
    access = (access or Access())._replace(share=True)
    with open_chain(path, access=access, lent=True) as overlay:
        image = overlay.image.file
        lending = lending_of(overlay.cow, overlay.header, image)
        kind = None if lending.header is None else lending.mark.kind
        holder = None if lending.twin is None else user_of(lending.twin)
        return LendingStatus(
            path,
            lending.state,
            lending.twin,
            overlay.header.lent_id,
            kind,
            has_attribute(image.fd, SYNCHRONOUS),
            _is_streamed(overlay, lending),
            holder,
            None if lending.header is None else other_data_file(lending.header, image.identity),
        )


def _is_streamed(overlay: Overlay, lending: Lending) -> bool:
    header = lending.header
    return overlay.backing is not None and header is not None and header.backing is None
