"""The adversary's table: what breaks a promise, kind by kind, with everybody's watts beside it.

    python bench/adversary.py results.csv           # resumes: runs in the file are not repeated
    python bench/adversary.py results.csv --table   # the tables of docs/breadth.md, runs nothing

All figures are simulated. A cell is a fleet, a load and something that is not as believed; every
policy meets the same requests and the same mishaps. A cell is *broken* where `mpc` misses the
promise by more than 0.3 points although an opponent keeps it, and *dearer* where it draws more
than 0.5 % above the cheapest opponent that keeps it.

Some opponents give the machines other roles than the cell has. Where the cheapest that keeps the
promise has done so, and the cell is broken or dearer, `mpc` is run on the same machines in those
roles, too, and judged a second time (*alike*). Mishaps strike the machine that they strike in the
cell, whatever it does. The exit status is 1 if a cell is broken as given.
"""

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.experiment import Run
from voltana_ctrl.sim.arrivals import Diurnal, Gamma, MarkovModulated
from voltana_ctrl.sim.faults import ClockClamp, Failure, Slowdown
from voltana_ctrl.sim.plant import PlantSettings
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import PowerBudget

# The tables of docs/breadth.md were made with the reference as first shipped.
A100, H100 = "a100-sxm-80gb/llama-3.1-8b-2026-11", "h100-sxm-80gb/llama-3.1-8b"
A100_70B = "a100-sxm-80gb/llama-3-70b-tp4"
OPPONENTS = (
    "static-max", "static-1005", "threshold", "dualscale", "pack", "voltanallm",
    "voltanallm-tile", "voltanallm-jsq", "voltanallm-full-ladder", "voltanallm-thresholds",
    "ecoserve", "static-best", "governors",
)  # fmt: skip
COLUMNS = (
    "kind", "cell", "policy", "seed", "requests", "power_w", "ttft_attainment", "itl_attainment",
    "over_budget_frac", "layout",
)  # fmt: skip
WARMUP_S = 30.0
BROKEN_FRAC, DEARER_FRAC = 0.003, 0.005


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a cell is: the reference scenario where nothing else is said."""

    kind: str
    rate_req_s: float
    fleet: str = "2P2D"
    profile: str = A100
    workload: str = "sharegpt"
    #: Prompt and answer lengths drawn evenly from these ranges, in place of the generator's.
    lengths_tok: tuple[tuple[int, int], ...] = ()
    #: Loads in turn, each for so many seconds, in place of one.
    square_req_s: tuple[float, ...] = ()
    hold_s: float = 20.0
    arrivals: object = None
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=0.6, itl_s=0.06))
    settings: PlantSettings = field(default_factory=PlantSettings)
    faults: tuple = ()
    believed_pace_frac: float = 1.0
    budget_w: float | None = None
    requests: int = 5000

    @property
    def duration_s(self) -> float:
        """Window in which so many requests are judged, of two to twenty minutes."""
        mean_req_s = float(np.mean(self.square_req_s)) if self.square_req_s else self.rate_req_s
        return float(np.clip(np.ceil(self.requests / mean_req_s / 20.0) * 20.0, 120.0, 1200.0))


def _cells() -> dict[str, Cell]:
    cells: dict[str, Cell] = {}

    def add(name: str, **what: object) -> None:
        if name in cells:
            raise ValueError(name)
        cells[name] = Cell(**what)

    for rate in (10, 28, 45, 60, 75):
        add(f"steady {rate}", kind="steady", rate_req_s=rate)
    for fleet, rate in (("3P1D", 22), ("1P1D", 30), ("1P3D", 30), ("1P2D", 20), ("8P8D", 200),
                        ("4P4D", 120), ("2P6D", 60), ("1P1D", 12)):  # fmt: skip
        add(f"{fleet} {rate}", kind="other fleets", fleet=fleet, rate_req_s=rate)
    add("H100 60", kind="other fleets", profile=H100, rate_req_s=60)
    add("70B 6P2D 4", kind="other fleets", profile=A100_70B, fleet="6P2D", rate_req_s=4,
        slo=Slo(ttft_s=3.0, itl_s=0.1))  # fmt: skip
    for ttft_s, itl_s, kept, rate in ((0.3, 0.06, 0.99, 40), (0.6, 0.035, 0.99, 30),
                                      (2.0, 0.2, 0.99, 50), (0.6, 0.06, 0.9, 50),
                                      (0.6, 0.06, 0.999, 50)):  # fmt: skip
        add(f"slo {ttft_s}/{itl_s}/{kept} at {rate}", kind="other promises", rate_req_s=rate,
            slo=Slo(ttft_s=ttft_s, itl_s=itl_s, attainment=kept))  # fmt: skip
    for low, high, rate in ((1, 5, 40), (2, 3, 60), (1, 12, 50), (2, 40, 45), (10, 20, 50)):
        add(f"answers of {low} to {high} at {rate}", kind="short answers", rate_req_s=rate,
            lengths_tok=((100, 500), (low, high)))  # fmt: skip
    add("prompts of 4,000 at 6", kind="other lengths", rate_req_s=6,
        lengths_tok=((3000, 5000), (50, 200)))  # fmt: skip
    add("long answers at 5", kind="other lengths", rate_req_s=5,
        lengths_tok=((100, 300), (500, 3000)))  # fmt: skip
    add("lmsys 60", kind="other lengths", workload="lmsys", rate_req_s=60)
    add("azure-conv 6", kind="other lengths", workload="azure-conv", rate_req_s=6)
    for fleet, pace, rate in (("4C", 0.8, 40), ("4C", 0.8, 65), ("2C", 0.7, 15), ("8C", 0.85, 100),
                              ("4C", 1.25, 40)):  # fmt: skip
        add(f"{fleet} believed x{pace} at {rate}", kind="colocated, wrong profile", fleet=fleet,
            rate_req_s=rate, believed_pace_frac=pace)  # fmt: skip
    for fleet, rate in (("4C", 12), ("4C", 40), ("4C", 65), ("3C", 30), ("2C", 20), ("8C", 90),
                        ("5C", 25)):  # fmt: skip
        add(f"{fleet} {rate}", kind="colocated", fleet=fleet, rate_req_s=rate)
    for name, clamp_mhz, rate in (("decode-0", 600, 45), ("decode-1", 750, 60),
                                  ("prefill-0", 600, 45), ("prefill-1", 800, 60),
                                  ("decode-0", 450, 30)):  # fmt: skip
        add(f"{name} clamped to {clamp_mhz} at {rate}", kind="one unlike the others",
            rate_req_s=rate, faults=(ClockClamp(instance=name, clamp_mhz=clamp_mhz, from_s=0.0),),
        )  # fmt: skip
    for name, slow, rate in (("decode-0", 1.4, 50), ("prefill-0", 1.5, 50), ("decode-1", 1.8, 40),
                             ("prefill-1", 2.0, 35), ("decode-0", 1.2, 65)):  # fmt: skip
        add(f"{name} x{slow} for a while at {rate}", kind="one unlike the others", rate_req_s=rate,
            faults=(Slowdown(instance=name, slow_frac=slow, from_s=40.0, until_s=110.0),),
        )  # fmt: skip
    add("4C, one x1.5, at 45", kind="one unlike the others", fleet="4C", rate_req_s=45,
        faults=(Slowdown(instance="colocated-0", slow_frac=1.5, from_s=40.0),))  # fmt: skip
    add("4C, one clamped to 700, at 45", kind="one unlike the others", fleet="4C", rate_req_s=45,
        faults=(ClockClamp(instance="colocated-1", clamp_mhz=700, from_s=0.0),))  # fmt: skip
    for jitter, rate in ((0.05, 35), (0.05, 65), (0.1, 50), (0.2, 50), (0.2, 30), (0.3, 45)):
        add(f"jitter {jitter} at {rate}", kind="noise", rate_req_s=rate,
            settings=PlantSettings(jitter_sd_frac=jitter))  # fmt: skip
    for pace, rate in ((0.8, 45), (0.6, 30), (0.6, 45), (0.7, 55), (1.3, 45), (1.2, 65)):
        add(f"believed x{pace} at {rate}", kind="wrong profile", rate_req_s=rate,
            believed_pace_frac=pace)  # fmt: skip
    for cv, rate in ((2, 40), (3, 30), (4, 30), (4, 50)):
        add(f"gamma cv {cv} at {rate}", kind="bursts", rate_req_s=rate, arrivals=Gamma(cv=cv))
    add("bursts of 5 s at 30", kind="bursts", rate_req_s=30,
        arrivals=MarkovModulated(high_s=5.0, low_s=25.0))  # fmt: skip
    for loads, hold_s in (((10, 60), 20.0), ((10, 60), 60.0), ((20, 50), 10.0), ((5, 45, 25), 40.0),
                          ((30, 70), 15.0)):  # fmt: skip
        add(f"steps {'/'.join(map(str, loads))} every {hold_s:g} s", kind="swings",
            rate_req_s=float(np.mean(loads)), square_req_s=loads, hold_s=hold_s)  # fmt: skip
    add("a day in 300 s at 30", kind="swings", rate_req_s=30,
        arrivals=Diurnal(swing_frac=0.9, period_s=300.0, peak_s=150.0))  # fmt: skip
    add("decode fails in turn at 45", kind="failures", rate_req_s=45, faults=tuple(
        Failure(instance=f"decode-{k % 2}", from_s=50.0 + 30.0 * k, until_s=60.0 + 30.0 * k)
        for k in range(3)))  # fmt: skip
    add("prefill fails in turn at 40", kind="failures", rate_req_s=40, faults=tuple(
        Failure(instance=f"prefill-{k % 2}", from_s=50.0 + 30.0 * k, until_s=58.0 + 30.0 * k)
        for k in range(3)))  # fmt: skip
    add("4P4D, two fail, at 80", kind="failures", fleet="4P4D", rate_req_s=80, faults=(
        Failure(instance="decode-0", from_s=60.0, until_s=90.0),
        Failure(instance="prefill-2", from_s=80.0, until_s=110.0)))  # fmt: skip
    add("4C, one fails, at 40", kind="failures", fleet="4C", rate_req_s=40,
        faults=(Failure(instance="colocated-0", from_s=60.0, until_s=80.0),))  # fmt: skip
    for settle_s, rate in ((0.2, 35), (0.1, 50), (0.4, 30), (0.0, 50), (0.2, 60)):
        add(f"delay {settle_s + 0.005:g} s at {rate}", kind="delay", rate_req_s=rate,
            settings=PlantSettings(settle_s=settle_s))  # fmt: skip
    for budget_w, rate in ((650, 35), (850, 55), (560, 20), (1000, 65)):
        add(f"budget {budget_w} W at {rate}", kind="budget", rate_req_s=rate, budget_w=budget_w)
    return cells


CELLS = _cells()


def believed(fleet: FleetSpec, pace_frac: float) -> FleetSpec:
    """The fleet with iteration times multiplied: what a wrong profile makes of it."""
    wrong = []
    for one in fleet.instances:
        table = one.profile.table.copy()
        for name in table.dtype.names:
            if name.endswith("_s"):
                table[name] *= pace_frac
        profile = dataclasses.replace(one.profile, table=table)
        wrong.append(dataclasses.replace(one, profile=profile))
    return FleetSpec(tuple(wrong))


def requests_of(cell: Cell, seed: int) -> str | Workload:
    """Name of the cell's generator, or requests drawn for it."""
    if not (cell.lengths_tok or cell.square_req_s):
        return cell.workload
    from voltana_ctrl.sim.workload import make_workload

    rng = np.random.default_rng([seed, 7])
    total_s = WARMUP_S + cell.duration_s + 61.0
    loads = cell.square_req_s or (cell.rate_req_s,)
    hold_s = cell.hold_s if cell.square_req_s else total_s
    parts = []
    begin_s = 0.0
    while begin_s < total_s:
        load = loads[len(parts) % len(loads)]
        parts.append(begin_s + np.sort(rng.uniform(0.0, hold_s, rng.poisson(load * hold_s))))
        begin_s += hold_s
    arrival_s = np.concatenate(parts)
    arrival_s = arrival_s[arrival_s < total_s]
    n = len(arrival_s)
    if cell.lengths_tok:
        prompt, output = (rng.integers(low, high + 1, n) for low, high in cell.lengths_tok)
    else:
        drawn = make_workload(cell.workload, n / total_s * 1.2 + 1.0, total_s, seed)
        prompt, output = drawn.prompt_tok[:n], drawn.output_tok[:n]
    return Workload(
        name="adversary", arrival_s=arrival_s, prompt_tok=prompt, output_tok=output,
        duration_s=total_s,
    )  # fmt: skip


