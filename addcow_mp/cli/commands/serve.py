"""``addcow serve``: the guest's view over NBD, by nbdkit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from addcow_mp.cli.options import ChangeOptions, File, Rate, rate_of
from addcow_mp.errors import ImageError, UsageError
from addcow_mp.units import MAX_SIZE

if TYPE_CHECKING:
    from addcow_mp.device.access import Access

#: The port of NBD.
PORT = 10809

#: Only programs of this machine can connect, unless the user names another address.
LOOPBACK = "127.0.0.1"

#: Requests of one connection that run at a time: their waits for the disk overlap. With nbdkit's 16
#: they wait longer for the interpreter, and reads of cached data are a sixth slower.
THREADS = 4

_PACKAGES = "install the packages nbdkit and nbdkit-plugin-python"


def command(
    *,
    file: File,
    socket: Annotated[
        str | None, typer.Option("--socket", metavar="PATH", help="listen on a Unix socket")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", metavar="N", min=1, max=65535, help="listen on a TCP port  [default: 10809]"
        ),
    ] = None,
    bind: Annotated[
        str | None,
        typer.Option("--bind", metavar="ADDR", help="listen on this address, not on 127.0.0.1"),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="serve the overlay without changing it")
    ] = False,
    rate: Rate = None,
    changing: ChangeOptions,
) -> None:
    """Serve the guest's view of an overlay over NBD until SIGTERM or Ctrl-C.

    nbdkit and its Python plugin must be installed.
    """
    _check_usage(socket, port, bind)
    filters = _rate_filter(rate)
    writable = not read_only
    access = changing.access(force=changing.force, writes=writable, exclude=changing.exclude)
    _refuse_unusable(file, access, writable=writable)
    nbdkit = _nbdkit()
    options = {"file": os.path.abspath(file), "writable": writable, "access": _fields(access)}
    options["socket"] = _listen(socket, port or PORT, bind or LOOPBACK)
    mode = [] if writable else ["--readonly"]
    plugin = ["python", _plugin(), f"options={json.dumps(options)}"]
    threads = f"--threads={THREADS}"
    _become([nbdkit, "--foreground", threads, *filters[:1], *mode, *plugin, *filters[1:]])


def _check_usage(socket: str | None, port: int | None, bind: str | None) -> None:
    from addcow_mp.cli.listening import check_path

    if socket is not None:
        if port is not None or bind is not None:
            raise UsageError(message="--socket: give either a socket or a port, not both")
        check_path(socket)
    if bind == "":
        raise UsageError(message="--bind '': it is empty; give an address, such as 127.0.0.1")


def _rate_filter(rate: str | None) -> list[str]:
    """The option and the parameter of nbdkit that limit the rate, if it is limited."""
    limit = rate_of(rate)
    if not limit:
        return []
    # The filter counts bits, in a signed number of 64 bits.
    return ["--filter=rate", f"rate={min(8 * limit, MAX_SIZE)}"]


def _listen(path: str | None, port: int, address: str) -> dict[str, object] | None:
    """Listen for nbdkit. Returns the Unix socket, which the plugin removes at its end."""
    from addcow_mp.cli import listening

    if path is None:
        listening.pass_on(listening.listen_on_port(address, port))
        return None
    listening.pass_on([listening.listen_on_path(path)])
    return {"path": os.path.abspath(path), "which": listening.identity(path)}


def _refuse_unusable(file: str, access: Access, *, writable: bool) -> None:
    """Open the overlay once, so that what refuses it is said in one line."""
    import addcow_mp

    with addcow_mp.open(file, writable=writable, access=access) as disk:
        if writable:
            disk.check_permission()


def _fields(access: Access) -> dict[str, object]:
    fields = access._asdict()
    del fields["files"]
    fields["roots"] = [os.path.abspath(root) for root in access.roots]
    return fields


def _plugin() -> str:
    import addcow_mp

    return os.path.join(os.path.dirname(os.path.abspath(addcow_mp.__file__)), "nbd_plugin.py")


def _nbdkit() -> str:
    """The path of nbdkit. Raises :class:`ImageError` where it cannot run the plugin."""
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        raise ImageError(path="nbdkit", problem=f"it is not installed; {_PACKAGES}")
    dump = [nbdkit, "python", "--dump-plugin"]
    done = subprocess.run(dump, capture_output=True, text=True, check=False)
    told = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    version = told.get("python_version", "")
    if done.returncode or not version:
        raise ImageError(path=nbdkit, problem=f"it has no plugin for Python; {_PACKAGES}")
    own = ".".join(map(str, sys.version_info[:2]))
    if ".".join(version.split(".")[:2]) != own:
        problem = f"its plugin runs Python {version}, and addcow runs {own}; use the same version"
        raise ImageError(path=nbdkit, problem=problem)
    return nbdkit


def _become(words: list[str]) -> NoReturn:
    """Replace this process by nbdkit, which finds the packages of this one."""
    paths = [one or os.getcwd() for one in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(words[0], words)  # noqa: S606 - no shell is wanted
