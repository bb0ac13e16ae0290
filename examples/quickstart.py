"""Compare control policies on a simulated fleet: two prefill and two decode instances, 2P2D.

Run: python examples/quickstart.py
"""

from voltana_ctrl import Slo, compare


def main() -> None:
    result = compare(
        fleet="2P2D",
        profile="a100-sxm-80gb/llama-3.1-8b",
        workload="sharegpt",
        rates_req_s=[20.0, 50.0],
        duration_s=30.0,
        warmup_s=10.0,
        slo=Slo(ttft_s=0.6, itl_s=0.06, attainment=0.99),
        policies=["static-max", "static-1005", "voltanallm", "pack", "bound"],
    )
    print("req/s  policy        power  TTFT met  ITL met   (simulated)")
    for run in result.runs:
        line = f"{run['rate_req_s']:5g}  {run['policy']:12s} {run['mean_power_w']:5.0f} W"
        if run["policy"] != "bound":  # the bound is computed: it serves no requests
            line += f"  {run['ttft_attainment']:7.1%}  {run['itl_attainment']:7.1%}"
        print(line)


if __name__ == "__main__":
    main()
