"""The breadth table: one factor at a time from the reference scenario, every baseline.

    python bench/matrix.py results.csv                 # resumes: runs in the file are not repeated
    python bench/matrix.py results.csv --table         # the tables of docs/breadth.md, runs nothing
    python bench/matrix.py noisy.csv --jitter 0.05     # its twin: iteration times vary by 5 %
    python bench/matrix.py results.csv --table --twin noisy.csv

All figures are simulated. The loads of a cell are fractions of its knee: the highest load at which
static-max keeps both promises, measured on the same seeds and windows by bisection. A cell is
lost to a baseline that is cheaper by more than 0.5 % and better in attainment (the worse of TTFT
and ITL) by more than 0.002; the exit status is 1 if one is.
"""

import argparse
import csv
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.experiment import Run
from voltana_ctrl.sim.plant import PlantSettings
from voltana_ctrl.sim.traces import read_trace

# The tables of docs/breadth.md were made with the reference as first shipped.
A100, H100 = "a100-sxm-80gb/llama-3.1-8b", "h100-sxm-80gb/llama-3.1-8b"
A100_70B = "a100-sxm-80gb/llama-3-70b-tp4"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BASELINES = (
    "static-max", "static-1005", "threshold", "dualscale", "pack", "voltanallm",
    "voltanallm-tile", "voltanallm-jsq", "voltanallm-full-ladder",
)  # fmt: skip
COLUMNS = (
    "cell", "load_frac", "rate_req_s", "policy", "seed", "duration_s", "requests", "power_w",
    "ttft_attainment", "itl_attainment", "jitter_sd_frac",
)  # fmt: skip
WARMUP_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What differs from the reference."""

    fleet: str = "2P2D"
    profile: str = A100
    workload: str = "sharegpt"
    trace: str = ""
    slo: Slo = dataclasses.field(default_factory=lambda: Slo(ttft_s=0.6, itl_s=0.06))
    actuation_s: float = 0.005
    believed_pace_frac: float = 1.0
    # Bursts and silences of minutes need a longer window than the others.
    longer: float = 1.0


CELLS = {
    "reference": Cell(),
    "4C": Cell(fleet="4C"),
    "azure-code": Cell(workload="azure-code", longer=10.0),
    "actuation-50ms": Cell(actuation_s=0.05),
    "actuation-200ms": Cell(actuation_s=0.2),
    "profile-20%-fast": Cell(believed_pace_frac=0.8),
    "profile-20%-slow": Cell(believed_pace_frac=1.2),
    "lmsys": Cell(workload="lmsys"),
    "azure-conv": Cell(workload="azure-conv"),
    "azure-conv-trace": Cell(trace="azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"),
    "4P4D": Cell(fleet="4P4D"),
    "A100+H100": Cell(fleet="A100+H100"),
    # Prompts of 100,000 tokens take longer than any promise, hence 90 %.
    "mooncake-70B": Cell(
        fleet="6P2D", profile=A100_70B, slo=Slo(ttft_s=30.0, itl_s=0.1, attainment=0.9),
        trace="mooncake_fast25/conversation_first30min.jsonl.gz", longer=3.0,
    ),
    "H100": Cell(profile=H100),
    "itl-40ms": Cell(slo=Slo(ttft_s=0.6, itl_s=0.04)),
    "8P24D": Cell(fleet="8P24D"),
}  # fmt: skip


def make_fleet(cell):
    """The fleet of a cell; half A100, half H100 where it says so."""
    if cell.fleet != "A100+H100":
        return FleetSpec.parse(cell.fleet, load_profile(cell.profile))
    old, new = (FleetSpec.parse("2P2D", load_profile(name)).instances for name in (A100, H100))
    return FleetSpec((old[0], new[1], old[2], new[3]))


def believed(fleet, pace_frac):
    """The fleet with iteration times multiplied: what a wrong profile makes of it."""
    wrong = []
    for one in fleet.instances:
        table = one.profile.table.copy()
        for name in table.dtype.names:
            if name.endswith("_s"):
                table[name] *= pace_frac
        wrong.append(
            dataclasses.replace(one, profile=dataclasses.replace(one.profile, table=table))
        )
    return FleetSpec(tuple(wrong))


def simulate(cell, policy, rate_req_s, seed, duration_s, jitter_sd_frac=0.0):
    """Requests, mean power, and the attainment of TTFT and ITL."""
    fleet = make_fleet(cell)
    duration_s *= cell.longer
    workload = read_trace(DATA / cell.trace) if cell.trace else cell.workload
    if cell.trace:
        # Seeds are stretches of the trace, one after the other.
        workload = workload.rescaled(rate_req_s)
        span_s = WARMUP_S + duration_s + 61.0
        start_s = seed * (WARMUP_S + duration_s)
        if start_s + span_s > workload.duration_s:
            span_s = min(span_s, workload.duration_s)
            start_s = workload.duration_s - span_s
        workload = workload.window(span_s, start_s=start_s)
    figures = Run(
        policy=policy,
        fleet=fleet,
        slo=cell.slo,
        workload=workload,
        rate_req_s=None if cell.trace else rate_req_s,
        seed=seed,
        duration_s=duration_s,
        warmup_s=WARMUP_S,
        settings=PlantSettings(actuation_s=cell.actuation_s, jitter_sd_frac=jitter_sd_frac),
        believed=None
        if cell.believed_pace_frac == 1.0
        else believed(fleet, cell.believed_pace_frac),
    ).simulate()
    return (
        figures["requests_arrived"],
        figures["mean_power_w"],
        figures["ttft_attainment"],
        figures["itl_attainment"],
    )


def measure_knee(cell, seeds, duration_s):
    """Highest load, to 2 %, at which static-max keeps both promises."""
    free = dataclasses.replace(cell, actuation_s=0.005, believed_pace_frac=1.0)

    def holds(rate_req_s):
        runs = [simulate(free, "static-max", rate_req_s, seed, duration_s) for seed in seeds]
        return min(np.mean([run[2:] for run in runs], axis=0)) >= cell.slo.attainment

    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2.0 * high
    while high - low > 0.02 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def read_rows(path):
    """Rows of the file, with numbers as numbers; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {
                key: value if key in ("cell", "policy") else float(value)
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def means(rows):
    """Rate, watts and worse attainment with its parts, by cell, load and policy."""
    found = {}
    for row in rows:
        found.setdefault((row["cell"], row["load_frac"]), {}).setdefault(row["policy"], []).append(
            [row[key] for key in ("rate_req_s", "power_w", "ttft_attainment", "itl_attainment")]
        )
    return {
        where: {policy: np.mean(runs, axis=0) for policy, runs in by_policy.items()}
        for where, by_policy in found.items()
    }


def lost_to(by_policy):
    """Baselines both cheaper and better than mpc."""
    if "mpc" not in by_policy:
        return []
    _, ours_w, *ours = by_policy["mpc"]
    return [
        policy
        for policy, (_, power_w, *attainment) in by_policy.items()
        if policy != "mpc" and power_w < 0.995 * ours_w and min(attainment) > min(ours) + 0.002
    ]


def table(rows, noisy=()):
    """The table of the docs, as Markdown; with the twin's three columns where it is given."""
    twins = means(noisy)
    heads = [
        "cell", "load", "req/s", "static-max", "voltanallm", "cheapest baseline that keeps 99 %",
        "mpc", "mpc / cheapest", "lost to",
    ]  # fmt: skip
    if twins:
        heads += ["mpc, 5 % jitter", "mpc / cheapest", "lost to"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (cell, load), by_policy in means(rows).items():
        rate = next(iter(by_policy.values()))[0]
        told = [cell, f"{100 * load:.0f} %", f"{rate:.3g}"]
        told += [_figures(by_policy, policy) for policy in ("static-max", "voltanallm")]
        best = _cheapest(cell, by_policy)
        told.append(f"{best}: {_figures(by_policy, best)}" if best else "-")
        told += _against(cell, by_policy)
        if twins:
            told += _against(cell, twins.get((cell, load), {}))
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def _cheapest(cell, by_policy):
    """The cheapest baseline that keeps the promise; empty where none does."""
    keeps = [
        policy
        for policy, (_, _, *attainment) in by_policy.items()
        if policy in BASELINES and min(attainment) >= CELLS[cell].slo.attainment
    ]
    return min(keeps, key=lambda policy: by_policy[policy][1], default="")


def _against(cell, by_policy):
    """What `mpc` draws and keeps, beside the cheapest that holds, and to whom it loses."""
    best, ratio = _cheapest(cell, by_policy), "-"
    if best and "mpc" in by_policy:
        ratio = f"{by_policy['mpc'][1] / by_policy[best][1]:.3f}"
    return [_figures(by_policy, "mpc"), ratio, ", ".join(lost_to(by_policy)) or "none"]


def _figures(by_policy, policy):
    if policy not in by_policy:
        return "-"
    _, power_w, ttft, itl = by_policy[policy]
    return f"{power_w:.0f}; {100 * ttft:.1f} / {100 * itl:.1f}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="CSV file, extended by what is missing in it")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--policies", default=",".join((*BASELINES, "mpc")))
    parser.add_argument("--loads", default="0.5,0.75,0.25")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--duration", type=float, default=120.0)
    parser.add_argument("--jitter", type=float, default=0.0, help="spread of iteration times")
    parser.add_argument("--twin", type=Path, help="file of runs with jitter, beside the others")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    options = parser.parse_args(arguments)
    rows = read_rows(options.results)
    if options.table:
        print(table(rows, read_rows(options.twin) if options.twin else ()))
        return int(any(lost_to(by_policy) for by_policy in means(rows).values()))
    if any(row.get("jitter_sd_frac") != options.jitter for row in rows):
        parser.error(f"--jitter: {options.results} has runs of another; give them a file each")
    known = {(row["cell"], row["load_frac"], row["policy"], row["seed"]) for row in rows}
    knees = {row["cell"]: row["rate_req_s"] / row["load_frac"] for row in rows}
    begin_s = time.perf_counter()
    with options.results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for name in options.cells.split(","):
            cell = CELLS[name]
            if cell.trace and not (DATA / cell.trace).exists():
                print(f"{name}: needs {cell.trace} in {DATA}; left out", flush=True)
                continue
            for load in map(float, options.loads.split(",")):
                for policy in options.policies.split(","):
                    for seed in range(options.seeds):
                        if (name, load, policy, float(seed)) in known:
                            continue
                        if name not in knees:
                            seeds = range(options.seeds)
                            knees[name] = measure_knee(cell, seeds, options.duration)
                        rate = load * knees[name]
                        try:
                            figures = simulate(
                                cell, policy, rate, seed, options.duration, options.jitter
                            )
                        except ConfigError as error:
                            print(f"{name}: {policy} is left out: {error}", flush=True)
                            continue
                        writer.writerow(
                            dict(
                                zip(
                                    COLUMNS,
                                    (name, load, rate, policy, seed, options.duration * cell.longer,
                                     *figures, options.jitter),
                                    strict=True,
                                )
                            )
                        )  # fmt: skip
                        file.flush()
            print(f"{name}: {time.perf_counter() - begin_s:.0f} s", flush=True)
    rows = read_rows(options.results)
    print(table(rows))
    return int(any(lost_to(by_policy) for by_policy in means(rows).values()))


if __name__ == "__main__":
    sys.exit(main())
