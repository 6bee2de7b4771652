"""Arguments that the public functions share: paths, and the keywords of jobs.

The keywords come in groups (:class:`Stoppable` and those that extend it). A function that takes
``**keywords: Unpack[Copying]`` accepts each keyword of that group: a type checker knows them, and
:func:`public` makes the function refuse all others and show these in its signature.
:data:`DEFAULTS` holds their default values. :func:`working` turns them into the settings and hooks
of a job.

An exception in a function of the caller stops the job like ``stopping``, and is raised when the job
has ended.

The keywords are:

``progress``
    Called from time to time with the number of bytes done and the number of all bytes.
``counted``
    Called after ``progress`` with the number of images (or layers) done and the number of all.
``stopping``
    Called again and again, perhaps by other threads of this process. Once it returns true, no more
    work begins, finished work is published, and the call raises :class:`StoppedError`.
``time_limit``
    Seconds after which the job stops in the same way, with :class:`TimeLimitError`; None = no
    limit.
``note``
    Called with a line of text that says what the job waits for.
``log``
    Called with each event: the plan, the start of a step, the result of an image, the final result.
``on_error``
    ``skip``: if an image is refused or fails, the job continues with the others. ``stop``: no
    further image begins.
``jobs``
    The number of worker processes: None = one for each usable processor, 0 = none: the calling
    process does the work.
``idle``
    Use the disk only when no other program does, where the system can.
``rate``
    Bytes per second for all processes together; None or 0 = no limit.
``copy``
    The only method of copying: ``clone``, ``range``, ``buffer`` or ``map``. ``auto``: the job
    chooses.
``direct``
    Copy without the page cache.
``sparse``
    Aligned blocks of this many zero bytes become holes; 0 = do not look for zeros, None = the
    default of the command.
``manifest``
    Make new manifests for those that the job removes, where it knows the new content.
``access``
    Says which files may be opened and how; None = only files beneath the directory of the image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar, cast, get_args

from addcow_mp.device.access import Access
from addcow_mp.errors import StoppedError, UsageError
from addcow_mp.format.header import ADD_COW, RAW

if TYPE_CHECKING:
    from addcow_mp.device.copying import CopyOptions
    from addcow_mp.farm.farm_job import Event
    from addcow_mp.jobs.options import Hooks, RunOptions
    from addcow_mp.jobs.rebase import NewBacking

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""The name of a file, in every form that Python accepts."""

CopyChoice = Literal["auto", "clone", "range", "buffer", "map"]
OnError = Literal["skip", "stop"]

F = TypeVar("F", bound=Callable[..., Any])


# Keywords


class Stoppable(TypedDict, total=False):
    """The keywords of calls that may take long."""

    access: Access | None
    stopping: Callable[[], bool] | None
    time_limit: float | None
    note: Callable[[str], None] | None


class Planning(Stoppable, total=False):
    """Those of calls that use worker processes."""

    jobs: int | None
    idle: bool


class Working(Planning, total=False):
    """Those of calls with progress."""

    progress: Callable[[int, int], None] | None


class Reading(Working, total=False):
    """Those of calls that read at a limited rate."""

    rate: int | None


class Copying(Reading, total=False):
    """Those of calls that copy."""

    copy: CopyChoice
    direct: bool
    sparse: int | None


class _Following(TypedDict, total=False):
    manifest: bool


class Changing(Copying, _Following, total=False):
    """Those of calls that copy into an image."""


class _Counting(TypedDict, total=False):
    counted: Callable[[int, int], None] | None


class FarmReading(Reading, _Counting, total=False):
    """Those of calls that read all images of a farm."""


class _FarmJob(_Counting, _Following, total=False):
    on_error: OnError
    log: Callable[[Event], None] | None


class FarmChanging(Working, _FarmJob, total=False):
    """Those of calls that change all images of a farm."""


class FarmCopying(Copying, _FarmJob, total=False):
    """Those of calls that copy in all images of a farm."""


