"""Selects the overlays of a farm that get another backing file, and compares both bases once.

All overlays of a base get its new version. The differences are the same for all of them, so both
bases are compared once, in units of the smallest cluster size. The bases stay open and locked until
the last overlay is done, so that no program changes what was compared. The new base is synced once.

The new base and the files below it are left out, even if they stand on the old base.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

from addcow_mp.device.chain import sync_chain
from addcow_mp.device.discovery import Identity, Named, named_by
from addcow_mp.device.files import identity_at
from addcow_mp.device.headers import MAX_DEPTH
from addcow_mp.errors import AddcowError, ImageError, StoppedError, UsageError
from addcow_mp.farm.image_job import JobSpec
from addcow_mp.format.header import MIN_CLUSTER_BITS
from addcow_mp.jobs.naming import plain
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.rebase import Bases, NewBacking, open_bases, refuse_nothing_to_verify

#: The most bases that a message names.
MOST_NAMED = 3

Base = tuple[Identity | str, str | None]
"""The backing file of an overlay, by inode, or by resolved name if it is missing; its format."""


class Rebasing:
    """The overlays in ``farm`` that the rebase of ``spec`` changes, and the open bases.

    :meth:`close` closes the bases. Raises :class:`AddcowError`.
    """

    def __init__(self, farm: list[Named], spec: JobSpec, options: RunOptions, hooks: Hooks) -> None:
        assert spec.backing is not None  # noqa: S101 - the spec of a rebase
        self._spec = spec
        self._backing = spec.backing
        self._opened = ExitStack()
        self._bases: Bases | None = None
        #: The old base that was compared. A job on an overlay of another base compares by itself.
        self._base: Base | None = None
        if spec.verifies:
            refuse_nothing_to_verify(self._backing)
        _refuse_missing(self._backing)
        self.overlays = _overlays_of(farm, spec.base, self._backing)
        try:
            self._compare(options, hooks)
        except BaseException:
            self.close()
            raise

    def spec_for(self, named: Named) -> JobSpec:
        """The job for an overlay; it holds the differences if the bases were compared for it."""
        is_known = self._base is not None and _base_of(named) == self._base
        return self._spec if is_known else replace(self._spec, backing=self._backing)

    def make_durable(self) -> None:
        """Sync the new base and its chain, before the first overlay relies on them."""
        if self._bases is not None and self._bases.new is not None:
            sync_chain(self._bases.new)

    def close(self) -> None:
        """Close the bases."""
        self._opened.close()

    def _compare(self, options: RunOptions, hooks: Hooks) -> None:
        backing = self._backing
        if backing.unsafe or not backing.name:
            return
        new = identity_at(backing.name)
        for named in self.overlays:
            needs_old = not named.all_allocated and named.backing != new
            bases = self._open(named, options) if needs_old else None
            if bases is not None:
                known = bases.differences(backing, options, hooks, 1 << MIN_CLUSTER_BITS)
                self._bases, self._base = bases, _base_of(named)
                known_backing = replace(backing, known=known, is_durable=True)
                self._spec = replace(self._spec, backing=known_backing)
                return

    def _open(self, named: Named, options: RunOptions) -> Bases | None:
        """The bases of an overlay; None when it cannot be opened, which its own job reports."""
        try:
            return self._opened.enter_context(open_bases(named.path, self._backing, options.access))
        except StoppedError:
            raise
        except AddcowError:
            return None


def _overlays_of(farm: list[Named], base: str | None, backing: NewBacking) -> list[Named]:
    """The overlays that stand on ``base``; None = on the only base of the farm.

    Raises :class:`UsageError` if ``base`` is None and the overlays have several bases.
    """
    new = _chain_of(backing.name) if backing.name else set()
    others = [one for one in farm if one.identity not in new]
    # A damaged overlay may stand on the base: its own job refuses it.
    damaged = [one for one in others if one.image_name is None]
    found = [one for one in others if one.backing_name is not None and one.image_name is not None]
    target = identity_at(backing.name) if backing.name else None
    if base is None:
        _refuse_several({key: one for one in found if (key := _base_of(one)[0]) != target})
        return [*found, *damaged]
    old = identity_at(base) or plain(os.path.abspath(base))
    _refuse_unknown(base, old, found)
    # Overlays that an earlier run has moved are kept: they count as "nothing to do".
    return [one for one in found if _base_of(one)[0] in (old, target)] + damaged


def _refuse_unknown(base: str, old: Identity | str, found: list[Named]) -> None:
    """Raise :class:`ImageError` for a base that does not exist, and that no overlay names."""
    if isinstance(old, str) and all(_base_of(one)[0] != old for one in found):
        problem = "it does not exist, and no overlay in these places stands on it"
        raise ImageError(path=base, problem=problem)


def _refuse_missing(backing: NewBacking) -> None:
    """Raise :class:`ImageError` for a new base that does not exist, unless only names change."""
    if backing.name and not backing.unsafe and identity_at(backing.name) is None:
        raise ImageError(path=backing.name, problem="it does not exist; name the new backing file")


def _refuse_several(bases: dict[Identity | str, Named]) -> None:
    """Raise :class:`UsageError` for more than one of ``bases``, each with one of its overlays."""
    if len(bases) <= 1:
        return
    names = sorted(str(one.backing_path) for one in bases.values())
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    listed = ", ".join(names[:MOST_NAMED])
    raise UsageError(
        message=f"the overlays have {len(names)} backing files ({listed}{more}); "
        "choose one with --from"
    )


def _base_of(named: Named) -> Base:
    if named.backing is not None:
        return named.backing, named.backing_format
    with suppress(OSError, ValueError):
        return plain(named.backing_path or ""), named.backing_format
    return named.backing_path or "", named.backing_format


def _chain_of(path: str) -> set[Identity]:
    """The identities of the files of the chain of ``path`` that can be examined."""
    return {identity for one in _files_below(path) if (identity := identity_at(one)) is not None}


def _files_below(path: str) -> Iterator[str]:
    below: str | None = path
    for _ in range(MAX_DEPTH + 1):
        if below is None:
            return
        yield below
        named = named_by(below)
        below = None if named is None else named.backing_path
