"""The options that name a new backing file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli.options import Format, OptionGroup
from addcow_mp.errors import UsageError

if TYPE_CHECKING:
    from addcow_mp.jobs.rebase import NewBacking


class NewBackingOptions(OptionGroup):
    """The options of ``rebase`` and ``farm rebase``."""

    backing: Annotated[
        str, typer.Option("-b", metavar="NEW", help='the new backing file; "" = none')
    ]
    backing_format: Annotated[
        Format | None,
        typer.Option("-F", metavar="FMT", help="format of NEW: raw or add-cow  [default: the old]"),
    ] = None
    unsafe: Annotated[
        bool, typer.Option("-u", help="only change the name: the backing file was renamed or moved")
    ] = False
    trusts_manifests: Annotated[
        bool,
        typer.Option(
            "--trust-manifests", help="manifests say where the backing files differ; none is read"
        ),
    ] = False

    def new_backing(self, *, by_path: bool = False) -> NewBacking:
        """The new backing file; ``by_path``: a relative name begins in the working directory.

        Raises :class:`UsageError`.
        """
        from addcow_mp.jobs.rebase import NewBacking

        if self.backing == "-":
            raise UsageError(message="'-' is not a file name here; a file of that name is './-'")
        return NewBacking(
            self.backing,
            self.backing_format,
            by_path=by_path,
            unsafe=self.unsafe,
            trusts_manifests=self.trusts_manifests,
        )
