"""A fleet of unlike GPUs, described in TOML: old cards prefill, a newer one decodes beside them.

Run: python examples/heterogeneous_fleet.py
"""

import tempfile
from pathlib import Path

from voltana_ctrl import compare

FLEET = """
[[instance]]
id = "a100-prefill"
role = "prefill"
profile = "a100-sxm-80gb/llama-3.1-8b"
count = 2

[[instance]]
id = "h100-decode"
role = "decode"
profile = "h100-sxm-80gb/llama-3.1-8b"
node = "node1"        # clock sets are serialised per node

[[instance]]
id = "a100-decode"
role = "decode"
profile = "a100-sxm-80gb/llama-3.1-8b"
max_batch = 512       # limits left out are the profile's
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.toml"
        path.write_text(FLEET, encoding="utf-8")
        # The same as `voltana-ctrl compare --fleet fleet.toml`.
        result = compare(
            fleet=path.as_posix(),
            rates_req_s=[20.0, 60.0],
            duration_s=30.0,
            warmup_s=10.0,
            # Join the shortest queue knows no speeds; least KV looks at what each card has left.
            policies=["static-max", "dualscale", "dualscale+least-kv", "pack", "bound"],
        )
    print(f"profiles: {result.profile}")
    for run in result.runs:
        line = f"{run['rate_req_s']:5g} req/s  {run['policy']:18s} {run['mean_power_w']:5.0f} W"
        if run["policy"] != "bound":
            line += f", SLO met by {run['slo_attainment']:6.1%}"
            line += f", {run['active_decode_mean']:.1f} decode instances active"
        print(line + "  (simulated)")


if __name__ == "__main__":
    main()
