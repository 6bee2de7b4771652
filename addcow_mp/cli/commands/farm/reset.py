"""``addcow farm reset``: every overlay that no other one needs goes back to its backing file."""

from __future__ import annotations

from addcow_mp.cli.farm_job import FarmRunOptions
from addcow_mp.farm.image_job import JobSpec, Operation


def command(*, options: FarmRunOptions) -> None:
    """Let every overlay show its backing file again; what guests have written is lost.

    An overlay that another one stands on is refused, also with --force. Exit status: 0 all done, 1
    some image was refused or failed, 75 the time limit was reached.
    """
    spec = JobSpec(Operation.RESET, stops_at_error=options.on_error == "stop")
    options.run_spec(spec, options.workers.copy_options())