def simulate(name: str, policy: str, seed: int, layout: str = "") -> dict[str, object]:
    """One run of one policy, on the cell's machines or on these in other roles, as a row."""
    cell = CELLS[name]
    profile = load_profile(cell.profile)
    fleet = FleetSpec.parse(cell.fleet, profile)
    if layout:
        roles = [one.role for one in FleetSpec.parse(layout, profile).instances]
        fleet = fleet.in_roles(roles)  # they keep the names by which mishaps know them
    workload = requests_of(cell, seed)
    figures = Run(
        policy=policy,
        fleet=fleet,
        slo=cell.slo,
        workload=workload,
        rate_req_s=cell.rate_req_s if isinstance(workload, str) else None,
        seed=seed,
        duration_s=cell.duration_s,
        warmup_s=WARMUP_S,
        settings=cell.settings,
        arrivals=cell.arrivals,
        faults=cell.faults,
        power_budget=None if cell.budget_w is None else PowerBudget.parse(f"{cell.budget_w}"),
        believed=None
        if cell.believed_pace_frac == 1.0
        else believed(fleet, cell.believed_pace_frac),
    ).simulate()
    return {
        "kind": cell.kind,
        "cell": name,
        "policy": policy,
        "seed": seed,
        "requests": figures["requests_arrived"],
        "power_w": figures["mean_power_w"],
        "ttft_attainment": figures["ttft_attainment"],
        "itl_attainment": figures["itl_attainment"],
        "over_budget_frac": figures["over_budget_frac"],
        "layout": figures["layout"],
    }