#: The default value of each keyword, in the order in which signatures show them.
DEFAULTS: FarmCopying = {
    "progress": None,
    "counted": None,
    "stopping": None,
    "time_limit": None,
    "note": None,
    "log": None,
    "on_error": "skip",
    "jobs": None,
    "idle": False,
    "rate": None,
    "copy": "auto",
    "direct": False,
    "sparse": None,
    "manifest": True,
    "access": None,
}


def public(function: F) -> F:
    """Return ``function`` with the keywords of its group in its signature; others are refused."""
    group = globals()[function.__annotations__["keywords"].removeprefix("Unpack[")[:-1]]
    hints = group.__annotations__
    own = [one for name, one in signature(function).parameters.items() if name != "keywords"]
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=_as_text(hints[name]))
        for name, default in DEFAULTS.items()
        if name in hints
    ]
    names = {one.name for one in (*own, *shared)}

    @wraps(function)
    def call(*values: object, **keywords: object) -> object:
        for name in keywords.keys() - names:
            problem = f"{function.__name__}() got an unexpected keyword argument '{name}'"
            raise TypeError(problem)
        return function(*values, **keywords)

    described = signature(function).replace(parameters=[*own, *shared])
    call.__signature__ = described  # type: ignore[attr-defined]
    return cast("F", call)


def _as_text(hint: Any) -> str:
    text: str = hint.__forward_arg__
    return text


# What a call does with them


class Run(NamedTuple):
    """The settings and hooks of a call; ``is_late``: whether its time limit is over.

    ``log``: called with the events of a farm job.
    """

    options: RunOptions
    hooks: Hooks
    is_late: Callable[[], bool]
    log: Callable[[Event], None]


@contextmanager
def running(given: Mapping[str, object], *, usual: int = 0) -> Iterator[Run]:
    """Run a block with the settings from the keywords ``given``. The time limit begins now.

    ``usual``: the default of ``sparse``, in bytes. Raises :class:`TypeError` or
    :class:`UsageError` for an invalid keyword, and at the end what a function of the caller raised.
    """
    from addcow_mp.engine.throttle import idle_priority
    from addcow_mp.jobs.options import RunOptions, late_after

    found = cast("FarmCopying", {**DEFAULTS, **given})
    limit = found["time_limit"]
    check_number("time_limit", limit, (int, float))
    is_late = late_after(limit)
    check_number("jobs", found["jobs"])
    access, copy_options = allowed(found["access"]), _copy_options(found, usual)
    options = RunOptions(found["jobs"], access, copy_options, manifests=found["manifest"])
    calls = _Calls(found)
    run = Run(options, calls.hooks(), is_late, calls.function("log"))
    with idle_priority(wanted=found["idle"]):
        try:
            yield run
        except StoppedError:
            if calls.error is None:
                raise
    if calls.error is not None:
        raise calls.error


@contextmanager
def working(given: Mapping[str, object], *, usual: int = 0) -> Iterator[tuple[RunOptions, Hooks]]:
    """The same as :func:`running`, with hooks that also stop the job at its time limit."""
    from addcow_mp.jobs.options import limited

    with running(given, usual=usual) as run, limited(run.hooks, run.is_late) as hooks:
        yield run.options, hooks


class _Calls:
    """The functions of the caller among the keywords ``found``.

    An exception in one of them is kept as ``error`` and stops the job. If it left the function, a
    task would report it as its own failure, and finished work would not be published.
    """

    def __init__(self, found: FarmCopying) -> None:
        self._found = cast("Mapping[str, Any]", found)
        self._is_stopped = False
        self.error: Exception | None = None

    def hooks(self) -> Hooks:
        """The hooks of a job."""
        from addcow_mp.jobs.options import Hooks

        progress, counted = self.function("progress"), self.function("counted")
        return Hooks(progress, self._stopping(), counted, self.function("note"))

    def function(self, name: str) -> Callable[..., Any]:
        """The function given as ``name``, or one that does nothing."""
        function = self._found[name]
        if function is None:
            return lambda *_: None
        if not callable(function):
            raise TypeError(f"{name}: give a function or None, not {type(function).__name__}")

        def call(*values: object) -> object:
            try:
                return None if self.error is not None else function(*values)
            except Exception as error:
                self.error = error
                return None

        return call

    def _stopping(self) -> Callable[[], bool]:
        """A function that says whether the job must stop. Once true, it stays true."""
        asked = self.function("stopping")

        def stopping() -> bool:
            self._is_stopped = self._is_stopped or bool(asked()) or self.error is not None
            return self._is_stopped

        return stopping


