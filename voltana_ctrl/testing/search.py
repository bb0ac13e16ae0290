"""The search for an input that breaks a law, by Hypothesis where it is installed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from voltana_ctrl.errors import ConfigError

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky
except ImportError as error:
    raise ConfigError(
        "voltana_ctrl.testing: expected Hypothesis, which is not installed; install it with"
        " pip install 'voltana-ctrl[test]'"
    ) from error

__all__ = ["for_all", "st"]

# Once a law is seen broken, so long is spent on a simpler input that breaks it.
_SHRINK_S = 0.5


def for_all(strategy: Any, look: Callable[[Any], None], *, examples: int) -> None:
    """Look at `examples` drawn inputs; the same ones every time."""
    failures: list[AssertionError] = []
    give_up_s = math.inf

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: Any) -> None:
        nonlocal give_up_s
        # Before anything is drawn: most attempts at a simpler input end while it is.
        if time.monotonic() > give_up_s:
            raise _EnoughError
        drawn = data.draw(strategy)
        try:
            look(drawn)
        except AssertionError as failure:
            give_up_s = min(give_up_s, time.monotonic() + _SHRINK_S)
            failures.append(failure)
            raise

    try:
        run()
    except (Flaky, _EnoughError):
        # Broken, and not again on the same input: chance in the object under test. Or
        # simplifying took too long, and the last one is the simplest so far.
        if not failures:
            raise
        raise failures[-1] from None


class _EnoughError(BaseException):
    """Ends the search for a simpler input; no Exception, which the search would catch."""
