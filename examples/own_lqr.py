"""A linear-quadratic regulator of your own: the model from here, the gain from python-control.

The prefill queue is an integrator: tokens that arrive fill it, those that are served drain it.
The regulator says how many tokens a second to serve, and the profile at which clock.

Run: pip install '.[theory]' && python examples/own_lqr.py
"""

import numpy as np

from voltana_ctrl import Decision, FleetSpec, Observation, Slo, compare
from voltana_ctrl.control.model import prefill_model


class PrefillLqr:
    """Prefill clocks by state feedback on the queue; decode at a fixed clock."""

    period_s = 0.1
    # A thousand tokens that wait weigh as much as ten thousand tokens a second of service.
    queue_weight, service_weight = 1e-6, 1e-8

    def __init__(self, fleet: FleetSpec, slo: Slo) -> None:
        import control

        system = prefill_model(self.period_s).to_control()
        gain, _, _ = control.dlqr(
            system.A, system.B[:, :1], [[self.queue_weight]], [[self.service_weight]]
        )
        self.fleet = fleet
        self.served_per_queued = abs(float(gain[0, 0]))

    def init(self) -> np.ndarray:
        return np.zeros(len(self.fleet))

    def decide(
        self, observation: Observation, arriving_tok_s: np.ndarray
    ) -> tuple[Decision, np.ndarray]:
        state = observation.state
        arrived_tok_s = np.asarray(state.arrived_tok) / self.period_s
        arriving_tok_s = 0.95 * arriving_tok_s + 0.05 * arrived_tok_s
        clocks_mhz = self.fleet.max_mhz * 0.8
        for i in self.fleet.prefill:
            serve_tok_s = arriving_tok_s[i] + self.served_per_queued * state.queue_tok[i]
            table = self.fleet.instances[i].table
            fast = np.flatnonzero(1.0 / table["prefill_tok_s"] >= serve_tok_s)
            clocks_mhz[i] = table["clock_mhz"][fast[0] if len(fast) else -1]
        decision = Decision.highest(
            self.fleet, t_s=state.t_s, floor_mhz=clocks_mhz, ceiling_mhz=self.fleet.max_mhz
        )
        return decision, arriving_tok_s


def main() -> None:
    try:
        import control  # noqa: F401
    except ImportError:
        print("python-control is not installed; pip install 'voltana-ctrl[theory]'")
        return
    result = compare(
        rates_req_s=[20.0],
        duration_s=30.0,
        warmup_s=10.0,
        policies=["static-max", f"{__name__}:PrefillLqr", "bound"],
    )
    for run in result.runs:
        met = run["ttft_attainment"], run["itl_attainment"]
        told = "" if None in met else f"  TTFT met by {met[0]:.1%}, ITL by {met[1]:.1%}"
        print(f"{run['policy']:22s} {run['mean_power_w']:5.0f} W  (simulated){told}")


if __name__ == "__main__":
    main()
