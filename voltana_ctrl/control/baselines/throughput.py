"""VoltanaLLM's two throughput thresholds: the highest clock while more than so much arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.laws import decode_s
from voltana_ctrl.types import Decision, FleetSpec, InstanceSpec, Observation, Slo

__all__ = ["Arrivals", "ThroughputController"]

#: Answer taken for typical before the first one has ended.
_OUTPUT_TOK = 200.0
#: Context of a running request, for the batch that a clock can hold.
_CONTEXT_TOK = 512.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrivals:
    """What has arrived within the window, by instance.

    Parameters
    ----------
    ticks : tuple of (t_s, req, tok)
        Time, requests and prompt tokens of every tick within the window.
    answered_req, answered_tok : float
        How many requests have ended, and their output tokens.

    Examples
    --------
    >>> Arrivals().answered_req
    0.0
    """

    ticks: tuple[tuple[float, F64, F64], ...] = ()
    answered_req: float = 0.0
    answered_tok: float = 0.0


class ThroughputController(Controller):
    """Rules 1 and 2 of VoltanaLLM v0.1's ``freq_manager.py``: the top clock under high throughput.

    An instance at which more prompt tokens a second, or more requests a second, have arrived in
    the last five seconds than its thresholds say runs at its highest clock; otherwise its governor
    chooses. The public demo sets both thresholds out of reach, and the paper names no values. Here
    they are what the clock below the highest of the ladder can serve: the prompt tokens that it
    prefills in a second, and the requests whose answers it decodes within the ITL promise.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Its ITL target bounds the batch.
    ladder_mhz : sequence of float
        Clocks of the governors; with a single one its own throughput is the threshold.
    window_s : float
        Arrivals are counted over so long.
    period_s : float
        Time between decisions.

    Raises
    ------
    ConfigError
        If the window is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from dataclasses import replace
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = ThroughputController(fleet, Slo(ttft_s=0.6, itl_s=0.06),
    ...                                   ladder_mhz=[1005, 1305, 1410])
    >>> busy = replace(FleetState.idle(2, t_s=1.0), arrived_tok=np.array([150_000.0, 0.0]))
    >>> decision, _ = controller.decide(Observation(state=busy), controller.init())
    >>> decision.freq_mhz
    array([1410.,  210.])
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        *,
        ladder_mhz: Sequence[float],
        window_s: float = 5.0,
        period_s: float = 0.1,
    ) -> None:
        super().__init__(fleet, period_s=period_s)
        positive("ThroughputController.window_s", window_s)
        self._window_s = window_s
        below = [_below(one, ladder_mhz) for one in fleet.instances]
        #: Prompt tokens a second, and requests at a time, that each one serves at that clock.
        self._most_tok_s = np.array(
            [
                1.0 / row["prefill_tok_s"] if one.role.prefills else np.inf
                for one, row in zip(fleet.instances, below, strict=True)
            ]
        )
        self._most_req = np.array(
            [
                _batch_req(one, row, slo) if one.role.decodes else np.inf
                for one, row in zip(fleet.instances, below, strict=True)
            ]
        )
        self._itl_s = slo.itl_s

    def init(self) -> Arrivals:
        """Nothing has arrived."""
        return Arrivals()

    def _decide(self, observation: Observation, memory: Arrivals) -> tuple[Decision, Arrivals]:
        state = observation.state
        since_s = state.t_s - self._window_s
        ticks = (
            *(tick for tick in memory.ticks if tick[0] > since_s),
            (state.t_s, state.arrived_req, state.arrived_tok),
        )
        output_tok = observation.finished.output_tok
        memory = Arrivals(
            ticks=ticks,
            answered_req=memory.answered_req + len(output_tok),
            answered_tok=memory.answered_tok + float(output_tok.sum()),
        )
        mean_tok = memory.answered_tok / memory.answered_req if memory.answered_req else _OUTPUT_TOK
        # Little's law: so many at a time leave after so many iterations of the promised length.
        most_req_s = self._most_req / (max(1.0, mean_tok - 1.0) * self._itl_s)
        req_s = np.sum([req for _, req, _ in ticks], axis=0) / self._window_s
        tok_s = np.sum([tok for _, _, tok in ticks], axis=0) / self._window_s
        busy = (tok_s > self._most_tok_s) | (req_s > most_req_s)
        floor_mhz = np.where(busy, self.fleet.max_mhz, self.fleet.min_mhz)
        return Decision.highest(self.fleet, t_s=state.t_s, floor_mhz=floor_mhz), memory


def _below(one: InstanceSpec, ladder_mhz: Sequence[float]) -> np.void:
    """Coefficients at the clock below the highest of the ladder."""
    rows = one.clock_rows(ladder_mhz)
    row: np.void = one.table[rows[-2] if len(rows) > 1 else rows[-1]]
    return row


def _batch_req(one: InstanceSpec, row: np.void, slo: Slo) -> float:
    """Largest batch within the ITL promise and the KV cache at this clock."""
    sizes = np.arange(1.0, one.max_batch + 1.0)
    padded = one.profile.padded_batch(one.max_batch)[1:]
    step_s = decode_s(row, sizes, _CONTEXT_TOK * sizes, padded)
    inside = (step_s <= slo.itl_s) & (_CONTEXT_TOK * sizes <= one.kv_capacity_tok)
    return float(np.count_nonzero(inside))
