"""The comparison as a table on a terminal, whole or row by row as runs end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from voltana_ctrl.report.study import REFERENCE, Study

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class _Column:
    """A column; `yields` says how early it makes room in a narrow terminal, 0 for never."""

    group: str
    head: str
    width: int
    value: Callable[[Study, str, float | None], str]
    yields: int = 0
    left: bool = False


def print_table(study: Study, console: Console) -> None:
    """One line per policy and load, means over seeds; reads at 80 columns.

    Parameters
    ----------
    study : Study
        Comparison to show.
    console : rich.console.Console
        Console to print on.

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
    runs = study.all_runs
    printer = RowPrinter(
        console,
        study.policies,
        gap=any(run.get("bound_gap_closed") is not None for run in runs),
        budget=any(run.get("over_budget_frac") is not None for run in runs),
        extras=[name for name in EXTRAS if any(run.get(name) is not None for run in runs)],
    )
    printer.head(study)
    for rate_req_s in study.loads:
        for policy in study.policies:
            if study.runs(policy, rate_req_s):
                printer.row(study, policy, rate_req_s)
    printer.foot(study)


#: Figures that have a column only where there are any.
EXTRAS = ("wall_power_w", "deadline_missed", "cost", "co2_g")


class RowPrinter:
    """Prints the table of a comparison a row at a time, in columns whose widths stand before.

    Where the terminal is narrow, columns are left out that others tell nearly as well; no number
    is ever cut.

    Parameters
    ----------
    console : rich.console.Console
        Console to print on.
    policies : sequence of str
        Names of the policies to come, for the width of their column.
    gap : bool
        Whether to show the way from voltanallm to the fluid bound.
    budget : bool
        Whether to show the time above the power budget.
    extras : collection of str
        Which of :data:`EXTRAS` to show; power at the wall brings the saving there.

    Examples
    --------
    >>> from rich.console import Console
    >>> from voltana_ctrl.report.study import Study
    >>> run = {"policy": "static-max", "rate_req_s": 5.0, "seed": 0, "mean_power_w": 400.0}
    >>> study = Study(comparison={"runs": [run], "slo": {"attainment": 0.99}})
    >>> RowPrinter(Console(width=80), ["static-max"]).row(study, "static-max", 5.0)
        5 static-max 400 ...
    """

    def __init__(
        self,
        console: Console,
        policies: Sequence[str],
        *,
        gap: bool = False,
        budget: bool = False,
        extras: Collection[str] = (),
    ) -> None:
        self._console = console
        self._gap, self._budget = gap, budget
        self._last: tuple[float | None] | None = None
        longest = max(map(len, policies), default=6)
        self._extras = extras
        columns = _columns(longest, gap=gap, budget=budget, extras=extras)
        self._columns = _fitting(columns, console.width)

    def head(self, study: Study) -> None:
        """Print what is compared, and what the columns are."""
        names = study.comparison
        self._print(f"{names['fleet']}  {_profile(study)}  {names['workload']}  (simulated)")
        if study.window:
            self._print(f"judged: {study.window}")
        self._print()
        groups, end = "", 0
        for group in dict.fromkeys(column.group for column in self._columns):
            inside = [k for k, column in enumerate(self._columns) if column.group == group]
            begin = sum(column.width + 1 for column in self._columns[: inside[0]])
            end = sum(column.width + 1 for column in self._columns[: inside[-1] + 1]) - 1
            if group:
                groups = groups.ljust(begin) + group.center(end - begin)
        self._print(groups.rstrip())
        self._print(self._line([column.head for column in self._columns]))
        self._print("─" * end)

    def row(self, study: Study, policy: str, rate_req_s: float | None) -> None:
        """Print the means of one policy at one load."""
        if self._last is not None and self._last != (rate_req_s,):
            self._print()
        cells = [column.value(study, policy, rate_req_s) for column in self._columns]
        if self._last == (rate_req_s,):
            cells[0] = ""
        self._last = (rate_req_s,)
        self._print(self._line(cells))

    def foot(self, study: Study) -> None:
        """Print what the columns mean, and the loads at which no policy keeps the promises."""
        slo = study.comparison["slo"]
        saving = "Saving is against static-max"
        if "static-max" not in study.policies:
            saving += ", which was not run"
        self._print()
        self._console.print(
            f"SLO: TTFT {slo['ttft_s']:g} s, ITL {slo['itl_s']:g} s, each met by"
            f" {slo['attainment']:.1%} of requests; * misses it. {saving}:"
            " of energy per output token, and of power for the bound, which serves no tokens."
            + (" Gap: way from voltanallm to the fluid bound." if self._gap else "")
            + (" Over: time above the power budget." if self._budget else "")
            + (
                " Late: requests that might wait and missed their deadline; the others are judged"
                " by TTFT and ITL."
                if "deadline_missed" in self._extras
                else ""
            )
            + (" Wall: with the rest of the servers." if "wall_power_w" in self._extras else "")
            + "".join(f" {said}" for said in (study.delays, study.conditions) if said),
            highlight=False,
            markup=False,
        )
        for note in study.notes:
            self._console.print(note, highlight=False, markup=False)
        lost = [rate for rate in study.loads if not _kept(study, rate)]
        if lost:
            loads = ", ".join("this load" if rate is None else f"{rate:.4g} req/s" for rate in lost)
            self._console.print(
                f"No policy keeps the SLO at {loads}: more instances, a lower load or another SLO"
                " would be needed. Without a policy that does there is no gap to close.",
                highlight=False,
            )

    def _line(self, cells: Sequence[str]) -> str:
        return " ".join(
            cell.ljust(column.width) if column.left else cell.rjust(column.width)
            for column, cell in zip(self._columns, cells, strict=True)
        ).rstrip()

    def _print(self, line: str = "") -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _columns(longest: int, *, gap: bool, budget: bool, extras: Collection[str]) -> list[_Column]:
    def mean(key: str, form: str, scale: float = 1.0) -> Callable[[Study, str, float | None], str]:
        def value(study: Study, policy: str, rate_req_s: float | None) -> str:
            found = study.mean(policy, rate_req_s, key)
            return text(None if found is None else found * scale, form)

        return value

    def met(key: str) -> Callable[[Study, str, float | None], str]:
        return lambda study, policy, rate_req_s: _met(
            study.mean(policy, rate_req_s, key), study.comparison["slo"]["attainment"]
        )

    columns = [
        _Column("", "req/s", 5, lambda _, __, rate: "-" if rate is None else f"{rate:.4g}"),
        _Column("", "policy", longest, lambda _, policy, __: policy, left=True),
        _Column("", "W", 4, mean("mean_power_w", "{:.0f}")),
        _Column("", "saving", 6, _saving()),
        _Column("wall", "W", 4, mean("wall_power_w", "{:.0f}")),
        _Column("wall", "saving", 6, _saving(wall=True)),
        _Column("", "J/token", 7, mean("energy_per_token_j", "{:.4f}"), yields=3),
        _Column("TTFT [ms]", "p50", 4, mean("ttft_p50_s", "{:.0f}", 1e3)),
        _Column("TTFT [ms]", "p99", 4, mean("ttft_p99_s", "{:.0f}", 1e3)),
        _Column("ITL [ms]", "p50", 4, mean("itl_p50_s", "{:.1f}", 1e3)),
        _Column("ITL [ms]", "p99", 4, mean("itl_p99_s", "{:.1f}", 1e3)),
        _Column("met [%]", "TTFT", 6, met("ttft_attainment")),
        _Column("met [%]", "ITL", 6, met("itl_attainment")),
        _Column("met [%]", "both", 5, mean("slo_attainment", "{:.1f}", 100.0), yields=1),
    ]
    if "wall_power_w" not in extras:
        columns = [column for column in columns if column.group != "wall"]
    if gap:
        columns.append(_Column("", "gap", 5, _gap_closed, yields=2))
    if budget:
        columns.append(_Column("", "over", 5, mean("over_budget_frac", "{:.1%}")))
    if "deadline_missed" in extras:
        columns.append(_Column("", "late", 5, mean("deadline_missed", "{:.4g}")))
    if "cost" in extras:
        columns.append(_Column("", "cost", 7, mean("cost", "{:.4f}")))
    if "co2_g" in extras:
        columns.append(_Column("", "CO2 [g]", 7, mean("co2_g", "{:.1f}")))
    return columns


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """Leave columns out, the first to yield first, until a line fits or none yields."""
    while sum(column.width + 1 for column in columns) - 1 > width:
        yielding = [column for column in columns if column.yields]
        if not yielding:
            break
        columns = [one for one in columns if one is not max(yielding, key=lambda one: one.yields)]
    return columns


