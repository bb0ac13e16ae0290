"""Errors of the laws by source: rows held out, other measurements, and what bands cover.

    python -m bench.validation sources

Reads the public tables beside the repository (../shared/data); without them nothing is made. About
a minute of one core.
"""

from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import binomtest

from voltana_ctrl import load_profile
from voltana_ctrl.fit import fit_power, fit_table, read_table
from voltana_ctrl.laws import decode_j, decode_s, prefill_s
from voltana_ctrl.types import PROFILE_DTYPE

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
#: 90 % of a normal distribution lie within so many standard deviations.
SD_OF_90 = 1.645
#: Of the host, per iteration, which sums of kernels leave out.
HOST_S = 1e-3
#: ML.ENERGY tells no context: its mean output and prompts of about 100 tokens are assumed.
ML_ENERGY = (
    ("h100-sxm-80gb/llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", 493),
    ("h100-sxm-80gb/llama-3.1-70b-tp4", "meta-llama/Llama-3.1-70B-Instruct", 450),
)

#: Matrix products that were measured in steps of eight tokens: card, model, GPUs.
KERNELS = (
    ("a100", "Meta-Llama-3-8B", 1),
    ("a100", "Meta-Llama-3-8B", 2),
    ("a100", "Meta-Llama-3-70B", 4),
    ("a40", "Llama-2-7b-hf", 1),
    ("h100", "Llama-2-7b-hf", 1),
    ("h100", "Llama-2-70b-hf", 4),
)


def a800(gpus):
    """Rows of the sweep of Qwen3-32B on so many GPUs."""
    files = [DATA / f"a800_qwen3_32b_dvfs_{part}.csv" for part in ("subset", "longctx")]
    return read_table(files, where={"tp": gpus})


def heldout_table():
    """Rows held out of the fit of their own source."""
    lines = [
        "| source | held out | rows | values | MAPE | worst value | 90 % band"
        " | covers of the unseen | which may be |",
        "|---" * 9 + "|",
    ]
    for gpus in ("1", "2"):
        result = fit_table(a800(gpus))
        for held in result.held_out:
            value, error = held.worst
            lines.append(
                f"| A800, Qwen3-32B, {gpus} GPU{'s' * (gpus == '2')}"
                f" | {held.phase} {held.quantity},"
                f" one {held.split} | {len(result.table.of(held.phase))} | {len(held.by)}"
                f" | {held.mape_frac:.1%} | {error:.1%} at {value:g} {held.unit}"
                f" | {held.p90_frac:.1%} | {held.fold_coverage_frac:.0%}"
                f" | {held.coverage_low_frac:.0%} to {held.coverage_high_frac:.0%} |"
            )
    path = DATA / "perseus_sosp24" / "stage_profile_gpt3-175b_a100_sxm_bf16.csv"
    for stage in ("0", "7"):
        table = read_table(path, where={"stage": stage})
        law = fit_power(table)
        power_w = table.energy_j / table.wall_s
        clocks = np.unique(table.freq_mhz[table.freq_mhz < law.capped_mhz])[1:-1]
        error = np.array([_clock_out(table, law, power_w, clock) for clock in clocks])
        band = np.quantile(error, 0.9)
        others = [np.quantile(np.delete(error, k), 0.9) for k in range(len(error))]
        inside = error <= others
        interval = binomtest(int(inside.sum()), len(inside)).proportion_ci()
        lines.append(
            f"| A100, GPT-3 training, stage {stage} (Perseus) | power, one clock | {len(table)}"
            f" | {len(clocks)} | {error.mean():.1%}"
            f" | {error.max():.1%} at {clocks[error.argmax()]:g} MHz | {band:.1%}"
            f" | {inside.mean():.0%} | {interval.low:.0%} to {interval.high:.0%} |"
        )
    return lines


def _clock_out(table, law, power_w, clock):
    out = table.freq_mhz == clock
    part = fit_power(table.rows(~out), near=law)
    return abs(float(part.prefill_w(clock)) / power_w[out].mean() - 1.0)


def beyond_table():
    """A fit of the batches up to 32, asked about larger ones."""
    table = a800("1")
    decode = np.array(table.phase) == "decode"
    small = fit_table(table.rows(~decode | (table.batch_req <= 32)))
    lines = ["| batch asked | step time errs by | error stated |", "|---|---|---|"]
    for batch_req in (64.0, 128.0):
        rows = table.rows(decode & (table.batch_req == batch_req))
        error = np.abs(small.laws.time_s(rows) / rows.wall_s - 1.0).mean()
        stated = small.band_frac("decode", 1410.0, batch_req)
        lines.append(f"| {batch_req:g} | {error:.1%} | {stated:.1%} |")
    return lines


