"""The application: a table of commands, each imported when it is used.

The module of a command bears its name, beneath :mod:`addcow_mp.cli.commands`, and contains its
options, its work and its printing. It is imported when the command runs or when help lists it.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command


class _Group(NamedTuple):
    """A group of commands: what help says of it, and its members in order."""

    help: str
    members: tuple[str, ...]


#: The groups of commands, by the words that lead to them.
_GROUPS = {
    "": _Group(
        "Create, inspect, change, commit and flatten add-cow disk images.",
        (
            *("create", "info", "map", "check", "verify", "convert", "compare"),
            *("commit", "flatten", "rebase", "reset", "drop", "resize", "snapshot"),
            *("io", "serve", "manifest", "farm", "qemu"),
        ),
    ),
    "qemu": _Group(
        "Lend overlays to QEMU, and take them back.",
        ("export", "import", "args", "status", "stream"),
    ),
    "manifest": _Group("Write digests of images to files.", ("create",)),
    "farm": _Group(
        "Inspect many images at once, and work on them.",
        (
            *("ls", "graph", "check", "verify", "manifest", "plan"),
            *("commit", "flatten", "rebase", "reset", "scrub"),
        ),
    ),
    "farm.manifest": _Group("Write the manifests of all images.", ("create",)),
    "farm.scrub": _Group("Verify a farm part by part, and record the results.", ("run", "status")),
}

#: What every part of the application is made with.
_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}


class _LazyGroup(TyperGroup):
    """A group whose members are imported by name; ``place`` is its key in :data:`_GROUPS`."""

    place = ""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the signature of typer
        """The names of all members, in order."""
        return list(_GROUPS[self.place].members)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The member called ``cmd_name``, if there is one."""
        if cmd_name not in _GROUPS[self.place].members:
            return None
        place = f"{self.place}.{cmd_name}".lstrip(".")
        return _group(place) if place in _GROUPS else _command(place)


def _command(place: str) -> Any:
    """The command made from the function ``command`` of the module at ``place``."""
    from importlib import import_module
    from keyword import iskeyword

    from addcow_mp.cli.options import expanded

    name = place.rpartition(".")[2]
    # A module cannot be named like a keyword.
    module = import_module(f"addcow_mp.cli.commands.{place}{'_' * iskeyword(name)}")
    app = typer.Typer(**_SETTINGS)
    settings: dict[str, Any] = getattr(module, "SETTINGS", {})
    app.command(name, **settings)(expanded(module.command))
    return get_command(app)


def _group(place: str) -> Any:
    kind = type("_LazyGroup", (_LazyGroup,), {"place": place})
    name = place.rpartition(".")[2] or "addcow"
    app = typer.Typer(name=name, help=_GROUPS[place].help, cls=kind, **_SETTINGS)
    if place:
        app.callback()(lambda: None)
    else:
        app.callback(invoke_without_command=True)(_addcow)
    return get_command(app)


def application() -> Any:
    """The ``addcow`` command with all its commands."""
    return _group("")


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
