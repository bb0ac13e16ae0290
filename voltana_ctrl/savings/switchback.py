"""Alternating blocks of a policy and of the highest clock, for a proof of what the policy saves.

Time is cut into blocks of one length, two of which make a pair: one under the policy, one at
the highest clock, in an order drawn anew for every pair. :mod:`voltana_ctrl.savings.proof`
says why this order carries the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from voltana_ctrl.checks import not_negative, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.control.baselines.static import StaticBudgetController
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.ports import controller_extras
from voltana_ctrl.types import Decision, Observation, PowerBudget

__all__ = [
    "AGE_NOTE",
    "BLOCK_NOTE",
    "LENGTH_NOTE",
    "POLICY_NOTE",
    "SwitchbackController",
    "SwitchbackMemory",
    "at_policy",
]

#: Note of a tick that says which block it belongs to, counted from 0.
BLOCK_NOTE = "switchback_block"
#: Note of a tick that is 1 in a block of the policy and 0 in one at the highest clock.
POLICY_NOTE = "switchback_policy"
#: Notes of a tick that say how long a block is, and how long ago this one began, in seconds.
LENGTH_NOTE = "switchback_length_s"
AGE_NOTE = "switchback_age_s"


def at_policy(block: int, seed: int) -> bool:
    """Whether a block is one of the policy; the same for the same numbers, always.

    Parameters
    ----------
    block : int
        Number of the block, counted from 0; blocks 2p and 2p + 1 are a pair.
    seed : int
        Seed from which the order within pairs is drawn.

    Returns
    -------
    bool
        True for one block of every pair, False for the other.

    Examples
    --------
    >>> sorted(at_policy(block, seed=7) for block in (4, 5))
    [False, True]
    """
    pair, second = divmod(block, 2)
    policy_first = bool(np.random.default_rng([seed, pair]).integers(2))
    return policy_first != bool(second)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchbackMemory:
    """What the controller remembers between ticks.

    Parameters
    ----------
    inner : object
        Memory of the policy.
    start_s : float, optional
        Time of the first tick in seconds; None before it.
    block : int
        Number of the present block, counted from 0.
    age_s : float
        Seconds since that block began.

    Examples
    --------
    >>> SwitchbackMemory(inner=None).block
    0
    """

    inner: Any
    start_s: float | None = None
    block: int = 0
    age_s: float = 0.0


class SwitchbackController(Controller):
    """A policy in some blocks of time, the highest clock in the others.

    Blocks come in pairs, one of each kind, in an order drawn anew for every pair. The policy is
    asked in every block, so that what it estimates stays fresh. In blocks at the highest clock its
    answer is replaced by what servers do without it: everybody active, equal shares, and the
    highest clock, or the highest uniform one that keeps `power_budget`.

    Parameters
    ----------
    inner : Controller
        The policy.
    block_s : float
        Length of a block in seconds, of at least ten periods of the policy; minutes are usual.
    seed : int
        Seed from which the order within pairs is drawn, see :func:`at_policy`.
    power_budget : PowerBudget, optional
        What the fleet may draw. It is kept here in blocks at the highest clock only: in the
        others the policy keeps its own, so give it the same.
    in_force : callable, optional
        Returns whether decisions are carried out now. While they are not, no tick is marked as one
        of a block, so that it counts for no proof.

    Raises
    ------
    ConfigError
        If the block is too short or the seed negative.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, load_profile
    >>> from voltana_ctrl.control import StaticController
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> controller = SwitchbackController(StaticController(fleet, 1005), block_s=600.0)
    >>> memory = controller.init()
    >>> for t_s in (0.0, 600.0):
    ...     observation = Observation(state=FleetState.idle(2, t_s=t_s))
    ...     decision, memory = controller.decide(observation, memory)
    ...     print(decision.freq_mhz, controller.notes(memory)[POLICY_NOTE])
    [1005. 1005.] 1.0
    [1410. 1410.] 0.0
    """

    def __init__(
        self,
        inner: Controller,
        *,
        block_s: float,
        seed: int = 0,
        power_budget: PowerBudget | None = None,
        in_force: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(inner.fleet, period_s=inner.period_s)
        positive("SwitchbackController.block_s", block_s)
        not_negative("SwitchbackController.seed", seed)
        if block_s < 10.0 * float(self.period_s):
            raise ConfigError(
                f"SwitchbackController.block_s: expected at least ten periods of"
                f" {float(self.period_s):g} s, got {block_s:g} s; requests must come and go in a"
                " block, so that minutes are usual"
            )
        self.inner = inner
        self._inner_notes = controller_extras(inner).notes
        self._highest = StaticBudgetController(
            inner.fleet, power_budget, period_s=float(inner.period_s)
        )
        self.block_s = block_s
        self.seed = int(seed)
        self._in_force = in_force

    def init(self) -> SwitchbackMemory:
        """Memory before the first tick, with which the first block begins."""
        return SwitchbackMemory(inner=self.inner.init())

    def notes(self, memory: SwitchbackMemory) -> Mapping[str, float]:
        """Block and kind of block of the latest decision, beside what the policy notes.

        Parameters
        ----------
        memory : SwitchbackMemory
            What the latest decision returned.

        Returns
        -------
        mapping of str to float
            `BLOCK_NOTE`, `POLICY_NOTE`, `LENGTH_NOTE` and `AGE_NOTE` with what the policy notes;
            the latter alone while decisions are not carried out.
        """
        told = dict(self._inner_notes(memory.inner))
        if not self._in_force():
            return told
        return {
            **told,
            BLOCK_NOTE: float(memory.block),
            POLICY_NOTE: float(at_policy(memory.block, self.seed)),
            LENGTH_NOTE: self.block_s,
            AGE_NOTE: memory.age_s,
        }

    def _decide(
        self, observation: Observation, memory: SwitchbackMemory
    ) -> tuple[Decision, SwitchbackMemory]:
        decision, inner = self.inner.decide(observation, memory.inner)
        t_s = observation.state.t_s
        start_s = t_s if memory.start_s is None else memory.start_s
        # A tick may fall a rounding error short of the border that it was due at.
        block = int((t_s - start_s) / self.block_s + 1e-9)
        if not at_policy(block, self.seed):
            decision, _ = self._highest.decide(observation, None)
        age_s = max(0.0, t_s - start_s - block * self.block_s)
        return decision, SwitchbackMemory(inner=inner, start_s=start_s, block=block, age_s=age_s)
