"""When requests arrive: point processes of a given mean rate.

Every process is a small value that knows its shape (how bursty, how periodic); the rate and the
span are given when it is sampled. All of them start in their stationary state, so the expected
number of arrivals in ``[0, duration_s)`` is ``rate_req_s * duration_s`` exactly (for
:class:`Diurnal`: over whole periods). The same generator state at another rate gives the same
draws on another clock, so loads are compared on common random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from voltana_ctrl.checks import F64, not_negative, positive
from voltana_ctrl.errors import ConfigError

__all__ = ["ArrivalProcess", "Diurnal", "Gamma", "MarkovModulated", "Poisson", "parse_arrivals"]

_MAX_EVENTS = 50_000_000  # 400 MB of times: beyond this a typing error is likelier than intent
_BLOCK = 4096


class ArrivalProcess(Protocol):
    """Anything that can draw arrival times at a mean rate.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.sim.arrivals import Poisson
    >>> process: ArrivalProcess = Poisson()
    >>> times_s = process.sample(10.0, 60.0, np.random.default_rng(0))
    >>> 500 < times_s.size < 700
    True
    """

    def sample(self, rate_req_s: float, duration_s: float, rng: np.random.Generator) -> F64:
        """Draw sorted arrival times in ``[0, duration_s)``.

        Parameters
        ----------
        rate_req_s : float
            Mean rate in requests per second, > 0.
        duration_s : float
            Span in seconds, > 0.
        rng : numpy.random.Generator
            Source of randomness, advanced by the call.

        Returns
        -------
        ndarray, shape (n,)
            Arrival times in seconds.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent users: exponential gaps, coefficient of variation 1.

    Examples
    --------
    >>> import numpy as np
    >>> t = Poisson().sample(100.0, 50.0, np.random.default_rng(0))
    >>> bool(abs(t.size / 50.0 - 100.0) < 5.0)
    True
    """

    def sample(self, rate_req_s: float, duration_s: float, rng: np.random.Generator) -> F64:
        """Draw sorted arrival times in ``[0, duration_s)``; see :class:`ArrivalProcess`.

        Raises
        ------
        ConfigError
            When the rate or the span is not a number > 0, or their product is absurdly large.
        """
        mean = _expected(rate_req_s, duration_s)
        return _clip(
            _renewals(mean, lambda n: rng.standard_exponential(n)) / rate_req_s, duration_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """A renewal process with gamma gaps: one knob for burstiness.

    Parameters
    ----------
    cv : float
        Coefficient of variation of the gaps, 0.01 to 100: 1 is Poisson, more is burstier, less
        is more regular. (vLLM's ``--burstiness`` is ``1 / cv**2``.)

    Raises
    ------
    ConfigError
        When `cv` is out of range.

    Notes
    -----
    The first gap is drawn from the equilibrium residual life, a uniform share of a length-biased
    gap (which for a gamma of shape k is a gamma of shape k + 1), so the process is stationary
    from time 0 (Cox, Renewal Theory, 1962, ch. 5).

    Examples
    --------
    >>> import numpy as np
    >>> t = Gamma(cv=3.0).sample(100.0, 400.0, np.random.default_rng(0))
    >>> gaps = np.diff(t)
    >>> bool(2.7 < gaps.std() / gaps.mean() < 3.3)
    True
    """

    cv: float

    def __post_init__(self) -> None:
        positive("Gamma.cv", self.cv)
        if not 0.01 <= self.cv <= 100.0:
            raise ConfigError(f"Gamma.cv: expected 0.01 to 100, got {self.cv!r}")

    def sample(self, rate_req_s: float, duration_s: float, rng: np.random.Generator) -> F64:
        """Draw sorted arrival times in ``[0, duration_s)``; see :class:`ArrivalProcess`.

        Raises
        ------
        ConfigError
            When the rate or the span is not a number > 0, or their product is absurdly large.
        """
        mean = _expected(rate_req_s, duration_s)
        shape = 1.0 / self.cv**2
        first = rng.random() * rng.standard_gamma(shape + 1.0) / shape
        rest = _renewals(mean, lambda n: rng.standard_gamma(shape, n) / shape)
        times = np.concatenate(([first], first + rest)) / rate_req_s
        return _clip(times, duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkovModulated:
    """Two-state Markov-modulated Poisson process: bursts and lulls (or silences).

    Parameters
    ----------
    high_s, low_s : float
        Mean time in the busy and in the quiet state, in seconds, > 0; both are exponential.
    low_rate_frac : float
        Rate of the quiet state over that of the busy one, 0 (silence) to 1 (plain Poisson).

    Raises
    ------
    ConfigError
        When a parameter is out of range.

    Notes
    -----
    Fischer and Meier-Hellstern, The MMPP cookbook, Performance Evaluation 18 (1993). Sampled by
    time change: a unit-rate Poisson process run on the clock of the integrated intensity.

    Examples
    --------
    >>> import numpy as np
    >>> bursts = MarkovModulated(high_s=5.0, low_s=15.0)
    >>> t = bursts.sample(20.0, 600.0, np.random.default_rng(0))
    >>> bool(np.diff(t).max() > 10.0)
    True
    """

    high_s: float
    low_s: float
    low_rate_frac: float = 0.0

    def __post_init__(self) -> None:
        positive("MarkovModulated.high_s", self.high_s)
        positive("MarkovModulated.low_s", self.low_s)
        not_negative("MarkovModulated.low_rate_frac", self.low_rate_frac)
        if self.low_rate_frac > 1.0:
            raise ConfigError(
                f"MarkovModulated.low_rate_frac: expected 0 to 1, got {self.low_rate_frac!r};"
                " swap the two states"
            )

    def sample(self, rate_req_s: float, duration_s: float, rng: np.random.Generator) -> F64:
        """Draw sorted arrival times in ``[0, duration_s)``; see :class:`ArrivalProcess`.

        Raises
        ------
        ConfigError
            When the rate or the span is not a number > 0, or their product is absurdly large.
        """
        _expected(rate_req_s, duration_s)
        cycle_s = self.high_s + self.low_s
        _expected(2.0 / cycle_s, duration_s)
        state_rng, event_rng = rng.spawn(2)
        starts_high = state_rng.random() < self.high_s / cycle_s
        sojourn_s = (self.high_s, self.low_s) if starts_high else (self.low_s, self.high_s)
        edges_s = np.zeros(1)
        while edges_s[-1] < duration_s:
            pairs = 16 + int((duration_s - edges_s[-1]) / cycle_s)
            stays_s = (state_rng.standard_exponential((pairs, 2)) * sojourn_s).ravel()
            edges_s = np.concatenate((edges_s, edges_s[-1] + np.cumsum(stays_s)))
        high_req_s = rate_req_s * cycle_s / (self.high_s + self.low_rate_frac * self.low_s)
        low_req_s = high_req_s * self.low_rate_frac
        is_high = (np.arange(edges_s.size - 1) % 2 == 0) == starts_high
        intensity_req_s = np.where(is_high, high_req_s, low_req_s)
        integral = np.concatenate(([0.0], np.cumsum(intensity_req_s * np.diff(edges_s))))
        events = _renewals(float(integral[-1]), lambda n: event_rng.standard_exponential(n))
        events = events[events < integral[-1]]
        return _clip(np.interp(events, integral, edges_s), duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diurnal:
    """Poisson with a daily swing: ``rate (1 + swing_frac cos(2 pi (t - peak_s) / period_s))``.

    Parameters
    ----------
    swing_frac : float
        Half the peak-to-trough range over the mean, 0 to 1; 0.5 means a peak of three times the
        trough.
    period_s : float
        Length of a period in seconds, > 0; shorten it to see a day in a short run.
    peak_s : float
        Time of the peak in seconds, >= 0.

    Raises
    ------
    ConfigError
        When a parameter is out of range.

    Notes
    -----
    The mean rate holds over whole periods. Sampled by thinning (Lewis and Shedler, Naval Research
    Logistics Quarterly 26, 1979).

    Examples
    --------
    >>> import numpy as np
    >>> day = Diurnal(swing_frac=0.8, period_s=100.0, peak_s=0.0)
    >>> t = day.sample(50.0, 100.0, np.random.default_rng(0))
    >>> by_quarter, _ = np.histogram(t, bins=4, range=(0.0, 100.0))
    >>> bool(by_quarter[0] > 2 * by_quarter[1])
    True
    """

    swing_frac: float = 0.5
    period_s: float = 86_400.0
    peak_s: float = 50_400.0

    def __post_init__(self) -> None:
        not_negative("Diurnal.swing_frac", self.swing_frac)
        positive("Diurnal.period_s", self.period_s)
        not_negative("Diurnal.peak_s", self.peak_s)
        if self.swing_frac > 1.0:
            raise ConfigError(f"Diurnal.swing_frac: expected 0 to 1, got {self.swing_frac!r}")

    def sample(self, rate_req_s: float, duration_s: float, rng: np.random.Generator) -> F64:
        """Draw sorted arrival times in ``[0, duration_s)``; see :class:`ArrivalProcess`.

        Raises
        ------
        ConfigError
            When the rate or the span is not a number > 0, or their product is absurdly large.
        """
        peak_req_s = rate_req_s * (1.0 + self.swing_frac)
        event_rng, thin_rng = rng.spawn(2)
        times_s = Poisson().sample(peak_req_s, duration_s, event_rng)
        phase = 2.0 * np.pi * (times_s - self.peak_s) / self.period_s
        keep = (1.0 + self.swing_frac * np.cos(phase)) / (1.0 + self.swing_frac)
        kept: F64 = times_s[thin_rng.random(times_s.size) < keep]
        return kept


_SHAPES: Mapping[str, type[Any]] = MappingProxyType(
    {"poisson": Poisson, "gamma": Gamma, "mmpp": MarkovModulated, "diurnal": Diurnal}
)


def parse_arrivals(text: str) -> ArrivalProcess:
    """Arrival process from ``poisson``, ``gamma:cv=3``, ``mmpp:high_s=5,low_s=15`` or ``diurnal``.

    Parameters
    ----------
    text : str
        Name, and after a colon the parameters of :class:`Gamma`, :class:`MarkovModulated` or
        :class:`Diurnal` with commas between; those with a default may be left out.

    Raises
    ------
    ConfigError
        Naming the part that does not fit.

    Examples
    --------
    >>> parse_arrivals("gamma:cv=3")
    Gamma(cv=3.0)
    >>> parse_arrivals("mmpp:high_s=5,low_s=15,low_rate_frac=0.2")
    MarkovModulated(high_s=5.0, low_s=15.0, low_rate_frac=0.2)
    """
    name, _, settings = text.partition(":")
    if name not in _SHAPES:
        raise ConfigError(
            f"arrivals: expected one of {', '.join(_SHAPES)}, such as gamma:cv=3, got {text!r}"
        )
    fields = _SHAPES[name].__dataclass_fields__
    values: dict[str, float] = {}
    for part in settings.split(",") if settings else []:
        key, _, number = part.partition("=")
        try:
            if key not in fields or key in values:
                raise ValueError
            values[key] = float(number)
        except ValueError:
            known = f"{', '.join(fields)}, each a number and once" if fields else "no parameters"
            raise ConfigError(f"arrivals {name}: expected {known}, got {part!r}") from None
    missing = [
        key for key, field in fields.items() if key not in values and field.default is MISSING
    ]
    if missing:
        raise ConfigError(
            f"arrivals {name}: expected {missing[0]}, such as {name}:{missing[0]}=5, got {text!r}"
        )
    process: ArrivalProcess = _SHAPES[name](**values)
    return process


def _expected(rate_req_s: float, duration_s: float) -> float:
    """Return the mean number of events; refuse what could not be held in memory."""
    positive("rate_req_s", rate_req_s)
    positive("duration_s", duration_s)
    mean = rate_req_s * duration_s
    if not mean <= _MAX_EVENTS:
        raise ConfigError(
            f"rate_req_s x duration_s: expected at most {_MAX_EVENTS} events, got {mean:.3g};"
            " lower the rate or the duration"
        )
    return mean


def _renewals(until: float, draw_gaps: Callable[[int], F64]) -> F64:
    """Partial sums of unit-mean gaps up to at least `until`.

    Blocks have one size whatever the horizon, so a longer one only continues a shorter one.
    """
    blocks = [np.zeros(0)]
    last = 0.0
    while last < until:
        block = last + np.cumsum(draw_gaps(_BLOCK))
        blocks.append(block)
        last = float(block[-1])
    return np.concatenate(blocks)


def _clip(times_s: F64, duration_s: float) -> F64:
    kept: F64 = times_s[times_s < duration_s]
    return kept
