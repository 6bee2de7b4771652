"""The options of the commands that move the data of one overlay, and how these commands run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from addcow_mp.cli.options import (
    CopyingOptions,
    JobChangeOptions,
    JobProgress,
    NoManifest,
    OptionGroup,
    OverlayFile,
    Printing,
    Verify,
    Workers,
)

if TYPE_CHECKING:
    from addcow_mp.device.access import Access
    from addcow_mp.jobs.options import Hooks, RunOptions
    from addcow_mp.jobs.report import Estimate, Report


class ImageJobOptions(OptionGroup):
    """The options of ``commit``, ``flatten`` and ``rebase``."""

    overlay: OverlayFile
    verify: Verify = False
    progress: JobProgress
    workers: Workers
    printing: Printing
    copying: CopyingOptions
    changing: JobChangeOptions
    no_manifest: NoManifest = False

    def run(self, job: Callable[..., Report], sentence: str) -> None:
        """Run ``job`` on the overlay, and print ``sentence`` or the report."""
        with self._working(self.changing.access_for(self.copying)) as (options, hooks):
            all_options = replace(options, manifests=not self.no_manifest)
            report = job(self.overlay.file, verifies=self.verify, options=all_options, hooks=hooks)
        self.printing.report(report, sentence)

    def plan(self, operation: str, estimate: Callable[..., Estimate | None]) -> None:
        """Call ``estimate``, and print what ``operation`` would do with the overlay."""
        from addcow_mp.cli.jsontext import print_document
        from addcow_mp.cli.planned import Planned

        access = self.changing.access_for(self.copying, writes=False)
        with self._working(access) as (options, hooks):
            found = estimate(self.overlay.file, options=options, hooks=hooks)
        planned = Planned(self.overlay.file, operation, found)
        if self.printing.as_json:
            print_document(planned.as_json())
        elif not self.printing.quiet:
            print(planned.line)

    def _working(self, access: Access) -> AbstractContextManager[tuple[RunOptions, Hooks]]:
        copy_options, quiet = self.copying.copy_options(), self.printing.quiet
        return self.workers.working(access, copy_options, self.progress, quiet=quiet)
