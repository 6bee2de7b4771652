"""How many examples a property is tried with.

`make test` tries a tenth of them (the profile "quick", which conftest loads); `make test-all`
tries all. Both try the same examples every time. ADDCOW_SEARCH=N draws N times as many new ones,
and a failure prints the line that brings its example back.
"""

import os

from hypothesis import HealthCheck, settings

SEARCH = int(os.environ.get("ADDCOW_SEARCH", "0"))


def tried(count: int) -> settings:
    """Return the settings of a property that a full run tries with `count` examples."""
    if settings.get_current_profile_name() == "quick":
        count = max(5, count // 10)
    return settings(
        max_examples=count * max(1, SEARCH),
        deadline=None,
        print_blob=True,
        derandomize=not SEARCH,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
