"""Coefficients of a fleet, and what they predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voltana_ctrl.checks import F64, I64
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types import PROFILE_DTYPE, FleetSpec

_COLUMNS = PROFILE_DTYPE.names or ()
#: Numbers of several units, and whole numbers that name instances.
Mixed = NDArray[np.float64]
Indices = ArrayLike


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetTables:
    """Latency and energy coefficients of every instance, per clock of its ladder.

    Arrays are taken as they are, without a copy, and made read-only.

    Parameters
    ----------
    table : ndarray, shape (n, n_clocks, n_columns)
        Columns are the fields of ``PROFILE_DTYPE``, in order; short ladders are filled up with
        their top row.
    n_clocks : ndarray of int, shape (n,)
        Length of each ladder.
    padded_req : ndarray of int, shape (n, largest batch + 1)
        Executed size of every batch.

    Raises
    ------
    ShapeError
        If shapes do not agree.
    ConfigError
        If a coefficient is negative or not finite.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.types import PROFILE_DTYPE
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> tables = FleetTables.of(fleet)
    >>> tables.table.shape == (4, 81, len(PROFILE_DTYPE)), len(tables.rows(3))
    (True, 81)
    """

    table: Mixed
    n_clocks: I64
    padded_req: I64

    def __post_init__(self) -> None:
        n = len(self.n_clocks)
        for name, dtype, shape in (
            ("table", np.float64, (n, None, len(_COLUMNS))),
            ("n_clocks", np.int64, (n,)),
            ("padded_req", np.int64, (n, None)),
        ):
            array = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            fits = array.ndim == len(shape) and all(
                wanted in (None, got) for wanted, got in zip(shape, array.shape, strict=True)
            )
            if not fits:
                raise ShapeError(f"FleetTables.{name}: expected shape {shape}, got {array.shape}")
            if not (np.isfinite(array).all() and (array >= 0).all()):
                raise ConfigError(f"FleetTables.{name}: expected finite numbers >= 0")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if n == 0 or self.n_clocks.min() < 1 or self.n_clocks.max() > self.table.shape[1]:
            raise ShapeError(
                f"FleetTables.n_clocks: expected 1 to {self.table.shape[1]} clocks for each of"
                f" at least one instance, got {self.n_clocks}"
            )

    def __len__(self) -> int:
        return len(self.n_clocks)

    @classmethod
    def of(cls, fleet: FleetSpec) -> FleetTables:
        """Tables of the profiles of a fleet.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, load_profile
        >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
        >>> len(FleetTables.of(FleetSpec.parse("1P1D", profile)))
        2
        """
        n_clocks = np.array([len(one.clocks_mhz) for one in fleet.instances])
        n_sizes = max(one.max_batch for one in fleet.instances) + 1
        table = np.zeros((len(fleet), n_clocks.max(), len(_COLUMNS)))
        padded = np.zeros((len(fleet), n_sizes), dtype=np.int64)
        for i, one in enumerate(fleet.instances):
            rows = np.ascontiguousarray(one.table)
            table[i, : len(rows)] = rows.view(np.float64).reshape(len(rows), -1)
            table[i, len(rows) :] = table[i, len(rows) - 1]
            padded[i] = one.profile.padded_batch(n_sizes - 1)
        return cls(table=table, n_clocks=n_clocks, padded_req=padded)

    @property
    def records(self) -> Any:
        """The table as kernels take it: dtype PROFILE_DTYPE, shape (n, n_clocks)."""
        return self.table.view(PROFILE_DTYPE)[:, :, 0]

    def rows(self, instance: int) -> Any:
        """Profile rows of one instance, dtype PROFILE_DTYPE, shape (n_clocks of it,)."""
        return self.records[instance, : self.n_clocks[instance]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """Answers to many questions, in the shape of the questions.

    Parameters
    ----------
    time_s : ndarray
        Length of the iteration: the ITL where it decodes.
    energy_j, power_w : ndarray
        Energy of the iteration and mean power during it.
    """

    time_s: F64
    energy_j: F64
    power_w: F64


def predict_decode(
    tables: FleetTables,
    instance: Indices,
    freq_mhz: ArrayLike,
    running_req: ArrayLike,
    kv_used_tok: ArrayLike,
) -> Prediction:
    """Decode iterations: one or many (instance, clock, load) at once.

    Parameters
    ----------
    tables : FleetTables
        What is believed.
    instance : array_like of int
        Index in the fleet.
    freq_mhz : array_like
        Clock; linear between those of the ladder, the nearest end outside it.
    running_req, kv_used_tok : array_like
        Load; negative and NaN count as 0.

    Returns
    -------
    Prediction
        Of the shape that the questions broadcast to.

    Raises
    ------
    ConfigError
        If an instance is not in the fleet.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.estimate import FleetTables
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> answer = predict_decode(FleetTables.of(fleet), 1, [705.0, 1410.0], 64, 25_000)
    >>> answer.time_s.round(4), answer.power_w.round(0)
    (array([0.0265, 0.0162]), array([170., 332.]))
    """
    from voltana_ctrl.kernels.learn.predictor import decode_many

    shape, (i, f, n, kv) = _questions(tables, instance, freq_mhz, running_req, kv_used_tok)
    out = np.empty((len(i), 3))
    decode_many(tables.records, tables.n_clocks, tables.padded_req, i, f, n, kv, out)
    return _prediction(out, shape)


def predict_prefill(
    tables: FleetTables,
    instance: Indices,
    freq_mhz: ArrayLike,
    new_tok: ArrayLike,
    square_tok2: ArrayLike = 0.0,
) -> Prediction:
    """Prefill iterations: one or many (instance, clock, load) at once.

    Parameters
    ----------
    tables : FleetTables
        What is believed.
    instance : array_like of int
        Index in the fleet.
    freq_mhz : array_like
        Clock; linear between those of the ladder, the nearest end outside it.
    new_tok : array_like
        Prompt tokens processed, summed over the batch.
    square_tok2 : array_like
        Sum over the batch of ``end^2 - start^2`` of the positions processed, for attention.

    Returns
    -------
    Prediction
        Of the shape that the questions broadcast to.

    Raises
    ------
    ConfigError
        If an instance is not in the fleet.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.estimate import FleetTables
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> float(predict_prefill(FleetTables.of(fleet), 0, 1410.0, 1000).time_s.round(4))
    0.0755
    """
    from voltana_ctrl.kernels.learn.predictor import prefill_many

    shape, (i, f, tok, tok2) = _questions(tables, instance, freq_mhz, new_tok, square_tok2)
    out = np.empty((len(i), 3))
    prefill_many(tables.records, tables.n_clocks, i, f, tok, tok2, out)
    return _prediction(out, shape)


class InstancePredictor:
    """Latency and power of one instance, one question at a time: the `Predictor` port.

    Parameters
    ----------
    tables : FleetTables
        What is believed.
    instance : int
        Number of the instance in the fleet.

    Raises
    ------
    ConfigError
        If there is no such instance.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.estimate import FleetTables
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> predictor = InstancePredictor(FleetTables.of(fleet), 1)
    >>> round(predictor.itl_s(1410.0, 64, 25_000), 4)
    0.0162
    """

    def __init__(self, tables: FleetTables, instance: int) -> None:
        from voltana_ctrl.kernels.learn.predictor import decode_one, prefill_one

        _questions(tables, instance)
        self._decode = (tables.records, tables.n_clocks, tables.padded_req, int(instance))
        self._prefill = (tables.records, tables.n_clocks, int(instance))
        self._decode_one = decode_one
        self._prefill_one = prefill_one

    def itl_s(self, freq_mhz: float, running_req: float, kv_used_tok: float) -> float:
        """Time [s] of a decode iteration."""
        return float(self._decode_one(*self._decode, freq_mhz, running_req, kv_used_tok)[0])

    def prefill_s(self, freq_mhz: float, new_tok: float) -> float:
        """Time [s] to prefill this many prompt tokens, without that of attention."""
        return float(self._prefill_one(*self._prefill, freq_mhz, new_tok, 0.0)[0])

    def power_w(self, freq_mhz: float, running_req: float, kv_used_tok: float) -> float:
        """Mean power [W] while decoding."""
        return float(self._decode_one(*self._decode, freq_mhz, running_req, kv_used_tok)[2])


def _questions(
    tables: FleetTables, instance: Indices, *loads: ArrayLike
) -> tuple[tuple[int, ...], list[Any]]:
    """Broadcast questions and flatten them; check the instances."""
    which = np.asarray(instance)
    if not (
        np.issubdtype(which.dtype, np.integer) and np.all((which >= 0) & (which < len(tables)))
    ):
        raise ConfigError(
            f"instance: expected whole numbers from 0 to {len(tables) - 1}, got {instance!r}"
        )
    arrays = np.broadcast_arrays(which, *(np.asarray(load, dtype=np.float64) for load in loads))
    dtypes = (np.int64, *(np.float64,) * len(loads))
    flat = [
        np.array(array, dtype=dtype, order="C").reshape(-1)
        for array, dtype in zip(arrays, dtypes, strict=True)
    ]
    return arrays[0].shape, flat


def _prediction(out: F64, shape: tuple[int, ...]) -> Prediction:
    time_s, energy_j, power_w = (out[:, c].reshape(shape) for c in range(3))
    return Prediction(time_s=time_s, energy_j=energy_j, power_w=power_w)
