"""What the built-in workloads are made of: lengths, arrivals, source and status.

The numbers stand in ``workloads.toml`` beside this module, each with where it comes from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

import numpy as np

from voltana_ctrl.checks import I64, count, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.sim.arrivals import ArrivalProcess, Gamma, MarkovModulated, Poisson

__all__ = ["WORKLOADS", "LengthModel", "WorkloadKind", "describe"]

WORKLOADS = ("sharegpt", "lmsys", "azure-conv", "azure-code", "fixed")
"""Names of the built-in workloads."""


class LengthModel(Protocol):
    """A distribution of request lengths.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.sim.catalog import describe
    >>> model: LengthModel = describe("fixed", prompt_tok=7).prompt
    >>> model.sample(np.random.default_rng(0), 3).tolist()
    [7, 7, 7]
    """

    def sample(self, rng: np.random.Generator, n: int) -> I64:
        """Draw `n` lengths in tokens, an int64 ndarray of shape (n,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _LogNormal:
    """Lognormal lengths, rounded and clipped.

    Parameters
    ----------
    median_tok : float
        Median before clipping, in tokens.
    sigma : float
        Standard deviation of the natural logarithm.
    min_tok, max_tok : int
        Bounds, in tokens.
    """

    median_tok: float
    sigma: float
    min_tok: int
    max_tok: int

    def sample(self, rng: np.random.Generator, n: int) -> I64:
        """Draw `n` lengths in tokens, an int64 ndarray of shape (n,)."""
        raw_tok = self.median_tok * np.exp(self.sigma * rng.standard_normal(n))
        return np.clip(np.rint(raw_tok), self.min_tok, self.max_tok).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantiles:
    """Lengths through measured quantiles, linear in the logarithm between them.

    Parameters
    ----------
    frac : tuple of float
        Probabilities, rising from 0 to 1.
    tok : tuple of float
        Lengths at these probabilities, in tokens, > 0, never falling.
    """

    frac: tuple[float, ...]
    tok: tuple[float, ...]

    def sample(self, rng: np.random.Generator, n: int) -> I64:
        """Draw `n` lengths in tokens, an int64 ndarray of shape (n,)."""
        log_tok = np.interp(rng.random(n), self.frac, np.log(self.tok))
        return np.rint(np.exp(log_tok)).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadKind:
    """What one built-in workload draws from; made by :func:`describe`.

    Parameters
    ----------
    prompt, output : LengthModel
        Distributions of the lengths.
    status : str
        ``given`` (a definition), ``fitted`` (to the data named in `source`) or ``published``
        (from statistics published about that data).
    source : str
        Where the numbers come from.
    rate_req_s : float, optional
        Mean rate of the trace described, in requests per second.
    shape : mapping
        Parameters of its arrival process; empty means Poisson.

    Examples
    --------
    >>> from voltana_ctrl.sim.catalog import describe
    >>> describe("azure-code").status
    'published'
    """

    prompt: LengthModel
    output: LengthModel
    status: str
    source: str
    rate_req_s: float | None
    shape: Mapping[str, float]

    def arrivals(self, rate_req_s: float) -> ArrivalProcess:
        """Return the arrival process at another mean rate, as if the trace's clock were rescaled.

        Parameters
        ----------
        rate_req_s : float
            Mean rate in requests per second, > 0.

        Returns
        -------
        ArrivalProcess
            With the gaps' coefficient of variation of the trace.

        Raises
        ------
        ConfigError
            When the rate is not a number > 0.

        Examples
        --------
        >>> from voltana_ctrl.sim.catalog import describe
        >>> describe("azure-conv").arrivals(20.0)
        Gamma(cv=1.09)
        """
        positive("rate_req_s", rate_req_s)
        if "cv" in self.shape:
            return Gamma(cv=self.shape["cv"])
        if "high_s" in self.shape and self.rate_req_s:
            stretch = self.rate_req_s / rate_req_s
            return MarkovModulated(
                high_s=self.shape["high_s"] * stretch, low_s=self.shape["low_s"] * stretch
            )
        return Poisson()


def describe(name: str, *, prompt_tok: int = 512, output_tok: int = 128) -> WorkloadKind:
    """Look up a built-in workload.

    Parameters
    ----------
    name : str
        One of :data:`WORKLOADS`.
    prompt_tok, output_tok : int
        Lengths in tokens, >= 1; used by ``fixed`` alone.

    Returns
    -------
    WorkloadKind
        Its lengths, arrivals, source and status.

    Raises
    ------
    ConfigError
        When the name is unknown, or a length is not a whole number >= 1.

    Examples
    --------
    >>> import numpy as np
    >>> tok = describe("sharegpt").prompt.sample(np.random.default_rng(0), 1000)
    >>> int(tok.min()) >= 4, int(tok.max()) <= 3000
    (True, True)
    """
    if name not in WORKLOADS:
        raise ConfigError(f"workload: expected one of {', '.join(WORKLOADS)}, got {name!r}")
    if name == "fixed":
        count("prompt_tok", prompt_tok)
        count("output_tok", output_tok)
        return WorkloadKind(
            prompt=_Quantiles(frac=(0.0, 1.0), tok=(prompt_tok, prompt_tok)),
            output=_Quantiles(frac=(0.0, 1.0), tok=(output_tok, output_tok)),
            status="given",
            source="constant lengths",
            rate_req_s=None,
            shape={},
        )
    text = (
        resources.files("voltana_ctrl.sim").joinpath("workloads.toml").read_text(encoding="utf-8")
    )
    table: dict[str, Any] = tomllib.loads(text)[name]
    return WorkloadKind(
        prompt=_length_model(table["prompt"]),
        output=_length_model(table["output"]),
        status=table["status"],
        source=table["source"],
        rate_req_s=table.get("rate_req_s"),
        shape=table.get("arrivals", {}),
    )


def _length_model(table: Mapping[str, Any]) -> LengthModel:
    if "frac" in table:
        return _Quantiles(frac=tuple(table["frac"]), tok=tuple(table["tok"]))
    return _LogNormal(**table)
