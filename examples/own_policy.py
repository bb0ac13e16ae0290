"""A control policy of your own, next to the shipped ones.

A policy is any class called with (fleet, slo) that has init() and decide(). What it remembers is
passed in and out, so that a run can be replayed. The same object runs on hardware.

Run: python examples/own_policy.py
"""

import numpy as np

from voltana_ctrl import Decision, FleetSpec, Observation, Slo, compare


class FollowTheBatch:
    """Decode clocks in proportion to the smoothed batch; prefill at a fixed clock."""

    period_s = 0.25
    full_batch_req = 300.0  # the batch that needs the highest clock

    def __init__(self, fleet: FleetSpec, slo: Slo) -> None:
        self.fleet = fleet
        self.slo = slo

    def init(self) -> np.ndarray:
        return np.zeros(len(self.fleet))

    def decide(
        self, observation: Observation, smooth_req: np.ndarray
    ) -> tuple[Decision, np.ndarray]:
        state = observation.state
        # Up at once, down slowly.
        smooth_req = np.maximum(state.running_req, 0.9 * smooth_req + 0.1 * state.running_req)
        need_frac = np.minimum(1.0, 0.3 + 0.7 * smooth_req / self.full_batch_req)
        need_frac[self.fleet.prefill] = 0.8
        clocks_mhz = need_frac * self.fleet.max_mhz
        # The guard rounds up to supported clocks; equal shares, everybody active.
        decision = Decision.highest(
            self.fleet, t_s=state.t_s, floor_mhz=clocks_mhz, ceiling_mhz=self.fleet.max_mhz
        )
        return decision, smooth_req


def main() -> None:
    # On the command line: voltana-ctrl compare --policies static-max,own_policy:FollowTheBatch
    result = compare(
        rates_req_s=[30.0],
        duration_s=30.0,
        warmup_s=10.0,
        policies=["static-max", f"{__name__}:FollowTheBatch", "dualscale"],
    )
    for run in result.runs:
        print(
            f"{run['policy']:28s} {run['mean_power_w']:5.0f} W,"
            f" TTFT met {run['ttft_attainment']:.1%},"
            f" ITL met {run['itl_attainment']:.1%}  (simulated)"
        )


if __name__ == "__main__":
    main()
