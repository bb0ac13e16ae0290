"""What a log says that a policy saved, and the refusal of one that says nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from voltana_ctrl.errors import ConfigError

__all__ = ["SCHEMA", "EvidenceRefused", "Interval", "Savings"]

#: Name and version of the JSON of :meth:`Savings.to_dict`.
SCHEMA = "voltana-ctrl/savings/1"

# In the unit of what the interval is of.
_Figure = float


class EvidenceRefused(ConfigError):
    """The log cannot carry a claim.

    Parameters
    ----------
    name : {"no switchback", "too few blocks", "missing power", "no requests", "unequal load"}
        Reason in short, for programs.
    message : str
        Reason in words, and what to do.

    Examples
    --------
    >>> EvidenceRefused("no requests", "nothing was served").name
    'no requests'
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and its 95 % interval.

    Parameters
    ----------
    value, low, high : float
        Estimate, lower and upper end, in the unit of what it is of.

    Examples
    --------
    >>> 0.25 in Interval(value=0.24, low=0.22, high=0.26)
    True
    """

    value: _Figure
    low: _Figure
    high: _Figure

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def scaled(self, factor: _Figure) -> Interval:
        """All three numbers times a factor, such as a change of unit.

        Parameters
        ----------
        factor : float
            Not negative.

        Returns
        -------
        Interval
            In the new unit.
        """
        return Interval(value=self.value * factor, low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """What a log says that the policy saved.

    Parameters
    ----------
    pairs, left_out : int
        Pairs of blocks that count, and blocks that do not: spoiled, idle, or without a partner.
    idle_pairs : int
        Pairs left out because nobody asked for anything in one of their blocks.
    block_s, washout_s : float
        Seconds of a block, and of the part at its start that does not count.
    saving_frac : Interval
        By which fraction the policy needs fewer joules per output token than the highest clock.
    policy_j_tok, highest_j_tok : float
        Joules per output token in blocks of the policy, and in those at the highest clock.
    policy_w, highest_w : float
        Mean power in watts in the same blocks.
    policy_attainment_frac, highest_attainment_frac : float, optional
        Fraction of requests that met TTFT and ITL, of those that began and ended in a block; None
        without an SLO, or where fewer than two pairs have such requests.
    attainment_gap_frac : Interval, optional
        Attainment under the policy less that at the highest clock, by the same pairs.
    load_gap_frac : Interval
        Tokens served under the policy over those served at the highest clock, less 1.
    saved_kwh : Interval
        Kilowatt-hours saved in the blocks of the policy that count.
    saved_kwh_day : Interval
        Kilowatt-hours per day that running the policy all the time would save at this load.
    saved_cost_day, saved_co2_g_day : Interval, optional
        The same in money and in grams of CO2 per day; None where no price or no intensity was
        given.

    Examples
    --------
    >>> known, none = Interval(value=0.2, low=0.15, high=0.25), Interval(value=0, low=-1, high=1)
    >>> found = Savings(pairs=12, left_out=1, block_s=600.0, washout_s=30.0, saving_frac=known,
    ...                 policy_j_tok=0.4, highest_j_tok=0.5, policy_w=400.0, highest_w=500.0,
    ...                 load_gap_frac=none, saved_kwh=known, saved_kwh_day=known)
    >>> print(found.text().splitlines()[0])
    saving 20.0 % of joules per output token, 95 % interval 15.0 to 25.0 %
    """

    pairs: int
    left_out: int
    block_s: float
    washout_s: float
    saving_frac: Interval
    policy_j_tok: float
    highest_j_tok: float
    policy_w: float
    highest_w: float
    policy_attainment_frac: float | None = None
    highest_attainment_frac: float | None = None
    attainment_gap_frac: Interval | None = None
    load_gap_frac: Interval
    saved_kwh: Interval
    saved_kwh_day: Interval
    saved_cost_day: Interval | None = None
    saved_co2_g_day: Interval | None = None
    idle_pairs: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values of JSON, and `SCHEMA` under ``schema``."""
        return {"schema": SCHEMA, **asdict(self)}

    def text(self) -> str:
        """The figures as a few lines for people."""
        saving, gap = self.saving_frac, self.attainment_gap_frac
        lines = [
            f"saving {_percent(saving)} of joules per output token, 95 % interval"
            f" {_percent(saving, ends=True)}",
            f"  {self.pairs} pairs of blocks of {self.block_s:g} s less {self.washout_s:g} s"
            f" of washout; {self.left_out} blocks left out",
            *self._idle_line(),
            f"  {'':14}{'policy':>12}{'highest clock':>16}",
            f"  {'joules/token':14}{self.policy_j_tok:12.4g}{self.highest_j_tok:16.4g}",
            f"  {'mean power, W':14}{self.policy_w:12.4g}{self.highest_w:16.4g}",
        ]
        if (
            self.policy_attainment_frac is None
            or self.highest_attainment_frac is None
            or gap is None
        ):
            lines.append("  attainment    not told: give --slo ttft=SECONDS,itl=SECONDS")
        else:
            lines += [
                f"  {'attainment':14}{self.policy_attainment_frac:12.4f}"
                f"{self.highest_attainment_frac:16.4f}",
                f"  attainment gap {gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})",
            ]
        lines += [
            f"  load under the policy {_percent(self.load_gap_frac, sign=True)}"
            f" ({_percent(self.load_gap_frac, sign=True, ends=True)})",
            f"  saved in this log: {_told(self.saved_kwh)} kWh",
            f"  all the time at this load: {_told(self.saved_kwh_day)} kWh per day",
        ]
        if self.saved_cost_day is not None:
            lines.append(f"  cost: {_told(self.saved_cost_day)} per day, in the price's currency")
        if self.saved_co2_g_day is not None:
            lines.append(f"  CO2: {_told(self.saved_co2_g_day.scaled(1e-3))} kg per day")
        if 0.0 in saving:
            lines.append("  The interval holds 0: this log shows no saving; run more blocks.")
        return "\n".join(lines)

    def _idle_line(self) -> list[str]:
        if not self.idle_pairs:
            return []
        count = f"{self.idle_pairs} pair" + "s" * (self.idle_pairs != 1)
        return [f"  {count} among them, in which nobody asked for anything in one of the blocks"]


def _percent(interval: Interval, *, sign: bool = False, ends: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    if ends:
        return f"{100.0 * interval.low:{form}} to {100.0 * interval.high:{form}} %"
    return f"{100.0 * interval.value:{form}} %"


def _told(interval: Interval) -> str:
    return f"{interval.value:.4g} ({interval.low:.4g} to {interval.high:.4g})"