def read_rows(path: Path) -> list[dict]:
    """Rows of the file, with numbers as numbers; none if there is no file yet."""
    if not path.exists():
        return []
    texts = ("kind", "cell", "policy", "layout")
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {
                key: value if key in texts else float(value) if value else np.nan
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def mean(rows: Iterable[dict]) -> np.ndarray:
    """Watts, the two attainments and the share over budget, over seeds."""
    keys = ("power_w", "ttft_attainment", "itl_attainment", "over_budget_frac")
    return np.mean([[row[key] for key in keys] for row in rows], axis=0)


@dataclass(frozen=True)
class Pair:
    """`mpc` beside the opponent that it is compared with, in one layout."""

    ours: np.ndarray
    rival: str = ""
    rival_w: float = np.nan
    layout: str = ""
    broken: bool = False

    @property
    def ratio(self) -> float:
        """Its watts over the opponent's."""
        return float(self.ours[0]) / self.rival_w

    @property
    def dearer(self) -> bool:
        """Whether the difference is more than half a percent."""
        return self.ratio > 1.0 + DEARER_FRAC

    @property
    def word(self) -> str:
        """What the table says."""
        return "**broken**" if self.broken else "dearer" if self.dearer else ""


@dataclass(frozen=True)
class Verdict:
    """How one cell ended: as given, and in the layout that the opponent chose."""

    given: Pair
    alike: Pair | None

    @property
    def lost(self) -> bool:
        """Whether it is broken or dearer as given."""
        return self.given.broken or self.given.dearer


def judge(cell: str, rows: Iterable[dict]) -> Verdict:
    """Judge against the opponents of the same cell and the same seeds.

    `alike` is None where there is no other layout to judge on. It is no better than `mpc` beside
    the cheapest opponent that keeps the promise without another layout.
    """
    what = CELLS[cell]
    own = what.fleet
    ours, others = {}, {}
    for row in rows:
        if row["policy"] == "mpc":
            ours[row["seed"], row["layout"]] = row
        elif row["policy"] != "cascade":
            others.setdefault(row["policy"], []).append(row)

    def missed(figures: np.ndarray, allowed: float) -> bool:
        over = what.budget_w is not None and not figures[3] <= 1e-3
        return over or float(min(figures[1:3])) < what.slo.attainment - allowed

    holders = {name: runs for name, runs in others.items() if not missed(mean(runs), 0.0)}

    def beside(names: Iterable[str], *, as_they: bool) -> Pair | None:
        rival = min(names, key=lambda name: mean(holders[name])[0], default="")
        runs = holders.get(rival, [])
        asked = [(run["seed"], run["layout"] if as_they else own) for run in runs]
        pairs = [(run, ours[key]) for run, key in zip(runs, asked, strict=True) if key in ours]
        if not pairs:
            return None
        figures = mean(mine for _, mine in pairs)
        layouts = dict.fromkeys(run["layout"] for run, _ in pairs)
        return Pair(
            figures, rival, float(mean(run for run, _ in pairs)[0]), ", ".join(layouts),
            missed(figures, BROKEN_FRAC),
        )  # fmt: skip

    mine = mean(row for (_, layout), row in ours.items() if layout == own)
    given = beside(holders, as_they=False) or Pair(mine)
    same = [name for name, runs in holders.items() if all(run["layout"] == own for run in runs)]
    alike = None
    if given.rival and given.rival not in same:
        alike = beside(holders, as_they=True)
        worse = beside(same, as_they=False)
        if alike and worse and (worse.broken, worse.dearer) > (alike.broken, alike.dearer):
            alike = worse
    return Verdict(given, alike)


def by_cell(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows of each cell that `mpc` has run as given."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["cell"] in CELLS:
            found.setdefault(row["cell"], []).append(row)
    return {
        cell: found[cell]
        for cell in CELLS
        if any(
            (row["policy"], row["layout"]) == ("mpc", CELLS[cell].fleet)
            for row in found.get(cell, ())
        )
    }


def in_other_layouts(rows: Iterable[dict]) -> Iterator[tuple[str, str, int, str]]:
    """Runs of `mpc` that the second verdict needs."""
    for cell, its in by_cell(rows).items():
        given = judge(cell, its).given
        if given.broken or given.dearer:
            for row in its:
                if row["policy"] == given.rival:
                    yield cell, "mpc", int(row["seed"]), row["layout"]


def table(rows: list[dict]) -> tuple[str, int]:
    """The table of the docs as Markdown, and how many cells are broken as given."""
    lines = [
        "| kind | cell | mpc W | TTFT / ITL % | cheapest that keeps it | its W | ratio | |"
        " alike: layout | mpc W | TTFT / ITL % | ratio | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    given, alike = [], []
    for cell, its in by_cell(rows).items():
        verdict = judge(cell, its)
        one = verdict.given
        word = one.word
        over = one.ours[3]
        if not np.isnan(over):
            word += f" over budget {100 * over:.2f} %"
        rival = "nobody | - | -"
        if one.rival:
            rival = f"{one.rival} | {one.rival_w:.0f} | {one.ratio:.3f}"
        second = "| | | | "
        given.append(one)
        alike.append(one)
        if verdict.lost and verdict.alike:
            other = alike[-1] = verdict.alike
            second = f"{other.layout} | {_figures(other)} | {other.ratio:.3f} | {other.word}"
        begin = f"| {CELLS[cell].kind} | {cell} | {_figures(one)}"
        lines.append(f"{begin} | {rival} | {word.strip()} | {second} |")
    for name, pairs in (("as given", given), ("alike", alike)):
        broken = sum(pair.broken for pair in pairs)
        dearer = sum(pair.dearer and not pair.broken for pair in pairs)
        lines.append(f"\n{name}: of {len(pairs)} cells {broken} broken, {dearer} dearer")
    return "\n".join(lines), sum(pair.broken for pair in given)


def _figures(pair: Pair) -> str:
    power_w, ttft, itl = pair.ours[:3]
    return f"{power_w:.0f} | {100 * ttft:.2f} / {100 * itl:.2f}"


def complete(wanted: list, rows: list[dict], pool, writer, file, begin_s: float) -> None:
    """Run what is wanted and not among the rows, and add it to them and to the file."""
    known = {
        (row["cell"], row["policy"], row["seed"], row["layout"])
        for row in rows
        if row["cell"] in CELLS  # a file may hold cells that are no more
    }
    known |= {(*one[:3], "") for one in known if one[1] != "mpc" or one[3] == CELLS[one[0]].fleet}
    missing = [one for one in wanted if (*one[:2], float(one[2]), one[3]) not in known]
    runs = {pool.submit(simulate, *what): what for what in missing}
    for done, run in enumerate(as_completed(runs), 1):
        try:
            row = run.result()
        except ConfigError as error:
            print(f"{runs[run][:2]} is left out: {error}", flush=True)
            continue
        writer.writerow(row)
        file.flush()
        rows.append({**row, "over_budget_frac": _number(row["over_budget_frac"])})
        if done % 100 == 0:
            print(f"{done} of {len(missing)}, {time.perf_counter() - begin_s:.0f} s", flush=True)


def _number(value: object) -> float:
    return np.nan if value is None else float(value)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing in the file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="CSV file, extended by what is missing in it")
    parser.add_argument("--cells", default="", help="only cells whose name or kind has this in it")
    parser.add_argument("--policies", default=",".join(("mpc", *OPPONENTS)))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    options = parser.parse_args(arguments)
    rows = read_rows(options.results)
    if options.table:
        text, broken = table(rows)
        print(text)
        return int(broken > 0)
    policies = options.policies.split(",")
    wanted = [
        (name, policy, seed, "")
        for name, cell in CELLS.items()
        if options.cells in name or options.cells in cell.kind
        for policy in policies
        for seed in range(options.seeds)
    ]
    begin_s = time.perf_counter()
    with (
        options.results.open("a", newline="", encoding="utf-8") as file,
        ProcessPoolExecutor(options.jobs) as pool,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        complete(wanted, rows, pool, writer, file, begin_s)
        if "mpc" in policies:
            wanted = [one for one in in_other_layouts(rows) if options.cells in one[0]]
            complete(wanted, rows, pool, writer, file, begin_s)
    text, broken = table(read_rows(options.results))
    print(text)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
