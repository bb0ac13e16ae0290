"""The agent of a node: watches, advises or acts; ends with the hardware as it was found."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.control.base import Controller
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.live.node import CappedGuard, KillSwitch
from voltana_ctrl.live.node_control import Advice, WatchController
from voltana_ctrl.loop import ControlLoop
from voltana_ctrl.ports import Observer, Router, backend_extras
from voltana_ctrl.savings.switchback import SwitchbackController
from voltana_ctrl.types import Decision, FleetSpec, Observation, PowerBudget

__all__ = ["MODES", "Agent", "AgentSettings", "Mode", "Switchable"]

Mode = Literal["observe", "advise", "act"]
#: What an agent may do, from least to most.
MODES: tuple[Mode, ...] = ("observe", "advise", "act")


@runtime_checkable
class Switchable(Protocol):
    """A backend that can be told to set nothing any more.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.live.hub import HubBackend
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> isinstance(HubBackend(fleet), Switchable)
    True
    """

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""

    @property
    def acts(self) -> bool:
        """Whether decisions are carried out: not without hardware, nor after :meth:`release`."""

    def read(self) -> Observation:
        """State now, and what happened since the last read."""

    def apply(self, decision: Decision) -> None:
        """Carry out a decision."""

    def release(self) -> None:
        """Set nothing any more, and give the hardware back."""

    def close(self) -> None:
        """Give the hardware back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What an agent does besides reading.

    Parameters
    ----------
    mode : {"observe", "advise", "act"}
        Only read; say what the policy would do; do it.
    kill_file : Path, optional
        File whose appearance gives the hardware back; looked for in mode ``act`` only.
    switchback_s : float, optional
        Seconds of the blocks in which policy and highest clock alternate, see
        :class:`~voltana_ctrl.savings.SwitchbackController`; none without.
    seed : int
        Seed from which the order of these blocks is drawn.
    power_budget : PowerBudget, optional
        What the fleet may draw in blocks at the highest clock. The policy keeps its own budget.
    ceiling_mhz : ndarray, shape (n,), optional
        Clocks that are never passed, see
        :func:`~voltana_ctrl.live.node.power_ceilings_mhz`.
    min_mhz : ndarray, shape (n,), optional
        Clocks below which nothing is ever asked for, power ceilings aside.
    obeys : bool
        Whether a controller elsewhere decides, which sees the whole fleet.
    unread : tuple of str
        Ids of instances whose GPUs nobody reads; advice says that their clock is assumed.

    Raises
    ------
    ConfigError
        If there is no such mode, or a switchback without acting.

    Examples
    --------
    >>> AgentSettings().mode
    'observe'
    """

    mode: Mode = "observe"
    kill_file: Path | None = None
    switchback_s: float | None = None
    seed: int = 0
    power_budget: PowerBudget | None = None
    ceiling_mhz: F64 | None = None
    min_mhz: F64 | None = None
    obeys: bool = False
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if self.switchback_s is not None and self.mode != "act":
            raise ConfigError(
                f"switchback: expected --mode act, got {self.mode}; what is not set proves nothing"
            )


class Agent:
    """A control loop with a mode, a kill switch and, if asked, a switchback.

    A context manager; leaving it gives the hardware back.

    Parameters
    ----------
    backend : Switchable
        The node (:class:`~voltana_ctrl.live.NodeBackend`), or the nodes that
        report (:class:`~voltana_ctrl.live.HubBackend`); closed with the agent.
    controller : Controller, optional
        The policy; none where the agent only observes.
    settings : AgentSettings, optional
        Mode and the rest; without, the agent only observes.
    observers : sequence of Observer
        Told every tick, such as a log and an exporter of metrics.
    period_s : float
        Seconds between readings where there is no controller.
    router : Router, optional
        Router in this process, which is told every decision that is applied.
    say : callable
        Called with what people should know, a line at a time.

    Raises
    ------
    ConfigError
        If mode, controller and backend do not fit together: a backend that could set anything is
        refused unless the mode is ``act``, and one that could not is refused there. Also if the
        kill file is there from the start.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.backends.nvml.meters import GpuMeters
    >>> from voltana_ctrl.live.node import NodeBackend
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> with Agent(NodeBackend(GpuMeters(fleet, {}))) as agent:
    ...     agent.run(duration_s=0.2)
    ...     agent.loop.ticks >= 1
    True
    """

    def __init__(
        self,
        backend: Switchable,
        controller: Controller | None = None,
        settings: AgentSettings | None = None,
        *,
        observers: Sequence[Observer] = (),
        period_s: float = 0.1,
        router: Router | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings = settings or AgentSettings()
        fleet = backend.spec
        if backend.acts != (settings.mode == "act"):
            can = "can set clocks" if backend.acts else "has nothing to set clocks with"
            raise ConfigError(f"agent: mode {settings.mode}: the backend {can}; give another one")
        if (controller is None) != (settings.mode == "observe"):
            raise ConfigError(
                f"agent: mode {settings.mode}: expected"
                f" {'no controller' if settings.mode == 'observe' else 'a controller'}"
            )
        if controller is None:
            controller = WatchController(fleet, period_s=period_s)
        if settings.switchback_s is not None:
            controller = SwitchbackController(
                controller,
                block_s=settings.switchback_s,
                seed=settings.seed,
                power_budget=settings.power_budget,
                in_force=lambda: backend.acts,
            )
        advice = []
        if settings.mode == "advise":
            # A backend that reads engines itself knows why one does not answer.
            problems = backend_extras(backend).problems
            advice = [Advice(fleet, say, unread=settings.unread, problems=problems)]
        ceiling_mhz = settings.ceiling_mhz
        self._backend = backend
        self._kill: KillSwitch | None = None
        self.loop = ControlLoop(
            backend,
            controller,
            CappedGuard(
                fleet,
                fleet.max_mhz if ceiling_mhz is None else np.array(ceiling_mhz),
                min_mhz=settings.min_mhz,
                obeys=settings.obeys,
                ranges=backend_extras(backend).limit_ranges,
            ),
            router,
            observers=(*observers, *advice),
        )
        if settings.mode == "act":
            self._kill = KillSwitch(backend.release, file=settings.kill_file, on_killed=say)

    @property
    def killed(self) -> str | None:
        """Why the hardware is to be given back before the end, in words; None unless killed."""
        return None if self._kill is None else self._kill.reason

    def kill(self, reason: str = "a call") -> None:
        """Have the hardware given back, and go on reading; does nothing unless the mode is ``act``.

        It returns at once: a thread gives the hardware back.

        Parameters
        ----------
        reason : str
            Why, in words.
        """
        if self._kill is not None:
            self._kill.kill(reason)

    def run(
        self, *, duration_s: float = float("inf"), stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Tick until `stop` says so, asked about every second, or the time is over.

        Parameters
        ----------
        duration_s : float
            Seconds to run at most.
        stop : callable
            Returns whether to end.

        Raises
        ------
        VoltanaError
            What the backend raises; the hardware is given back when the agent is left.
        """
        clock, period_s = self.loop.clock, self.loop.period_s
        # Whole periods, so that the ticks of one stretch follow on those of the last.
        stretch_s = max(1, round(1.0 / period_s)) * period_s
        end_s = clock.now_s() + duration_s
        while not stop() and clock.now_s() < end_s:
            self.loop.run(min(end_s, clock.now_s() + stretch_s))

    @contextlib.contextmanager
    def killed_by_signal(self, number: int = signal.SIGUSR1) -> Iterator[None]:
        """Context in which a signal calls :meth:`kill`; only in the main thread of a program.

        Parameters
        ----------
        number : int
            The signal; its handler of before is put back at the end.
        """

        def handle(_number: int, _frame: FrameType | None) -> None:
            self.kill(signal.Signals(number).name)

        before = signal.signal(number, handle)
        try:
            yield
        finally:
            signal.signal(number, before)

    def close(self) -> None:
        """Give the hardware back; may be called twice."""
        try:
            if self._kill is not None:
                self._kill.close()
        finally:
            self._backend.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
