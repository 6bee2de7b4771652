"""Functions that say what a job on one image would do, like ``--dry-run`` of the commands.

Each returns the bytes to move and the space that they need, or None when there is nothing to do. It
raises the error with which the job would be refused. Nothing is changed. ``farm_plan`` does this
for a farm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from addcow_mp.api.arguments import AnyPath, Working, allowed, new_backing, public, text, working
from addcow_mp.device.access import Access

if TYPE_CHECKING:
    from addcow_mp.jobs.options import RunOptions
    from addcow_mp.jobs.report import Estimate


def commit_estimate(
    path: AnyPath, *, keep: bool = False, base: AnyPath | None = None, access: Access | None = None
) -> Estimate | None:
    """Say what ``commit`` with these arguments would do."""
    path, options = text(path, "path"), _options(access)
    if base is not None:
        from addcow_mp.jobs.commit_base import estimate as job_into

        return job_into(path, text(base, "base"), options)
    from addcow_mp.jobs.commit import estimate as job

    return job(path, options, keep=keep)


def flatten_estimate(
    path: AnyPath, *, discard: bool = False, access: Access | None = None
) -> Estimate | None:
    """Say what ``flatten`` with these arguments would do."""
    from addcow_mp.jobs.flatten import estimate as job

    return job(text(path, "path"), _options(access), discard=discard)


@public
def rebase_estimate(
    path: AnyPath,
    backing: AnyPath | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    trust_manifests: bool = False,
    **keywords: Unpack[Working],
) -> Estimate | None:
    """Say what ``rebase`` with these arguments would do; both backing files are compared."""
    from addcow_mp.jobs.rebase import compared_estimate as job

    path = text(path, "path")
    new = new_backing(backing, backing_format, unsafe=unsafe, trust_manifests=trust_manifests)
    with working(keywords) as (options, hooks):
        return job(path, new, options, hooks)


def reset_estimate(path: AnyPath, *, access: Access | None = None) -> Estimate | None:
    """Say what ``reset`` would do; ``space.freed``: the bytes that it frees."""
    from addcow_mp.jobs.reset import estimate as job

    return job(text(path, "path"), _options(access))


def _options(access: Access | None) -> RunOptions:
    from addcow_mp.jobs.options import RunOptions

    return RunOptions(0, allowed(access))