def voltage_table():
    """The voltage of the A800 sweep, over the time that the energy belongs to, and over another."""
    table = a800("1")
    kernels_s = 64e-6 * _instrumented_us()
    lines = [
        "| energy over | s per GHz | knee MHz | held W | W per GHz | J per iteration, 32B"
        " | prefill W | W per GHz |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs = (("the same kernels", kernels_s), ("the step without instrumentation", None))
    for name, time_s in pairs:
        law = fit_power(table, time_s)
        lines.append(
            f"| {name} | {law.rise_frac:.2f} +- {law.sd['rise_frac']:.2f} | {law.knee_mhz:.0f}"
            f" | {law.decode_static_w:.1f} | {law.decode_dynamic_w:.1f} | {law.decode_iter_j:.2f}"
            f" | {law.prefill_static_w:.1f} | {law.prefill_dynamic_w:.0f} |"
        )
    return lines


def _instrumented_us():
    import pandas as pd

    files = [DATA / f"a800_qwen3_32b_dvfs_{part}.csv" for part in ("subset", "longctx")]
    rows = pd.concat([pd.read_csv(path) for path in files])
    rows = rows[rows.tp == 1]
    return (rows.attn_us_per_layer + rows.ffn_us_per_layer).to_numpy()


def unseen_table():
    """Profiles beside measurements of kernels and engines, and what their stated bands cover."""
    lines = [
        "| profile | what, at the highest clock | rows | MAPE | worst | 90 % band | inside |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, what, key, error in _unseen():
        band = load_profile(name).band
        told = ["-", "-"]
        if band is not None:
            stated = SD_OF_90 * getattr(band, key)
            told = [f"{stated:.0%}", f"{np.mean(np.abs(error) <= stated):.0%}"]
        lines.append(
            f"| `{name}` | {what} | {len(error)} | {np.abs(error).mean():.1%}"
            f" | {np.abs(error).max():.0%} | {' | '.join(told)} |"
        )
    return lines


def _unseen():
    import pandas as pd

    from tests.oracles import kernel_sums as sums

    small, large = "a100-sxm-80gb/llama-3.1-8b", "a100-sxm-80gb/llama-3-70b-tp4"
    for name, model, gpus, layers, heads, host_s in (
        (small, "Meta-Llama-3-8B", 1, 32, (32, 8), 0.0),
        (large, "Meta-Llama-3-70B", 4, 80, (16, 2), HOST_S),
    ):
        at = load_profile(name).table[-1]
        linear_s = sums.linear_ops_s(DATA, f"a100_meta-llama_{model}", gpus, layers)

        def reduced_s(tok, of, gpus=gpus):
            return 0.0 if gpus == 1 else 160 * of(DATA, "a100", tok * 8192 * 2)

        found = sums.prefill_kernels(DATA, linear_s, "a100", layers, heads)
        error = [
            (float(prefill_s(at, tok)) - host_s) / (s + reduced_s(tok, sums.vidur_all_reduce_s)) - 1
            for tok, s in found.items()
            if 1024 <= tok <= 8192
        ]
        yield name, "kernels of a prompt, 1,024 to 8,192 tokens", "prefill_time_frac", error
        error = [
            (float(decode_s(at, n, kv)) - HOST_S) / (s + reduced_s(n, sums.all_reduce_s)) - 1
            for n, kv, s in sums.decode_kernels(DATA, linear_s, "a100", layers, heads)
        ]
        yield name, "kernels of a decode step, 1 to 256 requests", "decode_time_frac", error
    runs = pd.read_csv(DATA / "mlenergy_v3" / "llm_runs.csv")
    runs = runs[(runs.gpu_model == "H100") & (runs.task == "lm-arena-chat")]
    for name, model, context in ML_ENERGY:
        at, mine = load_profile(name).table[-1], runs[runs.model_id == model]
        mine = mine[mine.avg_batch_size < 260].sort_values("avg_batch_size")
        n = mine.avg_batch_size.to_numpy()
        time_s = decode_s(at, n, n * context)
        power_w = decode_j(at, n, n * context) / time_s
        error = time_s / (1e-3 * mine.median_itl_ms.to_numpy()) - 1.0
        yield name, "median ITL of an engine (ML.ENERGY v3)", "decode_time_frac", error
        error = power_w / mine.avg_power_watts.to_numpy() - 1.0
        yield name, "mean power of an engine (ML.ENERGY v3)", "decode_power_frac", error


def tiles_table():
    """Kernels between tile edges, by the law with tiles and without, on every card there is.

    Fitted are passes of up to 64 tokens and of multiples of 128, where no tile is empty.
    """
    lines = [
        "| linear operations of | rows | without tiles | mean, with its sign | tiles of 64 | of 128"
        " | of 256 |",
        "|---" * 7 + "|",
    ]
    for card, model, gpus in KERNELS:
        time_s = _linear_s(f"{card}_meta-llama_{model}", gpus)
        tok = time_s.index.to_numpy(dtype=float)
        known = (tok <= 64.0) | (tok % 128.0 == 0.0)
        row = _bent(tok[known], time_s.to_numpy()[known])
        between = ~known & (tok > 128.0) & (tok <= 1024.0)
        cells = []
        for tile_tok in (0.0, 64.0, 128.0, 256.0):
            row["decode_tile_tok"] = tile_tok
            error = decode_s(row, tok[between], 0.0) / time_s.to_numpy()[between] - 1.0
            cells.append(f"{np.abs(error).mean():.1%}")
            if not tile_tok:
                cells.append(f"{error.mean():.1%}")
        what = f"{model}, {card.upper()} x {gpus}"
        lines.append(f"| {what} | {between.sum()} | {' | '.join(cells)} |")
    return lines


def _linear_s(model, gpus):
    """Sum of the matrix products of one layer, by tokens, up to 2,048 of them."""
    import pandas as pd

    ops = pd.read_parquet(DATA / "vidur_profiles" / f"linear_ops_{model}.parquet")
    ops = ops[(ops.num_tensor_parallel_workers == gpus) & (ops.num_tokens <= 2048)]
    names = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    median_ms = ops.groupby("num_tokens")[[f"time_stats.{name}.median" for name in names]].median()
    return 1e-3 * median_ms.sum(axis=1)


def _bent(tok, time_s):
    """Row of a profile whose line and roof pass these times best, by relative errors."""
    per_tok_s = time_s[-1] / tok[-1]
    names = ("decode_base_s", "decode_req_s", "decode_roof_base_s", "decode_roof_s")
    unit = np.array([time_s[0], 1e-3 * time_s[0], time_s[0], per_tok_s])

    def row(values):
        made = np.zeros(1, dtype=PROFILE_DTYPE)[0]
        for name, value in zip(names, values * unit, strict=True):
            made[name] = value
        made["prefill_tok_s"] = made["decode_roof_s"]
        return made

    found = [
        least_squares(
            lambda values: decode_s(row(values), tok, 0.0) / time_s - 1.0,
            [1.0, 1.0, roof_base, 1.0],
            bounds=(0.0, np.inf),
        )
        for roof_base in (0.01, 0.5)
    ]
    return row(min(found, key=lambda each: each.cost).x)


def noise_table():
    """How power scatters about its mean while H100 decode, per GPU."""
    import pandas as pd

    traces = pd.read_parquet(DATA / "openg2g_h100_traces" / "power_traces.parquet")
    lines = [
        "| model | requests at most | mean W | sd at 0.1 s, W | correlation at 0.1 s | at 1 s |",
        "|---|---|---|---|---|---|",
    ]
    for model, gpus in (("Llama-3.1-8B", 1), ("Llama-3.1-70B", 4)):
        for limit in (8, 64, 256, 1024):
            mine = traces[(traces.model == model) & (traces.max_num_seqs == limit)]
            power_w = mine.power_total_W.to_numpy() / gpus
            # Filling and draining at both ends left out.
            middle = power_w[len(power_w) // 5 : 4 * len(power_w) // 5]
            rest = middle - middle.mean()

            def after(k, rest=rest):
                return float(rest[k:] @ rest[:-k] / (rest @ rest))

            lines.append(
                f"| {model}, {gpus} GPU{'s' * (gpus > 1)} | {limit} | {middle.mean():.0f}"
                f" | {rest.std():.0f} | {after(1):.2f} | {after(10):.2f} |"
            )
    return lines


def tables():
    """Tables of the page by name; none where the data are not at hand."""
    if not DATA.is_dir():
        return {}
    return {
        "sources-heldout": heldout_table(),
        "sources-beyond": beyond_table(),
        "sources-voltage": voltage_table(),
        "sources-unseen": unseen_table(),
        "sources-tiles": tiles_table(),
        "sources-noise": noise_table(),
    }
