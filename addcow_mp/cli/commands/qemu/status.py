"""``addcow qemu status``: whose an overlay is."""

from __future__ import annotations

from addcow_mp.cli.commands.qemu.export import RELAXED_COST
from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import File, Opening, Printing


def command(*, file: File, printing: Printing, opening: Opening) -> None:
    """Say whose an overlay is: the user's own, or lent to QEMU, and which program has it open."""
    from addcow_mp.format.qcow2 import Kind
    from addcow_mp.jobs.qemu_status import status

    found = status(file, opening.access())
    if printing.as_json:
        print_document(found.as_json())
        return
    print(one_line(f"{file}: {found.state.replace('-', ' ')}"))
    if found.twin is not None:
        print(one_line(f"used through: {found.twin}"))
        print(one_line(f"open in: {found.holder or 'no program'}"))
    if found.other_data_file is not None:
        other = found.other_data_file
        print(one_line(f"a program that is given '{found.twin}' alone writes into: {other}"))
    if found.streamed:
        print("streamed: it needs its backing file no more; 'addcow qemu import' finishes")
    if found.kind is Kind.SECTOR:
        print(RELAXED_COST)
