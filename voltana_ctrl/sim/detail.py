"""What figures need of a run besides its totals: clocks, batch, power over time; latencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.checks import freeze_fields
from voltana_ctrl.errors import ShapeError
from voltana_ctrl.moved import forward
from voltana_ctrl.sim.metrics import drawn_j, judged_latencies, snapshot

if TYPE_CHECKING:
    from voltana_ctrl.sim.plant import Plant
    from voltana_ctrl.sim.power import PowerMeter

__all__ = ["DetailSampler", "RunDetail"]

__getattr__ = forward(__name__)

#: Intervals that the window is cut into.
INTERVALS = 120

# Even up to the median, then ever denser: attainment is decided in the tail.
_QUANTILE_FRAC = np.union1d(np.linspace(0.01, 0.5, 50), 1.0 - np.logspace(np.log10(0.5), -4, 250))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunDetail:
    """One run in the course of its window, and how its latencies are distributed.

    Parameters
    ----------
    edge_s : ndarray, shape (n + 1,)
        Simulated time at the edges of the intervals.
    freq_mhz : ndarray, shape (n, n_instances)
        Mean clock of each instance while it worked; NaN where it did not.
    batch_req : ndarray, shape (n, n_instances)
        Mean decode batch of its iterations; NaN where it decoded nothing.
    power_w : ndarray, shape (n, n_instances)
        Mean power of each instance.
    prefill, decode : ndarray of int
        Indices of the instances that prefill and that decode.
    quantile_frac : ndarray, shape (k,)
        Shares of the judged requests, ascending.
    ttft_s, itl_s : ndarray, shape (k,)
        Latency within which that share was served; infinite where it never was. A request
        of a single token has an ITL of 0.

    Raises
    ------
    ShapeError
        If shapes do not belong together.

    Examples
    --------
    >>> detail = RunDetail(edge_s=[0.0, 1.0], freq_mhz=[[900.0]], batch_req=[[4.0]],
    ...                    power_w=[[250.0]], prefill=[0], decode=[0],
    ...                    quantile_frac=[0.5, 0.99], ttft_s=[0.1, 0.4], itl_s=[0.02, 0.03])
    >>> detail.power_w.shape
    (1, 1)
    """

    edge_s: Any
    freq_mhz: Any
    batch_req: Any
    power_w: Any
    prefill: Any
    decode: Any
    quantile_frac: Any
    ttft_s: Any
    itl_s: Any

    def __post_init__(self) -> None:
        intervals, fleet = len(self.edge_s) - 1, np.shape(self.freq_mhz)[1:]
        if intervals < 1 or len(fleet) != 1:
            raise ShapeError(
                "RunDetail: expected at least two edges and one row of instances per interval,"
                f" got {intervals + 1} edges and freq_mhz of shape {np.shape(self.freq_mhz)}"
            )
        freeze_fields(self, ["edge_s"], (intervals + 1,))
        freeze_fields(self, ["freq_mhz", "batch_req", "power_w"], (intervals, *fleet))
        freeze_fields(self, ["prefill"], (len(self.prefill),), np.int64)
        freeze_fields(self, ["decode"], (len(self.decode),), np.int64)
        freeze_fields(self, ["quantile_frac", "ttft_s", "itl_s"], (len(self.quantile_frac),))


class DetailSampler:
    """Keeps the sums of every instance at fixed times of the window.

    Means over an interval are differences of sums, so nothing between two samples is lost.
    An observer of a control loop, or asked by whoever advances the plant.

    Parameters
    ----------
    plant : Plant
        What is sampled.
    from_s, until_s : float
        Edges of the window.
    meter : PowerMeter, optional
        What stands before the plant and is advanced in its place.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.plant import Plant
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = Plant(fleet, make_workload("sharegpt", rate_req_s=2.0, duration_s=20.0, seed=0))
    >>> sampler = DetailSampler(plant, 0.0, 12.0)
    >>> sampler.advance(12.0)
    >>> sampler.detail().freq_mhz.shape
    (120, 2)
    """

    def __init__(
        self, plant: Plant, from_s: float, until_s: float, meter: PowerMeter | None = None
    ) -> None:
        self._plant = plant
        self._advanced = meter or plant
        self._due_s = np.linspace(from_s, until_s, INTERVALS + 1)
        self._next = 0
        self._edge_s: list[float] = []
        self._sums: list[Any] = []

    def advance(self, to_s: float) -> None:
        """Run the plant until `to_s`, with a stop at every sample on the way."""
        while self._next < len(self._due_s) and self._due_s[self._next] <= to_s:
            self._advanced.advance(float(self._due_s[self._next]))
            self.take()
        self._advanced.advance(to_s)

    def on_tick(self, record: object) -> None:  # noqa: ARG002  the observer's signature
        """Sample if one is due."""
        self.take()

    def take(self) -> None:
        """Sample if one is due."""
        now_s = self._plant.now_s
        passed = int(np.searchsorted(self._due_s, now_s + 1e-9, side="right"))
        if passed > self._next:
            self._next = passed
            self._edge_s.append(now_s)
            self._sums.append(snapshot(self._plant))

    def detail(self) -> RunDetail:
        """Everything recorded, and the latencies as they are known now.

        Raises
        ------
        ShapeError
            If fewer than two samples were taken.
        """
        names = (
            "busy_s", "busy_mhz_s", "decoded_tok", "decode_iterations",
            "prefill_j", "decode_j", "idle_j", "transfer_j",
        )  # fmt: skip
        gain = {
            name: np.diff([sums[name] for sums in self._sums], axis=0).astype(float)
            for name in names
        }
        energy_j = drawn_j(gain)
        ttft_s, itl_s = judged_latencies(self._plant)
        fleet = self._plant.fleet
        return RunDetail(
            edge_s=self._edge_s,
            freq_mhz=_ratio(gain["busy_mhz_s"], gain["busy_s"]),
            batch_req=_ratio(gain["decoded_tok"], gain["decode_iterations"]),
            power_w=energy_j / np.diff(self._edge_s)[:, None],
            prefill=fleet.prefill,
            decode=fleet.decode,
            quantile_frac=_QUANTILE_FRAC,
            ttft_s=_quantiles(ttft_s),
            itl_s=_quantiles(itl_s),
        )


def _ratio(over: Any, under: Any) -> Any:
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 1e-12)


def _quantiles(latency_s: Any) -> Any:
    """Smallest latency that covers each share; NaN stands for one that never came."""
    if not latency_s.size:
        return np.full(len(_QUANTILE_FRAC), np.inf)
    ordered_s = np.sort(np.where(np.isnan(latency_s), np.inf, latency_s))
    # A share that is a whole number of requests must not round up to one more.
    rank = np.ceil(_QUANTILE_FRAC * latency_s.size - 1e-9).astype(int)
    return ordered_s[np.clip(rank - 1, 0, latency_s.size - 1)]
