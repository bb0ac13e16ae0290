"""The rehearsal against the simulator: the same requests through both, at the same dilation.

    python -m bench.rehearse --out rehearsal.jsonl      # every cell; what is there is not run again
    python -m bench.rehearse --out one.jsonl --fleets 2C --policies mpc --rates 6 --window 60

A cell starts emulated engines on fake GPUs, controller, agent and router in processes of their own,
plays a workload, and measures joules per output token and attainment in a window after a warm-up;
then it runs the simulated plant on the same requests with the same stretched profile. A run in
which more than 5 % of the iterations were late is void, and says so.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

import httpx
import numpy as np

from voltana_ctrl import ControlLoop, FleetSpec, Slo, load_profile
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.cli.demo import answers, stack_on
from voltana_ctrl.engines.emulated.fleet import EmulatedFleet
from voltana_ctrl.engines.emulated.load import play
from voltana_ctrl.engines.page import read_engine_page
from voltana_ctrl.live.governed import PolicyController
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.sim.workload import Workload, make_workload

PROFILE = "a100-sxm-80gb/llama-3.1-8b"


def stretched(work, dilation):
    return Workload(
        name=work.name, arrival_s=dilation * work.arrival_s, prompt_tok=work.prompt_tok,
        output_tok=work.output_tok, duration_s=dilation * work.duration_s,
    )  # fmt: skip


def simulated(shape, slo, policy, work, warm_s, window_s, profile):
    """Joules per token and attainment of the simulated plant in the window."""
    fleet = FleetSpec.parse(shape, load_profile(profile))
    parts = find_policy(policy).build(fleet, slo, PolicySetup())
    plant = SimBackend(
        fleet, workload=work, seed=0, governors=parts.governors,
        prefill_router=parts.prefill_router, decode_router=parts.decode_router,
    )  # fmt: skip
    controller = parts.controller or PolicyController(
        fleet, first=parts.first, held=fleet.ids if parts.governors else (), routed=lambda: True
    )
    marks, done = [], {}

    class Watch:
        def on_tick(self, record):
            seen = record.observation
            emitted = float(plant.plant.instances["emitted_tok"].sum())
            marks.append((seen.state.t_s, float(seen.state.energy_j.sum()), emitted))
            one = seen.finished
            done.update(zip(one.request, zip(one.ttft_s, one.itl_s, strict=True), strict=True))

    with ControlLoop(plant, controller, observers=[Watch()]) as loop:
        loop.run(warm_s + 3.0 * window_s)
    edges = [min(marks, key=lambda mark, at=at: abs(mark[0] - at))
             for at in (warm_s, warm_s + window_s)]  # fmt: skip
    (_, j0, tok0), (_, j1, tok1) = edges
    inside = np.flatnonzero((work.arrival_s >= warm_s) & (work.arrival_s < warm_s + window_s))
    told = np.array([done.get(int(k), (np.inf, np.inf)) for k in inside]).reshape(-1, 2)
    return {
        "joules_per_token": (j1 - j0) / (tok1 - tok0),
        "power_w": (j1 - j0) / window_s,
        "ttft_attainment": float((told[:, 0] <= slo.ttft_s).mean()),
        "itl_attainment": float((told[:, 1] <= slo.itl_s).mean()),
        "requests": len(inside),
    }


def emitted_tok(urls):
    pages = (httpx.get(f"{url}/metrics", trust_env=False, timeout=30.0).text for url in urls)
    return sum(read_engine_page("vllm", page)["output_tok"] for page in pages)


async def rehearsed(fleet, url, work, warm_s, window_s):
    """The same, of the real stack on emulated engines."""
    assert await answers(url, 180.0)
    await asyncio.sleep(5.0)
    begin_s = time.monotonic()
    playing = asyncio.create_task(play(url, work))
    marks = []
    for at_s in (warm_s, warm_s + window_s):
        await asyncio.sleep(max(0.0, begin_s + at_s - time.monotonic()))
        tok = await asyncio.to_thread(emitted_tok, fleet.urls)
        marks.append((time.monotonic(), sum(gpu.energy_j for gpu in fleet.fake.gpus), tok))
    told = await playing
    (t0, j0, tok0), (t1, j1, tok1) = marks
    inside = (told.arrival_s >= warm_s) & (told.arrival_s < warm_s + window_s)
    slo = Slo.parse(fleet.slo_text)
    late = [httpx.get(f"{one}/emulate", trust_env=False).json() for one in fleet.urls]
    iterations, too_late = (sum(one[key] for one in late) for key in ("iterations", "late"))
    return {
        "joules_per_token": (j1 - j0) / (tok1 - tok0),
        "power_w": (j1 - j0) / (t1 - t0),
        "ttft_attainment": float((told.ttft_s[inside] <= slo.ttft_s).mean()),
        "itl_attainment": float((told.itl_s[inside] <= slo.itl_s).mean()),
        "requests": int(inside.sum()),
        "late_frac": too_late / max(1, iterations),
        "void": too_late > 0.05 * iterations,
    }


def cell(shape, policy, rate_req_s, args):
    """One cell: requests at the true speed's rate, in slow motion."""
    span_s = args.warm + args.window
    work = make_workload(
        "sharegpt", rate_req_s=rate_req_s, duration_s=span_s / args.dilation, seed=args.seed
    )
    work = stretched(work, args.dilation)
    with EmulatedFleet(shape, dilation=args.dilation, governed=not args.ticks) as fleet:
        slo = Slo.parse(fleet.slo_text)
        with stack_on(fleet, policy, routed=not args.unrouted) as url:
            live = asyncio.run(rehearsed(fleet, url, work, args.warm, args.window))
        sim = simulated(shape, slo, policy, work, args.warm, args.window, fleet.profile)
    return {
        "rehearsed": live,
        "simulated": sim,
        "difference_frac": live["joules_per_token"] / sim["joules_per_token"] - 1.0,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; cells there are kept")
    parser.add_argument("--fleets", default="2P2D,4C")
    parser.add_argument("--policies", default="static-max,voltanallm,mpc")
    parser.add_argument("--rates", default="20,40,65", help="req/s at the true speed")
    parser.add_argument("--dilation", type=float, default=10.0)
    parser.add_argument("--warm", type=float, default=300.0, help="s as played, before the window")
    parser.add_argument("--window", type=float, default=900.0, help="s as played")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ticks", action="store_true", help="no governors in the engines")
    parser.add_argument("--unrouted", action="store_true", help="a router that obeys nobody")
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("dilation", "warm", "window", "seed", "ticks",
                                                    "unrouted")}  # fmt: skip
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    there = {json.dumps(json.loads(line)["cell"], sort_keys=True) for line in lines}
    for shape in args.fleets.split(","):
        for rate in args.rates.split(","):
            for policy in args.policies.split(","):
                told = {"fleet": shape, "policy": policy, "rate_req_s": float(rate), **settings}
                if json.dumps(told, sort_keys=True) in there:
                    continue
                found = {"cell": told, **cell(shape, policy, float(rate), args)}
                with args.out.open("a") as out:
                    out.write(json.dumps(found) + "\n")
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
