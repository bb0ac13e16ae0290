"""Single measurements that no profile was fitted to, beside what the laws say.

python -m bench.validation points
"""

import numpy as np

from voltana_ctrl import load_profile
from voltana_ctrl.laws import at_clock, decode_j, decode_s, prefill_j, prefill_s

L20 = "l20/qwen2.5-7b"
#: zydzydQAQ/pdblend, one L20: a prompt of 4,096 tokens, MHz, seconds, watts.
PROMPT = (
    (900, 1.432, 155), (1200, 1.084, 182), (1500, 0.874, 212), (1800, 0.735, 237),
    (2100, 0.635, 264), (2520, 0.543, 351),
)  # fmt: skip
#: The same: decode at about 1,200 tokens of context, MHz, requests, milliseconds, watts.
DECODE = ((900, 16, 28.5, 184), (2100, 16, 24.2, 223), (900, 64, 38.9, 196), (2100, 64, 32.9, 239))
#: EnergyLLM: A100, Llama-3.1-8B, vLLM 0.11 with CUDA graphs, batch 16: MHz and watts.
A100 = (
    (705, 101), (810, 110), (900, 112), (1005, 114), (1110, 122), (1200, 139), (1290, 155),
    (1350, 171), (1410, 195),
)  # fmt: skip
#: The reference as first shipped, and as refitted.
A100_PROFILES = ("a100-sxm-80gb/llama-3.1-8b-2026-11", "a100-sxm-80gb/llama-3.1-8b")


def prompt_table():
    """A long prompt on one L20."""
    lines = [
        "| MHz | s measured | / law | W measured | / law | J above idle measured | law |",
        "|---|---|---|---|---|---|---|",
    ]
    for mhz, seconds, watts in PROMPT:
        row = at_clock(load_profile(L20), mhz)
        law_s, law_j = float(prefill_s(row, 4096)), float(prefill_j(row, 4096))
        idle_w = float(row["idle_w"])
        lines.append(
            f"| {mhz} | {seconds:.3f} | {seconds / law_s:.2f} | {watts}"
            f" | {watts * law_s / law_j:.2f} | {seconds * (watts - idle_w):.0f}"
            f" | {law_j - law_s * idle_w:.0f} |"
        )
    return lines


def decode_table():
    """Decode iterations on one L20."""
    lines = [
        "| MHz | batch | ms measured | / law | W measured | / law |",
        "|---|---|---|---|---|---|",
    ]
    for mhz, batch, step_ms, watts in DECODE:
        row = at_clock(load_profile(L20), mhz)
        law_s = float(decode_s(row, batch, 1200 * batch))
        law_w = float(decode_j(row, batch, 1200 * batch)) / law_s
        lines.append(
            f"| {mhz} | {batch} | {step_ms:g} | {1e-3 * step_ms / law_s:.2f} | {watts}"
            f" | {watts / law_w:.2f} |"
        )
    return lines


def a100_table():
    """Power against the clock while serving, over the highest: the form, not the level."""
    lines = [
        "| MHz | W measured | W / W(1410) measured | first shipped | refitted |",
        "|---|---|---|---|---|",
    ]
    mhz = np.array([float(each) for each, _ in A100])
    shapes = []
    for name in A100_PROFILES:
        rows = at_clock(load_profile(name), mhz)
        power_w = decode_j(rows, 16, 16 * 400) / decode_s(rows, 16, 16 * 400)
        shapes.append(power_w / power_w[-1])
    for k, (clock, watts) in enumerate(A100):
        told = " | ".join(f"{shape[k]:.2f}" for shape in shapes)
        lines.append(f"| {clock} | {watts} | {watts / A100[-1][1]:.2f} | {told} |")
    return lines


def tables():
    """Tables of the page by name."""
    return {
        "points-prompt": prompt_table(),
        "points-decode": decode_table(),
        "points-a100": a100_table(),
    }
