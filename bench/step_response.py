"""Step responses of the theory page: a load that steps, decode slower than believed.

    python bench/step_response.py docs/figures/steps.png

Left 20 req/s, 60 for two minutes, and 20 again; right 40 req/s, with decode iterations that
take 1.3 times as long for two minutes. Prints for each step overshoot, the most that a mean of 5 s
lies beyond where it settles, in parts of the step, and the time from which on such means stay
within a fifth of the step, or 3 % of the value, of it. Simulated; ticks of 100 ms, one seed.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from voltana_ctrl import ControlLoop, FleetSpec, Guard, Slo, load_profile
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.sim.faults import Slowdown
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.workload import Workload, make_workload

PROFILE = "a100-sxm-80gb/llama-3.1-8b-2026-11"
SLO = Slo(ttft_s=0.6, itl_s=0.06)
UP_S, DOWN_S, END_S = 120.0, 240.0, 360.0
SMOOTH_S, TICK_S = 5.0, 0.1


def stepped() -> Workload:
    """20 req/s, and 60 between the steps."""
    base = make_workload("sharegpt", 60.0, END_S + 60.0, 0)
    keep = np.random.default_rng(0).random(len(base.arrival_s)) < 1.0 / 3.0
    keep |= (base.arrival_s >= UP_S) & (base.arrival_s < DOWN_S)
    return Workload(
        name="steps", arrival_s=base.arrival_s[keep], prompt_tok=base.prompt_tok[keep],
        output_tok=base.output_tok[keep], duration_s=base.duration_s,
    )  # fmt: skip


def driven(workload: Workload, faults: tuple = ()) -> dict[str, np.ndarray]:
    """What the controller had at every tick."""
    fleet = FleetSpec.parse("2P2D", load_profile(PROFILE))
    parts = find_policy("mpc").build(fleet, SLO, PolicySetup())
    backend = SimBackend(
        fleet, workload=workload, settings=PlantSettings(log_iterations=8192),
        governors=parts.governors, prefill_router=parts.prefill_router,
        decode_router=parts.decode_router, faults=list(faults),
    )  # fmt: skip
    rows = []

    class Keep:
        def on_tick(self, record):
            state, asked = record.observation.state, record.applied
            runs = state.running_req * [0, 0, 1, 1]
            clock_mhz = float(runs @ state.freq_mhz) / max(1.0, float(runs.sum()))
            belief = asked.belief
            rows.append((state.t_s, clock_mhz, asked.active[2:].sum(),
                         100.0 * belief.itl_margin_frac.max(),
                         belief.decode_pace_frac[2:].max()))  # fmt: skip

    loop = ControlLoop(
        backend, parts.controller, Guard(fleet), clock=backend.clock, observers=[Keep()]
    )
    loop.run(END_S)
    names = ("t_s", "decode clock [MHz]", "active decode", "ITL margin [%]",
             "decode pace")  # fmt: skip
    return dict(zip(names, np.array(rows).T, strict=True))


def response(t_s: np.ndarray, value: np.ndarray, from_s: float, until_s: float) -> str:
    """Overshoot and settling time of one step, in words."""
    n = round(SMOOTH_S / TICK_S)
    smooth = np.convolve(value, np.ones(n) / n)[: len(value)]  # of the 5 s before
    before = float(value[(t_s >= from_s - 30.0) & (t_s < from_s)].mean())
    end = float(value[(t_s >= until_s - 40.0) & (t_s < until_s)].mean())
    inside = (t_s >= from_s) & (t_s < until_s)
    step, found, times = end - before, smooth[inside], t_s[inside]
    room = max(0.2 * abs(step), 0.03 * abs(end))
    off = np.flatnonzero(np.abs(found - end) > room)
    settled_s = 0.0 if off.size == 0 else float(times[off[-1]] - from_s)
    text = f"{before:.4g} to {end:.4g}, settled after {settled_s:.1f} s"
    if abs(step) > 0.05 * abs(before):
        over = max(0.0, float(np.max((found - end) * np.sign(step))) / abs(step))
        text += f", overshoot {100.0 * over:.0f} %"
    return text


def draw(path: Path) -> None:
    """Draw them, and print the figures."""
    slower = tuple(
        Slowdown(instance=f"decode-{k}", slow_frac=1.3, from_s=UP_S, until_s=DOWN_S)
        for k in range(2)
    )
    runs = {
        "load 20, 60, 20 req/s": driven(stepped()),
        "decode 1.3 times as slow": driven(
            make_workload("sharegpt", 40.0, END_S + 60.0, 0), slower
        ),
    }
    names = ("decode clock [MHz]", "active decode", "ITL margin [%]", "decode pace")
    figure, axes = plt.subplots(
        len(names), 2, figsize=(9.0, 7.0), sharex=True, sharey="row", layout="constrained"
    )
    for column, (title, seen) in zip(axes.T, runs.items(), strict=True):
        column[0].set_title(title, fontsize=10)
        column[-1].set_xlabel("time [s]")
        for axis, name in zip(column, names, strict=True):
            axis.plot(seen["t_s"], seen[name], linewidth=0.7)
            for at_s in (UP_S, DOWN_S):
                axis.axvline(at_s, color="0.7", linewidth=0.7)
            print(f"{title}: {name}: {response(seen['t_s'], seen[name], UP_S, DOWN_S)};"
                  f" back: {response(seen['t_s'], seen[name], DOWN_S, END_S)}")  # fmt: skip
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
