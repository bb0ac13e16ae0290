"""Lengths that change: prompts of arrivals are believed before their answers are finished."""

from dataclasses import replace

import numpy as np
import pytest

from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
from voltana_ctrl.estimate import LoadFilter
from voltana_ctrl.types import RequestBatch

FLEET = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11"))


def finished(prompt_tok, answer_tok):
    n = len(prompt_tok)
    whole = np.zeros(n, int)
    return RequestBatch(
        request=whole, request_class=whole, prefill_instance=whole, decode_instance=whole + 1,
        ttft_s=np.full(n, 0.1), itl_s=np.full(n, 0.03), prompt_tok=prompt_tok,
        output_tok=answer_tok,
    )  # fmt: skip


def watched(came, done, seconds, *, load=None, memory=None, from_s=0.0):
    """Memory after so many seconds of 30 req/s, prompts drawn by `came`, finished as by `done`."""
    load = load or LoadFilter(FLEET)
    memory = memory or load.init()
    for k in range(seconds * 10):
        prompts = came(3)
        state = replace(
            FleetState.idle(2, t_s=from_s + 0.1 * k), arrived_req=np.array([3.0, 0.0]),
            arrived_tok=np.array([prompts.sum(), 0.0]),
        )  # fmt: skip
        told = Observation(state=state, finished=finished(*done(3)))
        memory = load.update(told, memory)
    return load, memory


def test_other_prompts_are_believed_before_any_of_them_has_finished() -> None:
    short, long = (lambda n: np.full(n, 200.0)), (lambda n: np.full(n, 2000.0))
    old = lambda n: (np.full(n, 200.0), np.full(n, 400.0))  # noqa: E731
    load, memory = watched(short, old, 60)
    assert not load.changes(memory)
    _, memory = watched(long, old, 12, load=load, memory=memory, from_s=60.0)
    assert load.changes(memory)
    lengths = load.load(memory).lengths
    assert lengths.prompt_tok > 1200.0
    assert lengths.prompt_sd_tok <= lengths.prompt_tok
    # What finished before counts no more than what has arrived lately.
    assert memory.moments[0] <= 330.0
    new = lambda n: (np.full(n, 2000.0), np.full(n, 60.0))  # noqa: E731
    _, memory = watched(long, new, 60, load=load, memory=memory, from_s=72.0)
    assert not load.changes(memory)
    assert load.load(memory).lengths.prompt_tok == pytest.approx(2000.0, rel=0.15)


@pytest.mark.parametrize("seed", range(4))
def test_chance_is_no_change(seed) -> None:
    rng = np.random.default_rng(seed)

    def prompts(n):
        return np.maximum(1.0, np.rint(rng.lognormal(5.0, 1.0, n)))

    load, memory = LoadFilter(FLEET), None
    for k in range(20):
        load, memory = watched(
            prompts, lambda n: (prompts(n), np.full(n, 100.0)), 10, load=load, memory=memory,
            from_s=10.0 * k,
        )  # fmt: skip
        assert not load.changes(memory)
