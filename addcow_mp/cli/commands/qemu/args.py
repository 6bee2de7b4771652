"""``addcow qemu args``: what to give to QEMU or libvirt for a lent overlay."""

from __future__ import annotations

import json
import shlex
from enum import StrEnum
from typing import Annotated

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.options import File, Opening


class Form(StrEnum):
    """Whom the output is for."""

    human = "human"
    json = "json"
    libvirt = "libvirt"


def command(
    *,
    file: File,
    output: Annotated[
        Form,
        typer.Option(
            "--output",
            help="human: options of qemu-system; json: arguments of blockdev-add; libvirt: a disk",
        ),
    ] = Form.human,
    opening: Opening,
) -> None:
    """Print what to give to QEMU for an overlay that is lent to it."""
    from addcow_mp.jobs.qemu_args import NODE, blockdev, lent_chain, libvirt

    layers = lent_chain(file, opening.access(share=True))
    if output is Form.json:
        print_document(blockdev(layers))
    elif output is Form.libvirt:
        print(libvirt(layers))
    else:
        print(f"-blockdev {shlex.quote(json.dumps(blockdev(layers)))}")
        # Zeros as data: a qcow2 file makes others in its tables, over the image file's old data,
        # which a power cut can bring back when the guest writes there again.
        print(f"-device virtio-blk-pci,drive={NODE},write-zeroes=off")
