"""A power budget that drops half-way: who keeps it, and what it costs.

The fleet may draw 1200 W at first and 840 W from 25 s on. Policies that know budgets set ceilings
on clocks that even the worst load cannot carry above it; the others go on as before. A budget
below what the fleet draws idle is refused.

Run: python examples/power_budget.py
"""

from voltana_ctrl import compare
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.types import PowerBudget


def main() -> None:
    result = compare(
        rates_req_s=[50.0],
        duration_s=30.0,
        warmup_s=10.0,  # times of the budget count from the start of the warm-up
        power_budget=PowerBudget(steps=((0.0, 1200.0), (25.0, 840.0))),
        policies=["static-max", "voltanallm", "static-budget", "threshold", "pack"],
    )
    print("policy           power  over budget  TTFT met  ITL met   (simulated)")
    for run in result.runs:
        print(
            f"{run['policy']:13s} {run['mean_power_w']:6.0f} W  {run['over_budget_frac']:11.1%}"
            f"  {run['ttft_attainment']:8.1%}  {run['itl_attainment']:7.1%}"
        )
    try:
        compare(rates_req_s=[50.0], power_budget=PowerBudget.parse("0:200"))
    except ConfigError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
