"""A router of your own, compared with the shipped ones behind the same clocks.

A router is any class called with (fleet, slo) that has route() and update(); `phase` says which
of the two picks it makes. On a server, route() is called once per request.

Run: python examples/own_router.py
"""

import numpy as np

from voltana_ctrl import Decision, FleetSpec, FleetState, Request, Slo, compare


class FillThenSpill:
    """The fullest decode instance whose batch stays under a limit, else the emptiest."""

    phase = "decode"
    limit_req = 128.0  # decode batches run in tiles of this size

    def __init__(self, fleet: FleetSpec, slo: Slo) -> None:
        self.members = np.array(fleet.decode)
        self.able = np.ones(len(fleet), dtype=bool)

    def update(self, decision: Decision) -> None:
        self.able = decision.active

    def route(self, request: Request, state: FleetState) -> int:
        able = self.members[(self.able & state.alive)[self.members]]
        batch_req = state.running_req[able] + state.queue_req[able]
        below = np.flatnonzero(batch_req < self.limit_req)
        if below.size:
            return int(able[below[np.argmax(batch_req[below])]])
        return int(able[np.argmin(batch_req)])


def main() -> None:
    # Shipped routers follow a "+": static-max+two-choices. One of your own brings the highest
    # clocks with it.
    result = compare(
        fleet="2P3D",
        rates_req_s=[40.0],
        duration_s=20.0,
        warmup_s=5.0,
        policies=[
            f"{__name__}:FillThenSpill",
            "static-max+round-robin",
            "static-max+two-choices",
            "static-max+tokens-x-batch",
        ],
    )
    for run in result.runs:
        print(
            f"{run['policy']:26s} mean batch {run['mean_batch']:5.1f},"
            f" ITL p99 {run['itl_p99_s'] * 1e3:5.1f} ms, {run['mean_power_w']:5.0f} W  (simulated)"
        )


if __name__ == "__main__":
    main()
