"""The application: a table of commands, each loaded when it is named.

A command stands in the module that bears its name, beneath :mod:`addcow_mp.cli.commands`: its
options, its work and its printing. The module is imported when the command is run or when help
lists it, so a command pays for nothing but itself at start-up.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

#: Groups of commands, by the words that lead to them, and the names of their members in order.
TABLE: dict[str, tuple[str, ...]] = {
    "": (
        "create",
        "info",
        "map",
        "check",
        "verify",
        "convert",
        "compare",
        "commit",
        "flatten",
        "io",
        "manifest",
        "farm",
    ),
    "manifest": ("create",),
    "farm": (
        "ls",
        "graph",
        "check",
        "verify",
        "manifest",
        "plan",
        "commit",
        "flatten",
        "scrub",
    ),
    "farm.manifest": ("create",),
    "farm.scrub": ("run", "status"),
}

#: What help says of a group.
_HELP = {
    "": "Create, inspect, change, commit and flatten add-cow disk images.",
    "manifest": "Write down what images hold.",
    "farm": "Look at many images at once, and work on them.",
    "farm.manifest": "Write down what all images hold.",
    "farm.scrub": "Verify a farm part by part, and remember the results.",
}


class _LazyGroup(TyperGroup):
    """A group whose members are loaded by name; ``place`` is its key in :data:`TABLE`."""

    place = ""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the signature of typer
        """The names of all members, in order."""
        return list(TABLE[self.place])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The member called ``cmd_name``; None when there is none."""
        if cmd_name not in TABLE[self.place]:
            return None
        place = f"{self.place}.{cmd_name}".lstrip(".")
        return _group(place) if place in TABLE else _command(place)


def _command(place: str) -> Any:
    """The command whose module is ``place``, made of the function that bears its name."""
    from importlib import import_module

    from addcow_mp.cli.options import expanded

    name = place.rpartition(".")[2]
    module = import_module(f"addcow_mp.cli.commands.{place}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name)(expanded(module.command))
    return get_command(app)


def _group(place: str) -> Any:
    kind = type("_LazyGroup", (_LazyGroup,), {"place": place})
    app = typer.Typer(
        name=place.rpartition(".")[2] or "addcow",
        help=_HELP[place],
        cls=kind,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    if place:
        app.callback()(_nothing)
    else:
        app.callback(invoke_without_command=True)(_addcow)
    return get_command(app)


def application() -> Any:
    """The ``addcow`` command with all its commands."""
    return _group("")


def _nothing() -> None:
    """A group of commands has no options of its own."""


def _addcow(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    from addcow_mp import __version__
    from addcow_mp.errors import UsageError

    if version:
        print(f"addcow {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise UsageError(message="Missing command; see 'addcow --help'")
