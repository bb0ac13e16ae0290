"""What is read from a fleet: its state, its iterations, its finished requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, count, freeze_fields, not_negative
from voltana_ctrl.errors import ShapeError
from voltana_ctrl.types.backlog import Backlog
from voltana_ctrl.types.fleet import FleetSpec
from voltana_ctrl.types.instance import Role

#: Most that one instance can be said to hold, draw or have counted: far above what is, and small
#: enough to be counted with.
_MOST_REQ = 1e6
_MOST_TOK = 1e12
_MOST_S = 1e6
_MOST_W = 1e6
_MOST_J = 1e15
#: Records that are kept of several observations together.
_MOST_ROWS = 100_000

_STATE_FIELDS = (
    "queue_tok",
    "queue_req",
    "oldest_wait_s",
    "running_req",
    "kv_used_tok",
    "freq_mhz",
    "power_w",
    "energy_j",
    "age_s",
    "arrived_req",
    "arrived_tok",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, as a router sees it.

    Parameters
    ----------
    prompt_tok : int
        Tokens of the prompt.
    id : int
        The host's number for it.
    cached_tok : int
        Prompt tokens whose KV is known to be cached.
    request_class : int
        The host's class key; 0 where it has none.
    host_score : ndarray, shape (n,), optional
        The host's own preference per instance (prefix-cache hits, affinity); higher is better.

    Examples
    --------
    >>> Request(prompt_tok=512).cached_tok
    0
    """

    prompt_tok: int
    id: int = 0
    cached_tok: int = 0
    request_class: int = 0
    host_score: F64 | None = None

    def __post_init__(self) -> None:
        count("Request.prompt_tok", self.prompt_tok)
        count("Request.cached_tok", self.cached_tok, minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetState:
    """State of every instance at one time.

    Parameters
    ----------
    t_s : float
        Time of the reading on the loop's clock.
    alive : ndarray of bool, shape (n,)
        Whether the instance answers.
    queue_tok, queue_req : ndarray, shape (n,)
        Prompt tokens and requests that wait or are being prefilled here.
    oldest_wait_s : ndarray, shape (n,)
        Age of the oldest of them.
    running_req : ndarray, shape (n,)
        Requests that generate here, those admitted next included.
    kv_used_tok : ndarray, shape (n,)
        Tokens in the KV cache.
    freq_mhz, power_w, energy_j : ndarray, shape (n,)
        SM clock, power, and energy since the start.
    age_s : ndarray, shape (n,)
        How old this reading is, per instance.
    arrived_req, arrived_tok : ndarray, shape (n,)
        Requests and prompt tokens routed here since the last read.

    Raises
    ------
    ShapeError
        If an array is not of shape (n,) or holds NaN.

    Examples
    --------
    >>> state = FleetState.idle(2)
    >>> state.queue_tok
    array([0., 0.])
    """

    t_s: float
    alive: Bool
    queue_tok: F64
    queue_req: F64
    oldest_wait_s: F64
    running_req: F64
    kv_used_tok: F64
    freq_mhz: F64
    power_w: F64
    energy_j: F64
    age_s: F64
    arrived_req: F64
    arrived_tok: F64

    def __post_init__(self) -> None:
        not_negative("FleetState.t_s", self.t_s)
        shape = (np.asarray(self.alive).size,)
        freeze_fields(self, ("alive",), shape, np.bool_)
        freeze_fields(self, _STATE_FIELDS, shape)
        values = np.array([getattr(self, name) for name in _STATE_FIELDS])
        strange = np.isnan(values).any(axis=1)
        if strange.any():
            raise ShapeError(
                f"FleetState.{_STATE_FIELDS[int(np.argmax(strange))]}: expected numbers, got NaN;"
                " mark the instance not alive and keep its last reading"
            )

    def __len__(self) -> int:
        return len(self.alive)

    def bounded(self, fleet: FleetSpec) -> FleetState:
        """The same, with impossible numbers cut to the largest possible: for states from outside.

        KV tokens are at most the cache, clocks at most the highest of the ladder, requests at most
        a million, and tokens, times, power and energy at most what is far above any real number.

        Parameters
        ----------
        fleet : FleetSpec
            The fleet whose state it is.

        Examples
        --------
        >>> from dataclasses import replace
        >>> from voltana_ctrl import FleetSpec, load_profile
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> told = replace(FleetState.idle(2), kv_used_tok=[1e300, 5.0], running_req=[1e300, 1.0])
        >>> sane = told.bounded(fleet)
        >>> bool(sane.kv_used_tok[0] == fleet.kv_capacity_tok[0]), float(sane.running_req[0])
        (True, 1000000.0)
        """
        highest: dict[str, float | F64] = {
            "queue_req": _MOST_REQ,
            "queue_tok": _MOST_TOK,
            "oldest_wait_s": _MOST_S,
            "running_req": _MOST_REQ,
            "kv_used_tok": fleet.kv_capacity_tok,
            "freq_mhz": fleet.max_mhz,
            "power_w": _MOST_W,
            "energy_j": _MOST_J,
            "arrived_req": _MOST_REQ,
            "arrived_tok": _MOST_TOK,
        }
        cut = {
            name: np.minimum(getattr(self, name), most)
            for name, most in highest.items()
            if np.any(getattr(self, name) > most)
        }
        return replace(self, **cut) if cut else self

    @classmethod
    def idle(cls, n: int, *, t_s: float = 0.0, freq_mhz: float = 0.0) -> FleetState:
        """State of `n` instances that have nothing to do.

        Examples
        --------
        >>> len(FleetState.idle(3))
        3
        """
        zeros = {name: np.zeros(n) for name in _STATE_FIELDS}
        zeros["freq_mhz"] = np.full(n, freq_mhz)
        return cls(t_s=t_s, alive=np.ones(n, bool), **zeros)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IterationBatch:
    """One row per engine iteration since the last read, where the engine tells.

    Parameters
    ----------
    instance : ndarray of int, shape (k,)
        Index in the fleet.
    t_s, wall_s : ndarray, shape (k,)
        End of the iteration and how long it took.
    freq_mhz : ndarray, shape (k,)
        SM clock it ran at.
    batch_req, prefill_tok, kv_tok : ndarray, shape (k,)
        Requests that decoded, prompt tokens processed, KV tokens read.
    energy_j : ndarray, shape (k,)
        Energy; 0 where it is not measured.
    asked_mhz : ndarray, shape (k,)
        Clock that had been asked for when the iteration began; 0 where nobody tells.
    prefill_tok2 : ndarray, shape (k,)
        Of the prompt parts that it processed, the sum of ``end**2 - start**2`` (where in its prompt
        a part ends and starts), to which attention is proportional; 0 where nobody tells.

    Examples
    --------
    >>> len(IterationBatch.empty())
    0
    """

    instance: I64
    t_s: F64
    wall_s: F64
    freq_mhz: F64
    batch_req: F64
    prefill_tok: F64
    kv_tok: F64
    energy_j: F64
    asked_mhz: F64 = None  # type: ignore[assignment]  # zeros unless told
    prefill_tok2: F64 = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        shape = (np.asarray(self.instance).size,)
        for name in ("asked_mhz", "prefill_tok2"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.zeros(shape))
        freeze_fields(self, ("instance",), shape, np.int64)
        freeze_fields(
            self,
            (
                "t_s",
                "wall_s",
                "freq_mhz",
                "batch_req",
                "prefill_tok",
                "kv_tok",
                "energy_j",
                "asked_mhz",
                "prefill_tok2",
            ),
            shape,
        )

    def __len__(self) -> int:
        return len(self.instance)

    @classmethod
    def empty(cls) -> IterationBatch:
        """No iterations.

        Examples
        --------
        >>> IterationBatch.empty().wall_s.shape
        (0,)
        """
        none, index = np.zeros(0), np.zeros(0, np.int64)
        return cls(
            instance=index,
            t_s=none,
            wall_s=none,
            freq_mhz=none,
            batch_req=none,
            prefill_tok=none,
            kv_tok=none,
            energy_j=none,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestBatch:
    """Requests that finished since the last read.

    Parameters
    ----------
    request : ndarray of int, shape (k,)
        Number of the request.
    request_class : ndarray of int, shape (k,)
        The host's class key.
    prompt_tok, output_tok : ndarray, shape (k,)
        Prompt and output lengths.
    ttft_s, itl_s : ndarray, shape (k,)
        Time to first token; mean gap between tokens, 0 for a single token.
    prefill_instance, decode_instance : ndarray of int, shape (k,)
        Index in the fleet of the instances where it ran.
    deferred : ndarray of int, shape (k,)
        1 for a request that might wait: nobody was promised its TTFT (which counts from when it was
        let in) or its ITL. 0 unless told.

    Examples
    --------
    >>> len(RequestBatch.empty())
    0
    """

    request: I64
    request_class: I64
    prompt_tok: F64
    output_tok: F64
    ttft_s: F64
    itl_s: F64
    prefill_instance: I64
    decode_instance: I64
    deferred: I64 = None  # type: ignore[assignment]  # zeros unless told

    def __post_init__(self) -> None:
        shape = (np.asarray(self.request).size,)
        if self.deferred is None:
            object.__setattr__(self, "deferred", np.zeros(shape, np.int64))
        whole = ("request", "request_class", "prefill_instance", "decode_instance", "deferred")
        freeze_fields(self, whole, shape, np.int64)
        freeze_fields(self, ("prompt_tok", "output_tok", "ttft_s", "itl_s"), shape)

    def __len__(self) -> int:
        return len(self.request)

    @classmethod
    def empty(cls) -> RequestBatch:
        """No requests.

        Examples
        --------
        >>> RequestBatch.empty().ttft_s.shape
        (0,)
        """
        none, index = np.zeros(0), np.zeros(0, np.int64)
        return cls(
            request=index,
            request_class=index,
            prompt_tok=none,
            output_tok=none,
            ttft_s=none,
            itl_s=none,
            prefill_instance=index,
            decode_instance=index,
        )


_Batch = TypeVar("_Batch", IterationBatch, RequestBatch)


def joined(kind: type[_Batch], batches: Sequence[_Batch]) -> _Batch:
    """Rows of all batches, one after the other.

    Parameters
    ----------
    kind : type
        Class of the batches.
    batches : sequence
        Any number of them.

    Returns
    -------
    batch of that kind
        Empty without any.

    Examples
    --------
    >>> from voltana_ctrl import RequestBatch
    >>> len(joined(RequestBatch, [RequestBatch.empty()] * 2))
    0
    """
    if not batches:
        return kind.empty()
    return kind(
        **{name: np.concatenate([getattr(one, name) for one in batches]) for name in kind.__slots__}
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """All that a backend tells in one read.

    Parameters
    ----------
    state : FleetState
        State of every instance.
    iterations : IterationBatch
        Iterations since the last read; empty where the engine does not tell.
    finished : RequestBatch
        Requests finished since the last read.
    ready_s : ndarray, shape (n,)
        Time until each instance would work, were it woken now: 0 where it is awake, or where
        nobody tells.
    roles : tuple of Role, optional
        What each instance does, or is about to do; as in the fleet where nobody tells.
    backlog : Backlog
        Requests that may wait and are held; none where nobody holds any.

    Raises
    ------
    ShapeError
        If `ready_s` has another length than the state.

    Examples
    --------
    >>> from voltana_ctrl import FleetState
    >>> len(Observation(state=FleetState.idle(2)).iterations)
    0
    """

    state: FleetState
    iterations: IterationBatch = None  # type: ignore[assignment]  # empty unless told
    finished: RequestBatch = None  # type: ignore[assignment]
    ready_s: F64 = None  # type: ignore[assignment]
    roles: tuple[Role, ...] | None = None
    backlog: Backlog = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.backlog is None:
            object.__setattr__(self, "backlog", Backlog.empty())
        if self.ready_s is None:
            object.__setattr__(self, "ready_s", np.zeros(len(self.state)))
        freeze_fields(self, ("ready_s",), (len(self.state),))
        if self.iterations is None:
            object.__setattr__(self, "iterations", IterationBatch.empty())
        if self.finished is None:
            object.__setattr__(self, "finished", RequestBatch.empty())

    def behind(self, before: Observation) -> Observation:
        """The same observation, with the counts and records of an earlier one that nobody took in.

        Parameters
        ----------
        before : Observation
            An earlier one of the same fleet. Where there are very many records, only the latest are
            kept.

        Examples
        --------
        >>> from dataclasses import replace
        >>> from voltana_ctrl import FleetState
        >>> seen = Observation(state=replace(FleetState.idle(2), arrived_req=[3.0, 1.0]))
        >>> seen.behind(seen).state.arrived_req
        array([6., 2.])
        """
        return replace(
            self,
            state=replace(
                self.state,
                arrived_req=before.state.arrived_req + self.state.arrived_req,
                arrived_tok=before.state.arrived_tok + self.state.arrived_tok,
            ),
            backlog=self.backlog.behind(before.backlog),
            iterations=_joined(before.iterations, self.iterations),
            finished=_joined(before.finished, self.finished),
        )


def _joined(first: Any, then: Any) -> Any:
    if not len(first):
        return then
    return type(then)(
        **{
            name: np.concatenate([getattr(first, name), getattr(then, name)])[-_MOST_ROWS:]
            for name in type(then).__slots__
        }
    )