def _saving(*, wall: bool = False) -> Callable[[Study, str, float | None], str]:
    def value(study: Study, policy: str, rate_req_s: float | None) -> str:
        if policy == REFERENCE:
            return ""
        return text(study.saving_frac(policy, rate_req_s, wall=wall), "{:.1%}")

    return value


def _gap_closed(study: Study, policy: str, rate_req_s: float | None) -> str:
    # What misses the SLO has closed nothing.
    if study.meets_slo(policy, rate_req_s) is False:
        return "-"
    return text(study.mean(policy, rate_req_s, "bound_gap_closed"), "{:.0%}")


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


def text(value: Any, form: str) -> str:
    """Number in a form; a dash for one that does not exist."""
    if value is None:
        return "-"
    shown = form.format(value)
    return shown if set(shown) & set("123456789") else shown.lstrip("-")  # no minus zero


def _met(value: float | None, target: float) -> str:
    """Share of requests, with as many digits as it takes to see on which side of the promise."""
    if value is None:
        return "-"
    if abs(value - target) >= 0.005:
        return f"{100.0 * value:.1f}" + " *"[value < target]
    # Rounded away from the promise where it is missed, lest 98.996 % read as 99.00 %.
    hundredths = math.floor(1e4 * value + 1e-9) if value < target else round(1e4 * value)
    return f"{hundredths / 100:.2f}" + " *"[value < target]
