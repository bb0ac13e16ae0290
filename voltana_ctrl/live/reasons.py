"""Why an instance runs at the clock that it has, in words for somebody who sees it first."""

from __future__ import annotations

from collections.abc import Mapping

from voltana_ctrl.savings.switchback import POLICY_NOTE
from voltana_ctrl.types import FleetSpec, Status, TickRecord
from voltana_ctrl.types.ladder import row_up

__all__ = ["clock_reason"]

#: A clock is at its highest from so near to it on.
_NEAR_MHZ = 1.0


def clock_reason(
    i: int,
    record: TickRecord,
    fleet: FleetSpec,
    *,
    mode: str = "act",
    held_up: Mapping[str, str] | None = None,
    budgeted: bool = False,
) -> str:
    """Why one instance is allowed the clocks that it is.

    Parameters
    ----------
    i : int
        Index of the instance in the fleet.
    record : TickRecord
        The latest tick.
    fleet : FleetSpec
        The fleet.
    mode : str
        Mode of the agent.
    held_up : mapping of str to str, optional
        What keeps instances from coming down, by id; see
        :meth:`~voltana_ctrl.live.descent.Descent.reasons`.
    budgeted : bool
        Whether a power budget is in force.

    Returns
    -------
    str
        The first of these that applies: that it does not answer, that nothing is set, that the
        decision was replaced, the block of a switchback, `--min-mhz`, what holds it up, a GPU that
        does not reach what it is asked for, a ceiling, its load.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetState, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> wish = Decision.highest(fleet, floor_mhz=[1410.0, 705.0])
    >>> seen = Observation(state=FleetState.idle(2))
    >>> record = TickRecord(number=0, observation=seen, proposed=wish, applied=wish)
    >>> clock_reason(0, record, fleet)
    'the policy asks for the highest clock at its load'
    >>> clock_reason(1, record, fleet)
    'its governor chooses between 705 and 1410 MHz, by its batch and queue'
    """
    decision, name = record.applied, fleet.ids[i]
    floor_mhz, ceiling_mhz = float(decision.freq_mhz[i]), float(decision.freq_max_mhz[i])
    if not record.observation.state.alive[i]:
        return "it does not answer; without orders it goes to its highest clock by itself"
    if mode != "act":
        return f"mode {mode}: nothing is set"
    if not record.in_force:
        return "nothing is set any more: the hardware was given back"
    if decision.status is not Status.OK:
        return f"no decision could be made: the highest clock, soon; {decision.status.value}"
    if record.notes.get(POLICY_NOTE) == 0.0:
        return "this block of the switchback is at the highest clock"
    clocks_mhz = fleet.instances[i].clocks_mhz
    asked_mhz = float(clocks_mhz[row_up(clocks_mhz, float(record.proposed.freq_mhz[i]))])
    if asked_mhz + _NEAR_MHZ < floor_mhz < ceiling_mhz - _NEAR_MHZ:
        return (
            f"its governor chooses between {floor_mhz:.0f} and {ceiling_mhz:.0f} MHz;"
            " `--min-mhz` keeps it from lower ones"
        )
    if held_up and name in held_up:
        return held_up[name]
    reached_mhz = record.notes.get(f"clamped_{name}_mhz")
    if reached_mhz is not None:
        return f"its GPU reaches {reached_mhz:.0f} MHz at most: heat, a power cap or its driver"
    chooses = floor_mhz < ceiling_mhz - _NEAR_MHZ
    if ceiling_mhz < fleet.max_mhz[i] - _NEAR_MHZ and (budgeted or not chooses):
        whose = "the power budget" if budgeted else "a power limit, or by the policy"
        return f"it is held to {ceiling_mhz:.0f} MHz at most by {whose}"
    if chooses:
        return (
            f"its governor chooses between {floor_mhz:.0f} and {ceiling_mhz:.0f} MHz, by its batch"
            " and queue"
        )
    return "the policy asks for the highest clock at its load"
