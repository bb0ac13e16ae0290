"""Least power of one instance against its load, under the promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool
from voltana_ctrl.control.governor import thrifty_row
from voltana_ctrl.laws import paced
from voltana_ctrl.types import InstanceSpec, Lengths, Role, Slo, Tuning
from voltana_ctrl.types.fleet import KV_FULL_FRAC
from voltana_ctrl.types.ladder import row_down

__all__ = ["Curve", "LeastPower", "Target"]

#: Prompt lengths, in standard deviations, at which the tail of the prefill wait is averaged.
_NODES = np.array([NormalDist().inv_cdf((i + 0.5) / 24) for i in range(24)])

#: Slacks at which the share of late answers is tabled.
_SLACKS = 501

#: ITL margins tried where not all promises can be kept.
_EXTRA_FRAC = np.linspace(0.0, 0.4, 17)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """Least power of one instance against its load.

    Parameters
    ----------
    arrival_req_s : ndarray, shape (n_loads,)
        Loads [req/s].
    power_w : ndarray, shape (n_loads,)
        Least mean power at each load; inf where the promises cannot be kept.
    floor_row : ndarray of int, shape (n_loads,)
        Row of the profile's table, and so of the clock, at which it is drawn; where a governor
        runs above it, the row of the floor.
    miss_frac : ndarray, shape (n_loads,)
        Share of requests that are predicted to miss a promise there.
    """

    arrival_req_s: F64
    power_w: F64
    floor_row: I64
    miss_frac: F64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """Where the fleet should settle.

    Parameters
    ----------
    active : ndarray of bool, shape (n,)
        Who takes new work.
    route_frac : ndarray, shape (n,)
        Share of the arrivals that each instance gets; the shares of a phase add up to 1.
    floor_mhz : ndarray, shape (n,)
        Lowest clock; the clock itself where no governor runs.
    power_w : ndarray, shape (n,)
        Predicted mean power; 0 where an instance gets more than it can serve.
    price_j_req : ndarray, shape (n,)
        Marginal energy of one more request there. Beyond what the instance can serve no energy
        tells it, and a price stands that is ten times the highest of its group.
    feasible : bool
        Whether all phases can keep the promises. In one that cannot, every usable instance is
        active, with a share by its speed, and its floor is no higher than helps to serve more of
        the requests in time.
    forgone_j : ndarray, shape (n_phases,)
        Energy that the active set of each phase has cost more than the best one would have, since
        the two began to differ. Negative while a change has yet to be earned back; see
        :meth:`TargetOptimiser.plan`.
    """

    active: Bool
    route_frac: F64
    floor_mhz: F64
    power_w: F64
    price_j_req: F64
    feasible: bool
    forgone_j: F64


class LeastPower:
    """What one instance draws at least, at any load that it can serve within the promises.

    Parameters
    ----------
    instance : InstanceSpec
        The instance.
    slo, margin_frac, delay_s, governed
        See :class:`voltana_ctrl.control.TargetOptimiser`.
    pace_frac : tuple of float
        Prefill and decode iterations take so many times what the profile says.
    able_mhz : float
        Highest clock that the instance gets.
    tuning : Tuning, optional
        What is chosen rather than derived; the defaults if left out.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> decode = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b")).instances[1]
    >>> least = LeastPower(decode, Slo(ttft_s=0.6, itl_s=0.06), margin_frac=(0.02, 0.035),
    ...                    delay_s=0.025, governed=True)
    >>> curve = least.at(length_moments([240, 240], [200, 200]))
    >>> curve(np.array([5.0, 80.0])).power_w.round(1)
    array([111.8,   inf])
    """

    def __init__(
        self,
        instance: InstanceSpec,
        slo: Slo,
        *,
        margin_frac: tuple[float, float],
        delay_s: float,
        governed: bool,
        pace_frac: tuple[float, float] = (1.0, 1.0),
        able_mhz: float = math.inf,
        tuning: Tuning | None = None,
    ) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose import target as kernels

        self._kernels = kernels
        self.instance = instance
        table = instance.table[: row_down(instance.clocks_mhz, able_mhz) + 1]
        #: Coefficients per clock, as they are believed.
        self.rows: Any = np.ascontiguousarray(paced(table, *pace_frac))
        self._padded = instance.profile.padded_batch(instance.max_batch)
        # Of a colocated instance: its prompts run beside what decodes.
        self._prompt_w = self.rows["prefill_power_w"] + self.rows["prefill_beside_w"]
        self._sizes = np.arange(1, instance.max_batch + 1)
        self._governed = governed
        tuning = tuning or Tuning()
        self._free_frac, self._repay_tok = tuning.free_frac, tuning.repay_tok
        self._thrifty_k = thrifty_row(table)
        self._miss_frac = 1.0 - slo.attainment
        self._ttft_s = slo.ttft_s / (1.0 + margin_frac[0]) - delay_s
        # Slower than what arrives is to postpone work, which only a clock that answers well
        # within the promise makes up for.
        self._deaf_frac = min(1.0, 3.0 * delay_s / slo.ttft_s)
        self._attainment, self._itl_s = slo.attainment, slo.itl_s
        self._itl_margin_frac = margin_frac[1]

    def at(self, lengths: Lengths, most_req: float = math.inf) -> Callable[[F64], Curve]:
        """Curve at these lengths, as a function of the load.

        Parameters
        ----------
        lengths : Lengths
            Prompt and output lengths of the requests.
        most_req : float
            Largest decode batch that can be there, see :meth:`station`.

        Returns
        -------
        callable
            Takes an array of loads [req/s], each > 0, and returns their :class:`Curve`.
        """
        if self.instance.role is Role.PREFILL:
            return self._prefill(lengths)
        return self._decode(lengths, most_req)

    def floor_row(self, arrival_req_s: float, lengths: Lengths, most_req: float) -> int:
        """Row of the floor of least power at this load, of batches up to `most_req`.

        Parameters
        ----------
        arrival_req_s : float
            Load of this instance, > 0.
        lengths, most_req
            See :meth:`at`.
        """
        return int(self.at(lengths, most_req)(np.array([arrival_req_s])).floor_row[0])

    def _prefill(self, lengths: Lengths) -> Callable[[F64], Curve]:
        """M/G/1 with exponential tail of the wait; base time shared by those that queue.

        ``P(W > t) = rho exp(-rho t / E[W])`` with Pollaczek-Khinchine's ``E[W]`` is the
        heavy-traffic approximation of Kingman (1962), exact for M/M/1. ``W`` is taken
        ``1 + rho / (1 + rho)`` times longer, since prompts are served together.
        """
        spread = math.sqrt(math.log1p((lengths.prompt_sd_tok / lengths.prompt_tok) ** 2))
        typical_tok = lengths.prompt_tok * np.exp(spread * _NODES - spread**2 / 2.0)

        def curve(loads_req_s: F64) -> Curve:
            power_w, row, late_frac = _empty(loads_req_s)
            self._kernels.prefill_curve(
                self.rows, loads_req_s, lengths.prompt_tok, lengths.prompt_sd_tok, self._ttft_s,
                self._miss_frac, self._governed, self._deaf_frac,
                typical_tok, power_w, row, late_frac,
            )  # fmt: skip
            return Curve(
                arrival_req_s=loads_req_s, power_w=power_w, floor_row=row, miss_frac=late_frac
            )

        return curve

    def _decode(self, lengths: Lengths, most_req: float) -> Callable[[F64], Curve]:
        station = self.station(lengths, most_req=most_req)
        limits = self._limits(lengths)

        def curve(loads_req_s: F64) -> Curve:
            power_w, row, over_frac = _empty(loads_req_s)
            self._kernels.decode_curve(
                station, loads_req_s, *limits, self._miss_frac, power_w, row, over_frac,
            )  # fmt: skip
            return Curve(
                arrival_req_s=loads_req_s, power_w=power_w, floor_row=row, miss_frac=over_frac
            )

        return curve

    def _limits(self, lengths: Lengths) -> tuple[float, int, float]:
        """Tokens that a request decodes, largest batch, longest iteration."""
        decoded_tok = lengths.output_tok - 1.0
        # Largest batch whose KV tokens fit as often as the promises are to be kept.
        kv_tok = self._sizes * lengths.context_tok
        kv_tok += (
            NormalDist().inv_cdf(self._attainment) * lengths.context_sd_tok * np.sqrt(self._sizes)
        )
        limit_req = int(np.count_nonzero(kv_tok <= KV_FULL_FRAC * self.instance.kv_capacity_tok))
        limit_s = self._itl_s / (1.0 + 1.0 / max(1.0, decoded_tok))
        if self._governed and self.instance.role is Role.COLOCATED:
            # Nobody waits at a hand-off, and what the governor aims at has been seen to be enough.
            limit_s = max(limit_s, self._itl_s / (1.0 + self._itl_margin_frac))
        return decoded_tok, limit_req, limit_s

    def keeps(self, arrival_req_s: float, lengths: Lengths, most_req: float) -> bool:
        """Whether a decode instance keeps the promise without a floor, of batches up to `most_req`.

        Parameters
        ----------
        arrival_req_s : float
            Load of this instance.
        lengths, most_req
            See :meth:`at`.
        """
        of = self.station(lengths, most_req=most_req), arrival_req_s, *self._limits(lengths), 0
        return bool(self._kernels.station(*of)[1] <= self._miss_frac)

    def overload_frac(self, arrival_req_s: float, lengths: Lengths) -> float:
        """ITL margin, on top of the governor's own, that pays where promises cannot be kept.

        The least that serves in time as many of the requests, but for what the promise allows,
        as any would, and more where that is all but free: nothing is spent that buys no
        attainment. A margin, not a floor: it makes the clock rise with the batch, where a floor
        is high while the batch is small.

        Parameters
        ----------
        arrival_req_s : float
            Load of this instance.
        lengths : Lengths
            Prompt and output lengths of the requests.

        Returns
        -------
        float
            Between 0 and 0.4: iterations are to be so much shorter, relative.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> from voltana_ctrl.laws import length_moments
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> least = LeastPower(fleet.instances[1], Slo(ttft_s=0.6, itl_s=0.06),
        ...                    margin_frac=(0.02, 0.035), delay_s=0.025, governed=True)
        >>> lengths = length_moments([240, 240], [200, 200])
        >>> [round(least.overload_frac(load_req_s, lengths), 3) for load_req_s in (40.0, 49.0)]
        [0.0, 0.1]
        """
        served_frac, power_w = np.empty((2, len(_EXTRA_FRAC)))
        for k, extra_frac in enumerate(_EXTRA_FRAC):
            aim_s = self._itl_s / (1.0 + self._itl_margin_frac + extra_frac)
            power_w[k], missed_frac, _ = self._kernels.station(
                self.station(lengths, aim_s=aim_s), arrival_req_s,
                *self._limits(lengths), 0,
            )  # fmt: skip
            served_frac[k] = 1.0 - missed_frac
        least = int(np.argmax(served_frac >= self._attainment * served_frac.max()))
        free = np.flatnonzero(power_w <= (1.0 + self._free_frac) * power_w[least])[-1]
        return float(_EXTRA_FRAC[max(free, least)])

    def speed_req_s(self, lengths: Lengths) -> float:
        """Requests per second that the instance serves at its highest clock, about.

        Parameters
        ----------
        lengths : Lengths
            Prompt and output lengths of the requests.

        Returns
        -------
        float
            Requests per second, without a look at the promises.
        """
        row = self.rows[-1]
        if self.instance.role is Role.PREFILL:
            return float(1.0 / (row["prefill_tok_s"] * lengths.prompt_tok + row["prefill_req_s"]))
        per_req_s = max(row["decode_req_s"], row["decode_roof_s"])
        growth_s = per_req_s + row["decode_kv_s"] * lengths.context_tok
        return float(1.0 / (growth_s * max(1.0, lengths.output_tok - 1.0)))

    def station(
        self, lengths: Lengths, *, aim_s: float | None = None, most_req: float = math.inf
    ) -> tuple[Any, ...]:
        """The decode station at these lengths, as the arguments that its kernels take.

        Parameters
        ----------
        lengths : Lengths
            Prompt and output lengths of the requests.
        aim_s : float, optional
            Iteration time that the governor aims at; the promise less its margin by default.
        most_req : float
            Batches above it are left out: of what is left each keeps its odds against the others,
            as detailed balance has it.
        """
        if aim_s is None:
            # Without a governor nobody aims at anything.
            aim_s = self._itl_s / (1.0 + self._itl_margin_frac) if self._governed else math.inf
        rows, n = self.rows, int(min(len(self._padded), max(most_req, 1.0) + 1.0))
        padded = self._padded[:n]
        needed_row, step_s, power_w = np.empty(n, dtype=np.int64), np.empty(n), np.empty(n)
        self._kernels.governed_batches(
            rows, padded, lengths.context_tok, aim_s,
            needed_row, step_s, power_w,
        )  # fmt: skip
        return (
            rows, padded, lengths.context_tok, needed_row, step_s, power_w,
            self._beside(lengths, aim_s),
        )  # fmt: skip

    def _beside(self, lengths: Lengths, aim_s: float) -> Any:
        """Prompts that run beside what decodes; none where they run elsewhere."""
        from scipy.special import ndtr

        from voltana_ctrl.kernels.choose import beside  # loads Numba

        prompt_s, prompt_s2, prompt_w, late_frac = np.empty((4, 0))
        if self.instance.role is Role.COLOCATED:
            rows = self.rows
            square = lengths.prompt_tok**2 + lengths.prompt_sd_tok**2
            each_tok2 = square / max(lengths.prompt_tok, 1.0)
            tok_s = rows["prefill_tok_s"] + rows["prefill_tok2_s"] * each_tok2
            each_s = rows["prefill_req_s"]
            prompt_s = tok_s * lengths.prompt_tok + each_s
            prompt_s2 = tok_s**2 * square + 2.0 * tok_s * each_s * lengths.prompt_tok + each_s**2
            prompt_w = self._prompt_w
            if self._governed:
                slack = np.linspace(beside.LEAST_SLACK, beside.MOST_SLACK, _SLACKS)
                root_tok = np.sqrt(_typical_answers_tok(lengths))
                late_frac = ndtr(-slack[:, None] * root_tok).mean(axis=1)
        return beside.Beside(
            prompt_s=prompt_s, prompt_s2=prompt_s2, prompt_w=prompt_w, late_frac=late_frac,
            aim_s=aim_s, itl_s=self._itl_s, repay_tok=self._repay_tok, thrifty_k=self._thrifty_k,
        )  # fmt: skip


def _typical_answers_tok(lengths: Lengths) -> F64:
    """Tokens decoded of answers, each as likely: lognormal.

    A request that decodes ``d`` tokens holds its prompt and half of them on average over its stay,
    so that ``E[d^2] / E[d]`` is twice what the context has above the prompt.
    """
    mean_tok = max(1.0, lengths.output_tok - 1.0)
    met_tok = 2.0 * (lengths.context_tok - lengths.prompt_tok)
    spread = math.sqrt(math.log(max(1.0, met_tok / mean_tok)))
    typical: F64 = np.maximum(1.0, mean_tok * np.exp(spread * _NODES - spread**2 / 2.0))
    return typical


def _empty(loads_req_s: F64) -> tuple[F64, I64, F64]:
    n = len(loads_req_s)
    return np.empty(n), np.empty(n, dtype=np.int64), np.empty(n)
