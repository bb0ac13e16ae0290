"""The staircase: an engine runs a batch as the next captured size. Which, from times alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.fit.tables import IterationTable

__all__ = ["detect_batch_steps", "pad"]

# Largest tile looked for.
MAX_STEP_REQ = 512
# Two sizes that differ by one tell whether a step lies between them; this many such pairs are
# asked for before a staircase is claimed.
MIN_PAIRS = 4
# A regime of padding must lower the Bayesian information criterion by this much ("very strong"
# evidence, Kass and Raftery, J. Am. Stat. Assoc. 90, 1995, p. 777, is 10).
MIN_EVIDENCE = 10.0
# Two step sizes whose evidence differs by less are not told apart by the table.
TIE = 2.0
# Sizes, from small to large, at which the time is tried to bend upwards.
N_BENDS = 12


def pad(batch_req: Any, batch_steps: tuple[tuple[int, int], ...]) -> F64:
    """Executed size of each batch.

    Parameters
    ----------
    batch_req : array_like
        Requests in the batch.
    batch_steps : tuple of (upto_req, step_req)
        See :class:`voltana_ctrl.types.Profile`.

    Examples
    --------
    >>> pad([1, 8, 9, 129, 2000], ((128, 8), (1024, 32)))
    array([   8.,    8.,   16.,  160., 2000.])
    """
    size = np.asarray(batch_req, dtype=np.float64)
    padded = size.copy()
    before = 0
    for upto_req, step_req in batch_steps:
        inside = (size > before) & (size <= upto_req)
        padded[inside] = np.ceil(size[inside] / step_req) * step_req
        before = upto_req
    return padded


def detect_batch_steps(table: IterationTable) -> tuple[tuple[int, int], ...] | None:
    """Find how batches are padded, from decode times alone.

    At each clock the time is affine in the executed size and in KV tokens, or bends upwards at
    one size; the padding is the one under which least is left over. Regimes with a step size
    of their own, and the bends, are added while the Bayesian information criterion asks for
    more.

    Parameters
    ----------
    table : IterationTable
        Measured iterations, decode rows only.

    Returns
    -------
    tuple of (upto_req, step_req), or None
        Empty if there is no staircase; None if the batches measured cannot tell, because too
        few of them differ by one.

    Raises
    ------
    ConfigError
        If there is a staircase, but two step sizes explain the table equally well.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl.fit import IterationTable
    >>> n = np.array([8 * k + j for k in range(1, 9) for j in (0, 1)], dtype=float)
    >>> zero = 0 * n
    >>> table = IterationTable(
    ...     phase=("decode",) * len(n), freq_mhz=1410 + zero, batch_req=n, kv_tok=zero,
    ...     prefill_tok=zero, square_tok2=zero, wall_s=0.01 + 1e-4 * np.ceil(n / 8) * 8,
    ...     energy_j=zero + 3)
    >>> detect_batch_steps(table)
    ((72, 8),)
    """
    sizes = np.unique(table.batch_req)
    if np.count_nonzero(np.diff(sizes) == 1.0) < MIN_PAIRS or np.any(sizes % 1.0):
        return None
    found = []
    for bends in (False, True):
        search = _Search(table, sizes, bends=bends)
        regimes: list[tuple[int, int]] = [(int(sizes[-1]), 1)]
        evidence = search.evidence(regimes)
        while True:
            better = search.refine(regimes)
            gained = search.evidence(better) - evidence
            if not gained > MIN_EVIDENCE:
                break
            regimes, evidence = better, evidence + gained
        found.append((evidence, search, regimes))
    straight, bent = found
    _, search, regimes = bent if bent[0] > straight[0] + MIN_EVIDENCE else straight
    search.check_unique(regimes)
    kept = _merge(regimes)
    return () if all(step == 1 for _, step in kept) else kept


def _merge(regimes: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join neighbours of equal step; a step covers its last batch, drop unpadded top sizes."""
    merged: list[tuple[int, int]] = []
    for upto, step in regimes:
        if merged and merged[-1][1] == step:
            merged.pop()
        merged.append((-(-upto // step) * step, step))
    # A boundary moves up as long as both neighbours run every size alike.
    for index, (upto, step) in enumerate(merged[:-1]):
        beyond = merged[index + 1][1]
        while upto + step <= merged[index + 1][0] and all(
            -(-size // beyond) * beyond == upto + step for size in range(upto + 1, upto + step + 1)
        ):
            upto += step
        merged[index] = (upto, step)
    if merged[-1][1] == 1:
        merged.pop()
    return tuple(merged)


class _Search:
    """Leftover of the affine law for a padding: a projection per clock, then one column."""

    def __init__(self, table: IterationTable, sizes: F64, *, bends: bool) -> None:
        self.sizes = sizes.astype(np.int64)
        self.n_rows = len(table)
        self.bends_req = np.geomspace(sizes[1], sizes[-2], N_BENDS) if bends else np.empty(0)
        self.blocks = []
        for clock in np.unique(table.freq_mhz):
            at = table.freq_mhz == clock
            wall_s = table.wall_s[at]
            columns = [1.0 / wall_s]
            if np.ptp(table.kv_tok[at]) > 0.0:
                columns.append(table.kv_tok[at] / wall_s)
            basis, _ = np.linalg.qr(np.stack([c / np.linalg.norm(c) for c in columns], axis=1))
            one = np.ones(len(wall_s))
            left = one - basis @ (basis.T @ one)
            which = np.searchsorted(sizes, table.batch_req[at])
            self.blocks.append((which, wall_s, basis, left))

    def rss(self, paddings: list[tuple[tuple[int, int], ...]]) -> F64:
        """Sum of squared relative errors under each of several paddings."""
        padded = np.stack([pad(self.sizes, each) for each in paddings], axis=1)
        total = np.zeros(len(paddings))
        for which, wall_s, basis, left in self.blocks:
            columns = padded[which] / wall_s[:, None]
            norm = np.linalg.norm(columns, axis=0)
            columns -= basis @ (basis.T @ columns)
            size = np.einsum("ij,ij->j", columns, columns)
            good = size > 1e-16 * norm**2
            along = np.maximum(left @ columns, 0.0)
            gain = np.where(good, along**2 / np.where(good, size, 1.0), 0.0)
            most = gain
            for bend_req in self.bends_req:
                beyond = np.maximum(padded - bend_req, 0.0)[which] / wall_s[:, None]
                beyond -= basis @ (basis.T @ beyond)
                # What the bend explains beside the straight line.
                part = np.einsum("ij,ij->j", columns, beyond) / np.where(good, size, 1.0)
                beyond -= part * columns
                rest = np.einsum("ij,ij->j", beyond, beyond)
                known = rest > 1e-16 * size
                steeper = np.maximum(left @ beyond, 0.0)
                more = np.where(known, steeper**2 / np.where(known, rest, 1.0), 0.0)
                most = np.maximum(most, gain + more)
            total += left @ left - most
        # Below a relative error of 1e-7 what is left is rounding of the difference.
        return np.maximum(total, self.n_rows * 1e-14)

    def evidence(self, regimes: list[tuple[int, int]]) -> float:
        rss = self.rss([tuple(regimes)])[0]
        return float(self._score(rss, regimes))

    def _score(self, rss: Any, regimes: list[tuple[int, int]]) -> Any:
        # Each regime has a step; all but the last have an end.
        n_parameters = 2 * len(regimes) - 1 - (regimes == [(int(self.sizes[-1]), 1)])
        n_parameters += 2 * len(self.blocks) * (len(self.bends_req) > 0)
        return -self.n_rows * np.log(rss) - n_parameters * np.log(self.n_rows)

    def refine(self, regimes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Best of: another step for a regime; a regime split in two, each with its step."""
        best, best_score = regimes, -np.inf
        for index in range(len(regimes)):
            options = [self._restep(regimes, index)]
            low = regimes[index - 1][0] if index else 0
            for upto in self.sizes[(self.sizes > low) & (self.sizes < regimes[index][0])]:
                split = [*regimes[:index], (int(upto), regimes[index][1]), *regimes[index:]]
                split = self._restep(split, index)
                split = self._restep(split, index + 1)
                options.append(self._restep(split, index))
            for option in options:
                score = self.evidence(option)
                if score > best_score:
                    best, best_score = option, score
        return best

    def _paddings(self, regimes: list[tuple[int, int]], index: int) -> tuple[list[int], F64]:
        upto, _ = regimes[index]
        low = regimes[index - 1][0] if index else 0
        last = index == len(regimes) - 1
        # A regime that another follows ends on a size that is run as it is.
        most = min(upto - low, MAX_STEP_REQ)
        steps = [step for step in range(1, most + 1) if last or upto % step == 0]
        paddings = [(*regimes[:index], (upto, step), *regimes[index + 1 :]) for step in steps]
        return steps, self.rss(paddings)

    def _restep(self, regimes: list[tuple[int, int]], index: int) -> list[tuple[int, int]]:
        steps, rss = self._paddings(regimes, index)
        step = steps[int(np.argmin(rss))]
        return [*regimes[:index], (regimes[index][0], step), *regimes[index + 1 :]]

    def check_unique(self, regimes: list[tuple[int, int]]) -> None:
        for index, (upto, step) in enumerate(regimes):
            if step == 1:
                continue
            steps, rss = self._paddings(regimes, index)
            score = -self.n_rows * np.log(rss)
            tied = [
                other
                for other, value in zip(steps, score, strict=True)
                if other != step and value > score[steps.index(step)] - TIE
            ]
            if tied:
                raise ConfigError(
                    f"batch_steps: steps of {step} and {tied[0]} requests explain batches up to"
                    f" {upto} equally well; measure batch sizes n and n + 1 for every multiple n"
                    f" of {step} and of {tied[0]} there, or say batch_steps=[[upto, step], ...]"
                )
