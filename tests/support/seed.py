"""The seed of all random tests of a run: the environment gives it, or chance does.

The processes of a run share it, and a run with failures shows it at its end.
"""

import os
import random

SEED = os.environ.setdefault("ADDCOW_SEED", str(random.SystemRandom().randrange(10**9)))


def random_for(*words: object) -> random.Random:
    """Return random numbers that only the seed and these words decide."""
    return random.Random(" ".join(map(str, (SEED, *words))))
