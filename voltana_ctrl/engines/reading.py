"""What a telemetry source tells of every instance at one time."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from voltana_ctrl.checks import F64, freeze_fields

__all__ = ["EngineReading"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineReading:
    """State of the instances of a fleet as one source tells it; NaN where it does not.

    Parameters
    ----------
    age_s : ndarray, shape (n,)
        Seconds since an instance was heard; infinite before the first time.
    queue_req, queue_tok : ndarray, shape (n,)
        Requests that wait, and their tokens.
    oldest_wait_s : ndarray, shape (n,)
        Seconds that the oldest of them has waited.
    running_req : ndarray, shape (n,)
        Requests that generate.
    kv_used_tok : ndarray, shape (n,)
        Tokens in the KV cache.
    arrived_req, arrived_tok : ndarray, shape (n,)
        Requests that arrived since the last read, and tokens of their prompts.
    freq_mhz, power_w, energy_j : ndarray, shape (n,)
        SM clock in MHz, power in watts, and joules since the source was first read.

    Examples
    --------
    >>> import numpy as np
    >>> first = EngineReading.silent(2)
    >>> second = EngineReading.silent(2, age_s=[0.1, 0.2], running_req=[3.0, np.nan])
    >>> first.filled_from(second).running_req
    array([ 3., nan])
    """

    age_s: F64
    queue_req: F64
    queue_tok: F64
    oldest_wait_s: F64
    running_req: F64
    kv_used_tok: F64
    arrived_req: F64
    arrived_tok: F64
    freq_mhz: F64
    power_w: F64
    energy_j: F64

    def __post_init__(self) -> None:
        freeze_fields(self, _NAMES, (np.asarray(self.age_s).size,))

    @classmethod
    def silent(cls, n: int, **told: object) -> EngineReading:
        """Reading of `n` instances that tells nothing but what is given.

        Parameters
        ----------
        n : int
            Number of instances.
        **told
            Fields that are told; all others are NaN, and the age is infinite.

        Returns
        -------
        EngineReading
            The reading.
        """
        unknown = {name: np.full(n, np.nan) for name in _NAMES}
        unknown["age_s"] = np.full(n, np.inf)
        return cls(**{**unknown, **told})  # type: ignore[arg-type]

    def filled_from(self, other: EngineReading) -> EngineReading:
        """The same reading, with what another one tells where this one is silent.

        Parameters
        ----------
        other : EngineReading
            Reading of the same fleet.

        Returns
        -------
        EngineReading
            Its age is the lower one of both.
        """
        both = {
            name: np.where(np.isnan(getattr(self, name)), getattr(other, name), getattr(self, name))
            for name in _NAMES
        }
        both["age_s"] = np.minimum(self.age_s, other.age_s)
        return EngineReading(**both)


_NAMES = tuple(field.name for field in fields(EngineReading))
