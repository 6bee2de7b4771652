"""``python -m addcow_mp`` and the ``addcow`` command.

Kept free of imports on purpose: a spawned worker runs this module again under another
name, and must not load the command line for it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    _settle()
    # What is imported stays: looking for garbage among it takes a tenth of the start-up and
    # finds none. This many objects are made by the imports; later ones are looked at as ever.
    gc.set_threshold(50_000)
    from addcow_mp.cli.main import run

    status = run(sys.argv[1:])
    # Nor is there any at the end: the system takes the memory back faster.
    gc.freeze()
    sys.exit(status)


def _settle() -> None:
    """Make of the process what the imports that follow can rely on.

    Streams that the caller has closed lead nowhere: an image must not be opened as number 2,
    into which the system writes its complaints. Until a job can be stopped in good order,
    Ctrl-C ends the process without a word, and a question about progress has no answer yet.
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
