"""Extents as the public interface shows them."""

from __future__ import annotations

from addcow_mp.device.layer import Kind, Piece


class Extent:
    """An extent of the guest's view, with qemu-img map's words; bytes throughout.

    ``depth`` 0 is the image file, 1 the backing file, and so on. ``present`` is
    false where no layer holds it; ``zero`` says that it certainly reads as zeros;
    ``data`` that there are bytes in the file. ``offset`` in that file equals ``start``.
    """

    __slots__ = ("data", "depth", "length", "present", "start", "zero")

    def __init__(self, piece: Piece) -> None:
        self.start = piece.start
        self.length = piece.stop - piece.start
        self.depth = piece.depth
        self.present = piece.kind is not Kind.ABSENT
        self.data = piece.kind is Kind.DATA
        self.zero = not self.data

    @classmethod
    def of(cls, piece: Piece) -> Extent:
        """The extent that ``piece`` describes."""
        return cls(piece)

    @property
    def offset(self) -> int | None:
        """Where it lies in the file at its depth; None where no layer holds it."""
        return self.start if self.present else None

    def __repr__(self) -> str:
        words = ("data" if self.data else "zero") if self.present else "absent"
        return f"Extent({self.start}, {self.length}, depth={self.depth}, {words})"
