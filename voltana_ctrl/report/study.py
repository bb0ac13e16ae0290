"""A comparison as reports read it: means over seeds by policy and load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voltana_ctrl.errors import ShapeError
from voltana_ctrl.sim.detail import RunDetail
from voltana_ctrl.types import Profile

#: What savings are counted against.
REFERENCE = "static-max"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Study:
    """Runs of a comparison, by policy and load.

    A load is a request rate in requests per second, None for a closed loop.

    Parameters
    ----------
    comparison : mapping
        Values as in the JSON that ``compare`` writes.
    details : tuple of RunDetail or None
        One per run, or none at all: then nothing over time and no latencies are drawn.
    profiles : tuple of Profile
        Profiles of the fleet, which tell how well it is known.

    Raises
    ------
    ShapeError
        If details are not as many as runs.

    Examples
    --------
    >>> runs = [{"policy": "static-max", "rate_req_s": 5.0, "seed": 0, "mean_power_w": 400.0},
    ...         {"policy": "slow", "rate_req_s": 5.0, "seed": 0, "mean_power_w": 300.0}]
    >>> study = Study(comparison={"runs": runs})
    >>> study.policies, study.loads, study.saving_frac("slow", 5.0)
    (('static-max', 'slow'), (5.0,), 0.25)
    """

    comparison: Mapping[str, Any]
    details: tuple[RunDetail | None, ...] = ()
    profiles: tuple[Profile, ...] = ()

    def __post_init__(self) -> None:
        if self.details and len(self.details) != len(self.all_runs):
            raise ShapeError(
                f"Study.details: expected one per run, {len(self.all_runs)}, or none,"
                f" got {len(self.details)}"
            )

    @property
    def all_runs(self) -> list[dict[str, Any]]:
        """Every run, in order."""
        runs: list[dict[str, Any]] = self.comparison["runs"]
        return runs

    @property
    def policies(self) -> tuple[str, ...]:
        """Names in order, the bound among them if it was run."""
        return tuple(dict.fromkeys(run["policy"] for run in self.all_runs))

    @property
    def loads(self) -> tuple[float | None, ...]:
        """Request rates in order; None for a closed loop."""
        return tuple(dict.fromkeys(run["rate_req_s"] for run in self.all_runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds in order."""
        return tuple(dict.fromkeys(run["seed"] for run in self.all_runs))

    @property
    def power_budget_w(self) -> list[list[float]]:
        """Steps of the fleet's power budget, time [s] and limit [W]; empty without one."""
        return self.comparison.get("power_budget_w") or []

    @property
    def conditions(self) -> str:
        """What was out of the ordinary, as sentences: arrivals, noise, faults; mostly empty."""
        said = []
        if self.comparison.get("rate_steps_req_s"):
            steps = self.comparison["rate_steps_req_s"]
            rates = ", ".join(f"{rate:g} req/s from {from_s:g} s" for from_s, rate in steps)
            said.append(f"Load: {rates}.")
        jitter = self.comparison.get("settings", {}).get("jitter_sd_frac")
        if jitter:
            said.append(f"Iteration times spread by {jitter:.0%}.")
        if self.comparison.get("arrivals"):
            said.append(f"Arrivals: {self.comparison['arrivals']}.")
        faults = self.comparison.get("faults") or []
        if len(faults) > 4:
            return " ".join([*said, f"{len(faults)} faults, named in the JSON."])
        for row in faults:
            how = f" by {row['slow_frac']:g}" if "slow_frac" in row else ""
            how += f" to {row['clamp_mhz']:g} MHz" if "clamp_mhz" in row else ""
            until = "" if row["until_s"] is None else f" to {row['until_s']:g} s"
            name = row["fault"].replace("_", " ").capitalize()
            said.append(f"{name} of {row['instance']}{how} from {row['from_s']:g} s{until}.")
        return " ".join(said)

    @property
    def window(self) -> str:
        """What was judged, such as ``120 s after 30 s, 2 seeds``; empty where unknown."""
        settings = self.comparison.get("settings") or {}
        seeds = self.comparison.get("seeds") or self.seeds
        if "duration_s" not in settings or not seeds:
            return ""
        many = f"{len(seeds)} seed" + ("" if len(seeds) == 1 else "s")
        return f"{settings['duration_s']:g} s after {settings['warmup_s']:g} s, {many}"

    @property
    def delays(self) -> str:
        """How late a clock answers and how late policies think it does; empty where unknown."""
        settings = self.comparison.get("settings")
        if not settings:
            return ""
        true_ms = 1e3 * (settings["actuation_s"] + settings["settle_s"])
        believed_ms = 1e3 * settings["belief_delay_s"]
        return (
            f"A clock runs {true_ms:.4g} ms after it was asked for; policies believe"
            f" {believed_ms:.4g} ms until they have seen some."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What to keep in mind when reading the figures, as sentences."""
        return tuple(self.comparison.get("notes") or ())

    @property
    def target_frac(self) -> float:
        """Share of requests that must meet each objective."""
        return float(self.comparison["slo"]["attainment"])

    def runs(self, policy: str, rate_req_s: float | None) -> list[dict[str, Any]]:
        """Runs of a policy at a load, one per seed, as they stand in the JSON."""
        return [r for r in self.all_runs if (r["policy"], r["rate_req_s"]) == (policy, rate_req_s)]

    def detail(self, policy: str, rate_req_s: float | None) -> list[RunDetail]:
        """Details of the runs of a policy at a load, one per seed that has them."""
        both = zip(self.all_runs, self.details, strict=False)
        return [
            detail
            for run, detail in both
            if detail is not None and (run["policy"], run["rate_req_s"]) == (policy, rate_req_s)
        ]

    def values(self, policy: str, rate_req_s: float | None, key: str) -> list[float]:
        """Figures by their name in the JSON, of the seeds that have one."""
        return [r[key] for r in self.runs(policy, rate_req_s) if r.get(key) is not None]

    def mean(self, policy: str, rate_req_s: float | None, key: str) -> float | None:
        """Mean of a figure over seeds; None if no seed has it."""
        values = self.values(policy, rate_req_s, key)
        return sum(values) / len(values) if values else None

    def saving_frac(
        self, policy: str, rate_req_s: float | None, *, wall: bool = False
    ) -> float | None:
        """Energy per output token saved against static-max, at the GPUs or at the wall.

        Of the bound, which serves no tokens, it is power; not in a closed loop, where a slower
        policy serves less, so that power says nothing.

        Returns
        -------
        float or None
            Fraction; None where one of both has no such figure.
        """
        keys = (
            ("wall_per_token_j", "wall_power_w") if wall else ("energy_per_token_j", "mean_power_w")
        )
        for key in keys[: 1 if rate_req_s is None else 2]:
            full, own = (self.mean(name, rate_req_s, key) for name in (REFERENCE, policy))
            if full and own is not None:
                return 1.0 - own / full
        return None

    def above_bound_frac(self, policy: str, rate_req_s: float | None) -> float | None:
        """Power above the fluid bound, as a share of the bound; None without one."""
        bound_w = self.mean("bound", rate_req_s, "mean_power_w")
        power_w = self.mean(policy, rate_req_s, "mean_power_w")
        return None if not bound_w or power_w is None else power_w / bound_w - 1.0

    def meets_slo(self, policy: str, rate_req_s: float | None) -> bool | None:
        """Whether both attainments reach the target; None where nothing was served."""
        met = [self.mean(policy, rate_req_s, f"{part}_attainment") for part in ("ttft", "itl")]
        known = [value for value in met if value is not None]
        return all(value >= self.target_frac for value in known) if known else None

    def cheapest(self, rate_req_s: float | None) -> str | None:
        """Policy of the least power among those that meet the SLO.

        In a closed loop slower policies serve less, so energy per token decides.

        Returns
        -------
        str or None
            Its name; None if no policy meets the SLO.
        """
        key = "energy_per_token_j" if rate_req_s is None else "mean_power_w"
        cost = {
            policy: value
            for policy in self.policies
            if self.meets_slo(policy, rate_req_s)
            and (value := self.mean(policy, rate_req_s, key)) is not None
        }
        return min(cost, key=cost.__getitem__) if cost else None

    @property
    def shown_load(self) -> float | None:
        """Load that stands for the others where only one is drawn: the middle one."""
        return self.loads[len(self.loads) // 2]

    @property
    def title(self) -> str:
        """Fleet, profile, workload."""
        return "  ·  ".join(str(self.comparison[k]) for k in ("fleet", "profile", "workload"))


def load_text(rate_req_s: float | None) -> str:
    """Load in words."""
    return "closed loop" if rate_req_s is None else f"{rate_req_s:.4g} req/s"
