"""Closed loop against measurement: eight L20 under clock control.

    python -m bench.validation.l20            # the tables of docs/validation/l20.md
    python -m bench.validation.l20 --profile  # the file of the profile l20/qwen2.5-7b

Times are the published fits of one engine alone. Of the power two numbers are fitted, and to the
rows at boost alone: which part of the power above idle that one engine was seen to hold while it
decodes a fleet holds (`held`), and which part of the energy of a prompt token a decoded token
takes (`token`). Prompts in an iteration that decodes too draw both, up to the power cap. All other
rows are predictions; those under control are given their own mean clock and share of engines on.
"""

import sys
from dataclasses import replace

import numpy as np
from scipy.optimize import isotonic_regression, minimize_scalar, nnls

from bench.validation.l20_fleet import (
    FACTS,
    SPAN_S,
    WARMUP_S,
    served,
    served_dynamic,
    served_static,
    states,
    workload,
)
from voltana_ctrl import FleetSpec
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.kernels.layout import PROFILE_DTYPE
from voltana_ctrl.profiles import load_profile
from voltana_ctrl.types import Profile, Slo

NAME, REFERENCE = "l20/qwen2.5-7b", "a100-sxm-80gb/llama-3.1-8b"
#: Energy of a decoded token over that of a prompt token above idle, as fitted here.
TOKEN_FRAC = 0.46
#: Tokens that are computed together, of kernels on four other cards: docs/validation/sources.md.
TILE_TOK = 64
LADDER_MHZ = np.arange(900.0, 2521.0, 15.0)
PROMISES = {"sharegpt": Slo(ttft_s=5.0, itl_s=0.15), "alpaca": Slo(ttft_s=1.0, itl_s=0.1)}
DRAWS, WINDOW_S = 20, 120.0
#: What predictions are asked to be within: watts, TPOT, and TTFT.
WITHIN = (0.07, 0.15, 0.15)
#: 90 % of a normal distribution lie within so many standard deviations.
SD_OF_90 = 1.645


def falling(parts, seconds):
    """Coefficients per clock, none of which rises with it, that fit these seconds best.

    Each is a sum of increments >= 0 from the highest clock down. `parts` are the factors of the
    coefficients at each load, shape (n_loads, n_parts); `seconds` has shape (n_loads, n_clocks).
    """
    n_clocks = seconds.shape[1]
    above = np.triu(np.ones((n_clocks, n_clocks)))
    design = np.einsum("lp,ck->lcpk", parts, above) / seconds[:, :, None, None]
    design = design.reshape(seconds.size, -1)
    scale = np.linalg.norm(design, axis=0)
    found, _ = nnls(design / scale, np.ones(seconds.size), maxiter=10_000)
    return (found / scale).reshape(-1, n_clocks) @ above.T


def engine_times(one):
    """Base and slopes of prompts and of decoding, of the fits of one engine.

    Those fits trade base against slope from clock to clock, and decoding bends with the square of
    the batch. Here both are lines whose coefficients never rise with the clock: of prompts of 32 to
    2,048 tokens, and of 1 to 64 requests at 128 to 1,280 tokens of context.
    """
    n = np.geomspace(32.0, 2048.0, 13)
    prompt_s = (
        one["a_ms"] * 1e-3 + np.outer(n, one["b_us"] * 1e-6) + np.outer(n**2, one["c_ns"] * 1e-9)
    )
    prompt = falling(np.stack([np.ones_like(n), n, n**2], axis=1), prompt_s)
    batch, context = (
        grid.ravel() for grid in np.meshgrid([1.0, 4, 8, 16, 32, 48, 64], [128.0, 640, 1280])
    )
    step_s = (
        one["alpha_ms"] * 1e-3
        + np.outer(batch, one["beta_us"] * 1e-6)
        + np.outer(batch * context, one["gamma_ns"] * 1e-9)
        + np.outer(batch**2, one["delta_us"] * 1e-6)
    )
    return prompt, falling(np.stack([np.ones_like(batch), batch, batch * context], axis=1), step_s)


