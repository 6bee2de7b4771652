"""Run one command line: what it raises becomes one line on stderr and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from addcow_mp.cli import messages, results, signals
from addcow_mp.cli.messages import lead_nowhere, report_failure
from addcow_mp.errors import AddcowError, ResourceError, UsageError, is_shortage

INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Run ``addcow`` with these arguments and return its exit status."""
    results.begin()
    messages.begin()
    signals.begin()
    status = _finished(arguments)
    if not results.failed():
        return status
    failure = results.failure()
    status = status or results.UNTOLD
    return status if failure is None else report_failure(failure, status)


def _finished(arguments: Sequence[str]) -> int:
    try:
        status = _carried_out(arguments)
        messages.tell_the_rest()
    except AddcowError as error:
        return _failed(arguments, str(error), error.exit_code, error.fields.get("path"))
    except KeyboardInterrupt:
        told = f"{signals.words()}{results.given_up()}"
        return _failed(arguments, told, signals.status())
    except BrokenPipeError:
        # The reader of our output has gone (a pager, `head`).
        _give_up_output()
        return 1
    except MemoryError:
        return _failed(arguments, "out of memory; give it more, or fewer --jobs", 1)
    except OSError as error:
        _give_up_output()
        return _failed(arguments, _told(error), 1)
    return status


def _told(error: OSError) -> str:
    if is_shortage(error):
        return str(ResourceError.of("go on", error))
    named = f"{error.filename}: " if error.filename else ""
    return f"{named}{error.strerror or error}"


def _failed(arguments: Sequence[str], message: str, status: int, path: str | None = None) -> int:
    """Say why the command failed: in one line, and to a program as JSON."""
    from addcow_mp.cli.jsontext import form_of, print_failure

    print_failure(form_of(arguments), message, status, path)
    return report_failure(message, status)


def _carried_out(arguments: Sequence[str]) -> int:
    """Run the command; what is left then is to tell of it, which no signal has to be kept from."""
    try:
        return _dispatch(arguments)
    finally:
        signals.end()


def _give_up_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        lead_nowhere(sys.stdout)


def _dispatch(arguments: Sequence[str]) -> int:
    import typer

    from addcow_mp.cli.app import application

    # Every complaint about the command line derives from this class, whichever copy of
    # click typer brings with it.
    usage_problem: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        status = application().main(list(arguments), "addcow", standalone_mode=False)
    except usage_problem as problem:
        return _failed(arguments, _usage(problem), UsageError.exit_code)
    sys.stdout.flush()
    if status == INTERRUPTED:
        raise KeyboardInterrupt  # which was taken for an exit status on its way
    return status if isinstance(status, int) else 0


def _usage(problem: Any) -> str:
    command = problem.ctx.command_path if problem.ctx is not None else "addcow"
    told = " ".join(problem.format_message().split()).rstrip(".")
    return f"{told}; see '{command} --help'"
