"""Clock steps by queue and batch thresholds, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from voltana_ctrl.checks import fraction
from voltana_ctrl.control.base import CompiledGovernor
from voltana_ctrl.control.baselines.ecofreq import DEFAULT_LADDER_MHZ
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import InstanceSpec

__all__ = ["ThresholdGovernor"]


class ThresholdGovernor(CompiledGovernor):
    """One clock step up per threshold passed, and down once well below it.

    What an operating system's on-demand governor does with the load of a processor, done with
    prompt tokens waiting and requests running. It knows no latency and no target; thresholds
    are fractions of the engine's own limits that double from step to step, not tuned to any
    workload.

    Parameters
    ----------
    instance : InstanceSpec
        The instance whose clock it chooses.
    ladder_mhz : sequence of float
        Clocks, each raised to the next supported one.
    queue_frac : sequence of float, optional
        Prompt tokens waiting, over the tokens of one iteration (`prefill_budget_tok`), above
        which the next clock is taken; one fewer than clocks. By default the last is 1.
    batch_frac : sequence of float, optional
        Requests running, over `max_batch`, likewise. By default the last is 1/2.
    keep_frac : float
        Down when both are at most this times the threshold below (hysteresis).

    Raises
    ------
    ConfigError
        If thresholds do not ascend or are not one fewer than clocks.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> decode = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b")).instances[1]
    >>> governor = ThresholdGovernor(decode)
    >>> [governor.step(n, 400.0 * n, 0, 0.0, 210.0, 1410.0) for n in (60, 70, 60, 40, 600)]
    [1005.0, 1095.0, 1095.0, 1005.0, 1410.0]
    """

    def __init__(
        self,
        instance: InstanceSpec,
        *,
        ladder_mhz: Sequence[float] = DEFAULT_LADDER_MHZ,
        queue_frac: Sequence[float] | None = None,
        batch_frac: Sequence[float] | None = None,
        keep_frac: float = 0.75,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose.baselines import threshold

        rungs = instance.clock_rows(ladder_mhz)
        halves = 0.5 ** np.arange(len(rungs) - 2.0, -1.0, -1.0)
        queue = _ascending("queue_frac", halves if queue_frac is None else queue_frac, rungs)
        batch = _ascending("batch_frac", halves / 2 if batch_frac is None else batch_frac, rungs)
        fraction("ThresholdGovernor.keep_frac", keep_frac)
        super().__init__(
            instance,
            instance.profile,
            threshold,
            [
                len(rungs),
                keep_frac,
                *rungs,
                *(queue * instance.prefill_budget_tok),
                *(batch * instance.max_batch),
            ],
        )


def _ascending(name: str, values: Sequence[float] | np.ndarray, rungs: list[int]) -> np.ndarray:
    steps = np.asarray(values, dtype=np.float64)
    right = steps.shape == (len(rungs) - 1,) and np.all(np.diff(steps, prepend=0.0) > 0.0)
    if not right:
        raise ConfigError(
            f"ThresholdGovernor.{name}: expected {len(rungs) - 1} ascending numbers > 0, one"
            f" fewer than the {len(rungs)} clocks, got {values}"
        )
    return steps
