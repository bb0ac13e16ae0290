"""What a plan earns: where decisions take time, or the future is known in part.

    python bench/planning.py results.csv                # resumes: runs in the file are not repeated
    python bench/planning.py results.csv --scene diurnal
    python bench/planning.py results.csv --table        # the tables of docs/planning.md, no run

All figures are simulated: two seeds, at least 5,000 judged requests a run, five minutes to learn
before. Every run of a scene meets the same requests, and every ratio is to an opponent of the same
run and seed that keeps its promise. A scene passes if every seed shows what it must.
"""

import argparse
import csv
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from plan_scenes import LEVERS, SCENES, Case, Scene, holds

from voltana_ctrl import load_profile
from voltana_ctrl.errors import ConfigError

PROFILE = "a100-sxm-80gb/llama-3.1-8b-2026-11"
SEEDS = 2
KEYS = {
    "requests": "requests_arrived", "power_w": "mean_power_w",
    "ttft_attainment": "ttft_attainment", "itl_attainment": "itl_attainment",
    "over_budget_frac": "over_budget_frac", "deadline_missed": "deadline_missed",
    "deferred": "deferred_arrived", "tokens": "tokens_out", "cost": "cost",
    "co2_g": "co2_g", "wakes": "wakes", "role_changes": "role_changes",
}  # fmt: skip
TEXTS = ("scene", "entry", "profile")
COLUMNS = (*TEXTS, "seed", *KEYS, "cpu_s")