def _copy_options(found: FarmCopying, usual: int) -> CopyOptions:
    from addcow_mp.device.copying import CopyOptions

    copy, sparse, rate = found["copy"], found["sparse"], found["rate"]
    one_of("copy", copy, get_args(CopyChoice))
    check_number("rate", rate)
    check_number("sparse", sparse)
    return CopyOptions.chosen(copy, sparse, direct=found["direct"], rate=rate or 0, usual=usual)


# Single arguments


def text(path: AnyPath, argument: str) -> str:
    """Return the path as text. Raises :class:`TypeError`, which names the ``argument``."""
    try:
        return os.fsdecode(path)
    except TypeError:
        wanted = "give a str, bytes or os.PathLike"
        raise TypeError(f"{argument}: {wanted}, not {type(path).__name__}") from None


def texts(places: AnyPath | Iterable[AnyPath], argument: str) -> list[str]:
    """Return one path, or several, as text. Raises :class:`UsageError` for an empty list."""
    if isinstance(places, str | bytes | os.PathLike) or not isinstance(places, Iterable):
        return [text(places, argument)]
    listed = [text(one, argument) for one in places]
    if not listed:
        raise UsageError(message=f"{argument}: name at least one directory or file")
    return listed


def allowed(access: Access | None) -> Access:
    """Return ``access`` with its roots and patterns as text. Raises :class:`TypeError`."""
    access = Access() if access is None else access
    if isinstance(access.roots, str | bytes | os.PathLike):
        raise TypeError("roots: give a sequence of directories, not one name")
    patterns: object = access.exclude
    if isinstance(patterns, str | bytes):
        raise TypeError("exclude: give a sequence of patterns, not one pattern")
    return access._replace(
        roots=tuple(text(root, "roots") for root in access.roots),
        exclude=tuple(text(pattern, "exclude") for pattern in access.exclude),
    )


def one_of(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raise :class:`UsageError` unless ``value`` is one of the ``choices``."""
    known = list(choices)
    if value not in known:
        raise UsageError(message=f"invalid {argument} {value!r}: give {' or '.join(known)}")


def check_format(argument: str, value: object) -> None:
    """Raise :class:`UsageError` unless ``value`` is ``add-cow`` or ``raw``."""
    one_of(argument, value, (ADD_COW, RAW))


def new_backing(
    backing: AnyPath | None,
    format_: str | None,
    *,
    unsafe: bool,
    trust_manifests: bool,
    by_path: bool = False,
) -> NewBacking:
    """Return the new backing file of a rebase; ``backing`` None = none.

    ``by_path``: a relative name begins in the working directory. Raises :class:`UsageError`.
    """
    from addcow_mp.jobs.rebase import NewBacking

    name = "" if backing is None else text(backing, "backing")
    if backing is not None and not name:
        raise UsageError(message="backing: '' names no file; None is for no backing file")
    if format_ is not None:
        check_format("backing_format", format_)
    return NewBacking(name, format_, by_path, unsafe, trust_manifests)


def check_number(
    argument: str, value: object, kinds: tuple[type, ...] = (int,), least: int = 0
) -> None:
    """Accept None, or a number of one of the ``kinds`` that is not below ``least``.

    Raises :class:`TypeError` for another type, :class:`UsageError` for a smaller number.
    """
    if value is None:
        return
    if not isinstance(value, kinds):
        raise TypeError(f"{argument}: give a number or None, not {type(value).__name__}")
    if not value >= least:  # type: ignore[operator]
        raise UsageError(message=f"invalid {argument} {value}: give {least} or more, or None")
