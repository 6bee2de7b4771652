"""``addcow qemu import``: take an overlay back from QEMU."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.options import File, JobChangeOptions, Printing


def command(
    *,
    file: File,
    discard: Annotated[
        bool,
        typer.Option(
            "--discard",
            help="then remove the .add-cow file, if every cluster is allocated: the image file "
            "alone is the disk",
        ),
    ] = False,
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="take a copy of FILE or of its qcow2 file for the original"),
    ] = False,
    abandon: Annotated[
        bool,
        typer.Option(
            "--abandon",
            help="give up what the guest has written, with --force, where the qcow2 file is lost",
        ),
    ] = False,
    printing: Printing,
    changing: JobChangeOptions,
) -> None:
    """Take an overlay back from QEMU; also finish what was interrupted."""
    from addcow_mp.jobs.qemu_import import ImportOptions, take_back

    access = changing.access(force=changing.force, writes=True, exclude=changing.exclude)
    options = ImportOptions(discard=discard, adopt=adopt, abandon=abandon)
    report = take_back(file, options, access=access)
    printing.report(report, _sentence(report.state_before, discard=discard))


def _sentence(state: str | None, *, discard: bool) -> str:
    if state != "here":
        return "Taken back from QEMU."
    return "It is not lent; its .add-cow file was removed." if discard else "It is not lent."
