"""Replay a trace of real requests under several policies.

Reads Azure LLM traces, Mooncake and vLLM/SGLang benchmark files, told apart by content. Without a
path it takes the Azure conversation trace of 2023 if that lies beside the repository, and
otherwise writes a small file of the same form.

Run: python examples/trace_replay.py [TRACE]
"""

import datetime
import sys
import tempfile
from pathlib import Path

import numpy as np

from voltana_ctrl import compare

PUBLISHED = (
    Path(__file__).resolve().parents[2]
    / "shared/data/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
)


def write_trace(path: Path) -> Path:
    """One minute of bursty arrivals in the form of the Azure trace."""
    random = np.random.default_rng(0)
    arrival_s = np.cumsum(random.gamma(0.5, 2.0 / 8.0, size=480))  # 8 req/s, burstier than Poisson
    start = datetime.datetime(2023, 11, 16, 18, 0, 0)
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for t_s in arrival_s:
        stamp = start + datetime.timedelta(seconds=float(t_s))
        prompt_tok = int(random.lognormal(6.2, 1.0)) + 1
        output_tok = int(random.lognormal(5.0, 0.7)) + 1
        rows.append(f"{stamp:%Y-%m-%d %H:%M:%S.%f},{prompt_tok},{output_tok}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def replay(path: Path) -> None:
    # Arrival times are the trace's own; rates_req_s=[20.0] would speed its clock up to 20 req/s.
    result = compare(
        workload=path,
        duration_s=30.0,
        warmup_s=10.0,
        policies=["static-max", "voltanallm", "dualscale", "pack", "bound"],
    )
    print(f"{result.workload} on {result.fleet} (simulated)")
    for run in result.runs:
        line = f"{run['policy']:12s} {run['mean_power_w']:5.0f} W"
        if run["requests_arrived"] is not None:
            line += (
                f", {run['requests_arrived']} requests, SLO met by {run['slo_attainment']:.1%},"
                f" TTFT p99 {run['ttft_p99_s']:.2f} s"
            )
        print(line)


def main() -> None:
    if len(sys.argv) > 1:
        replay(Path(sys.argv[1]))
    elif PUBLISHED.exists():
        replay(PUBLISHED)
    else:
        with tempfile.TemporaryDirectory() as folder:
            replay(write_trace(Path(folder) / "trace.csv"))


if __name__ == "__main__":
    main()