def request_s(prompt, step):
    """Seconds by which a request of a full batch costs more than a token of a prompt, per clock.

    Every token that is decoded goes through the vocabulary and is sampled; of a prompt only the
    last. The least squares of relative errors of steps of 64 to 256 requests, which take the later
    of the line of small batches and that of a prompt of as many tokens with this on top.
    """

    def off(more_s, k):
        found = []
        for one in FACTS["steps"]:
            n = one["batch_req"]
            line, roof = step[0][k] + step[1][k] * n, prompt[0][k] + (prompt[1][k] + more_s) * n
            kv_s = step[2][k] * n * one["context_tok"]
            found.append((max(line, roof) + kv_s) / (1e-3 * one["ms"][k]) - 1.0)
        return found

    least = [
        minimize_scalar(
            lambda us, k=k: sum(np.square(off(1e-6 * us, k))), bounds=(0.0, 100.0), method="bounded"
        ).x
        for k in range(len(prompt[0]))
    ]
    return 1e-6 * isotonic_regression(least, increasing=False).x


def columns(held, token):
    """Coefficients at the six clocks that were measured."""
    one = {name: np.asarray(values, dtype=float) for name, values in FACTS["engine"].items()}
    # Never less at a higher clock: the readings scatter by some watts.
    idle_w = isotonic_regression(one["idle_w"]).x
    saturated_w = one["p0_w"] + one["p1_w"]
    prompt, step = engine_times(one)
    held_w = held * (one["q0_w"] - idle_w)
    prompt_j = (saturated_w - idle_w) * prompt[1]
    spare_w = FACTS["power_cap_w"] - saturated_w
    return {
        "idle_w": idle_w,
        "decode_base_s": step[0],
        "decode_req_s": step[1],
        "decode_kv_s": step[2],
        # A decoded token is computed as a prompt token is, and then is a word.
        "decode_roof_base_s": prompt[0],
        "decode_roof_s": prompt[1] + request_s(prompt, step),
        "decode_power_w": idle_w + held_w,
        "decode_req_j": token * prompt_j,
        "prefill_base_s": prompt[0],
        "prefill_tok_s": prompt[1],
        "prefill_tok2_s": prompt[2],
        "prefill_power_w": saturated_w,
        "prefill_beside_w": np.maximum(0.0, np.minimum(held_w, spare_w)),
    }


def profile(held, token):
    """The profile of an engine with these two numbers."""
    table = np.zeros(len(LADDER_MHZ), dtype=PROFILE_DTYPE)
    table["clock_mhz"] = LADDER_MHZ
    table["decode_tile_tok"] = TILE_TOK
    for name, values in columns(held, token).items():
        table[name] = np.interp(LADDER_MHZ, FACTS["engine"]["clock_mhz"], values)
    return Profile(
        name=NAME, table=table, idle_w=float(table["idle_w"][-1]), parked_w=FACTS["parked_w"],
        wake_s=FACTS["wake_s"], kv_capacity_tok=FACTS["kv_capacity_tok"], max_batch=256,
        prefill_budget_tok=2048, kv_bytes_per_tok=FACTS["kv_bytes_per_tok"],
        link_bytes_s=FACTS["link_bytes_s"], link_latency_s=FACTS["link_latency_s"],
        power_cap_w=FACTS["power_cap_w"], first_token="decode", status="fitted",
    )  # fmt: skip


def fit():
    """`held` and `token` by least squares on the rows at boost, where power is linear in both."""
    rows = FACTS["boost"]["rows"]
    at = {
        pair: np.array(
            [served(profile(*pair), *row[:3], seeds=1)[0] / row[3] for row in rows]
        )
        for pair in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    }  # fmt: skip
    none = at[0.0, 0.0]
    design = np.stack([at[1.0, 0.0] - none, at[0.0, 1.0] - none], axis=1)
    found, *_ = np.linalg.lstsq(design, 1.0 - none, rcond=None)
    left = design @ found + none - 1.0
    sd = left.std(ddof=2) * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    return found, sd


