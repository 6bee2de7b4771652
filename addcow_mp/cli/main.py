"""Running one command line: errors become one line on stderr and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from addcow_mp.cli import messages, results, signals
from addcow_mp.errors import AddcowError, ResourceError, UsageError, is_shortage

INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Run ``addcow`` with these arguments and return its exit status."""
    results.begin()
    messages.begin()
    status = _run(arguments)
    error = results.failure()
    if error is None:
        return status
    status = status or results.NOT_PRINTED
    message = results.describe(error)
    return status if message is None else messages.report_failure(message, status)


def _run(arguments: Sequence[str]) -> int:
    """Run the command and report its error."""
    try:
        # After the block a signal may end the process: only messages are left.
        with signals.raising():
            status = _dispatch(arguments)
        messages.write_early_warnings()
    except AddcowError as error:
        messages.warn(_manifests_gone(error.report))
        return _failed(arguments, str(error), error.exit_code, error.fields.get("path"))
    except KeyboardInterrupt:
        message = f"{signals.description()}{results.abandon()}"
        return _failed(arguments, message, signals.status())
    except BrokenPipeError:  # the reader of the output has gone (a pager, `head`)
        _flush_or_discard()
        return 1
    except MemoryError:
        return _failed(arguments, "out of memory; give it more, or fewer --jobs", 1)
    except OSError as error:
        _flush_or_discard()
        return _failed(arguments, _describe(error), 1)
    return status


def _manifests_gone(report: Any) -> list[str]:
    """What a user of manifests must know of a job that ended early."""
    gone = getattr(report, "manifests_gone", [])
    return [f"{path}: it was removed, as it no longer applies" for path in gone]


def _describe(error: OSError) -> str:
    if is_shortage(error):
        return str(ResourceError.of("continue", error))
    file = f"{error.filename}: " if error.filename else ""
    return f"{file}{error.strerror or error}"


def _failed(arguments: Sequence[str], message: str, status: int, path: str | None = None) -> int:
    """Report why the command failed: in one line, and as JSON if that is the output's form."""
    from addcow_mp.cli.jsontext import form_of, print_failure

    print_failure(form_of(arguments), message, status, path)
    return messages.report_failure(message, status)


def _flush_or_discard() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        messages.discard(sys.stdout)


def _dispatch(arguments: Sequence[str]) -> int:
    import typer

    from addcow_mp.cli.app import application

    # The base class of every error about the command line; click is typer's own copy.
    usage_problem: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        status = application().main(list(arguments), "addcow", standalone_mode=False)
    except usage_problem as problem:
        return _failed(arguments, _usage(problem), UsageError.exit_code)
    sys.stdout.flush()
    if status == INTERRUPTED:
        raise KeyboardInterrupt  # click has turned it into an exit status
    return status if isinstance(status, int) else 0


def _usage(problem: Any) -> str:
    command = problem.ctx.command_path if problem.ctx is not None else "addcow"
    message = " ".join(problem.format_message().split()).rstrip(".")
    return f"{message}; see '{command} --help'"
