"""Commands about several files: one after the other, and the exit status of the worst.

With one file, a command prints what it has always printed, and its error ends it. With several, an
error is a line about its file and the others go on; their results as JSON are one list, in the
order of the files, in which an error is an object with ``error`` and ``exit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from addcow_mp.cli.messages import report_failure
from addcow_mp.cli.options import JobChangeOptions, Printing, ProgressOptions, Workers
from addcow_mp.errors import AddcowError, StoppedError, UsageError

if TYPE_CHECKING:
    from addcow_mp.farm.shared_search import SharedSearch
    from addcow_mp.jobs.options import RunOptions

T = TypeVar("T")

#: Errors that end the command: they are about no single file.
_ENDING = (StoppedError, UsageError)


class Result(NamedTuple, Generic[T]):
    """What the work on a file has returned, or the error that ended it."""

    value: T | None
    error: AddcowError | None = None


def results_of(files: Sequence[str], work: Callable[[str], T]) -> Iterator[Result[T]]:
    """The result of ``work`` on each file; the error of a single file is raised."""
    for file in files:
        try:
            result: Result[T] = Result(work(file))
        except AddcowError as error:
            if len(files) == 1 or isinstance(error, _ENDING):
                raise
            result = Result(None, error.without_traceback())
        yield result


def change_each(
    files: Sequence[str],
    work: Callable[[str, RunOptions, SharedSearch], T],
    changing: JobChangeOptions,
    *,
    quiet: bool,
    writes: bool = True,
) -> list[Result[T]]:
    """The result of a quick job on each file, in this process; a signal stops it between two."""
    from addcow_mp.farm.shared_search import SharedSearch

    access = changing.access(force=changing.force, writes=writes, exclude=changing.exclude)
    workers = Workers(jobs=0)
    copy_options = workers.copy_options()
    with workers.working(access, copy_options, ProgressOptions(), quiet=quiet) as (options, hooks):
        search = SharedSearch(files, access)

        def on_file(path: str) -> T:
            if hooks.stopping():
                raise StoppedError(path=path)
            return work(path, options, search)

        return list(results_of(files, on_file))


def print_results(
    results: Iterable[Result[T]],
    printing: Printing,
    *,
    is_list: bool,
    show: Callable[[T], None],
    describe: Callable[[T], object],
    status: Callable[[T], int] = lambda _: 0,
) -> int:
    """Print each result as it comes, or all of them as one document; returns the worst status.

    ``show`` prints a result as text and ``describe`` makes it JSON: a list of them if ``is_list``.
    """
    documents: list[object] = []
    statuses: list[int] = []
    for one in results:
        if one.value is None:
            code, document = _failed(one.error)
        else:
            code = status(one.value)
            document = describe(one.value) if printing.as_json else None
            if not printing.as_json:
                show(one.value)
        statuses.append(code)
        documents.append(document)
    if printing.as_json:
        from addcow_mp.cli.jsontext import print_document

        print_document(documents if is_list else documents[0])
    return statuses[0] if len(statuses) == 1 else _worst(statuses)


def _worst(statuses: list[int]) -> int:
    # The module of findings takes a twentieth of the time of `info`, which needs it here alone.
    from addcow_mp.findings import worst

    return worst(statuses)


def _failed(error: AddcowError | None) -> tuple[int, object]:
    """Print an error; returns its status, and itself as JSON."""
    from addcow_mp.cli.jsontext import failure_json

    assert error is not None  # noqa: S101 - there is a value or an error
    path = error.fields.get("path")
    return report_failure(str(error), error.exit_code), failure_json(
        str(error), error.exit_code, path
    )
