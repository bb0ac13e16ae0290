"""The comparison as a table on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from voltana_ctrl.report.study import REFERENCE, Study

if TYPE_CHECKING:
    from rich.console import Console


def print_table(study: Study, console: Console) -> None:
    """One line per policy and load, means over seeds; reads at 80 columns.

    Parameters
    ----------
    study : Study
        What to show.
    console : rich.console.Console
        Where.

    Examples
    --------
    >>> from rich.console import Console
    >>> from voltana_ctrl import compare
    >>> result = compare(rates_req_s=[5.0], duration_s=10.0, warmup_s=2.0, policies=["bound"])
    >>> console = Console(width=80)
    >>> with console.capture() as captured:
    ...     print_table(result.to_study(), console)
    >>> "(simulated)" in captured.get()
    True
    """
    from rich import box
    from rich.table import Table

    slo = study.comparison["slo"]
    budgeted = any(run["over_budget_frac"] is not None for run in study.comparison["runs"])
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=f"{study.comparison['fleet']}  {_profile(study)}  {study.comparison['workload']}"
        "  (simulated)",
        caption=(
            f"SLO: TTFT {slo['ttft_s']:g} s, ITL {slo['itl_s']:g} s, each met by"
            f" {slo['attainment']:.1%} of requests; * misses it."
            " Saving is against static-max; in a closed loop, per token."
            " Gap: way from voltanallm to the fluid bound."
            + (" Over: time above the power budget." if budgeted else "")
            + (f" {study.conditions}" if study.conditions else "")
        ),
    )
    heads = ["req/s", "policy", "W", "saving", "J/tok", "TTFT ok", "ITL ok", "gap"]
    for head in [*heads, *(["over"] if budgeted else [])]:
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    for rate_req_s in study.loads:
        ran = [policy for policy in study.policies if study.runs(policy, rate_req_s)]
        for policy in ran:
            saving_frac = study.saving_frac(policy, rate_req_s)
            table.add_row(
                ("-" if rate_req_s is None else f"{rate_req_s:.4g}") if policy == ran[0] else "",
                policy,
                text(study.mean(policy, rate_req_s, "mean_power_w"), "{:.0f}"),
                "" if policy == REFERENCE else text(saving_frac, "{:.1%}"),
                text(study.mean(policy, rate_req_s, "energy_per_token_j"), "{:.4f}"),
                _met(study.mean(policy, rate_req_s, "ttft_attainment"), slo["attainment"]),
                _met(study.mean(policy, rate_req_s, "itl_attainment"), slo["attainment"]),
                # What misses the SLO has closed nothing.
                text(study.mean(policy, rate_req_s, "bound_gap_closed"), "{:.0%}")
                if study.meets_slo(policy, rate_req_s) is not False
                else "-",
                *([_over(study, policy, rate_req_s)] if budgeted else []),
                end_section=policy == ran[-1],
            )
    console.print(table)
    lost = [rate for rate in study.loads if not _kept(study, rate)]
    if lost:
        loads = ", ".join("this load" if rate is None else f"{rate:.4g} req/s" for rate in lost)
        console.print(
            f"No policy keeps the SLO at {loads}: more instances, a lower load or another SLO"
            " would be needed. Without a policy that does there is no gap to close."
        )


def _profile(study: Study) -> str:
    """Its name, and how well it is known."""
    status = ", ".join(dict.fromkeys(profile.status for profile in study.profiles))
    return f"{study.comparison['profile']}" + (f" ({status})" if status else "")


def _kept(study: Study, rate_req_s: float | None) -> bool:
    """Whether a policy that was run keeps the SLO; the bound is none."""
    verdicts = [
        study.meets_slo(policy, rate_req_s) for policy in study.policies if policy != "bound"
    ]
    return True in verdicts or set(verdicts) <= {None}


def _over(study: Study, policy: str, rate_req_s: float | None) -> str:
    return text(study.mean(policy, rate_req_s, "over_budget_frac"), "{:.1%}")


def text(value: Any, form: str) -> str:
    """Number in a form; a dash for one that does not exist."""
    if value is None:
        return "-"
    shown = form.format(value)
    return shown if set(shown) & set("123456789") else shown.lstrip("-")  # no minus zero


def _met(value: float | None, target: float) -> str:
    return text(value, "{:.1%}") + ("" if value is None else " *"[value < target])
