"""Robust bounded regression on relative errors: SciPy's solver, and what it leaves unsaid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, Bool

# Relative residual beyond which a row counts by its size, no longer by its square: repeated
# iterations scatter by 1-2 % in the published tables.
SCALE_FRAC = 0.02

# Folds of one cross-validation at most; beyond it, sizes share a fold.
MAX_FOLDS = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """Parameters at the optimum, their covariance, what the optimum costs and what it leaves.

    `scatter_frac` is the standard deviation of the residuals, relative errors, by their median.
    """

    values: F64
    covariance: F64
    cost: float
    scatter_frac: float


def estimate(
    residual: Callable[[F64], F64],
    jacobian: Callable[[F64], F64] | None,
    starts: Sequence[F64],
    lower: F64,
    upper: F64,
) -> Estimate:
    """Best of several bounded least-squares fits with the soft-L1 loss.

    Residuals are relative errors. Parameters with ``lower == upper`` are held. The covariance
    is ``s^2 (J' J)^+`` with the weights of the loss inside J and ``s`` the scatter of the
    residuals; it treats a parameter on its bound as free, which errs on the wide side.
    """
    from scipy.optimize import least_squares

    free = upper > lower
    full = np.where(free, 0.0, lower)

    def spread(part: F64) -> F64:
        whole = full.copy()
        whole[free] = part
        return whole

    def slopes(part: F64) -> F64:
        columns: F64 = jacobian(spread(part))[:, free] if jacobian else np.empty(0)
        return columns

    best: Any = None
    for start in starts:
        inside = np.clip(start, lower, upper)[free]
        found = least_squares(
            lambda part: residual(spread(part)),
            inside,
            jac=slopes if jacobian else "3-point",
            bounds=(lower[free], upper[free]),
            loss="soft_l1",
            f_scale=SCALE_FRAC,
            x_scale="jac",
            ftol=1e-7,
            xtol=1e-7,
            max_nfev=80,
        )
        if best is None or found.cost < best.cost:
            best = found
    values = spread(best.x)
    covariance = np.zeros((len(values), len(values)))
    scatter_frac = _scatter(best.fun, int(free.sum()))
    covariance[np.ix_(free, free)] = _covariance(best.jac, scatter_frac)
    return Estimate(
        values=values, covariance=covariance, cost=float(best.cost), scatter_frac=scatter_frac
    )


def _scatter(error: F64, n_free: int) -> float:
    """Scatter from the median absolute residual, so that outliers do not widen it."""
    spare = max(len(error) - n_free, 1)
    inflate = len(error) / spare
    mad_sd = 1.4826 * float(np.median(np.abs(error)))
    return float(max(mad_sd, 1e-9) * np.sqrt(inflate))


def _covariance(jac: F64, sd: float) -> F64:
    # Columns differ by orders of magnitude: scale before the pseudo-inverse.
    norm = np.linalg.norm(jac, axis=0)
    norm[norm == 0.0] = 1.0
    inverse: F64 = np.linalg.pinv((jac / norm).T @ (jac / norm), rcond=1e-12)
    covariance: F64 = sd**2 * inverse / np.outer(norm, norm)
    return covariance


def host_time(waited_s: F64) -> tuple[float, float]:
    """Median of the measured times, and its standard error; zeros where none was measured."""
    known = waited_s[~np.isnan(waited_s)]
    if len(known) == 0:
        return 0.0, 0.0
    middle = float(np.median(known))
    # The median of a normal sample scatters by sqrt(pi / 2) times what its mean does.
    scatter = 1.4826 * float(np.median(np.abs(known - middle)))
    return middle, float(np.sqrt(np.pi / 2.0 / len(known)) * scatter)


def linear(design: F64, measured: F64) -> F64:
    """Non-negative coefficients of ``design @ x = measured`` by relative least squares."""
    from scipy.optimize import nnls

    scale = np.linalg.norm(design / measured[:, None], axis=0)
    scale[scale == 0.0] = 1.0
    found, _ = nnls(design / measured[:, None] / scale, np.ones(len(measured)))
    solution: F64 = found / scale
    return solution


def falling(increments: F64) -> F64:
    """Values per ascending clock that never rise: each is the sum of the increments above it."""
    values: F64 = np.cumsum(increments[::-1])[::-1]
    return values


def folds(key: F64) -> Iterator[tuple[Any, Bool]]:
    """Yield the held-out values of `key` and the mask of their rows, at most MAX_FOLDS times."""
    values = np.unique(key)
    n_folds = min(len(values), MAX_FOLDS)
    for fold in range(n_folds):
        held = values[fold::n_folds]
        yield held, np.isin(key, held)
