"""``python -m addcow_mp`` and the ``addcow`` command.

Kept free of imports on purpose: a spawned worker runs this module again under another
name, and must not load the command line for it.
"""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    # What is imported stays: looking for garbage among it takes a tenth of the start-up and
    # finds none. This many objects are made by the imports; later ones are looked at as ever.
    gc.set_threshold(50_000)
    from addcow_mp.cli.main import run

    status = run(sys.argv[1:])
    # Nor is there any at the end: the system takes the memory back faster.
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    main()
