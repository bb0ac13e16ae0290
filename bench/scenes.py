"""Forty-six small comparisons whose figures are kept, to see what a change of the code changes.

    python bench/scenes.py before/          # on the old code: one JSON file a scene
    python bench/scenes.py after/           # on the new code
    python bench/scenes.py --difference before/ after/

The scenes cross fleets, policies, workloads, faults and budgets. What a clock on the wall measured
is left out of the files, so that a change which keeps the behaviour leaves them the same byte for
byte. `--difference` names each file that is not, with its largest relative change of power and its
largest change of attainment; the exit status is 1 if there is one. A scene whose file is there
is not run again.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from voltana_ctrl.cli import main as command

#: Measured on a wall clock, so never the same twice.
TIMING = ("decide_p50_s", "decide_p99_s", "sim_wall_s")
A100, H100 = "a100-sxm-80gb/llama-3.1-8b", "h100-sxm-80gb/llama-3.1-8b"
ALL = (
    "static-max,static-budget,static-1005,threshold,dualscale,pack,voltanallm,voltanallm-tile,"
    "voltanallm-jsq,voltanallm-full-ladder,voltanallm-adaptive,cascade,mpc,bound"
)
OURS = "voltanallm,cascade,mpc,bound"
COMPILED = "static-max,dualscale,voltanallm,voltanallm-jsq,bound"

UNLIKE = f"""
[[instance]]
id = "a100-prefill"
role = "prefill"
profile = "{A100}"
count = 2

[[instance]]
id = "h100-decode"
role = "decode"
profile = "{H100}"
node = "node1"

[[instance]]
id = "a100-decode"
role = "decode"
profile = "{A100}"
max_batch = 512
"""
WAKING = f"""
[[instance]]
role = "prefill"
profile = "{A100}"
count = 2
asleep_w = 20.0
wake_s = 10.0

[[instance]]
role = "decode"
profile = "{A100}"
count = 3
asleep_w = 20.0
wake_s = 10.0
wake_j = 500.0
"""
FAULTS = {
    "failures": """
[[failure]]
instance = "decode-0"
from_s = 15.0
until_s = 25.0

[[failure]]
instance = "prefill-1"
from_s = 20.0
until_s = 24.0
""",
    "slow": """
[[slowdown]]
instance = "decode-1"
from_s = 12.0
until_s = 30.0
slow_frac = 1.4
""",
    "clamp": """
