"""``python -m addcow_mp`` and the ``addcow`` command.

Kept free of imports on purpose: a spawned worker runs this module again under another
name, and must not load the command line for it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from addcow_mp.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
