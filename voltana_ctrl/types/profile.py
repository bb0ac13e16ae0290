"""What one instance of a (GPU, model, engine) does at each clock: times, energies, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from voltana_ctrl.checks import F64, I64, count, frozen_array, not_negative, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.kernels.layout import PROFILE_DTYPE
from voltana_ctrl.types.actuators import ActuatorPoint
from voltana_ctrl.types.rest import Rest, check_rest

ProfileStatus = Literal["measured", "fitted", "scaled", "extrapolated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """How far a profile may be from the truth: one standard deviation each, relative.

    What is shared is drawn once for all clocks and, where it says so, for both phases: errors of
    a profile are errors of its sources, not noise from clock to clock.

    Parameters
    ----------
    decode_time_frac, prefill_time_frac : float
        Level of the times.
    clock_time_frac : float
        Time at 0.7 of the highest clock and below over that at the highest, in both phases.
    decode_power_frac, prefill_power_frac : float
        Level of power and energy.
    clock_power_frac : float
        Power at 0.7 of the highest clock and below over that at the highest, in both phases: where
        the voltage rises, and how fast.
    idle_frac : float
        Idle and parked power.

    Raises
    ------
    ConfigError
        If a value is negative or 1 and more.

    Examples
    --------
    >>> Band(idle_frac=0.2).decode_time_frac
    0.0
    """

    decode_time_frac: float = 0.0
    prefill_time_frac: float = 0.0
    clock_time_frac: float = 0.0
    decode_power_frac: float = 0.0
    prefill_power_frac: float = 0.0
    clock_power_frac: float = 0.0
    idle_frac: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            not_negative(f"Band.{name}", getattr(self, name))
            if getattr(self, name) >= 1.0:
                raise ConfigError(
                    f"Band.{name}: expected less than 1, a ratio, got {getattr(self, name):g}"
                )


def with_idle_w(table: Any, idle_w: float) -> Any:
    """Rows whose idle power at the highest clock is this; at the others it moves as much.

    Parameters
    ----------
    table : ndarray, shape (n_clocks,), dtype PROFILE_DTYPE
        Rows of a profile.
    idle_w : float
        Idle power at the highest clock.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.kernels.layout import PROFILE_DTYPE
    >>> rows = np.zeros(2, dtype=PROFILE_DTYPE)
    >>> rows["idle_w"] = 55.0, 60.0
    >>> with_idle_w(rows, 80.0)["idle_w"]
    array([75., 80.])
    """
    if len(table) == 0 or table["idle_w"][-1] == idle_w:
        return table
    moved = table.copy()
    moved["idle_w"] = np.maximum(0.0, moved["idle_w"] + (idle_w - table["idle_w"][-1]))
    moved.flags.writeable = False
    return moved


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """Latency and energy coefficients of one instance, per clock of its ladder.

    Loaded by :func:`voltana_ctrl.profiles.load_profile`; identified from measurements by
    ``fit``. An iteration that decodes ``n`` requests with ``kv_tok`` tokens in the KV cache
    and prefills ``new_tok`` prompt tokens takes and costs what the columns of `table` say.

    Parameters
    ----------
    name : str
        ``gpu/model``, for example ``a100-sxm-80gb/llama-3.1-8b``.
    gpus : int
        GPUs of one instance (tensor parallel degree); all coefficients are their sum.
    table : ndarray, shape (n_clocks,), dtype PROFILE_DTYPE
        One row per supported clock, ascending.
    batch_steps : tuple of (upto_req, step_req)
        Staircase: a batch of up to `upto_req` runs as the next multiple of `step_req`.
        Sizes beyond the last entry are not padded.
    idle_w : float
        Power of an instance that holds the model and runs nothing, at its highest clock; the
        column `idle_w` of the table says it per clock, and is moved to agree.
    parked_w : float, optional
        Power while it is parked and empty, with the clocks of core and memory at their lowest;
        `idle_w` by default, which parking does not change.
    wake_s : float
        Time until a parked and empty instance works again.
    deep_parked, asleep, off : Rest, optional
        What it draws in deeper sleep, and what it takes to get in and out; a depth that is left
        out is not to be had.
    kv_capacity_tok, max_batch, prefill_budget_tok : int
        KV cache size, running-request limit, prompt tokens per iteration.
    kv_bytes_per_tok, link_bytes_s, link_latency_s, transfer_j_per_tok : float
        KV transfer from prefill to decode takes ``latency + tok * bytes / link`` seconds.
    clock_stall_s, clock_change_j : float
        A change of its clock keeps the instance from working for so long, and takes so much.
    rest_of_server_w : float
        What its server draws besides the GPUs, per instance: fans, processors, conversion. No
        policy changes it; it counts in savings at the wall alone.
    power_cap_w : float
        Power limit of the instance; in the table already.
    first_token : {"prefill", "decode"}
        Which phase streams the first token to the client.
    status : {"measured", "fitted", "scaled", "extrapolated"}
        How well the weakest coefficient is known.
    summary : str
        One line on where it comes from.
    sources : mapping of str to mapping
        For each group of coefficients its `status`, `source` and `error`.
    band : Band, optional
        How far all this may be from the truth; without one nothing is known of it.
    actuators : tuple of ActuatorPoint
        Measurements of power caps, memory and CPU clocks beside those of clock locks; none
        leaves these actuators alone.

    Raises
    ------
    ConfigError, ShapeError
        If a coefficient is not physical (negative, not finite) or clocks do not ascend.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> float(profile.clocks_mhz[0]), float(profile.clocks_mhz[-1]), profile.status
    (210.0, 1410.0, 'scaled')
    """

    name: str
    table: Any
    gpus: int = 1
    batch_steps: tuple[tuple[int, int], ...] = ()
    idle_w: float
    kv_capacity_tok: int
    max_batch: int
    prefill_budget_tok: int = 8192
    kv_bytes_per_tok: float
    link_bytes_s: float
    link_latency_s: float = 0.0
    transfer_j_per_tok: float = 0.0
    parked_w: float | None = None
    wake_s: float = 0.0
    deep_parked: Rest | None = None
    asleep: Rest | None = None
    off: Rest | None = None
    clock_stall_s: float = 0.0
    clock_change_j: float = 0.0
    rest_of_server_w: float = 0.0
    power_cap_w: float
    first_token: Literal["prefill", "decode"] = "prefill"
    status: ProfileStatus
    summary: str = ""
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    band: Band | None = None
    actuators: tuple[ActuatorPoint, ...] = ()

    def __post_init__(self) -> None:
        label = f"Profile({self.name})"
        not_negative(f"{label}.idle_w", self.idle_w)
        table = np.asarray(self.table)
        table = frozen_array(f"{label}.table", table, (len(table),), PROFILE_DTYPE)
        table = with_idle_w(table, self.idle_w)
        object.__setattr__(self, "table", table)
        for column in PROFILE_DTYPE.names or ():
            values = table[column]
            if not (np.all(np.isfinite(values)) and np.all(values >= 0.0)):
                raise ConfigError(
                    f"{label}.table[{column!r}]: expected finite numbers >= 0, got {values}"
                )
        clocks_mhz = table["clock_mhz"]
        if len(table) == 0 or clocks_mhz[0] <= 0 or not np.all(np.diff(clocks_mhz) > 0):
            raise ConfigError(f"{label}.table: expected ascending clocks > 0, got {clocks_mhz}")
        for name in ("gpus", "kv_capacity_tok", "max_batch", "prefill_budget_tok"):
            count(f"{label}.{name}", getattr(self, name))
        for name in (
            "link_latency_s",
            "transfer_j_per_tok",
            "wake_s",
            "clock_stall_s",
            "clock_change_j",
            "rest_of_server_w",
        ):
            not_negative(f"{label}.{name}", getattr(self, name))
        if self.parked_w is not None:
            not_negative(f"{label}.parked_w", self.parked_w)
        for name in ("deep_parked", "asleep", "off"):
            check_rest(f"{label}.{name}", getattr(self, name), self.idle_w)
        for name in ("kv_bytes_per_tok", "link_bytes_s", "power_cap_w"):
            positive(f"{label}.{name}", getattr(self, name))
        if self.first_token not in ("prefill", "decode"):
            raise ConfigError(
                f"{label}.first_token: expected 'prefill' or 'decode', got {self.first_token!r}"
            )
        if self.status not in ("measured", "fitted", "scaled", "extrapolated"):
            raise ConfigError(
                f"{label}.status: expected measured, fitted, scaled or extrapolated,"
                f" got {self.status!r}"
            )
        upto_before = 0
        for upto_req, step_req in self.batch_steps:
            count(f"{label}.batch_steps", step_req)
            count(f"{label}.batch_steps", upto_req, minimum=upto_before + 1)
            upto_before = upto_req
        for point in self.actuators:
            if not clocks_mhz[0] <= point.freq_mhz <= clocks_mhz[-1]:
                raise ConfigError(
                    f"{label}.actuators: expected clocks within {clocks_mhz[0]:g}.."
                    f"{clocks_mhz[-1]:g} MHz, got {point.freq_mhz:g}"
                )

    @property
    def clocks_mhz(self) -> F64:
        """Supported SM clocks, ascending, shape (n_clocks,)."""
        clocks: F64 = np.ascontiguousarray(self.table["clock_mhz"])
        return clocks

    def padded_batch(self, max_batch: int | None = None) -> I64:
        """Executed size of every batch, shape (max_batch + 1,).

        Returns
        -------
        ndarray of int, shape (max_batch + 1,)
            The size that runs for a batch of so many requests, by their number.

        Examples
        --------
        >>> from voltana_ctrl import load_profile
        >>> load_profile("a100-sxm-80gb/llama-3.1-8b").padded_batch()[[1, 8, 9, 128, 129]]
        array([  8,   8,  16, 128, 160])
        """
        sizes = np.arange((max_batch or self.max_batch) + 1, dtype=np.int64)
        padded = sizes.copy()
        upto_before = 0
        for upto_req, step_req in self.batch_steps:
            inside = (sizes > upto_before) & (sizes <= upto_req)
            padded[inside] = -(-sizes[inside] // step_req) * step_req
            upto_before = upto_req
        return padded
