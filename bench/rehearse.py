"""The rehearsal against the simulator: the same requests through both, at the same dilation.

    python -m bench.rehearse --out rehearsal.jsonl      # every cell; what is there is not run again
    python -m bench.rehearse --out one.jsonl --fleets 2C --policies mpc --rates 6 --window 60
    python -m bench.rehearse --out rehearsal.jsonl --policies mpc --switchback 120   # and `savings`
    python -m bench.rehearse --table rehearsal.jsonl    # as rows of the docs

A cell starts emulated engines on fake GPUs, controller, agent and router in processes of their own,
plays a workload, and measures joules per output token and attainment in a window after a warm-up;
then it runs the simulated plant on the same requests with the same stretched profile, under the
controller as it runs on a fleet, which begins at the highest clocks and stands idle first. A run in
which more than 5 % of the iterations were late is void, and says so.
"""

import argparse
import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from voltana_ctrl import ControlLoop, FleetSpec, Slo, load_profile
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.backends.nvml.lease import end_on_sigterm
from voltana_ctrl.cli.demo import answers, stack_on
from voltana_ctrl.engines.emulated.fleet import EmulatedFleet
from voltana_ctrl.engines.emulated.load import play
from voltana_ctrl.engines.page import read_engine_page, read_histograms
from voltana_ctrl.live.descent import Descent
from voltana_ctrl.live.governed import PolicyController
from voltana_ctrl.policies import PolicySetup, find_policy
from voltana_ctrl.savings import BlockMeter, SwitchbackController, estimate_savings
from voltana_ctrl.savings.proof import savings_of_log
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.workload import Workload, make_workload
from voltana_ctrl.types import Role

#: Parts of the window whose scatter is the standard error.
_PARTS = 10
#: Without requests at first, in both: a fleet that was idle has parked most of itself.
_IDLE_S = 20.0


def stretched(work, dilation, most_tok):
    """The same requests in slow motion, none of them longer than it pays to wait for."""
    return Workload(
        name=work.name, arrival_s=dilation * work.arrival_s, prompt_tok=work.prompt_tok,
        output_tok=np.minimum(work.output_tok, most_tok), duration_s=dilation * work.duration_s,
    )  # fmt: skip


def stood(marks, at_s):
    """Joules drawn and tokens made at these times, between the two marks around each."""
    t_s, joules, tok = np.array(marks).T
    return np.interp(at_s, t_s, joules), np.interp(at_s, t_s, tok)


def figures(marks, edges_s, ttft_s, itl_s, slo):
    """What is compared: energy and tokens by parts of the window, and who was in time."""
    joules, tok = (np.diff(values) for values in stood(marks, edges_s))
    return {
        "joules_per_token": float(joules.sum() / tok.sum()),
        "power_w": float(joules.sum() / (edges_s[-1] - edges_s[0])),
        "parts_j_per_tok": (joules / np.maximum(tok, 1.0)).tolist(),
        "ttft_attainment": float((ttft_s <= slo.ttft_s).mean()),
        "itl_attainment": float((itl_s <= slo.itl_s).mean()),
        "requests": len(ttft_s),
        "in_time": [(ttft_s <= slo.ttft_s).tolist(), (itl_s <= slo.itl_s).tolist()],
    }


def simulator(shape, slo, policy, work, profile):
    """The simulated plant on these requests, and the policy in the form that runs on a fleet."""
    fleet = FleetSpec.parse(shape, load_profile(profile))
    parts = find_policy(policy).build(fleet, slo, PolicySetup())
    plant = SimBackend(
        fleet, workload=work, seed=0, governors=parts.governors,
        prefill_router=parts.prefill_router, decode_router=parts.decode_router,
        settings=PlantSettings(
            # The engines of a rehearsal tell every iteration, from which policies learn their pace.
            log_iterations=20_000, view_age_s=parts.view_age_s,
            decode_at_arrival=parts.decode_at_arrival,
        ),
    )  # fmt: skip
    controller = parts.controller or PolicyController(
        fleet, first=parts.first, held=fleet.ids if parts.governors else (), routed=lambda: True
    )
    return plant, Descent(controller, slo)


def after_idling(work):
    """The same requests later, as a simulated fleet gets them that has stood idle."""
    return replace(work, arrival_s=work.arrival_s + _IDLE_S, duration_s=work.duration_s + _IDLE_S)


