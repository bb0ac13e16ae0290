"""Requests that may wait for their answer: what is held of them, and how they are let in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from voltana_ctrl.checks import F64, freeze_fields, not_negative
from voltana_ctrl.errors import ConfigError, ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """How fast requests that may wait are let in to be routed, earliest deadline first.

    Parameters
    ----------
    rate_req_s : float
        So many a second; infinite lets everybody in at once, 0 nobody.
    due_s : float
        A request whose deadline is so near, in seconds, is let in whatever the rate.

    Raises
    ------
    ConfigError
        If a number is negative or NaN.

    Examples
    --------
    >>> Admission(rate_req_s=2.5).due_s
    60.0
    """

    rate_req_s: float = np.inf
    due_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.rate_req_s >= 0.0:
            raise ConfigError(
                f"Admission.rate_req_s: expected a number >= 0, got {self.rate_req_s!r}"
            )
        not_negative("Admission.due_s", self.due_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backlog:
    """Requests that are held before they are routed, and what has moved since the last read.

    Parameters
    ----------
    deadline_s : ndarray, shape (k,)
        When each must have its answer, on the loop's clock, ascending.
    prompt_tok : ndarray, shape (k,)
        Their prompt lengths.
    arrived_req, arrived_tok : float
        Requests that may wait, and their prompt tokens, that came since the last read.
    admitted_req, admitted_tok : float
        And those that were let in; they count among those that arrived at instances, too.

    Raises
    ------
    ShapeError
        If the arrays differ in length, or deadlines fall.

    Examples
    --------
    >>> Backlog(deadline_s=[60.0, 90.0], prompt_tok=[500.0, 40.0]).due_req(75.0)
    1
    """

    deadline_s: F64
    prompt_tok: F64
    arrived_req: float = 0.0
    arrived_tok: float = 0.0
    admitted_req: float = 0.0
    admitted_tok: float = 0.0

    def __post_init__(self) -> None:
        freeze_fields(self, ("deadline_s", "prompt_tok"), (np.asarray(self.deadline_s).size,))
        if np.any(np.diff(self.deadline_s) < 0.0):
            raise ShapeError("Backlog.deadline_s: expected deadlines that never fall")

    def __len__(self) -> int:
        return len(self.deadline_s)

    def due_req(self, t_s: float) -> int:
        """How many of those that are held must have their answer by `t_s`.

        Parameters
        ----------
        t_s : float
            Time on the loop's clock.

        Returns
        -------
        int
            Requests of those that are held.
        """
        return int(np.searchsorted(self.deadline_s, t_s, side="right"))

    def behind(self, before: Backlog) -> Backlog:
        """The same backlog, with the counts of an earlier one that nobody has taken in.

        Parameters
        ----------
        before : Backlog
            An earlier one of the same fleet.

        Examples
        --------
        >>> from dataclasses import replace
        >>> Backlog.empty().behind(replace(Backlog.empty(), arrived_req=2.0)).arrived_req
        2.0
        """
        counts = ("arrived_req", "arrived_tok", "admitted_req", "admitted_tok")
        return replace(
            self, **{name: getattr(before, name) + getattr(self, name) for name in counts}
        )

    @classmethod
    def empty(cls) -> Backlog:
        """Nothing is held.

        Examples
        --------
        >>> len(Backlog.empty())
        0
        """
        return cls(deadline_s=np.zeros(0), prompt_tok=np.zeros(0))
