"""Linear state-space models of queues and batches, linearised from the physics.

Continuous time, per instance::

    prefill   dq/dt = lam_tok - mu
    decode    dn/dt = lam - n w / (L - 1)
              dm/dt = lam (l + 1) + n w - kappa m w / (L - 1),     w = 1 / T(f, n, m)

with ``q`` queued prompt tokens, ``n`` running requests, ``m`` KV tokens, ``T`` the affine
iteration time and ``kappa = (l + L) / c``. That a running request leaves at the rate
``w / (L - 1)`` means geometric output lengths: exact in steady state whatever the lengths (the
DC gain is the closed-form equilibrium), an approximation on the way there.

Discretised by zero-order hold. :meth:`LinearModel.to_control` hands the model to
`python-control <https://python-control.readthedocs.io>`_.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voltana_ctrl.checks import F64, frozen_array, not_negative, positive
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.laws import at_clock, decode_tangent
from voltana_ctrl.types import Lengths, Profile

__all__ = ["LinearModel", "decode_model", "decode_steps", "prefill_model", "zero_order_hold"]

Matrix = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearModel:
    """``x+ = A x + B u + E w + c`` over one period; ``dx/dt`` where `dt_s` is 0.

    Parameters
    ----------
    a, b, e : ndarray, shapes (n_state, n_state), (n_state, n_input), (n_state, n_disturbance)
        State, input and disturbance matrices.
    c : ndarray, shape (n_state,)
        The constant that makes the model exact where it was linearised.
    dt_s : float
        Period; 0 for continuous time.
    states, inputs, disturbances : tuple of str
        Names of the components of x, u and w, with their units as suffix.

    Raises
    ------
    ShapeError
        If the matrices do not fit the names.

    Examples
    --------
    >>> from voltana_ctrl.control.model import prefill_model
    >>> model = prefill_model(0.1)
    >>> model.step([100.0], [2000.0], [1500.0])
    array([50.])
    """

    a: Matrix
    b: Matrix
    e: Matrix
    c: Matrix
    dt_s: float
    states: tuple[str, ...]
    inputs: tuple[str, ...]
    disturbances: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.states)
        shapes = {
            "a": (n, n),
            "b": (n, len(self.inputs)),
            "e": (n, len(self.disturbances)),
            "c": (n,),
        }
        for name, shape in shapes.items():
            array = frozen_array(f"LinearModel.{name}", getattr(self, name), shape)
            object.__setattr__(self, name, array)

    def step(self, state: Any, inputs: Any, disturbances: Any) -> Matrix:
        """State after one period; of a continuous model (`dt_s` of 0) its rate of change.

        Parameters
        ----------
        state, inputs, disturbances : array_like, shape (n_state,), (n_input,), (n_disturbance,)
            The state now, and what is held over the period.

        Returns
        -------
        ndarray, shape (n_state,)
            In the units of `states`; of a continuous model per second.
        """
        after: Matrix = (
            self.a @ np.asarray(state, dtype=np.float64)
            + self.b @ np.asarray(inputs, dtype=np.float64)
            + self.e @ np.asarray(disturbances, dtype=np.float64)
            + self.c
        )
        return after

    def discrete(self, dt_s: float) -> LinearModel:
        """Zero-order hold of a continuous model: exact where inputs change only between periods.

        Parameters
        ----------
        dt_s : float
            Length of the period, > 0.

        Returns
        -------
        LinearModel
            The same states, inputs and disturbances, in steps of `dt_s`.

        Raises
        ------
        ConfigError
            If the period is not positive, or the model is discrete already.
        """
        positive("LinearModel.discrete(dt_s)", dt_s)
        if self.dt_s != 0.0:
            raise ConfigError(
                f"LinearModel.discrete: expected a continuous model, got period {self.dt_s} s"
            )
        forced = np.concatenate([self.b, self.e, self.c[:, None]], axis=1)
        held_a, held = zero_order_hold(self.a[None], forced[None], dt_s)
        n_input, n_disturbance = len(self.inputs), len(self.disturbances)
        return LinearModel(
            a=held_a[0],
            b=held[0, :, :n_input],
            e=held[0, :, n_input : n_input + n_disturbance],
            c=held[0, :, -1],
            dt_s=dt_s,
            states=self.states,
            inputs=self.inputs,
            disturbances=self.disturbances,
        )

    def steady(self, inputs: Any, disturbances: Any) -> Matrix:
        """State that does not change while these inputs and disturbances are held.

        Parameters
        ----------
        inputs, disturbances : array_like, shape (n_input,), (n_disturbance,)
            In the units of their names.

        Returns
        -------
        ndarray, shape (n_state,)
            In the units of `states`.

        Raises
        ------
        ConfigError
            If no such state exists (an integrator).
        """
        drive = (
            self.b @ np.asarray(inputs, dtype=np.float64)
            + self.e @ np.asarray(disturbances, dtype=np.float64)
            + self.c
        )
        still = -self.a if self.dt_s == 0.0 else np.eye(len(self.states)) - self.a
        if np.linalg.matrix_rank(still) < len(self.states):
            raise ConfigError("LinearModel.steady: an integrator has no steady state")
        state: Matrix = np.linalg.solve(still, drive)
        return state

    def to_control(self) -> Any:
        """``control.StateSpace`` with named states; inputs are inputs, disturbances, then ``one``.

        The input ``one`` carries the constant `c`: hold it at 1. Outputs are the states.

        Raises
        ------
        ConfigError
            If the package control is not installed.

        Examples
        --------
        >>> from voltana_ctrl.control.model import prefill_model
        >>> system = prefill_model(0.1).to_control()
        >>> system.state_labels, system.input_labels
        (['queue_tok'], ['service_tok_s', 'arrival_tok_s', 'one'])
        """
        # Loads SciPy, which `import voltana_ctrl` must not.
        try:
            import control
        except ImportError as error:
            raise ConfigError(
                "to_control: needs the package control; pip install 'voltana-ctrl[theory]'"
            ) from error

        n = len(self.states)
        return control.ss(
            self.a,
            np.concatenate([self.b, self.e, self.c[:, None]], axis=1),
            np.eye(n),
            np.zeros((n, len(self.inputs) + len(self.disturbances) + 1)),
            self.dt_s,
            states=list(self.states),
            inputs=[*self.inputs, *self.disturbances, "one"],
            outputs=list(self.states),
        )


def prefill_model(dt_s: float) -> LinearModel:
    """Prefill queue over one period: an integrator, ``q+ = q + dt (arrivals - service)``.

    Its state is `queue_tok`, queued prompt tokens; its input `service_tok_s`, prompt tokens that
    are processed per second; its disturbance `arrival_tok_s`, prompt tokens that arrive per second.
    Nothing stops at an empty queue: the state may become negative.

    Parameters
    ----------
    dt_s : float
        Length of the period.

    Returns
    -------
    LinearModel
        Discrete, with period `dt_s`.

    Raises
    ------
    ConfigError
        If the period is not positive.

    Examples
    --------
    >>> prefill_model(0.5).b
    array([[-0.5]])
    """
    positive("prefill_model(dt_s)", dt_s)
    return LinearModel(
        a=np.array([[1.0]]),
        b=np.array([[-dt_s]]),
        e=np.array([[dt_s]]),
        c=np.zeros(1),
        dt_s=dt_s,
        states=("queue_tok",),
        inputs=("service_tok_s",),
        disturbances=("arrival_tok_s",),
    )


def decode_model(
    profile: Profile, freq_mhz: float, running_req: float, kv_tok: float, lengths: Lengths
) -> LinearModel:
    """Continuous model of a decode instance around (clock, running requests, KV tokens).

    Parameters
    ----------
    profile : Profile
        Profile of the instance.
    freq_mhz, running_req, kv_tok : float
        Where to linearise: clock, requests in the batch, their tokens in the KV cache.
    lengths : Lengths
        Prompt and output lengths of the requests.

    Returns
    -------
    LinearModel
        In continuous time, with the states `running_req` and `kv_tok`, the input `freq_mhz` and the
        disturbance `arrival_req_s`.

    Raises
    ------
    ConfigError
        If the clock lies outside the ladder, or the batch is not finite, as in a point of more load
        than can be served.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.laws import decode_equilibrium, length_moments
    >>> profile = load_profile("a100-sxm-80gb/llama-3.1-8b")
    >>> lengths = length_moments([240, 240], [200, 200])
    >>> row = profile.table[20]
    >>> at = decode_equilibrium(row, 10.0, lengths.output_tok, lengths.context_tok)
    >>> model = decode_model(profile, row["clock_mhz"], at.running_req, at.kv_tok, lengths)
    >>> bool(np.allclose(model.steady([row["clock_mhz"]], [10.0]), [at.running_req, at.kv_tok]))
    True
    """
    not_negative("decode_model.running_req", running_req)
    not_negative("decode_model.kv_tok", kv_tok)
    a, b, e, c = decode_steps(
        at_clock(profile, [freq_mhz]),
        _slopes(profile, np.array([freq_mhz])),
        np.array([freq_mhz]),
        np.array([running_req], dtype=np.float64),
        np.array([kv_tok], dtype=np.float64),
        lengths,
    )
    return LinearModel(
        a=a[0],
        b=b[0],
        e=e[0],
        c=c[0],
        dt_s=0.0,
        states=("running_req", "kv_tok"),
        inputs=("freq_mhz",),
        disturbances=("arrival_req_s",),
    )


def decode_steps(
    rows: Any, slopes: Any, freq_mhz: F64, running_req: F64, kv_tok: F64, lengths: Lengths
) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Continuous matrices of many decode instances at once, first axis the instance.

    Parameters
    ----------
    rows, slopes : ndarray, dtype PROFILE_DTYPE, shape (n,)
        Coefficients at the clocks, and their change per MHz.
    freq_mhz, running_req, kv_tok : ndarray, shape (n,)
        Where to linearise: clocks, requests in the batches, their tokens in the KV cache.
    lengths : Lengths
        Prompt and output lengths of the requests.

    Returns
    -------
    a, b, e, c : ndarray, shapes (n, 2, 2), (n, 2, 1), (n, 2, 1), (n, 2)
        Matrices of :class:`LinearModel` with states (requests, KV tokens), input clock [MHz] and
        disturbance arrivals [req/s].

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> table = load_profile("a100-sxm-80gb/llama-3.1-8b").table
    >>> a, *_ = decode_steps(table[-1:], table[-1:], np.array([1410.0]), np.array([40.0]),
    ...                      np.array([2e4]), length_moments([240, 240], [200, 200]))
    >>> bool(np.all(np.linalg.eigvals(a[0]).real < 0.0))  # a batch settles by itself
    True
    """
    rows, slopes = decode_tangent(rows, slopes, running_req)
    names = ("decode_base_s", "decode_req_s", "decode_kv_s")
    base, per_req, per_kv = (rows[name] for name in names)
    step_s = base + per_req * running_req + per_kv * kv_tok
    by_mhz = slopes[names[0]] + slopes[names[1]] * running_req + slopes[names[2]] * kv_tok
    decoded = lengths.output_tok - 1.0
    kappa = lengths.departure_context_frac
    # Slopes of w = 1 / T.
    pace = 1.0 / step_s
    pace_n, pace_m, pace_f = (-(pace**2) * slope for slope in (per_req, per_kv, by_mhz))
    tokens = np.stack([pace + running_req * pace_n, running_req * pace_m], axis=-1)
    leaving = np.stack([kv_tok * pace_n, pace + kv_tok * pace_m], axis=-1)
    a = np.stack([-tokens / decoded, tokens - kappa * leaving / decoded], axis=-2)
    by_f = np.stack(
        [
            -running_req * pace_f / decoded,
            (running_req - kappa * kv_tok / decoded) * pace_f,
        ],
        axis=-1,
    )
    e = np.empty((len(freq_mhz), 2, 1))
    e[:, 0, 0] = 1.0
    e[:, 1, 0] = lengths.prompt_tok + 1.0
    flow = np.stack(
        [
            -running_req * pace / decoded,
            running_req * pace - kappa * kv_tok * pace / decoded,
        ],
        axis=-1,
    )
    state = np.stack([running_req, kv_tok], axis=-1)
    c = flow - np.einsum("nij,nj->ni", a, state) - by_f * freq_mhz[:, None]
    return a, by_f[:, :, None], e, c


