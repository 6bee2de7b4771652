"""Functions on a farm: all overlays in the given places, found by content.

A place is a directory, a file or a pattern; a single place need not be in a list. Names inside
images may also lead beneath the directories among the places. Every result lists the files that
cannot be examined, with the reason. An image that is refused or fails does not stop the others, and
no error is raised for it: the result holds its problem.

A farm job that ends early raises the error that ended it; its ``report`` is the result so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Unpack, get_args

from addcow_mp.api.arguments import (
    DEFAULTS,
    AnyPath,
    FarmChanging,
    FarmCopying,
    FarmReading,
    OnError,
    Planning,
    Working,
    allowed,
    check_number,
    new_backing,
    one_of,
    public,
    running,
    text,
    texts,
    working,
)
from addcow_mp.device.access import Access
from addcow_mp.errors import AddcowError, UsageError

if TYPE_CHECKING:
    from addcow_mp.farm.check import FarmReport
    from addcow_mp.farm.file_graph import FileGraph
    from addcow_mp.farm.manifest import FarmManifests
    from addcow_mp.farm.members import Members
    from addcow_mp.farm.result import FarmResult
    from addcow_mp.farm.scrub import Scrubbed
    from addcow_mp.farm.scrub_state import ScrubStatus
    from addcow_mp.farm.verify import FarmLayerReports
    from addcow_mp.jobs.options import Hooks
    from addcow_mp.jobs.rebase import NewBacking

Places = AnyPath | Iterable[AnyPath]
"""The places of a farm, or one place."""

Job = Literal["commit", "flatten", "reset"]


# Reading


def farm_ls(places: Places, *, access: Access | None = None) -> Members:
    """List every overlay: its backing file, its size, and how much of it is allocated."""
    from addcow_mp.farm.members import members as job

    return job(texts(places, "places"), allowed(access))


def farm_graph(places: Places, *, access: Access | None = None) -> FileGraph:
    """Say which file backs which, which files are missing, and which files no overlay names."""
    from addcow_mp.farm.file_graph import file_graph as job

    return job(texts(places, "places"), allowed(access))


@public
def farm_check(places: Places, **keywords: Unpack[Working]) -> FarmReport:
    """Check every overlay, and the farm as a whole; damage is reported, not raised.

    ``progress`` counts images; the number of all is an estimate until all files are examined.
    """
    from addcow_mp.farm.check import farm_check as job

    listed = texts(places, "places")
    with working(keywords) as (options, hooks):
        return job(listed, options, _counting_images(hooks))


@public
def farm_verify(places: Places, **keywords: Unpack[FarmReading]) -> FarmLayerReports:
    """Compare every layer with its manifest, each once; differences are reported, not raised.

    ``counted`` counts layers.
    """
    from addcow_mp.farm.verify import farm_verify as job

    listed = texts(places, "places")
    with working(keywords) as (options, hooks):
        return job(listed, options, hooks)


@public
def farm_manifest_create(
    places: Places, *, replace: bool = False, **keywords: Unpack[Working]
) -> FarmManifests:
    """Write a manifest beside each layer without one, of every overlay; a shared base once.

    ``replace``: existing manifests that do not match are replaced. ``progress`` counts images.
    """
    from addcow_mp.farm.manifest import farm_manifest as job

    listed = texts(places, "places")
    with working(keywords) as (options, hooks):
        return job(listed, options, _counting_images(hooks), replaces=replace)


def _counting_images(hooks: Hooks) -> Hooks:
    """Hooks whose ``progress`` counts images, since the bytes of the job are not known before."""
    from addcow_mp.engine.transfer_run import no_progress

    return replace(hooks, progress=no_progress, counted=hooks.progress)


# Changing


@public
def farm_plan(
    places: Places, operation: Job, *, discard: bool = False, **keywords: Unpack[Planning]
) -> FarmResult:
    """Say what a job on every overlay would do: its order, the space needed, what is refused.

    Nothing is changed. ``discard``: plan a flatten that removes the ``.add-cow`` files.
    """
    one_of("operation", operation, get_args(Job))
    if discard and operation != "flatten":
        raise UsageError(message="discard is for flatten")
    return _farm_job(places, operation, keywords, discard=discard, is_dry_run=True)


@public
def farm_commit(
    places: Places,
    *,
    verify: bool = False,
    **keywords: Unpack[FarmCopying],
) -> FarmResult:
    """Commit every overlay into its backing file, the deepest chains first.

    ``verify`` reads each image back. ``progress`` counts bytes and ``counted`` images. The same
    call again does only what is left.
    """
    return _farm_job(places, "commit", keywords, verify=verify)


@public
def farm_flatten(
    places: Places,
    *,
    discard: bool = False,
    verify: bool = False,
    **keywords: Unpack[FarmCopying],
) -> FarmResult:
    """Copy the missing clusters of every overlay into its image file, the deepest chains first.

    ``discard`` then removes the ``.add-cow`` files. ``verify`` reads each image back. ``progress``
    counts bytes and ``counted`` images. The same call again does only what is left.
    """
    return _farm_job(places, "flatten", keywords, discard=discard, verify=verify)


@public
def farm_rebase(
    places: Places,
    backing: AnyPath | None,
    *,
    backing_format: str | None = None,
    base: AnyPath | None = None,
    unsafe: bool = False,
    trust_manifests: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    **keywords: Unpack[FarmCopying],
) -> FarmResult:
    """Give every overlay of a base another backing file; the guests see the same disks.

    ``backing``: the path of the new backing file; None = none. A relative path begins in the
    working directory. The new backing file and the files below it are left out. ``base``: the old
    backing file of the overlays; None = all overlays have the same one, otherwise
    :class:`UsageError` is raised. ``dry_run``: only say what would be done. The other arguments are
    those of ``rebase``. ``progress`` counts bytes and ``counted`` images. The same call again does
    only what is left.
    """
    new = new_backing(
        backing, backing_format, unsafe=unsafe, trust_manifests=trust_manifests, by_path=True
    )
    old = None if base is None else text(base, "base")
    return _farm_job(
        places,
        "rebase",
        keywords,
        verify=verify,
        backing=new,
        base=old,
        is_dry_run=dry_run,
    )


@public
def farm_reset(places: Places, **keywords: Unpack[FarmChanging]) -> FarmResult:
    """Let every overlay show its backing file again; what guests have written is lost.

    An overlay on which another one stands is refused. ``counted`` counts images. The same call
    again does only what is left.
    """
    return _farm_job(places, "reset", keywords)


def _farm_job(
    places: Places,
    operation: str,
    keywords: Mapping[str, object],
    *,
    discard: bool = False,
    verify: bool = False,
    backing: NewBacking | None = None,
    base: str | None = None,
    is_dry_run: bool = False,
) -> FarmResult:
    from addcow_mp.engine.stop_flag import never
    from addcow_mp.farm.farm_job import FarmJob, run_farm_job
    from addcow_mp.farm.image_job import JobSpec, Operation
    from addcow_mp.jobs.options import limited

    listed = texts(places, "places")
    on_error = keywords.get("on_error", DEFAULTS["on_error"])
    one_of("on_error", on_error, get_args(OnError))
    stops = on_error == "stop"
    spec = JobSpec(Operation(operation), discard, verify, stops, backing, base)
    with running(keywords) as run:
        job = FarmJob(spec, is_dry_run, run.is_late)
        # A job finishes its plan, since the result says what is left. A dry run ends at the limit.
        with limited(run.hooks, run.is_late if is_dry_run else never) as hooks:
            result = run_farm_job(listed, job, run.options, hooks, run.log)
    _raise_problem(result.problem, result)
    return result


def _raise_problem(problem: AddcowError | None, result: object) -> None:
    """Raise the error that ended a job early; its report is the ``result`` so far."""
    if problem is not None:
        problem.report = result
        raise problem


# Scrubbing


@public
def farm_scrub_run(
    places: Places,
    state: AnyPath,
    *,
    sample: float | None = None,
    **keywords: Unpack[FarmReading],
) -> Scrubbed:
    """Compare layers with their manifests, the least recently verified layer first.

    ``state``: an SQLite database with the results; the next call continues from it. ``sample``: the
    share of each layer that is read at random, above 0 and up to 1; None = the whole layer.
    ``progress`` counts bytes and ``counted`` layers. After a stop or at the time limit
    :class:`StoppedError` or :class:`TimeLimitError` is raised. If a layer differs, it is not
    raised, and is ``problem`` of the result.
    """
    from addcow_mp.farm.scrub import scrub as job

    listed, state = texts(places, "places"), text(state, "state")
    check_number("sample", sample, (int, float))
    if sample is not None and not 0 < sample <= 1:
        raise UsageError(message=f"invalid sample {sample}: give a share above 0, up to 1")
    with running(keywords) as run:
        result = job(listed, state, run.options, run.hooks, share=sample, is_late=run.is_late)
    if result.is_problem_worst:
        _raise_problem(result.problem, result)
    return result


def farm_scrub_status(state: AnyPath, *, locking: bool = True) -> ScrubStatus:
    """Say which layers were verified, when, and with which result; also during a run."""
    from addcow_mp.farm.scrub_state import read

    return read(text(state, "state"), locking=locking)
