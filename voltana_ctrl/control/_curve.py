"""Least power of one instance against its load, under the promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from voltana_ctrl.physics import Lengths
from voltana_ctrl.types import InstanceSpec, Role, Slo
from voltana_ctrl.types._check import F64, I64

__all__ = ["Curve", "LeastPower"]

#: Prompt lengths, in standard deviations, at which the tail of the prefill wait is averaged.
_NODES = np.array([NormalDist().inv_cdf((i + 0.5) / 24) for i in range(24)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """Least power of one instance against its load.

    Parameters
    ----------
    arrival_req_s : ndarray, shape (n_loads,)
        Loads.
    power_w : ndarray, shape (n_loads,)
        Least power; inf where the promises cannot be kept.
    floor_row : ndarray of int, shape (n_loads,)
        Row of the clock (of the floor, where a governor runs above it).
    miss_frac : ndarray, shape (n_loads,)
        Share of requests predicted to miss.

    Examples
    --------
    >>> Curve.__slots__[0]
    'arrival_req_s'
    """

    arrival_req_s: F64
    power_w: F64
    floor_row: I64
    miss_frac: F64


class LeastPower:
    """What one instance draws at least, at any load that it can serve within the promises.

    Parameters
    ----------
    instance : InstanceSpec
        Which.
    slo, margin_frac, delay_s, governed
        As of :class:`voltana_ctrl.control.TargetOptimiser`.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.physics import length_moments
    >>> decode = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b")).instances[1]
    >>> least = LeastPower(decode, Slo(ttft_s=0.6, itl_s=0.06), margin_frac=(0.02, 0.035),
    ...                    delay_s=0.025, governed=True)
    >>> curve = least.at(length_moments([240, 240], [200, 200]))
    >>> curve(np.array([5.0, 80.0])).power_w.round(1)
    array([117.2,   inf])
    """

    def __init__(
        self,
        instance: InstanceSpec,
        slo: Slo,
        *,
        margin_frac: tuple[float, float],
        delay_s: float,
        governed: bool,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl._kernels import target as kernels

        self._kernels = kernels
        self.instance = instance
        self._rows: Any = np.ascontiguousarray(instance.table)
        self._padded = instance.profile.padded_batch(instance.max_batch)
        self._prompt_w = self._rows["prefill_power_w"].copy()
        self._sizes = np.arange(1, instance.max_batch + 1)
        self._governed = governed
        self._miss_frac = 1.0 - slo.attainment
        self._ttft_s = slo.ttft_s / (1.0 + margin_frac[0]) - delay_s
        self._itl_s = slo.itl_s
        # A governor aims at the promise less its margin; without one nobody does.
        self._aim_s = slo.itl_s / (1.0 + margin_frac[1]) if governed else math.inf

    def at(self, lengths: Lengths, pace_frac: float = 1.0) -> Callable[[F64], Curve]:
        """Curve at these lengths: a function of loads [req/s], each > 0.

        Parameters
        ----------
        lengths : Lengths
            Of the requests.
        pace_frac : float
            Decode iterations take so many times what profiles say.
        """
        if self.instance.role is Role.PREFILL:
            return self._prefill(lengths)
        return self._decode(lengths, pace_frac)

    def _prefill(self, lengths: Lengths) -> Callable[[F64], Curve]:
        """M/G/1 with exponential tail of the wait; base time shared by those that queue.

        ``P(W > t) = rho exp(-rho t / E[W])`` with Pollaczek-Khinchine's ``E[W]`` is the
        heavy-traffic approximation of Kingman (1962), exact for M/M/1.
        """
        spread = math.sqrt(math.log1p((lengths.prompt_sd_tok / lengths.prompt_tok) ** 2))
        typical_tok = lengths.prompt_tok * np.exp(spread * _NODES - spread**2 / 2.0)

        def curve(loads_req_s: F64) -> Curve:
            power_w, row, late_frac = _empty(loads_req_s)
            self._kernels.prefill_curve(
                self._rows, loads_req_s, lengths.prompt_tok, lengths.prompt_sd_tok, self._ttft_s,
                self.instance.idle_w, self._miss_frac, self._governed, typical_tok,
                power_w, row, late_frac,
            )  # fmt: skip
            if self._governed:
                # The governor raises to the top when the queue asks for it.
                row[:] = 0
            else:
                row[np.isinf(power_w)] = len(self._rows) - 1
            return Curve(
                arrival_req_s=loads_req_s, power_w=power_w, floor_row=row, miss_frac=late_frac
            )

        return curve

    def _decode(self, lengths: Lengths, pace_frac: float) -> Callable[[F64], Curve]:
        station = self.station(lengths, pace_frac)
        decoded_tok = lengths.output_tok - 1.0
        limit_s = self._itl_s / (1.0 + 1.0 / max(1.0, decoded_tok))
        # Largest batch whose KV tokens fit but for one time in a hundred.
        kv_tok = self._sizes * lengths.context_tok
        kv_tok += 2.33 * lengths.context_sd_tok * np.sqrt(self._sizes)
        limit_req = int(np.count_nonzero(kv_tok <= 0.99 * self.instance.kv_capacity_tok))

        def curve(loads_req_s: F64) -> Curve:
            power_w, row, over_frac = _empty(loads_req_s)
            self._kernels.decode_curve(
                station, loads_req_s, decoded_tok, limit_req, limit_s, self._miss_frac,
                self.instance.idle_w, power_w, row, over_frac,
            )  # fmt: skip
            return Curve(
                arrival_req_s=loads_req_s, power_w=power_w, floor_row=row, miss_frac=over_frac
            )

        return curve

    def station(self, lengths: Lengths, pace_frac: float = 1.0) -> tuple[Any, ...]:
        """The decode station at these lengths, as its kernels take it.

        Parameters
        ----------
        lengths, pace_frac
            As of :meth:`at`.
        """
        rows, n = self._rows, len(self._padded)
        needed_row, step_s, power_w = np.empty(n, dtype=np.int64), np.empty(n), np.empty(n)
        self._kernels.governed_batches(
            rows, self._padded, lengths.context_tok, pace_frac, self._aim_s,
            needed_row, step_s, power_w,
        )  # fmt: skip
        prompt_s = np.zeros(len(rows))
        if self.instance.role is Role.COLOCATED:
            square = lengths.prompt_tok**2 + lengths.prompt_sd_tok**2
            prompt_s = rows["prefill_tok_s"] * lengths.prompt_tok + rows["prefill_tok2_s"] * square
        return (
            rows, self._padded, lengths.context_tok, pace_frac, needed_row, step_s, power_w,
            prompt_s, self._prompt_w,
        )  # fmt: skip


def _empty(loads_req_s: F64) -> tuple[F64, I64, F64]:
    n = len(loads_req_s)
    return np.empty(n), np.empty(n, dtype=np.int64), np.empty(n)