def zero_order_hold(a: Matrix, forced: Matrix, dt_s: float) -> tuple[Matrix, Matrix]:
    """Discretise ``dx/dt = A x + F v`` for many systems at once, v held over the period.

    ``exp([[A, F], [0, 0]] dt)`` by scaling, a Taylor series and squaring.

    Parameters
    ----------
    a : ndarray, shape (k, n, n)
        State matrices A.
    forced : ndarray, shape (k, n, p)
        Matrices F of all that is held: inputs, disturbances, constant.
    dt_s : float
        Length of the period.

    Returns
    -------
    a, forced : ndarray, shapes (k, n, n), (k, n, p)
        A and F of the discrete systems ``x+ = A x + F v``.

    Examples
    --------
    >>> import numpy as np
    >>> a, forced = zero_order_hold(np.array([[[-1.0]]]), np.array([[[1.0]]]), 0.5)
    >>> a.round(4).item(), forced.round(4).item()
    (0.6065, 0.3935)
    """
    k, n, p = forced.shape
    whole = np.zeros((k, n + p, n + p))
    whole[:, :n, :n] = a
    whole[:, :n, n:] = forced
    whole *= dt_s
    # The state part alone sets the pace; the forced columns enter linearly.
    norm = float(np.abs(whole[:, :n, :n]).sum(axis=-1).max(initial=0.0))
    halvings = max(0, int(np.ceil(np.log2(max(norm, 1e-300)))) + 2)
    whole /= 2.0**halvings
    power = np.broadcast_to(np.eye(n + p), whole.shape).copy()
    total = power.copy()
    for order in range(1, 13):
        power = power @ whole / order
        total = total + power
    for _ in range(halvings):
        total = total @ total
    return total[:, :n, :n], total[:, :n, n:]


def _slopes(profile: Profile, freq_mhz: F64) -> Any:
    """Change of the coefficients per MHz: at a clock of the ladder the mean of both sides."""
    ladder = profile.clocks_mhz
    slopes = np.zeros(len(freq_mhz), dtype=profile.table.dtype)
    above = [
        np.clip(np.searchsorted(ladder, freq_mhz, side=side), 1, len(ladder) - 1)
        for side in ("left", "right")
    ]
    for name in (
        "decode_base_s",
        "decode_req_s",
        "decode_kv_s",
        "decode_roof_s",
        "decode_roof_base_s",
        "decode_host_s",
        "prefill_tok_s",
    ):
        column = profile.table[name]
        slopes[name] = np.mean(
            [(column[k] - column[k - 1]) / (ladder[k] - ladder[k - 1]) for k in above], axis=0
        )
    return slopes
