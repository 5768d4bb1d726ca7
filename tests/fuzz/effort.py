"""How much the property tests try: little and always the same in the suite, more and new in `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_TIMES = int(os.environ.get("EPLB_FUZZ_EFFORT", "1"))


def effort(examples: int) -> settings:
    """Settings that try `examples`, or a multiple of them."""
    return settings(
        max_examples=examples * _TIMES,
        derandomize=_TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
