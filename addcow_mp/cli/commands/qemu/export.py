"""``addcow qemu export``: lend an overlay to QEMU."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line, print_manifests_gone, warn
from addcow_mp.cli.options import File, JobChangeOptions, Printing, name_of_file


class Crash(StrEnum):
    """What a power cut of the host may cost."""

    strict = "strict"
    relaxed = "relaxed"


Target = Annotated[
    str | None,
    typer.Argument(
        metavar="QCOW2",
        callback=name_of_file,
        help="the new file for QEMU, in the directory of FILE  [default: FILE with .qcow2]",
    ),
]
CrashOption = Annotated[
    Crash,
    typer.Option(
        "--crash",
        help="strict: a power cut is harmless; relaxed: faster, and what a guest wrote without a "
        "flush may read as zeros",
    ),
]
Absolute = Annotated[
    bool,
    typer.Option(
        "--absolute-data-file",
        help="QCOW2 names the image file by its absolute path: a copy of QCOW2 then writes into "
        "the original",
    ),
]


def command(
    *,
    file: File,
    qcow2: Target = None,
    crash: CrashOption = Crash.strict,
    absolute: Absolute = False,
    printing: Printing,
    changing: JobChangeOptions,
) -> None:
    """Lend an overlay to QEMU, which uses it through a new qcow2 file beside it.

    Nothing is copied. 'addcow qemu args' says what to give to QEMU, 'addcow qemu import' takes the
    overlay back.
    """
    from addcow_mp.jobs.qemu_export import export

    access = changing.access(force=changing.force, writes=True, exclude=changing.exclude)
    relaxed = crash is Crash.relaxed
    result = export(file, qcow2, relaxed=relaxed, absolute_data_file=absolute, access=access)
    warn(result.warnings)
    if relaxed:
        warn([f"{file}: {RELAXED_COST}"])
    if printing.as_json:
        print_document(result.as_json())
    elif not printing.quiet:
        print(one_line(f"Lent to QEMU through '{result.twin}'."))
        print_manifests_gone(result.manifests_removed)


RELAXED_COST = (
    "lent with --crash relaxed: after a power cut of the host, sectors that the guest wrote and "
    "did not flush may read as zeros"
)
