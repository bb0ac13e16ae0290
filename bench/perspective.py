"""The figure of the theory page: power of one awake instance, and of a few that share a load.

    python bench/perspective.py docs/figures/perspective.png

Left the least power of a decode instance against its load, with the facets that the plan has of it;
right that of four which share a load, for each whole number of awake ones, and the perspective
`a p(load / a)` at the best `a`, whole or not: the relaxation that the plan solves.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.control import TargetOptimiser
from voltana_ctrl.laws import length_moments
from voltana_ctrl.sim.workload import make_workload

PROFILE = "a100-sxm-80gb/llama-3.1-8b-2026-11"
COUNT, REST_W = 4, 20.0


def draw(path: Path) -> None:
    """Draw it."""
    fleet = FleetSpec.parse("1P1D", load_profile(PROFILE))
    load = make_workload("sharegpt", 30.0, 1000.0, 0)
    lengths = length_moments(load.prompt_tok, load.output_tok)
    optimiser = TargetOptimiser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    supply = optimiser.supplies(lengths)[1]
    one_req_s = np.linspace(0.01, 1.0, 200) * supply.most_req_s
    curve_w = optimiser.curve(fleet.instances[1], one_req_s, lengths).power_w
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.4), layout="constrained")
    left.plot(one_req_s, curve_w, color="0.6", linewidth=3.0, label="least power, closed form")
    facets = sorted(set(zip(supply.alpha_j_req, supply.beta_w, strict=True)))
    for k, (alpha, beta) in enumerate(facets):
        left.plot(one_req_s, alpha * one_req_s + beta, "C0--", linewidth=0.7,
                  label=None if k else f"{len(facets)} facets")  # fmt: skip
    left.plot([0.0], [REST_W], "ko", label="at rest (20 W, a what-if)")
    left.set(xlabel="load of one decode instance [req/s]", ylabel="power [W]",
             ylim=(0.0, 1.1 * np.nanmax(curve_w[np.isfinite(curve_w)])))  # fmt: skip
    left.legend(frameon=False, fontsize=8)

    loads = np.linspace(0.5, COUNT * supply.most_req_s, 300)

    def fleet_w(awake):
        shared = loads / awake
        power_w = awake * np.max(
            supply.alpha_j_req[:, None] * shared + supply.beta_w[:, None], axis=0
        ) + REST_W * (COUNT - awake)
        return np.where(shared <= supply.most_req_s, power_w, np.nan)

    for awake in range(1, COUNT + 1):
        right.plot(loads, fleet_w(awake), linewidth=1.0, label=f"{awake} awake")
    best_w = np.nanmin([fleet_w(awake) for awake in np.linspace(1.0, COUNT, 301)], axis=0)
    right.plot(loads, best_w, "k", linewidth=2.0, label="perspective, best count")
    right.set(xlabel="load of four that share it [req/s]", ylabel="power [W]")
    right.legend(frameon=False, fontsize=8)
    whole_w = np.nanmin([fleet_w(awake) for awake in range(1, COUNT + 1)], axis=0)
    print(f"whole counts cost up to {100.0 * np.max(whole_w / best_w - 1.0):.1f} % more, and"
          f" {100.0 * (whole_w.mean() / best_w.mean() - 1.0):.1f} % over all loads")  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
