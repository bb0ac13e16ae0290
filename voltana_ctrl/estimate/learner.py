"""Tables that keep learning from the iterations they predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from voltana_ctrl.checks import F64, I64, fraction, not_negative
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.estimate.predictor import FleetTables, Mixed
from voltana_ctrl.types import IterationBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """What iteration records have taught, as plain arrays; replaced at every update.

    A *model* is one regression of an instance: decode time under each candidate staircase,
    prefill time, decode energy, prefill energy. Its terms are a scale and a tilt over the
    clock per part of the prediction, relative to the prior profile.

    Parameters
    ----------
    terms_frac : ndarray, shape (n, n_models, 6)
        Scales (1 where the profile is right) and tilts (0).
    covariance : ndarray, shape (n, n_models, 6, 6)
        Covariance of the terms, in units of the record noise squared.
    notes : ndarray, shape (n, n_models, 6)
        Mean error, mean squared error, two drift sums, records since the last alarm, alarms.
    tile : ndarray of int, shape (n,)
        Candidate staircase that predicts best; 0 is the profile's own.
    counts : ndarray, shape (n, 4)
        Records learned, unused and refused, and the clock of the latest one.
    """

    terms_frac: F64
    covariance: Mixed
    notes: Mixed
    tile: I64
    counts: Mixed

    def __post_init__(self) -> None:
        for name in self.__slots__:
            getattr(self, name).flags.writeable = False


class OnlineLearner:
    """Learns each instance's law from its iterations: recursive least squares, guarded.

    Pure: :meth:`update` takes a state and returns the next; nothing is kept here but settings.

    Each record is compared with the prior profile's prediction at its clock and load; scale
    and tilt of every part follow by recursive least squares with directional forgetting. The
    guards: records that are not finite, or off by a factor of 30, are refused; those at whose
    end the clock was another than before are used only where they took longer, or less, than
    expected at either. Of an iteration that mixes decode and prefill each phase learns from
    what the other leaves, in the measure in which the other is certain. An error counts as at most
    five mean errors; coefficients stay within a factor of 12 of the prior and above zero; the
    covariance stays positive definite, its trace no larger than the prior's. A sum of errors
    that leaves its band is a drift: the covariance starts afresh and :meth:`widening_frac`
    opens until the error has settled. The staircase of executed batch sizes is chosen among
    the profile's own and fixed tiles by discounted squared error.

    Parameters
    ----------
    prior : FleetTables
        Where learning starts, and what it is relative to.
    forget : float
        Weight kept per record along its direction; ``1 / (1 - forget)`` records are remembered.
    settle_records : int
        Records of a phase after which an alarm (or the start) no longer widens margins.

    Raises
    ------
    ConfigError
        If `forget` is not between 0.5 and 1.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, IterationBatch, load_profile
    >>> from voltana_ctrl.estimate import FleetTables, predict_decode
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> learner = OnlineLearner(FleetTables.of(fleet))
    >>> slow = predict_decode(learner.prior, 1, 1410.0, 64, 25_000).time_s * 1.3
    >>> k = np.ones(50)
    >>> records = IterationBatch(instance=k, t_s=k, wall_s=k * slow, freq_mhz=1410.0 * k,
    ...     batch_req=64 * k, prefill_tok=0 * k, kv_tok=25_000 * k, energy_j=0 * k)
    >>> state = learner.update(learner.init(), records)
    >>> tables = learner.tables(state)
    >>> round(float(predict_decode(tables, 1, 1410.0, 64, 25_000).time_s / slow), 3)
    1.0
    """

    def __init__(
        self, prior: FleetTables, *, forget: float = 0.99, settle_records: int = 200
    ) -> None:
        fraction("OnlineLearner.forget", forget)
        if forget < 0.5:
            raise ConfigError(f"OnlineLearner.forget: expected 0.5 to 1, got {forget}")
        not_negative("OnlineLearner.settle_records", settle_records)
        self.prior = prior
        self.forget = forget
        self.settle_records = settle_records

    def init(self) -> Learned:
        """State before the first record: the prior, widely uncertain."""
        from voltana_ctrl.kernels.learn import learner, rls

        n = len(self.prior)
        terms = np.zeros((n, learner.N_MODELS, rls.N_TERMS))
        terms[:, :, ::2] = 1.0
        one = np.empty((rls.N_TERMS, rls.N_TERMS))
        rls.restart(one)
        notes = np.zeros((n, learner.N_MODELS, rls.N_NOTES))
        notes[:, :, rls.ERROR_FRAC] = rls.FIRST_ERROR
        notes[:, :, rls.SCORE_FRAC2] = rls.FIRST_ERROR**2
        return Learned(
            terms_frac=terms,
            covariance=np.tile(one, (n, learner.N_MODELS, 1, 1)),
            notes=notes,
            tile=np.zeros(n, dtype=np.int64),
            counts=np.zeros((n, learner.N_COUNTS)),
        )

    def update(self, state: Learned, iterations: IterationBatch) -> Learned:
        """State after these records, oldest first.

        Parameters
        ----------
        state : Learned
            What :meth:`init` or an earlier update returned; not changed.
        iterations : IterationBatch
            Any records, also wrong ones.

        Raises
        ------
        ShapeError
            If the state is of another fleet.
        """
        from voltana_ctrl.kernels.learn.learner import learn

        if len(state.tile) != len(self.prior):
            raise ShapeError(
                f"OnlineLearner.update: expected the state of {len(self.prior)} instances,"
                f" got {len(state.tile)}"
            )
        if len(iterations) == 0:
            return state
        after = [getattr(state, name).copy() for name in Learned.__slots__]
        terms, covariance, notes, tile, counts = after
        prior = self.prior
        learn(
            prior.records, prior.n_clocks, prior.padded_req, iterations.instance,
            iterations.wall_s, iterations.freq_mhz, iterations.batch_req,
            iterations.prefill_tok, iterations.kv_tok, iterations.energy_j,
            terms, covariance, notes, tile, counts, self.forget,
        )  # fmt: skip
        return Learned(
            terms_frac=terms, covariance=covariance, notes=notes, tile=tile, counts=counts
        )

    def tables(self, state: Learned) -> FleetTables:
        """Tables as learned: positive, times falling and powers rising with the clock."""
        from voltana_ctrl.kernels.learn.learner import TILES_REQ, learned_table

        prior = self.prior
        out = np.empty_like(prior.table)
        learned_table(prior.table, prior.n_clocks, state.terms_frac, state.tile, out)
        padded = prior.padded_req
        if state.tile.any():
            padded = padded.copy()
            sizes = np.arange(padded.shape[1])
            for i in np.flatnonzero(state.tile):
                width = TILES_REQ[state.tile[i]]
                padded[i] = -(-sizes // width) * width
        return FleetTables(table=out, n_clocks=prior.n_clocks, padded_req=padded)

    def tile_req(self, state: Learned) -> I64:
        """Batch sizes are executed in multiples of this; 0: as the profile says, shape (n,)."""
        from voltana_ctrl.kernels.learn.learner import TILES_REQ

        tiles: I64 = np.array(TILES_REQ, dtype=np.int64)[state.tile]
        return tiles

    def error_frac(self, state: Learned) -> F64:
        """Recent mean error one step ahead, of prefill and decode time, shape (n, 2)."""
        from voltana_ctrl.kernels.learn.rls import ERROR_FRAC

        return self._time_notes(state, ERROR_FRAC)

    def alarms(self, state: Learned) -> F64:
        """Drift alarms so far, of prefill and decode time, shape (n, 2)."""
        from voltana_ctrl.kernels.learn.rls import ALARMS

        return self._time_notes(state, ALARMS)

    def widening_frac(self, state: Learned) -> F64:
        """Margin to add while the law of an instance is uncertain, shape (n, 2).

        Twice the recent mean error from the start or a drift alarm until `settle_records`
        later; 0 otherwise. Columns are prefill and decode.

        Returns
        -------
        ndarray, shape (n, 2)
            Relative, of prefill and decode time.
        """
        from voltana_ctrl.kernels.learn.rls import SINCE

        unsettled = self._time_notes(state, SINCE) < self.settle_records
        widened: F64 = np.where(unsettled, 2.0 * self.error_frac(state), 0.0)
        return widened

    def _time_notes(self, state: Learned, column: int) -> F64:
        from voltana_ctrl.kernels.learn.learner import PREFILL_TIME

        every = np.arange(len(state.tile))
        notes: F64 = np.stack(
            [state.notes[:, PREFILL_TIME, column], state.notes[every, state.tile, column]], axis=1
        )
        return notes
