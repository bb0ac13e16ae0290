"""Plain Python twins of the baseline governors and routers."""

import itertools


def empty_tok(row, tok):
    """Slots of the last tile that stay empty, from the second tile on: tile after tile."""
    tile = row["decode_tile_tok"]
    if not tile or tok <= tile:
        return 0.0
    slots = tile
    while slots < tok:
        slots += tile
    return slots - tok


def decode_s(row, padded_req, kv_tok):
    line = row["decode_base_s"] + row["decode_req_s"] * padded_req
    roof = row["decode_roof_base_s"] + row["decode_roof_s"] * padded_req
    roof += row["prefill_tok_s"] * empty_tok(row, padded_req)
    linear = max(line, roof) + row["decode_kv_s"] * kv_tok
    return max(linear, row["decode_floor_s"]) + row["decode_host_s"]


def prefill_s(row, tok):
    slots = tok + empty_tok(row, tok)
    return row["prefill_base_s"] + row["prefill_tok_s"] * slots if tok > 0 else 0.0


def prefill_j(row, tok):
    return prefill_s(row, tok) * row["prefill_power_w"]


def batches(waiting_tok, batch_tok, budget_tok, ahead=8):
    """Prompt tokens of the next batches: the one that is formed, then full ones."""
    sizes = [batch_tok]
    left_tok = waiting_tok - batch_tok
    while left_tok > 0 and len(sizes) < ahead:
        sizes.append(min(left_tok, budget_tok))
        left_tok -= budget_tok
    return sizes


def greedy_plan(rows, sizes, wait_s, ttft_s):
    """Levels from all-highest by the best single step down, as long as one helps and fits."""
    levels = [len(rows) - 1] * len(sizes)

    def total_s(plan):
        return wait_s + sum(prefill_s(rows[k], tok) for k, tok in zip(plan, sizes, strict=True))

    def total_j(plan):
        return sum(prefill_j(rows[k], tok) for k, tok in zip(plan, sizes, strict=True))

    while True:
        steps = []
        for b, level in enumerate(levels):
            if level > 0:
                plan = [*levels[:b], level - 1, *levels[b + 1 :]]
                saved_j = prefill_j(rows[level], sizes[b]) - prefill_j(rows[level - 1], sizes[b])
                if saved_j > 0.0 and total_s(plan) <= ttft_s:
                    steps.append((-saved_j, b, plan))
        if not steps:
            return levels, total_s(levels), total_j(levels)
        levels = min(steps)[2]


def best_plan_j(rows, sizes, wait_s, ttft_s):
    """Least energy over all plans within the TTFT, by enumeration; None if there is none."""
    found = [
        sum(prefill_j(rows[k], tok) for k, tok in zip(plan, sizes, strict=True))
        for plan in itertools.product(range(len(rows)), repeat=len(sizes))
        if wait_s + sum(prefill_s(rows[k], tok) for k, tok in zip(plan, sizes, strict=True))
        <= ttft_s
    ]
    return min(found) if found else None


def lowest_feasible(rows, padded_req, kv_tok, itl_s):
    """Level of the lowest clock that keeps the ITL; the highest if none does."""
    for level, row in enumerate(rows):
        if decode_s(row, padded_req, kv_tok) <= itl_s:
            return level
    return len(rows) - 1


def threshold_levels(loads, tok_steps, req_steps, keep_frac):
    """Levels of a threshold governor over a sequence of (waiting_tok, running_req)."""
    level = 0
    for waiting_tok, running_req in loads:
        passed = sum(waiting_tok > step for step in tok_steps)
        passed = max(passed, sum(running_req > step for step in req_steps))
        kept = sum(waiting_tok > keep_frac * step for step in tok_steps)
        kept = max(kept, sum(running_req > keep_frac * step for step in req_steps))
        level = min(max(level, passed), kept)
        yield level


def least(eligible, score):
    """Eligible instance of the least score; the lower index on a tie."""
    return min(eligible, key=lambda j: (score(j), j))