[[clock_clamp]]
instance = "decode-0"
from_s = 12.0
clamp_mhz = 600.0
""",
}


def scenes(folder):
    """Arguments of `voltana-ctrl compare` by scene."""
    files = {"unlike": UNLIKE, "waking": WAKING, **FAULTS}
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")

    def path(name):
        return (folder / f"{name}.toml").as_posix()

    def scene(rate, policies=OURS, **options):
        told = {"duration": 30, "warmup": 10, "rate": rate, "policies": policies, **options}
        return [
            word
            for name, value in told.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    found = {f"reference-{rate}": scene(rate, ALL) for rate in (10, 20, 35, 50, 65, 80, 100)}
    found |= {f"4C-{rate}": scene(rate, ALL, fleet="4C") for rate in (10, 35, 50)}
    found |= {
        f"{workload}-{rate}": scene(rate, workload=workload)
        for workload, rate in (
            ("lmsys", 30), ("azure-conv", 10), ("azure-code", 8), ("fixed", 20), ("fixed", 60),
        )
    }  # fmt: skip
    found |= {
        f"{fleet}-{rate}": scene(rate, fleet=fleet)
        for fleet, rate in (
            ("1P1D", 15), ("1P3D", 30), ("4P4D", 90), ("8P24D", 200), ("2C", 15), ("16P48D", 100),
        )
    }  # fmt: skip
    found |= {
        f"budget-{name}": scene(rate, "static-budget,pack,cascade,mpc", power_budget_w=budget_w)
        for name, rate, budget_w in (
            ("constant", 35, "650"), ("steps", 50, "0:1400,20:800,32:1400"), ("tight", 65, "700"),
        )
    }  # fmt: skip
    found["budget-4C"] = scene(30, "static-budget,cascade,mpc", fleet="4C", power_budget_w="900")
    found |= {
        f"arrivals-{name}": scene(30, f"pack,{OURS}", arrivals=arrivals)
        for name, arrivals in (
            ("gamma", "gamma:cv=3"), ("mmpp", "mmpp:high_s=5,low_s=15"),
            ("diurnal", "diurnal:period_s=40"),
        )
    }  # fmt: skip
    found |= {
        f"faults-{name}": scene(40, f"pack,voltanallm-adaptive,{OURS}", faults=path(name))
        for name in FAULTS
    }
    found["faults-budget"] = scene(35, "cascade,mpc", faults=path("failures"), power_budget_w="900")
    found["unlike"] = scene(
        40, "static-max,pack,dualscale+least-kv,cascade,mpc,bound", fleet=path("unlike")
    )
    found["unlike-routers"] = scene(
        40, "threshold+jsq,dualscale+two-choices/random,static-max+tokens-x-batch",
        fleet=path("unlike"),
    )  # fmt: skip
    found["waking"] = scene(20, f"pack,{OURS}", fleet=path("waking"))
    found["waking-diurnal"] = scene(
        30, f"pack,{OURS}", fleet=path("waking"), arrivals="diurnal:period_s=30"
    )
    found["h100"] = scene(60, ALL, profile=H100)
    found["70b"] = scene(3, profile="a100-sxm-80gb/llama-3-70b-tp4", slo="ttft=3,itl=0.1")
    found["a800"] = scene(5, profile="a800-sxm-80gb/qwen3-32b", slo="ttft=3,itl=0.1")
    found["tight-itl"] = scene(40, slo="ttft=0.6,itl=0.04")
    found["low-attainment"] = scene(50, slo="ttft=0.4,itl=0.06,attainment=0.9")
    found["jitter"] = scene(50, COMPILED + ",mpc", jitter=0.2)
    found["slow-sets"] = scene(35, COMPILED + ",mpc", actuation_ms=200)
    found["long-tick"] = scene(35, tick_ms=1000)
    found["seeds"] = scene(35, COMPILED, seeds=3)
    found["closed"] = [
        "--concurrency", "60", "--duration", "30", "--warmup", "10", "--policies", COMPILED,
    ]  # fmt: skip
    return found


def run(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        for name, options in scenes(Path(made)).items():
            path = folder / f"{name}.json"
            if path.is_file():
                continue
            sys.argv = ["voltana-ctrl", "compare", *options, "--json", str(path), "--jobs", "1"]
            with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
                command()
            found = json.loads(path.read_text(encoding="utf-8"))
            found["runs"] = [
                {key: value for key, value in each.items() if key not in TIMING}
                for each in found["runs"]
            ]
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(name, flush=True)


def difference(before, after):
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*.json")})
    unlike = 0
    for name in names:
        one, other = before / name, after / name
        if not (one.is_file() and other.is_file()):
            unlike += 1
            print(f"{name}: in one of the folders only")
        elif one.read_bytes() != other.read_bytes():
            unlike += 1
            print(f"{name}: {_largest(*(json.loads(each.read_text()) for each in (one, other)))}")
    print(f"{len(names)} scenes, {len(names) - unlike} the same byte for byte")
    return unlike


def _largest(one, other):
    pairs = list(zip(one["runs"], other["runs"], strict=True))
    powers = [(a["mean_power_w"], b["mean_power_w"]) for a, b in pairs]
    power = max(abs(b / a - 1.0) for a, b in powers if a)
    met = max(
        abs((b[key] or 0.0) - (a[key] or 0.0))
        for a, b in pairs
        for key in ("ttft_attainment", "itl_attainment")
    )
    return f"power by up to {100 * power:.3f} %, attainment by up to {100 * met:.3f} points"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--difference", action="store_true")
    options = parser.parse_args()
    if options.difference:
        return int(difference(*options.folders) > 0)
    run(*options.folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