def boost_rows():
    """All rows at boost, by data set, rate and layout."""
    return {tuple(row[:3]): row[3:] for row in FACTS["boost"]["rows"] + FACTS["further"]["rows"]}


def over(predicted, measured):
    """Prediction over measurement, or a dash where nothing was published."""
    return f"{predicted / measured:.2f}" if measured else "-"


def cells(got, power_w, ttft_ms, tpot_ms):
    """Measured watts and TPOT, and what was predicted over each."""
    return (
        f"{power_w} | {over(got[0], power_w)} | {tpot_ms or '-'} | {over(got[2], tpot_ms)}"
        f" | {over(got[1], ttft_ms)}"
    )


MEASURED = "W measured | W / measured | TPOT ms measured | TPOT / measured | TTFT / measured"


def boost_table(believed, which="boost"):
    """Rows at boost: those to which two numbers of the power were fitted, or further ones."""
    lines = [f"| data | req/s | layout | {MEASURED} |", "|---|---|---|---|---|---|---|---|"]
    for data, rate, layout, *measured in FACTS[which]["rows"]:
        got = served(believed, data, rate, layout)
        lines.append(f"| {data} | {rate:g} | {layout} | {cells(got, *measured)} |")
    return lines


def static_table(believed):
    """Rows of one setting throughout, none of which was used for fitting."""
    lines = [
        f"| what | data | req/s | on | MHz | others | {MEASURED} | batch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in FACTS["static"]["rows"]:
        data, rate, layout, mhz, others, *measured, what = row
        got = served_static(believed, row)
        lines.append(
            f"| {what} | {data} | {rate:g} | {layout} | {', '.join(map(str, mhz))} | {others}"
            f" | {cells(got, *measured)} | {got[3]:.0f} |"
        )
    return lines


def dynamic_table(believed):
    """Rows of clocks and engines under control, none of which was used for fitting."""
    lines = [
        f"| what | data | req/s | at boost | else | {MEASURED} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in FACTS["dynamic"]["rows"]:
        data, rate, on, *_, what = row
        (boost_s, _, _), (low_s, _, low_mhz) = states(*row[2:7])[:2]
        if not row[4]:
            low_s = SPAN_S - boost_s
        got = served_dynamic(believed, row)
        lines.append(
            f"| {what} | {data} | {rate:g} | {boost_s / (boost_s + low_s):.0%}"
            f" | {on} on at {low_mhz:.0f} MHz | {cells(got, *row[7:10])} |"
        )
    return lines


def within_table(believed):
    """How many of the rows are predicted within the bounds that were asked for."""
    kinds = {
        "one setting throughout": [
            (row[5:8], served_static(believed, row)) for row in FACTS["static"]["rows"]
        ],
        "under control": [
            (row[7:10], served_dynamic(believed, row)) for row in FACTS["dynamic"]["rows"]
        ],
        "at boost, not fitted": [
            (row[3:], served(believed, *row[:3])) for row in FACTS["further"]["rows"]
        ],
    }
    band = believed.band
    band_frac = [
        SD_OF_90 * np.hypot(band.decode_power_frac, band.clock_power_frac),
        SD_OF_90 * np.hypot(band.decode_time_frac, band.clock_time_frac),
    ]
    lines = [
        "| rows | W within 7 % | TPOT within 15 % | TTFT within 15 % | W off by, mean | TPOT off by"
        " | TTFT off by | TTFT / measured"
        f" | W within {band_frac[0]:.0%}, its 90 % band | TPOT within {band_frac[1]:.0%} |",
        "|---" * 10 + "|",
    ]
    found = {}
    for kind, rows in kinds.items():
        # Watts, TPOT, TTFT over what was published of them.
        found[kind] = [
            np.array([got[at] / measured[at] for measured, got in rows if measured[at]])
            for at in (0, 2, 1)
        ]
    found["all"] = [np.concatenate(each) for each in zip(*found.values(), strict=True)]
    for kind, ratios in found.items():
        errors = [np.abs(ratio - 1.0) for ratio in ratios]
        spread = f"{ratios[2].min():.2f} to {ratios[2].max():.2f}"
        asked = " | ".join(
            f"{(error < within).sum()} of {len(error)}"
            for error, within in zip(errors, WITHIN, strict=True)
        )
        means = " | ".join(f"{error.mean():.1%}" for error in errors)
        covered = " | ".join(
            f"{np.mean(error < within):.0%}"
            for error, within in zip(errors, band_frac, strict=False)
        )
        lines.append(f"| {kind} | {asked} | {means} | {spread} | {covered} |")
    return lines


def best_static():
    """The best static setting of the source on colocated engines, by data set."""
    return [
        row for row in FACTS["static"]["rows"] if row[-1] == "best static" and row[2].endswith("C")
    ]


def without_beside(believed):
    """The profile where prompts draw nothing on top of decoding: the other end of what may be."""
    table = believed.table.copy()
    table["prefill_beside_w"] = 0.0
    return replace(believed, table=table)


def ratio_table(believed):
    """Best static over all at boost: what lower clocks and fewer engines save."""
    lines = ["| data | measured | predicted | without | W / measured without |", "|---" * 5 + "|"]
    for row in best_static():
        data, rate, *_ = row
        with_w, without_w = (
            served_static(one, row)[0] for one in (believed, without_beside(believed))
        )
        all_on_w = [
            served(one, data, rate, "8C")[0] for one in (believed, without_beside(believed))
        ]
        measured = row[5] / boost_rows()[data, rate, "8C"][0]
        lines.append(
            f"| {data} | {measured:.2f} | {with_w / all_on_w[0]:.2f}"
            f" | {without_w / all_on_w[1]:.2f} | {without_w / row[5]:.2f} |"
        )
    return lines


def drawn(believed, rng):
    """What the engine may be in truth: numbers of the power, and computing, within their errors.

    The two fitted numbers with twice their standard error, since 22 rows of one fleet share
    whatever is wrong with it; what prompts draw beside decoding from nothing to all of it; the time
    of computing by 7 %, where step times of the source scatter by 7 to 14 %.
    """
    table = believed.table.copy()
    held_w = table["decode_power_w"] - table["idle_w"]
    table["decode_power_w"] = table["idle_w"] + held_w * (1.0 + 0.03 * rng.standard_normal())
    table["decode_req_j"] *= max(0.0, 1.0 + 0.45 * rng.standard_normal())
    table["prefill_beside_w"] *= rng.uniform(0.0, 1.0)
    computing = np.exp(0.07 * rng.standard_normal())
    for name in ("decode_roof_base_s", "decode_roof_s", "prefill_tok_s"):
        table[name] *= computing
    return replace(believed, table=table)


def static_best(believed, data, rate_req_s):
    """Engines on and their clock: the least power of a grid that keeps the promises on average."""
    slo, best = PROMISES[data], None
    for on in range(2, 9):
        for mhz in np.arange(900.0, 2521.0, 90.0):
            watts, ttft_ms, tpot_ms, _ = served(believed, data, rate_req_s, "8C", on, mhz, seeds=1)
            # Means at two thirds of the promise: 99 % of the requests keep it.
            kept = ttft_ms < 667.0 * slo.ttft_s and tpot_ms < 667.0 * slo.itl_s
            if kept and (best is None or watts < best[0]):
                best = watts, on, mhz
    return best[1:]


def control_table(believed):
    """What `cascade` saves beside static settings, if the engine is what a draw says."""
    fleet = FleetSpec.parse("8C", believed)
    lines = [
        "| data | setting of this simulator | W | cascade W | saving | 5 to 95 %"
        " | within the SLO |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, rate, layout, (mhz,), *_ in best_static():
        on = int(layout[:-1])
        ours, kept = [], []
        truths = [believed] + [drawn(believed, np.random.default_rng(k)) for k in range(DRAWS)]
        for truth in truths:
            figures = Run(
                policy="cascade", fleet=FleetSpec.parse("8C", truth), believed=fleet,
                slo=PROMISES[data], workload=workload(data, rate, 0, WARMUP_S + WINDOW_S + 60.0),
                duration_s=WINDOW_S, warmup_s=WARMUP_S,
            ).simulate()  # fmt: skip
            ours.append(figures["mean_power_w"])
            kept.append(figures["slo_attainment"])
        settings = [("theirs", on, mhz), ("best of a grid", *static_best(believed, data, rate))]
        for what, n_on, clock_mhz in settings:
            static_w = [served(one, data, rate, "8C", n_on, clock_mhz, 1)[0] for one in truths]
            saving = 1.0 - np.array(ours) / static_w
            low, high = np.quantile(saving[1:], [0.05, 0.95])
            lines.append(
                f"| {data} | {what}: {n_on} on at {clock_mhz:.0f} MHz | {static_w[0]:.0f}"
                f" | {ours[0]:.0f} | {saving[0]:.0%} | {low:.0%} to {high:.0%}"
                f" | {kept[0]:.3f}, {min(kept):.3f} at worst |"
            )
    return lines


def headline_table():
    """What the energy of a decoded token that was found here would do to the A100 headline."""
    reference = load_profile(REFERENCE)
    table = reference.table.copy()
    prompt_j = (table["prefill_power_w"] - table["idle_w"]) * table["prefill_tok_s"]
    table["decode_req_j"] = TOKEN_FRAC * prompt_j
    profiles = (reference, replace(reference, table=table, name="a100-sxm-80gb/corrected"))
    lines = ["| req/s | saving of | as it is | corrected |", "|---|---|---|---|"]
    for rate_req_s in (10.0, 35.0, 65.0):
        saved = {"voltanallm": [], "mpc": []}
        for profile in profiles:
            token_j = {
                policy: Run(
                    policy=policy, fleet=FleetSpec.parse("2P2D", profile), workload="sharegpt",
                    slo=Slo(ttft_s=0.6, itl_s=0.06), rate_req_s=rate_req_s, seed=1,
                ).simulate()["energy_per_token_j"]
                for policy in ("static-max", *saved)
            }  # fmt: skip
            for policy, each in saved.items():
                each.append(f"{1.0 - token_j[policy] / token_j['static-max']:.1%}")
        lines += [
            f"| {rate_req_s:g} | {policy} | {' | '.join(each)} |" for policy, each in saved.items()
        ]
    return lines


def profile_text(held, token, sd):
    """The profile file with these numbers."""
    clocks = FACTS["engine"]["clock_mhz"]
    made = columns(held, token)

    def shaped(name):
        return f'[{{ value = 1.0, shape = "{name}" }}]'

    fleet = "8 x L20, vLLM 0.10.1.1, Qwen2.5-7B: figures of zydzydQAQ/pdblend, results/v2 (2026)"
    sections = {
        "decode_time": (
            "fitted", f"{fleet}; one engine alone; the roof is the line of a prompt, and what a"
            " request takes more in steps of 64 to 256; tiles as on other cards",
            "residuals of the source 7-14 %; closed loop within 15 % in 56 of 63 rows that were not"
            " fitted; where a batch settles that is just above a tile it takes up to half as long"
            " again",
            {"base_s": "decode_base_s", "req_s": "decode_req_s", "kv_s": "decode_kv_s",
             "roof_s": "decode_roof_s", "roof_base_s": "decode_roof_base_s"},
        ),
        "decode_energy": (
            "fitted", f"{fleet}; clock response of one engine, level of the fleet at boost:"
            f" {held:.3f} +- {sd[0]:.3f} of the power above idle, {token:.2f} +- {sd[1]:.2f} of the"
            " energy of a prompt token per decoded token",
            "closed loop within 7 % in 60 of 66 rows that were not fitted, up to 12 % low at the"
            " highest loads of short prompts, 20 % in one that failed its promise",
            {"power_w": "decode_power_w", "req_j": "decode_req_j"},
        ),
        "prefill_time": (
            "fitted", f"{fleet}; one engine alone", "residuals of the source 1-5 %",
            {"base_s": "prefill_base_s", "tok_s": "prefill_tok_s", "tok2_s": "prefill_tok2_s"},
        ),
        "prefill_power": (
            "fitted", f"{fleet}; prompts of 1,024 tokens; beside decoding what decoding holds"
            " besides, up to the cap, which is assumed",
            "residuals of the source 3-5 %; beside decoding see the closed loop",
            {"power_w": "prefill_power_w", "beside_w": "prefill_beside_w"},
        ),
    }  # fmt: skip
    lines = [
        "# One L20 (350 W), Qwen2.5-7B-Instruct in bf16, vLLM. Made by bench/validation/l20.py.",
        f'name = "{NAME}"',
        'summary = "one engine alone and a fleet at boost; validated in closed loop"',
        "gpus = 1",
        'first_token = "decode"',
        "clocks = { min_mhz = 900, max_mhz = 2520, step_mhz = 15 }",
    ]
    for section, (status, source, error, keys) in sections.items():
        lines += ["", f"[{section}]", f'status = "{status}"', f'source = "{source}"']
        lines += [f'error = "{error}"']
        lines += [f"{key} = {shaped(name)}" for key, name in keys.items()]
        lines += ["floor_s = 0.0", f"tile_tok = {TILE_TOK}.0"] if section == "decode_time" else []
        lines += ["iter_j = 0.0", "kv_j = 0.0"] if section == "decode_energy" else []
    fixed = {
        "power": ("measured", "card limit; model loaded, by clock", "one reading a clock",
                  {"idle_w": shaped("idle_w"), "power_cap_w": FACTS["power_cap_w"]}),
        "parking": ("measured", "core and memory clock at their lowest", "one reading",
                    {"parked_w": FACTS["parked_w"], "wake_s": FACTS["wake_s"]}),
        "memory": ("scaled", "KV tokens as published; batch limit and token budget are assumed",
                   "depends on engine and flags: detect them",
                   {"kv_capacity_tok": FACTS["kv_capacity_tok"], "max_batch": 256,
                    "prefill_budget_tok": 2048, "batch_steps": "[]"}),
        "transfer": ("fitted", "KV transfer over PCIe; energy not measured", "0 J assumed",
                     {"kv_bytes_per_tok": FACTS["kv_bytes_per_tok"],
                      "link_bytes_s": FACTS["link_bytes_s"],
                      "link_latency_s": FACTS["link_latency_s"], "transfer_j_per_tok": 0.0}),
    }  # fmt: skip
    fixed["band"] = (
        "fitted", "22 rows at boost, step times of the source, two fits of its clock response",
        "residuals, as one standard deviation",
        {"decode_time_frac": 0.05, "prefill_time_frac": 0.04, "clock_time_frac": 0.07,
         "decode_power_frac": 0.03, "prefill_power_frac": 0.04, "clock_power_frac": 0.05,
         "idle_frac": 0.03},
    )  # fmt: skip
    for section, (status, source, error, values) in fixed.items():
        lines += ["", f"[{section}]", f'status = "{status}"', f'source = "{fleet}; {source}"']
        lines += [f'error = "{error}"', *(f"{key} = {value}" for key, value in values.items())]
    for name, values in made.items():
        factors = ", ".join(f"{value:.6g}" for value in values)
        lines += ["", f"[shapes.{name}]", 'form = "points"', f"clock_mhz = {clocks}"]
        lines += [f"factor = [{factors}]"]
    return "\n".join(lines) + "\n"


def tables():
    """Tables of the page by name."""
    believed = load_profile(NAME)
    return {
        "l20-boost": boost_table(believed),
        "l20-within": within_table(believed),
        "l20-static": static_table(believed),
        "l20-dynamic": dynamic_table(believed),
        "l20-further": boost_table(believed, "further"),
        "l20-ratio": ratio_table(believed),
        "l20-control": control_table(believed),
        "l20-headline": headline_table(),
    }


if __name__ == "__main__":
    if "--profile" in sys.argv:
        (held_frac, token_frac), errors = fit()
        print(profile_text(held_frac, token_frac, errors), end="")
    else:
        for title, rows in tables().items():
            print(f"{title}\n" + "\n".join(rows) + "\n")
