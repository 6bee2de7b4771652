"""``python -m addcow_mp`` and the ``addcow`` command.

A spawned worker runs this module again under another name. It imports nothing of the package at
the top, so that a worker does not load the command line.
"""

from __future__ import annotations

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    _prepare_process()
    # Imported objects live until the end: collecting garbage among them takes a tenth of the
    # start-up time and finds nothing. The imports make fewer objects than this.
    gc.set_threshold(50_000)
    from addcow_mp.cli.main import run

    status = run(sys.argv[1:])
    # The system frees the memory faster than a last collection would.
    gc.freeze()
    sys.exit(status)


def _prepare_process() -> None:
    """Open closed standard streams and set the signals that would act during the imports.

    A standard stream that the caller has closed is opened on /dev/null: otherwise an image could
    get descriptor 2, to which the interpreter writes its errors. Until a job can be stopped in
    order, Ctrl-C ends the process silently and SIGUSR1 is ignored.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            os.dup2(fd, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
            if fd != number:
                os.close(fd)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


if __name__ == "__main__":
    main()
