"""``addcow qemu stream``: make everything allocated while the guest runs."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import (
    File,
    JobProgress,
    Opening,
    Printing,
    Rate,
    name_of_file,
    rate_of,
)


def command(
    *,
    file: File,
    qmp: Annotated[
        str,
        typer.Option(
            "--qmp",
            metavar="SOCKET",
            callback=name_of_file,
            help="the Unix socket of QEMU's monitor, as in its option -qmp",
        ),
    ],
    rate: Rate = None,
    progress: JobProgress,
    printing: Printing,
    opening: Opening,
) -> None:
    """Make every cluster of a lent overlay allocated, while its guest runs.

    QEMU copies. A stop loses nothing, and the same command continues. When the guest is off,
    'addcow qemu import --discard' leaves the raw disk alone. Needs pip install 'addcow-mp[qemu]'.
    """
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.qemu_stream import stream

    access, limit = opening.access(), rate_of(rate)
    with working(progress.chosen(quiet=printing.quiet), quiet=printing.quiet) as hooks:
        done = stream(file, qmp, rate=limit, access=access, hooks=hooks)
    if printing.as_json:
        print_document(done.as_json())
    elif not printing.quiet:
        already = " already" if done.before else ""
        print(f"Every cluster is allocated{already}; the guest goes on.")
        print(one_line(f"When it is off: addcow qemu import --discard {shlex.quote(file)}"))
        print(one_line(f"Then '{done.image}' alone is the disk."))
