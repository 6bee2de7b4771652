"""The options of the commands that change one overlay, and their one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from addcow_mp.cli.options import (
    CopyingOptions,
    JobChangeOptions,
    JobProgress,
    OptionGroup,
    OverlayFile,
    Printing,
    Verify,
    Workers,
)

if TYPE_CHECKING:
    from addcow_mp.jobs.report import Report


class ImageJobOptions(OptionGroup):
    """The options of ``commit`` and ``flatten``."""

    overlay: OverlayFile
    verify: Verify = False
    progress: JobProgress
    workers: Workers
    printing: Printing
    copying: CopyingOptions
    changing: JobChangeOptions

    def run(self, job: Callable[..., Report], sentence: str) -> None:
        """Run ``job`` on the overlay, and print ``sentence`` or the report."""
        access, copy_options = self.changing.access_for(self.copying), self.copying.copy_options()
        quiet = self.printing.quiet
        with self.workers.working(access, copy_options, self.progress, quiet=quiet) as (
            options,
            hooks,
        ):
            report = job(self.overlay.file, verifies=self.verify, options=options, hooks=hooks)
        self.printing.report(report, sentence)
