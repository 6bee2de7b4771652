"""``addcow qemu args``: what to give to QEMU or libvirt for a lent overlay."""

from __future__ import annotations

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
    from addcow_mp.jobs.qemu_args import qemu_args

    found = qemu_args(file, opening.access())
    if output is Form.json:
        print_document(found.blockdev)
    elif output is Form.libvirt:
        print(found.libvirt)
    else:
        words = iter(found.options)
        for option, value in zip(words, words, strict=True):
            print(f"{option} {shlex.quote(value)}")
