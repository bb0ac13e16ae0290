"""Joules of each request that a router served: modelled at once, measured where iterations are."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from voltana_ctrl.checks import count
from voltana_ctrl.estimate import FleetTables
from voltana_ctrl.estimate.attribution import EnergyLedger
from voltana_ctrl.router.ledger import Flight
from voltana_ctrl.router.policy import StateSource
from voltana_ctrl.types import FleetSpec, IterationBatch, RequestBatch, TickRecord

__all__ = ["EnergyBook", "RequestEnergy"]

# Of what the kernels predict: time, energy, power.
_ENERGY_J = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnergy:
    """What one request cost.

    Parameters
    ----------
    id : str
        Id of the request, as in the header ``x-request-id`` of its answer.
    prefill_j, decode_j : float
        Joules of its prompt and of its tokens, as shared with its batch.
    idle_j : float
        Its share, in joules, of what instances drew that had nothing to do while it ran.
    source : {"measured", "modelled"}
        Whether prefill and decode are attributed from measured iterations or from the profile;
        `idle_j` is always the idle power of the profile.
    prompt_tok, output_tok : int
        Tokens of its prompt and of its answer.
    prefill_instance, decode_instance : str
        Ids of the instances where it ran.

    Examples
    --------
    >>> energy = RequestEnergy(id="a", prefill_j=3.0, decode_j=9.0, idle_j=0.5, source="modelled",
    ...     prompt_tok=40, output_tok=20, prefill_instance="p0", decode_instance="d0")
    >>> energy.total_j, energy.header
    (12.5, 'prefill=3.0000, decode=9.0000, idle=0.5000, source=modelled')
    """

    id: str
    prefill_j: float
    decode_j: float
    idle_j: float
    source: Literal["measured", "modelled"]
    prompt_tok: int
    output_tok: int
    prefill_instance: str
    decode_instance: str

    @property
    def total_j(self) -> float:
        """Sum of all three, in joules."""
        return self.prefill_j + self.decode_j + self.idle_j

    @property
    def header(self) -> str:
        """Value of the header ``x-voltana-energy``: a structured field (RFC 9651), in joules."""
        return (
            f"prefill={self.prefill_j:.4f}, decode={self.decode_j:.4f}, idle={self.idle_j:.4f},"
            f" source={self.source}"
        )

    def usage(self) -> dict[str, Any]:
        """The energy as it stands in the `usage` of an answer.

        Returns
        -------
        dict
            Joules of the three parts and in total, rounded to 0.1 mJ, and the source.
        """
        return {
            "prefill_j": round(self.prefill_j, 4),
            "decode_j": round(self.decode_j, 4),
            "idle_j": round(self.idle_j, 4),
            "total_j": round(self.total_j, 4),
            "source": self.source,
        }

    def json(self) -> dict[str, Any]:
        """All fields, and ``total_j``, as plain values of JSON."""
        return {**asdict(self), "total_j": self.total_j}


class EnergyBook:
    """Charges requests as they end, and remembers the latest of them.

    Modelled: the profile's energy of the prompt, and of one decode step at the mean batch of the
    time, shared by that batch, for each further token. Measured: where the book is an observer of
    a :class:`~voltana_ctrl.ControlLoop` whose iterations carry energy, the attribution of
    :class:`~voltana_ctrl.estimate.EnergyLedger`; final with the tick after the request's end.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    source : StateSource, optional
        Tells the clocks, by which the profile's energies are taken; the highest ones without.
    keep_req : int
        Number of requests whose energy is remembered.

    Raises
    ------
    ConfigError
        If nothing is to be remembered.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.router.ledger import Flight
    >>> book = EnergyBook(FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b")))
    >>> flight = Flight(id="a", prompt_tok=1000, begin_s=0.0, prefill=0, decode=1, output_tok=11,
    ...                 batch_req=10.0, kv_tok=10_000.0)
    >>> energy = book.charge(flight)
    >>> round(energy.prefill_j, 1), round(energy.decode_j, 1), energy.source
    (30.2, 3.6, 'modelled')
    >>> book.find("a") == energy
    True
    """

    def __init__(
        self, fleet: FleetSpec, source: StateSource | None = None, *, keep_req: int = 10_000
    ) -> None:
        # Loads Numba, which an import must not.
        from voltana_ctrl.kernels.learn.predictor import decode_one, prefill_one

        count("EnergyBook.keep_req", keep_req)
        self.fleet = fleet
        self.source = source
        self.keep_req = keep_req
        self.spent_j = {"prefill": 0.0, "decode": 0.0, "idle": 0.0}
        self._ids = fleet.ids
        self._tables = FleetTables.of(fleet)
        self._decode_one, self._prefill_one = decode_one, prefill_one
        self._max_mhz = fleet.max_mhz
        self._book: OrderedDict[str, RequestEnergy] = OrderedDict()
        self._attribution = EnergyLedger(instances=len(fleet))
        self._measured = self._attribution.init()
        self._ended: list[tuple[str, Flight]] = []
        self._observed = False
        # The loop ticks in a thread of its own.
        self._lock = threading.Lock()

    def charge(self, flight: Flight, *, cached_tok: int = 0) -> RequestEnergy:
        """Charge a request that has ended, and remember its energy.

        Parameters
        ----------
        flight : Flight
            The request, with its instances, lengths and mean batch.
        cached_tok : int
            Prompt tokens that the engine found in its prefix cache.

        Returns
        -------
        RequestEnergy
            As far as it is known now; a measured one is made final by the next tick.
        """
        prefill_j, decode_j = self._modelled(flight, cached_tok)
        energy = RequestEnergy(
            id=flight.id,
            prefill_j=prefill_j,
            decode_j=decode_j,
            idle_j=flight.idle_j,
            source="modelled",
            prompt_tok=flight.prompt_tok,
            output_tok=flight.output_tok,
            prefill_instance=self._name(flight.prefill),
            decode_instance=self._name(flight.decode),
        )
        with self._lock:
            if self._observed:
                prices = self._measured
                _, cost = self._attribution.update(
                    prices,
                    t_s=float(prices.past_s[-1]),
                    iterations=IterationBatch.empty(),
                    finished=_batch([flight]),
                )
                energy = _measured(energy, cost.prefill_j[0], cost.decode_j[0])
                self._ended.append((flight.id, flight))
            self.spent_j["prefill"] += energy.prefill_j
            self.spent_j["decode"] += energy.decode_j
            self.spent_j["idle"] += energy.idle_j
            self._book[flight.id] = energy
            while len(self._book) > self.keep_req:
                self._book.popitem(last=False)
        return energy

    def find(self, request_id: str) -> RequestEnergy | None:
        """Energy of a request that ended not too long ago.

        Parameters
        ----------
        request_id : str
            Id as in the header ``x-request-id`` of its answer.

        Returns
        -------
        RequestEnergy or None
            None if there was no such request, or more than `keep_req` have ended since.
        """
        with self._lock:
            return self._book.get(request_id)

    def on_tick(self, record: TickRecord) -> None:
        """Learn what iterations cost; the observer of a control loop."""
        iterations = record.observation.iterations
        with self._lock:
            self._observed = self._observed or bool(np.any(iterations.energy_j > 0.0))
            ended, self._ended = self._ended, []
            self._measured, cost = self._attribution.update(
                self._measured,
                t_s=max(record.observation.state.t_s, float(self._measured.past_s[-1])),
                iterations=iterations,
                finished=_batch([flight for _, flight in ended]),
            )
            for k, (request_id, _) in enumerate(ended):
                if request_id in self._book:
                    self._book[request_id] = _measured(
                        self._book[request_id], cost.prefill_j[k], cost.decode_j[k]
                    )

    def _modelled(self, flight: Flight, cached_tok: int) -> tuple[float, float]:
        freq_mhz = self._max_mhz
        if self.source is not None and len(self.source.state) == len(freq_mhz):
            told_mhz = self.source.state.freq_mhz
            freq_mhz = np.where(told_mhz > 0.0, told_mhz, freq_mhz)
        tables = self._tables
        prefill_j = decode_j = 0.0
        i, j = flight.prefill, flight.decode
        if i >= 0:
            tok, cached = float(flight.prompt_tok), float(min(cached_tok, flight.prompt_tok))
            load = (freq_mhz[i], tok - cached, tok**2 - cached**2)
            prefill_j = self._prefill_one(tables.records, tables.n_clocks, i, *load)[_ENERGY_J]
        if j >= 0 and flight.output_tok > 1:
            load = (freq_mhz[j], flight.batch_req, flight.kv_tok)
            of = (tables.records, tables.n_clocks, tables.padded_req)
            step_j = self._decode_one(*of, j, *load)[_ENERGY_J]
            decode_j = step_j / flight.batch_req * (flight.output_tok - 1)
        return float(prefill_j), float(decode_j)

    def _name(self, instance: int) -> str:
        return self._ids[instance] if instance >= 0 else ""


def _measured(energy: RequestEnergy, prefill_j: float, decode_j: float) -> RequestEnergy:
    """With attributed figures, where the iterations of both phases told their energy."""
    if not (prefill_j > 0.0 and (decode_j > 0.0 or energy.output_tok <= 1)):
        return energy
    return replace(energy, prefill_j=float(prefill_j), decode_j=float(decode_j), source="measured")


def _batch(flights: list[Flight]) -> RequestBatch:
    """As the attribution takes them; the host's number is their position."""
    rows = np.zeros((len(flights), 6))
    for k, flight in enumerate(flights):
        further_tok = max(flight.output_tok - 1, 0)
        rows[k] = (
            flight.prompt_tok,
            flight.output_tok,
            max(0.0, flight.first_s - flight.begin_s),
            (flight.last_s - flight.first_s) / further_tok if further_tok else 0.0,
            flight.prefill,
            flight.decode,
        )
    return RequestBatch(
        request=np.arange(len(flights)),
        request_class=np.zeros(len(flights), dtype=np.int64),
        prompt_tok=rows[:, 0],
        output_tok=rows[:, 1],
        ttft_s=rows[:, 2],
        itl_s=rows[:, 3],
        prefill_instance=rows[:, 4].astype(np.int64),
        decode_instance=rows[:, 5].astype(np.int64),
    )
