"""Run one command line: what it raises becomes one line on stderr and an exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from addcow_mp.cli.saying import complain, hush, lead_nowhere
from addcow_mp.errors import AddcowError, UsageError

INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Run ``addcow`` with these arguments and return its exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Names of files are bytes: what the terminal cannot show is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    hush(quiet=False)
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return _dispatch(arguments)
    except AddcowError as error:
        return complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (a pager, `head`): nobody is left to tell.
        _give_up_output()
        return 1
    except MemoryError:
        return complain("out of memory; give it more, or fewer --jobs", 1)
    except OSError as error:
        _give_up_output()
        named = f"{error.filename}: " if error.filename else ""
        return complain(f"{named}{error.strerror or error}", 1)


def _give_up_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        lead_nowhere(sys.stdout)


def _dispatch(arguments: Sequence[str]) -> int:
    import typer
    from typer.main import get_command

    from addcow_mp.cli.app import build

    # Every complaint about the command line derives from this class, whichever copy of
    # click typer brings with it.
    usage_problem: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        status = get_command(build(arguments)).main(
            list(arguments), "addcow", standalone_mode=False
        )
    except usage_problem as problem:
        return complain(_usage(problem), UsageError.exit_code)
    sys.stdout.flush()
    if status == INTERRUPTED:
        return complain("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _usage(problem: Any) -> str:
    command = problem.ctx.command_path if problem.ctx is not None else "addcow"
    told = " ".join(problem.format_message().split()).rstrip(".")
    return f"{told}; see '{command} --help'"
