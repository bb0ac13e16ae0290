"""Energy, tokens and attainment of each block of a switchback, from ticks as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voltana_ctrl.backends.log import log_fleet, log_lines, log_observation
from voltana_ctrl.checks import Bool, not_negative
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.savings.switchback import AGE_NOTE, BLOCK_NOTE, LENGTH_NOTE, POLICY_NOTE
from voltana_ctrl.types import FleetState, Observation, RequestBatch, Slo, TickRecord

__all__ = ["Block", "BlockMeter", "read_blocks"]

_WASHOUT_FRAC = 0.2
_WASHOUT_MOST_S = 120.0
_STALE_S = 5.0
# A block counts while at most this share of it is missing or was not seen.
_MISSING_FRAC = 0.1
_NOTES = (BLOCK_NOTE, POLICY_NOTE, LENGTH_NOTE, AGE_NOTE)


@dataclass(slots=True, kw_only=True)
class Block:
    """Sums over one block, after its washout.

    Parameters
    ----------
    run, number : int
        How often the controller was started before, and blocks before it since the last
        start.
    at_policy : bool
        Whether the policy ran; else the highest clock.
    start_s : float
        When it began, on the clock of the loop.
    length_s, washout_s : float
        Seconds that it was to last, and seconds at its start that do not count.
    from_s, until_s : float
        Times of the readings between which it counts; the same before any does.
    unseen_s : float
        Seconds of it in which readings were old or an instance was away.
    after_s : float
        Seconds seen after its end, in which its last requests may have finished.
    energy_j : float
        Joules drawn between `from_s` and `until_s`.
    arrived_req : float
        Requests of the whole fleet that arrived between its washout and as long before its end:
        what clients did, whatever the clock.
    in_flight_req : float
        Most requests of the whole fleet that ran or waited at once in that span.
    finished_tok, iterated_tok : float
        Tokens generated, as told by requests that finished, and by iterations.
    judged_req, met_req : int
        Requests that began and ended in the block, and how many of them met the SLO.
    counter_fell : bool
        Whether an energy counter went backwards.

    Examples
    --------
    >>> block = Block(run=0, number=0, at_policy=True, start_s=0.0, length_s=60.0, washout_s=12.0)
    >>> block.spoiled
    'it is not complete'
    """

    run: int
    number: int
    at_policy: bool
    start_s: float
    length_s: float
    washout_s: float
    from_s: float = 0.0
    until_s: float = 0.0
    unseen_s: float = 0.0
    after_s: float = 0.0
    energy_j: float = 0.0
    arrived_req: float = 0.0
    in_flight_req: float = 0.0
    finished_tok: float = 0.0
    iterated_tok: float = 0.0
    judged_req: int = 0
    met_req: int = 0
    counter_fell: bool = False

    @property
    def span_s(self) -> float:
        """Seconds of it that count."""
        return self.until_s - self.from_s

    @property
    def spoiled(self) -> str | None:
        """Why the block counts for no proof, in words; None if it counts."""
        whole_s = self.length_s - self.washout_s
        if self.counter_fell:
            return "an energy counter fell"
        if self.span_s < (1.0 - _MISSING_FRAC) * whole_s:
            return "it is not complete"
        if self.unseen_s > _MISSING_FRAC * whole_s:
            return "readings were missing"
        if self.after_s < self.washout_s:
            return "its last requests were not awaited"
        return None


class BlockMeter:
    """Observer that sums ticks into the blocks of a switchback.

    What a tick reads happened under the decision of the tick before, and goes to its block.
    The tokens of a finished request go to the blocks during which they were generated, in
    proportion to time: counting them where requests end would charge a block for the requests
    that a change of the clock delays beyond its end.

    Parameters
    ----------
    slo : Slo, optional
        What requests are judged by; none are judged without.
    washout_s : float, optional
        Seconds at the start of each block that do not count; a fifth of the block, at most 120 s,
        by default.
    chosen : sequence of int, optional
        Indices of instances whose energy and requests count; all by default.
    ids : sequence of str
        Names of the instances, for messages.

    Raises
    ------
    ConfigError
        If the washout is negative.

    Examples
    --------
    >>> BlockMeter().blocks
    []
    """

    def __init__(
        self,
        *,
        slo: Slo | None = None,
        washout_s: float | None = None,
        chosen: Sequence[int] | None = None,
        ids: Sequence[str] = (),
    ) -> None:
        if washout_s is not None:
            not_negative("washout_s", washout_s)
        self.slo = slo
        self.washout_s = washout_s
        self.ids = tuple(ids)
        self.blocks: list[Block] = []
        self._chosen = None if chosen is None else np.array(sorted(chosen), dtype=np.int64)
        self._state: FleetState | None = None
        self._block: Block | None = None
        self._age_s = 0.0
        self._moved: Bool | None = None

    def on_tick(self, record: TickRecord) -> None:
        """Take one tick of a running loop."""
        self.add(record.observation, record.notes)

    def add(self, observation: Observation, notes: Mapping[str, float]) -> None:
        """Take one tick; one without the marks of a switchback belongs to no block.

        Parameters
        ----------
        observation : Observation
            What was read.
        notes : mapping of str to float
            Notes of the tick, among them the marks that
            :class:`~voltana_ctrl.savings.SwitchbackController` makes.

        Raises
        ------
        ConfigError
            If the washout is not shorter than the block.
        """
        state, before = observation.state, self._state
        if before is not None and len(before) == len(state) and before.t_s <= state.t_s:
            self._count(before, observation)
            self._share_out(observation.finished, state.t_s)
        else:
            self._block = None
        self._state = state
        if any(name not in notes for name in _NOTES):
            self._block = None
            return
        self._age_s = notes[AGE_NOTE]
        self._block = self._block_of(state.t_s - self._age_s, notes)

    def _block_of(self, start_s: float, notes: Mapping[str, float]) -> Block:
        number = int(notes[BLOCK_NOTE])
        latest = self.blocks[-1] if self.blocks else None
        length_s = notes[LENGTH_NOTE]
        # Blocks of one start of the controller lie on one grid of time.
        same_run = (
            latest is not None
            and self._block is not None
            and abs(start_s - latest.start_s - (number - latest.number) * length_s) < 1.0
        )
        if latest is not None and same_run and latest.number == number:
            return latest
        washout_s = self.washout_s
        if washout_s is None:
            washout_s = min(_WASHOUT_FRAC * length_s, _WASHOUT_MOST_S)
        if washout_s >= length_s:
            raise ConfigError(
                f"washout_s: expected less than a block of {length_s:g} s, got {washout_s:g}"
            )
        block = Block(
            run=(-1 if latest is None else latest.run) + (not same_run),
            number=number,
            at_policy=notes[POLICY_NOTE] > 0.5,
            start_s=start_s,
            length_s=length_s,
            washout_s=washout_s,
        )
        self.blocks.append(block)
        return block

    def _count(self, before: FleetState, observation: Observation) -> None:
        state, finished, block = observation.state, observation.finished, self._block
        delta_j = state.energy_j - before.energy_j
        self._moved = (delta_j > 0.0) | (False if self._moved is None else self._moved)
        if block is None:
            return
        self._judge(block, finished, self._ours(finished), state.t_s)
        if self._age_s < block.washout_s - 1e-9:
            return
        if self._age_s < block.length_s - block.washout_s:
            block.arrived_req += float(state.arrived_req.sum())
            in_flight_req = float((state.running_req + state.queue_req).sum())
            block.in_flight_req = max(block.in_flight_req, in_flight_req)
        chosen = slice(None) if self._chosen is None else self._chosen
        if block.until_s == block.from_s:
            block.from_s = before.t_s
        block.until_s = state.t_s
        dt_s = state.t_s - before.t_s
        old = np.any(~state.alive[chosen]) or np.any(state.age_s[chosen] > _STALE_S)
        block.unseen_s += dt_s if old or dt_s > _STALE_S else 0.0
        block.counter_fell |= bool(np.any(delta_j[chosen] < 0.0))
        block.energy_j += float(delta_j[chosen].sum())
        iterations = observation.iterations
        told_tok = iterations.batch_req
        if self._chosen is not None:
            told_tok = told_tok[np.isin(iterations.instance, self._chosen)]
        block.iterated_tok += float(told_tok.sum())

    def _share_out(self, finished: RequestBatch, t_s: float) -> None:
        """Give the tokens of finished requests to the blocks in which they were generated."""
        ours = self._ours(finished)
        output_tok = finished.output_tok[ours]
        # A request of one token, or of unknown pace, counts where it ends.
        took_s = np.maximum(finished.itl_s[ours] * np.maximum(output_tok - 1.0, 0.0), 1e-6)
        begun_s = t_s - took_s
        for block in reversed(self.blocks):
            if block.run != self.blocks[-1].run:
                break  # on another clock, perhaps
            if block.until_s == block.from_s:
                continue  # in its washout
            block.after_s = t_s - block.until_s
            inside_s = np.minimum(t_s, block.until_s) - np.maximum(begun_s, block.from_s)
            block.finished_tok += float((output_tok * np.clip(inside_s / took_s, 0.0, 1.0)).sum())
            if begun_s.min(initial=t_s) > block.until_s and block.after_s > block.washout_s:
                break

    def _judge(self, block: Block, finished: RequestBatch, ours: Bool, t_s: float) -> None:
        if self.slo is None or len(finished) == 0:
            return
        decode_s = finished.itl_s * np.maximum(finished.output_tok - 1.0, 0.0)
        inside = ours & (t_s - decode_s - finished.ttft_s >= block.start_s)
        met = (finished.ttft_s <= self.slo.ttft_s) & (finished.itl_s <= self.slo.itl_s)
        block.judged_req += int(inside.sum())
        block.met_req += int((inside & met).sum())

    def _ours(self, finished: RequestBatch) -> Bool:
        if self._chosen is None:
            return np.ones(len(finished), bool)
        return np.isin(finished.decode_instance, self._chosen) | np.isin(
            finished.prefill_instance, self._chosen
        )

    def without_energy(self) -> tuple[str, ...]:
        """Names of the instances that count and whose energy never moved: nobody measures them.

        Returns
        -------
        tuple of str
            Their `ids`, or ``instance 0`` and so on where none were given.
        """
        if self._moved is None:
            return ()
        chosen = range(len(self._moved)) if self._chosen is None else self._chosen
        names = self.ids or tuple(f"instance {i}" for i in range(len(self._moved)))
        return tuple(names[i] for i in chosen if not self._moved[i])


def read_blocks(
    paths: Sequence[Path],
    *,
    slo: Slo | None = None,
    washout_s: float | None = None,
    instances: Sequence[str] = (),
) -> BlockMeter:
    """Read logs of one fleet and sum their ticks into blocks.

    Parameters
    ----------
    paths : sequence of Path
        Files of the logs, in the order in which they were written.
    slo : Slo, optional
        What requests are judged by; that of the first file, where it has one, by default.
    washout_s : float, optional
        See :class:`BlockMeter`.
    instances : sequence of str
        Ids of the instances whose energy and requests count; all by default.

    Returns
    -------
    BlockMeter
        Its `blocks` in the order of time.

    Raises
    ------
    ConfigError
        If there is no file, or one cannot be read, is no log of ticks, is of another fleet, or has
        no such instance.

    Examples
    --------
    >>> from pathlib import Path
    >>> read_blocks([Path("no-such.jsonl")])
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: log no-such.jsonl: cannot be read: No such file or directory
    """
    meter: BlockMeter | None = None
    for path in paths:
        for number, values in log_lines(path):
            try:
                if number > 1 and meter is not None:
                    observation = log_observation(values["observation"])
                    meter.add(observation, values.get("notes", {}))
                    continue
                ids = log_fleet(values).ids
                told = values.get("slo")
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"log {path}: line {number}: not of a log of ticks: {error}"
                ) from error
            if meter is None:
                meter = BlockMeter(
                    slo=slo or (None if told is None else Slo(**told)),
                    washout_s=washout_s,
                    chosen=_indices(path, instances, ids) if instances else None,
                    ids=ids,
                )
            elif ids != meter.ids:
                raise ConfigError(f"log {path}: of another fleet than {paths[0]}")
    if meter is None:
        raise ConfigError("savings: expected at least one log with a first line, got none")
    return meter


def _indices(path: Path, instances: Sequence[str], ids: Sequence[str]) -> list[int]:
    for name in instances:
        if name not in ids:
            raise ConfigError(f"instances: log {path} has no {name!r}; there are {', '.join(ids)}")
    return [list(ids).index(name) for name in instances]