def simulated(shape, slo, policy, work, edges_s, profile):
    """Figures of the simulated plant in the window."""
    work, edges_s = after_idling(work), edges_s + _IDLE_S
    plant, controller = simulator(shape, slo, policy, work, profile)
    marks, done = [], {}

    class Watch:
        def on_tick(self, record):
            seen = record.observation
            emitted = float(plant.plant.instances["emitted_tok"].sum())
            marks.append((seen.state.t_s, float(seen.state.energy_j.sum()), emitted))
            one = seen.finished
            done.update(zip(one.request, zip(one.ttft_s, one.itl_s, strict=True), strict=True))

    with ControlLoop(plant, controller, observers=[Watch()]) as loop:
        loop.run(edges_s[-1] + 2.0 * (edges_s[-1] - edges_s[0]))
    inside = np.flatnonzero((work.arrival_s >= edges_s[0]) & (work.arrival_s < edges_s[-1]))
    told = np.array([done.get(int(k), (np.inf, np.inf)) for k in inside]).reshape(-1, 2)
    return figures(marks, edges_s, told[:, 0], told[:, 1], slo)


def pages_of(urls):
    return [httpx.get(f"{url}/metrics", trust_env=False, timeout=30.0).text for url in urls]


def emitted_tok(urls):
    return sum(read_engine_page("vllm", page)["output_tok"] for page in pages_of(urls))


def mean_ttft_s(urls):
    """Mean time to first token of all requests so far, as engines that do both phases saw it."""
    found = [read_histograms("vllm", page)["ttft"] for page in pages_of(urls)]
    return sum(one.total_s for one in found) / sum(one.counts[-1] for one in found)


def said(folder):
    """What the parts of the stack said last: why clocks went up, whom they did not hear."""
    logs = {name: folder / f"{name}.log" for name in ("controller", "agent", "router")}
    return {name: log.read_text().splitlines()[-12:] for name, log in logs.items()}


async def rehearsed(fleet, url, work, edges_s):
    """The same, of the real stack on emulated engines."""
    assert await answers(url, 180.0)
    await asyncio.sleep(_IDLE_S)
    begin_s = time.monotonic()
    playing = asyncio.create_task(play(url, work, limit_s=3600.0))
    marks = []
    for at_s in edges_s:
        await asyncio.sleep(max(0.0, begin_s + at_s - time.monotonic()))
        before_s = time.monotonic()
        tok = await asyncio.to_thread(emitted_tok, fleet.urls)
        joules = sum(gpu.energy_j for gpu in fleet.fake.gpus)
        marks.append(((before_s + time.monotonic()) / 2.0 - begin_s, joules, tok))
    told = await playing
    # Requests are matched by their number, not by when each was really sent.
    inside = (work.arrival_s >= edges_s[0]) & (work.arrival_s < edges_s[-1])
    slo = Slo.parse(fleet.slo_text)
    late = [httpx.get(f"{one}/emulate", trust_env=False).json() for one in fleet.urls]
    iterations, too_late = (sum(one[key] for one in late) for key in ("iterations", "late"))
    found = figures(marks, edges_s, told.ttft_s[inside], told.itl_s[inside], slo)
    if all(one.role is Role.COLOCATED for one in fleet.spec.instances):
        # What router, client and a busy machine added.
        found["outside_ttft_s"] = float(np.nanmean(told.ttft_s)) - mean_ttft_s(fleet.urls)
    return found | {
        "late_frac": too_late / max(1, iterations),
        "void": too_late > 0.05 * iterations,
    }


def compared(live, sim):
    """Differences on the same requests, each with its standard error."""
    ratio = np.log(np.array(live.pop("parts_j_per_tok")) / np.array(sim.pop("parts_j_per_tok")))
    told = {
        "difference_frac": live["joules_per_token"] / sim["joules_per_token"] - 1.0,
        "difference_se": float(ratio.std(ddof=1) / np.sqrt(len(ratio))),
    }
    ours, theirs = (np.array(one.pop("in_time"), dtype=float) for one in (live, sim))
    for name, one, other in zip(("ttft", "itl"), ours, theirs, strict=True):
        told[f"{name}_points"] = 100.0 * float((one - other).mean())
        told[f"{name}_points_se"] = 100.0 * float((one - other).std() / np.sqrt(len(one)))
    return told


def requests_of(rate_req_s, span_s, args):
    work = make_workload(
        "sharegpt", rate_req_s=rate_req_s, duration_s=span_s / args.dilation, seed=args.seed
    )
    return stretched(work, args.dilation, args.most_tok)


def cell(shape, policy, rate_req_s, args):
    """One cell: requests at the true speed's rate, in slow motion."""
    window_s = args.window or args.requests * args.dilation / rate_req_s
    edges_s = args.warm + window_s * np.linspace(0.0, 1.0, _PARTS + 1)
    work = requests_of(rate_req_s, args.warm + window_s, args)
    with EmulatedFleet(shape, dilation=args.dilation, governed=not args.ticks) as fleet:
        slo = Slo.parse(fleet.slo_text)
        with stack_on(fleet, policy, routed=not args.unrouted) as stack:
            live = asyncio.run(rehearsed(fleet, stack.url, work, edges_s))
            live["said"] = said(fleet.folder)
        sim = simulated(shape, slo, policy, work, edges_s, fleet.profile)
    return {"rehearsed": live, "simulated": sim, **compared(live, sim)}


