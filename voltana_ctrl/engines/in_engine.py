"""What runs inside an engine's process, the same for every engine.

Configured by environment variables or a TOML file that ``VOLTANA_CTRL_CONFIG`` names; a
variable counts more than the file. Without any of it nothing is set and nothing is sent: the
plugin only counts.

======================== ============ =====================================================
Variable                 Key          Meaning
======================== ============ =====================================================
VOLTANA_CTRL_MODE        mode         ``observe`` (default) or ``act``: set this GPU's clock
VOLTANA_CTRL_PROFILE     profile      Profile of the instance, by name or file
VOLTANA_CTRL_SLO         slo          ``ttft=0.6,itl=0.06``
VOLTANA_CTRL_GPUS        gpus         UUIDs of the instance's GPUs
VOLTANA_CTRL_ROLE        role         ``prefill``, ``decode`` or ``colocated``; asked of the
                                      engine where it is not given
VOLTANA_CTRL_SETTER      setter       Socket of the privileged setter
VOLTANA_CTRL_POLICY      policy       Whose governor chooses clocks, ``mpc`` if left out; a
                                      controller's order goes first
VOLTANA_CTRL_LIMITS      limits       File with the order of the node's agent
VOLTANA_CTRL_LIMITS_UID  limits_uid   User id of that agent, where it is neither root nor the
                                      engine's own
VOLTANA_CTRL_PARK_MEMORY park_memory  1: the lowest memory clock while parked and idle
VOLTANA_CTRL_FPM         fpm          Address to publish forward-pass metrics at
VOLTANA_CTRL_WORKER_ID   worker_id    Sent with them
VOLTANA_CTRL_LOCK_DIR    lock_dir     Where lock files of GPUs live
VOLTANA_CTRL_LIBRARY     library      Driver library, where it is not the system's
VOLTANA_CTRL_BASE        base         Scheduler class to extend, where it is not vLLM's
======================== ============ =====================================================
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from voltana_ctrl.engines.clock_thread import ClockThread
from voltana_ctrl.engines.fpm.messages import ForwardPass
from voltana_ctrl.engines.fpm.publisher import FpmPublisher
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.ports import believe_of
from voltana_ctrl.textfile import read_toml
from voltana_ctrl.types import FleetSpec, InstanceSpec, Order, Role, Slo

__all__ = ["InEngine", "InEngineSettings"]

_log = logging.getLogger("voltana_ctrl")
_PREFIX = "VOLTANA_CTRL_"
_KEPT = 4096
# An engine must not fail by what observes it; after so many errors it is left alone.
_MAX_ERRORS = 10
# Passes closer to each other than this are published together. Where the governor is inside, who
# listens needs them for slow decisions only, and reads ten times a second.
_TOGETHER_S, _TOGETHER_GOVERNED_S = 0.02, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class InEngineSettings:
    """What a plugin inside an engine is to do.

    The fields are the keys of the table in :mod:`voltana_ctrl.engines.in_engine`.

    Parameters
    ----------
    mode : {"observe", "act"}
        Whether the plugin only counts, or sets the clock, too.
    profile : str
        Profile of the instance, by name or file; needed to act.
    slo : Slo, optional
        Promises on TTFT and ITL; needed to act.
    gpus : tuple of str
        UUIDs of the instance's GPUs; needed to act.
    role : Role, optional
        What the instance does; the engine is asked where it is None.
    setter : Path, optional
        Socket of the privileged setter; without it the clock is set from this process.
    policy : str
        Policy whose governor chooses clocks, until an order names another.
    limits : Path, optional
        File in which the node's agent hands over its orders.
    limits_uid : int, optional
        User id that may write `limits`, besides root and the engine's own user.
    park_memory : bool
        Whether the memory clock is held at its lowest while an order parks the instance and it
        has no work, where the driver lists several; not through the setter, which sets none.
    lock_dir, library : Path, optional
        Folder of the GPUs' lock files, and driver library; the system's where they are None.
    fpm : str
        ZeroMQ address to publish forward-pass metrics at; nothing is published where it is empty.
    worker_id : str
        Id that is sent with them.
    base : str
        Scheduler class to extend, as ``module.Class``; vLLM's own where it is empty.

    Raises
    ------
    ConfigError
        If a key is not known, a value is of the wrong form, or one is missing to act.

    Examples
    --------
    >>> InEngineSettings.read({}).mode
    'observe'
    >>> InEngineSettings.read({"VOLTANA_CTRL_SLO": "ttft=0.6,itl=0.06"}).slo.itl_s
    0.06
    """

    mode: str = "observe"
    profile: str = ""
    slo: Slo | None = None
    gpus: tuple[str, ...] = ()
    role: Role | None = None
    setter: Path | None = None
    policy: str = "mpc"
    limits: Path | None = None
    limits_uid: int | None = None
    park_memory: bool = False
    lock_dir: Path | None = None
    library: Path | None = None
    fpm: str = ""
    worker_id: str = ""
    base: str = ""

    def __post_init__(self) -> None:
        if self.mode not in ("observe", "act"):
            raise ConfigError(f"mode: expected observe or act, got {self.mode!r}")
        missing = [name for name in ("profile", "slo", "gpus") if not getattr(self, name)]
        if self.mode == "act" and missing:
            raise ConfigError(
                f"mode act: {missing[0]} is missing; set {_PREFIX}{missing[0].upper()}"
            )
        if self.park_memory and self.setter is not None:
            raise ConfigError(
                "park_memory: the setter sets no memory clock; leave out one of the two"
            )

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> InEngineSettings:
        """Settings from environment variables and the file that they name.

        Parameters
        ----------
        environment : mapping of str to str
            Usually ``os.environ``.

        Returns
        -------
        InEngineSettings
            The file counts where no variable says otherwise; defaults where neither does.

        Raises
        ------
        ConfigError
            If the file cannot be read, has a key that is not known, or a value is wrong.
        """
        told: dict[str, Any] = {}
        path = environment.get(f"{_PREFIX}CONFIG")
        if path:
            told = read_toml(path)
            unknown = sorted(set(told) - set(cls.__slots__))
            if unknown:
                known = ", ".join(cls.__slots__)
                raise ConfigError(f"{path}: unknown key {unknown[0]!r}; known are {known}")
        for name in cls.__slots__:
            value = environment.get(_PREFIX + name.upper())
            if value:
                told[name] = value
        return cls(**{name: _parsed(name, value) for name, value in told.items()})


def _all_text(values: list[Any]) -> bool:
    return all(isinstance(one, str) for one in values)


def _parsed(name: str, value: Any) -> Any:
    if name == "gpus":
        if not (isinstance(value, str) or (isinstance(value, list) and _all_text(value))):
            raise ConfigError(f"gpus: expected UUIDs in quotes, got {value!r}")
        return tuple(value.replace(",", " ").split() if isinstance(value, str) else value)
    if name == "limits_uid":
        if not (str(value).isascii() and str(value).isdigit() and len(str(value)) <= 10):
            raise ConfigError(f"limits_uid: expected the number of a user, got {value!r}")
        return int(value)
    if name == "park_memory":
        if value not in (True, False, "0", "1"):
            raise ConfigError(f"park_memory: expected 0 or 1 (a file: a boolean), got {value!r}")
        return value in (True, "1")
    if not isinstance(value, str):
        raise ConfigError(f"{name}: expected text, got {value!r}")
    if name == "slo":
        return Slo.parse(value)
    if name == "role":
        roles = {role.value: role for role in Role}
        if value not in roles:
            raise ConfigError(f"role: expected one of {', '.join(roles)}, got {value!r}")
        return roles[value]
    return Path(value) if name in ("setter", "limits", "lock_dir", "library") else value


class InEngine:
    """One engine from inside: counts its iterations, and before each chooses its clock.

    Parameters
    ----------
    settings : InEngineSettings
        What to do.
    role : Role
        What the engine says it does; `settings.role` goes first.
    dp_rank : int
        Its data-parallel rank; each rank publishes at a port, or a file, of its own.
    acts : bool
        False never sets a clock, whatever the settings say: for hooks that are called after
        an iteration.
    publishes : bool
        False publishes nothing, whatever the settings say.

    Raises
    ------
    ConfigError, BackendError
        If the settings cannot be followed: no such profile, or a GPU that cannot be held.

    Examples
    --------
    >>> from voltana_ctrl import Role
    >>> from voltana_ctrl.engines.fpm.messages import ForwardPass
    >>> engine = InEngine(InEngineSettings(), Role.DECODE)  # mode observe: no clock is asked for
    >>> engine.before(running_req=12, kv_used_tok=6000)
    >>> engine.after(ForwardPass(wall_s=0.02, decode_req=12.0))
    >>> engine.iterations, engine.asked_mhz
    (1, None)
    >>> engine.close()
    """

    def __init__(
        self,
        settings: InEngineSettings,
        role: Role,
        *,
        dp_rank: int = 0,
        acts: bool = True,
        publishes: bool = True,
    ) -> None:
        self.settings = settings
        self.role = settings.role or role
        self.iterations = 0
        self.errors = 0
        self.recent: deque[ForwardPass] = deque(maxlen=_KEPT)
        self.policy = settings.policy
        self._governor: Any = None
        self._instance: InstanceSpec | None = None
        self._delay_s, self._call_s = 0.025, 0.005
        self._began_mhz = 0.0
        self._clock: ClockThread | None = None
        self._publisher: FpmPublisher | None = None
        if acts and settings.mode == "act":
            self._clock = self._open_clock(settings)
        if publishes and settings.fpm:
            together_s = _TOGETHER_S if self._clock is None else _TOGETHER_GOVERNED_S
            self._publisher = FpmPublisher(
                _rank_address(settings.fpm, dp_rank),
                worker_id=settings.worker_id,
                dp_rank=dp_rank,
                together_s=together_s,
            )

    def _open_clock(self, settings: InEngineSettings) -> ClockThread:
        from voltana_ctrl.backends import NvmlBackend
        from voltana_ctrl.backends.nvml.dead_time import measure_dead_time
        from voltana_ctrl.backends.nvml.lockfile import LOCK_DIR
        from voltana_ctrl.profiles import load_profile

        if settings.slo is None:
            raise ConfigError(f"mode act: slo is missing; set {_PREFIX}SLO")
        self._instance = instance = InstanceSpec(
            id="engine",
            role=self.role,
            profile=load_profile(settings.profile),
            gpus=len(settings.gpus),
        )
        # Its clock is set alike whatever it does; a fleet needs somebody for each phase.
        alone = FleetSpec((replace(instance, role=Role.COLOCATED),))
        backend = NvmlBackend(
            alone,
            {"engine": settings.gpus},
            setter=settings.setter,
            lock_dir=settings.lock_dir or LOCK_DIR,
            library=settings.library,
        )
        try:
            # The engine does not serve yet: its GPUs are idle.
            dead = measure_dead_time(backend, repeats=3)
            self._delay_s, self._call_s = dead.delay_s(), float(dead.call_s.sum())
            self._choose(settings.policy)
            return ClockThread(
                backend,
                instance.clocks_mhz,
                limits=settings.limits,
                owners=() if settings.limits_uid is None else (settings.limits_uid,),
                on_handed=self._take,
                park=partial(backend.park_memory, 0) if settings.park_memory else None,
            )
        except BaseException:
            backend.close()
            raise

    def _choose(self, policy: str) -> None:
        """Have the governor of a policy choose the clocks from the next iteration on."""
        from voltana_ctrl.engines.governors import governor_of_policy

        if self._instance is None or self.settings.slo is None:
            return
        governor = governor_of_policy(
            policy, self._instance, self.settings.slo, delay_s=self._delay_s, dwell_s=self._call_s
        )
        if governor is not None:  # compiles it
            governor.step(1.0, 1.0, 0.0, 0.0, *self._instance.clocks_mhz[[0, -1]])
        self._governor, self.policy = governor, policy

    def _take(self, order: Order, policy: str) -> None:
        """Do as an order says; called by the clock thread."""
        if policy != self.policy:
            self._choose(policy)
        belief, believe = order.belief(delay_s=self.delay_s), believe_of(self._governor)
        if belief is not None and believe is not None:
            believe(belief, 0)

    @property
    def delay_s(self) -> float:
        """Seconds from asking for a clock until it runs.

        Measured at the start where clocks are set, and followed while running; else 0.025.
        """
        if self._clock is None or self._clock.set_s == 0.0:
            return self._delay_s
        return self._delay_s - self._call_s + self._clock.set_s

    @property
    def asked_mhz(self) -> float | None:
        """Clock in MHz that was asked for last; None where none is ever set."""
        return None if self._clock is None else self._clock.asked_mhz

    @property
    def clock(self) -> ClockThread | None:
        """The thread that sets clocks; None where none is ever set."""
        return self._clock

    def before(
        self,
        *,
        running_req: float,
        kv_used_tok: float,
        waiting_tok: float = 0.0,
        batch_tok: float = 0.0,
        oldest_wait_s: float = 0.0,
    ) -> None:
        """Choose the clock of the iteration that is about to run, and ask for it.

        It returns at once: a thread sets the clock. Nothing happens where none is ever set.

        Parameters
        ----------
        running_req : float
            Requests that decode in this iteration.
        kv_used_tok : float
            Tokens that they hold in the KV cache.
        waiting_tok : float
            Prompt tokens that are not prefilled yet, those of this iteration included.
        batch_tok : float
            Those of them that this iteration prefills.
        oldest_wait_s : float
            Seconds that the oldest of these prompts has waited.
        """
        clock = self._clock
        if clock is None:
            return
        governor = self._governor
        if governor is None:
            clock.ask(clock.floor_mhz)
            self._began_mhz = clock.asked_mhz
            return
        clock.ask(
            governor.step(
                running_req,
                kv_used_tok,
                waiting_tok,
                oldest_wait_s,
                clock.floor_mhz,
                clock.ceiling_mhz,
                batch_tok=batch_tok,
            )
        )
        self._began_mhz = clock.asked_mhz

    def after(self, one: ForwardPass) -> None:
        """Take an iteration that has ended.

        Parameters
        ----------
        one : ForwardPass
            What the iteration did.
        """
        self.iterations += 1
        self.recent.append(one)
        if self._publisher is not None:
            if self._clock is not None:
                one = replace(one, clock_mhz=self._began_mhz, delay_s=self.delay_s)
            self._publisher.send(one)

    def failed(self, error: Exception) -> bool:
        """Note that a hook failed.

        The engine goes on. At the tenth failure this is closed, which gives clocks back.

        Parameters
        ----------
        error : Exception
            What was raised.

        Returns
        -------
        bool
            Whether hooks are to be left alone from now on: True from the tenth failure on.
        """
        self.errors += 1
        if self.errors == 1:
            _log.warning("voltana-ctrl: a hook failed, the engine goes on: %r", error)
        if self.errors < _MAX_ERRORS:
            return False
        _log.error("voltana-ctrl: %d failures of a hook; it is switched off", self.errors)
        self.close()
        return True

    def close(self) -> None:
        """Give the clock back and stop; may be called twice."""
        if self._clock is not None:
            self._clock.close()
        if self._publisher is not None:
            self._publisher.close()


def _rank_address(address: str, dp_rank: int) -> str:
    """Each rank has an address of its own: the next port, or the file with its number."""
    head, _, port = address.rpartition(":")
    if address.startswith("tcp://") and port.isdigit():
        return f"{head}:{int(port) + dp_rank}"
    return f"{address}.{dp_rank}" if dp_rank else address


def settings_of_process() -> InEngineSettings:
    """Settings from this process's environment (:meth:`InEngineSettings.read`), and log them."""
    settings = InEngineSettings.read(os.environ)
    _log.info("voltana-ctrl: mode %s, forward-pass metrics %s", settings.mode, settings.fpm or "-")
    return settings


def seconds_since(t_s: float | None) -> float:
    """Seconds since a wall-clock time that an engine wrote down; 0 where it did not."""
    return 0.0 if t_s is None else max(0.0, time.time() - t_s)