def read_rows(path: Path) -> list[dict]:
    """Rows of the file, with numbers as numbers; none if there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {
                key: value if key in TEXTS else float(value) if value else np.nan
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def found_in(rows: list[dict], scene: str, seed: int, profile: str) -> dict[str, dict]:
    """Figures of a scene and seed, by entry."""
    what = (scene, profile, float(seed))
    return {
        row["entry"]: row for row in rows if (row["scene"], row["profile"], row["seed"]) == what
    }


def play(
    scene: str, seed: int, profile: str, data: Path, path: Path, entries: list[str] | None
) -> None:
    """Run what is missing of a scene with one seed, one run after the other."""
    case = Case(
        profile=load_profile(profile), seed=seed, data=data,
        found=found_in(read_rows(path), scene, seed, profile),
    )  # fmt: skip
    for entry, figures_of in SCENES[scene].entries.items():
        if entry in case.found or entry not in (entries or SCENES[scene].entries):
            continue
        begin_s = time.process_time()
        try:
            figures = figures_of(case)
        except (ConfigError, FileNotFoundError) as error:
            print(f"{scene}, {entry} is left out: {error}", flush=True)
            continue
        row = {"scene": scene, "entry": entry, "profile": profile, "seed": float(seed)}
        row |= {
            key: np.nan if figures.get(name) is None else float(figures[name])
            for key, name in KEYS.items()
        }
        row["cpu_s"] = time.process_time() - begin_s
        case.found[entry] = row
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        print(f"{scene}, seed {seed}, {entry}: {told(row)}; {row['cpu_s']:.0f} s CPU", flush=True)


def told(row: dict) -> str:
    """Watts, and the promises where there are any."""
    if np.isnan(row["ttft_attainment"]):
        return f"{row['power_w']:.0f}"
    return (
        f"{row['power_w']:.0f}; {100 * row['ttft_attainment']:.2f} /"
        f" {100 * row['itl_attainment']:.2f}"
    )


def judge(scene: Scene, found: dict[str, dict]) -> tuple[str, bool]:
    """What one seed shows, in words, and whether it is what must be seen."""
    if scene.judged is not None:
        return scene.judged(found)
    ours = found[scene.ours]
    others = {
        name: row for name, row in found.items() if name != scene.ours and name not in scene.beside
    }
    able = {name: row for name, row in others.items() if holds(row, scene.slo)}
    held = holds(ours, scene.slo)
    if not able:
        return "nobody else holds", held and scene.misses_do
    rival = (
        scene.rival if scene.rival in able else min(able, key=lambda name: able[name]["power_w"])
    )
    ratio = ours["power_w"] / able[rival]["power_w"]
    return f"{ratio:.3f} of {rival} ({told(able[rival])})", held and ratio <= scene.most


def table(rows: list[dict], profile: str) -> tuple[str, int]:
    """Both tables as Markdown, and how many scenes fail."""
    lines = ["| scene | must | mpc, by seed | against, by seed | |", "|---|---|---|---|---|"]
    every = ["| scene | run | W; TTFT / ITL %, by seed | wakes, role changes | CPU s |",
             "|---|---|---|---|---|"]  # fmt: skip
    failed = 0
    for name, scene in SCENES.items():
        seeds = [found_in(rows, name, seed, profile) for seed in range(SEEDS)]
        seeds = [found for found in seeds if scene.ours in found]
        if not seeds:
            continue
        try:
            verdicts = [judge(scene, found) for found in seeds]
        except KeyError as error:
            verdicts = [(f"{error} has not run", False)]
        passed = all(good for _, good in verdicts)
        failed += not passed
        ours = "<br>".join(told(found[scene.ours]) for found in seeds)
        said = "<br>".join(text for text, _ in verdicts)
        lines.append(
            f"| {name} | {scene.must} | {ours} | {said} | {'yes' if passed else '**no**'} |"
        )
        for entry in scene.entries:
            ran = [found[entry] for found in seeds if entry in found]
            if not ran:
                continue
            changes = ", ".join(
                "-" if np.isnan(mean) else f"{mean:.0f}"
                for mean in (
                    np.mean([row[key] for row in ran]) for key in ("wakes", "role_changes")
                )
            )
            texts = "<br>".join(told(row) for row in ran)
            cpu_s = np.mean([row["cpu_s"] for row in ran])
            every.append(f"| {name} | {entry} | {texts} | {changes} | {cpu_s:.0f} |")
    return "\n".join((*lines, "", *lever_lines(rows, profile), "", *every)), failed


def lever_lines(rows: list[dict], profile: str) -> list[str]:
    """What each lever is worth in its scene, as a Markdown table."""
    lines = ["| lever | scene | with, by seed | without, by seed | without / with |",
             "|---|---|---|---|---|"]  # fmt: skip
    for lever, (scene, ours, left_out) in LEVERS.items():
        seeds = [found_in(rows, scene, seed, profile) for seed in range(SEEDS)]
        both = [(found[ours], found[left_out]) for found in seeds if {ours, left_out} <= set(found)]
        if not both:
            continue
        # What is priced is told by its cost, the rest by power.
        key = "power_w" if np.isnan(both[0][0]["cost"]) else "cost"
        ratio = np.mean([off[key] / on[key] for on, off in both])
        shown = told if key == "power_w" else lambda row: f"cost {row['cost']:.3f}"
        texts = ("<br>".join(shown(pair[k]) for pair in both) for k in (0, 1))
        lines.append(f"| {lever} | {scene} | {' | '.join(texts)} | {ratio:.3f} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing in the file, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="CSV file, extended by what is missing in it")
    parser.add_argument("--scene", action="append", choices=list(SCENES), help="only this one")
    parser.add_argument("--entry", action="append", help="only this run, and others so named")
    parser.add_argument("--profile", default=PROFILE)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", type=Path, help="folder of public traces",
                        default=Path(__file__).resolve().parents[2] / "shared/data")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    options = parser.parse_args(arguments)
    if not options.table:
        if not options.results.exists():
            with options.results.open("w", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writeheader()
        with ProcessPoolExecutor(options.jobs) as pool:
            plays = [
                pool.submit(
                    play, scene, seed, options.profile, options.data, options.results, options.entry
                )
                for scene in options.scene or SCENES
                for seed in range(options.seeds)
            ]
            for each in plays:
                each.result()
    text, failed = table(read_rows(options.results), options.profile)
    print(text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