def switchback(shape, policy, rate_req_s, args):
    """`savings` on a rehearsal that alternates policy and highest clock, beside the simulator."""
    span_s = 2.0 * args.pairs * args.switchback
    work = requests_of(rate_req_s, span_s, args)
    with EmulatedFleet(shape, dilation=args.dilation) as fleet:
        slo = Slo.parse(fleet.slo_text)
        log = fleet.folder / "ticks.jsonl"
        controls = ["--switchback", f"{args.switchback / 60.0:.6f}", "--seed", str(args.seed),
                    "--log", str(log)]  # fmt: skip
        with stack_on(fleet, policy, controls=controls) as stack:
            asyncio.run(rehearsed(fleet, stack.url, work, np.linspace(0.0, span_s, 3)))
        live = savings_of_log([log]).to_dict()
        plant, controller = simulator(shape, slo, policy, after_idling(work), fleet.profile)
    meter = BlockMeter(slo=slo)
    alternating = SwitchbackController(controller, block_s=args.switchback, seed=args.seed)
    with ControlLoop(plant, alternating, observers=[meter]) as loop:
        loop.run(_IDLE_S + span_s)
    return {"rehearsed": live, "simulated": estimate_savings(meter).to_dict()}


def table(path):
    """Rows of the cells in a file, in Markdown."""
    head = (
        "| fleet | policy | req/s | judged | late | J/token | simulated | difference | TTFT, ITL |"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    for line in path.read_text().splitlines():
        one = json.loads(line)
        if "difference_frac" not in one:
            continue
        told, live, sim = one["cell"], one["rehearsed"], one["simulated"]
        form = "".join(f" ({name})" for name in ("ticks", "unrouted") if told[name])
        met = ", ".join(
            f"{100 * live[f'{name}_attainment']:.2f} %"
            f" ({one[f'{name}_points']:+.2f} ± {one[f'{name}_points_se']:.2f})"
            for name in ("ttft", "itl")
        )
        rows.append(
            f"| {told['fleet']} | {told['policy']}{form} | {told['rate_req_s']:g} |"
            f" {live['requests']} | {100 * live['late_frac']:.1f} %{' void' * live['void']}"
            f" | {live['joules_per_token']:.3f} | {sim['joules_per_token']:.3f} |"
            f" {100 * one['difference_frac']:+.2f} ± {100 * one['difference_se']:.2f} % | {met} |"
        )
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines; cells there are kept")
    parser.add_argument("--table", type=Path, help="print the cells of such a file, and end")
    parser.add_argument("--fleets", default="2P2D,4C")
    parser.add_argument("--policies", default="static-max,voltanallm,mpc")
    parser.add_argument("--rates", default="20,40,65", help="req/s at the true speed")
    parser.add_argument("--dilation", type=float, default=10.0)
    parser.add_argument("--warm", type=float, default=300.0, help="s as played, before the window")
    parser.add_argument("--requests", type=int, default=1600, help="judged in a cell, about")
    parser.add_argument("--window", type=float, help="s as played; by --requests if left out")
    parser.add_argument("--most-tok", type=int, default=400, help="longest answer, in both")
    parser.add_argument("--switchback", type=float, help="s of a block as played, for `savings`")
    parser.add_argument("--pairs", type=int, default=12, help="of blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ticks", action="store_true", help="no governors in the engines")
    parser.add_argument("--unrouted", action="store_true", help="a router that obeys nobody")
    args = parser.parse_args()
    if args.table is not None:
        print(table(args.table))
        return
    if args.out is None:
        parser.error("expected --out FILE or --table FILE")
    named = ("dilation", "warm", "window", "requests", "seed", "ticks", "unrouted", "switchback",
             "pairs", "most_tok")  # fmt: skip
    settings = {name: getattr(args, name) for name in named}
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    there = {json.dumps(json.loads(line)["cell"], sort_keys=True) for line in lines}
    for shape in args.fleets.split(","):
        for rate in args.rates.split(","):
            for policy in args.policies.split(","):
                told = {"fleet": shape, "policy": policy, "rate_req_s": float(rate), **settings}
                if json.dumps(told, sort_keys=True) in there:
                    continue
                run = cell if args.switchback is None else switchback
                found = {"cell": told, **run(shape, policy, float(rate), args)}
                with args.out.open("a") as out:
                    out.write(json.dumps(found) + "\n")
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with end_on_sigterm():  # engines and commands end with it
        main()
