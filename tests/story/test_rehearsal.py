"""One cell of the rehearsal: what runs is what was simulated."""

import argparse
import importlib.util

import pytest

from tests.helpers.fake_gpus import needs_compiler
from tests.helpers.paths import ROOT

pytest.importorskip("uvicorn", reason="needs the server extra")
pytest.importorskip("pynvml", reason="needs the nvml extra")

pytestmark = [needs_compiler, pytest.mark.slow]


def test_the_real_stack_takes_the_energy_that_the_simulated_one_does():
    spec = importlib.util.spec_from_file_location("rehearse", ROOT / "bench" / "rehearse.py")
    rehearse = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rehearse)
    args = argparse.Namespace(
        dilation=5.0,
        warm=30.0,
        window=40.0,
        requests=0,
        seed=0,
        ticks=False,
        unrouted=False,
        most_tok=400,
    )
    found = rehearse.cell("2C", "static-max", 4.0, args)
    if found["rehearsed"]["void"]:
        pytest.skip(f"this machine is too busy to keep the times: {found['rehearsed']}")
    assert abs(found["difference_frac"]) < 0.03, found
    assert found["rehearsed"]["outside_ttft_s"] > 0.0
    assert "mode act" in " ".join(found["rehearsed"]["said"]["controller"])
    for metric in ("ttft_attainment", "itl_attainment"):
        assert found["rehearsed"][metric] >= 0.99, found
