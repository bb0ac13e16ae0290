"""A fleet of emulated engines: what each process is told, and the files that others need."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voltana_ctrl.engines.emulated.app import EngineApp
from voltana_ctrl.engines.emulated.engine import EmulatedEngine
from voltana_ctrl.engines.in_engine import InEngine, InEngineSettings
from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.fakes.nvml import FakeGpu, FakeNvml, attached_gpu
from voltana_ctrl.profiles import load_profile
from voltana_ctrl.serving.server import bounded_server, listen
from voltana_ctrl.types import FleetSpec, InstanceSpec, Role

__all__ = ["EmulatedFleet", "EmulatedSettings", "FakeCard", "free_ports", "run_engine"]

_START_S = 120.0


class FakeCard:
    """Fake GPUs of one instance as an emulated engine sees them.

    Parameters
    ----------
    gpus : sequence of FakeGpu
        GPUs of the instance, which share one clock.

    Examples
    --------
    >>> class Gpu:
    ...     def __init__(self, clock_mhz): self.clock_mhz, self.power_w = clock_mhz, 0.0
    ...     def set(self, *, power_w): self.power_w = power_w
    >>> FakeCard([Gpu(1410.0), Gpu(1005.0)]).clock_mhz
    1005.0
    """

    def __init__(self, gpus: list[FakeGpu]) -> None:
        self._gpus = gpus
        self._drawn_w = 0.0

    @property
    def clock_mhz(self) -> float:
        """SM clock that runs: of several GPUs the slowest, for which the others wait."""
        return min(gpu.clock_mhz for gpu in self._gpus)

    def draw(self, power_w: float) -> None:
        """Draw so much from now on, all together."""
        if power_w != self._drawn_w:
            self._drawn_w = power_w
            for gpu in self._gpus:
                gpu.told_w = power_w / len(self._gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedSettings:
    """What one emulated engine is told, as the argument of its process.

    Parameters
    ----------
    instance, role, profile : str
        Id, role, and the profile that it obeys.
    port : int
        Port on 127.0.0.1 on which it serves.
    library : str
        The fake driver library.
    gpus : tuple of int
        Numbers of its fake GPUs.
    plugin : mapping of str to str
        Settings of the plugin inside, as its environment would have them.

    Examples
    --------
    >>> EmulatedSettings(instance="d0", role="decode", profile="p", port=1, library="x",
    ...                  gpus=(0,), plugin={}).port
    1
    """

    instance: str
    role: str
    profile: str
    port: int
    library: str
    gpus: tuple[int, ...]
    plugin: Mapping[str, str]


def run_engine(text: str) -> None:
    """Serve as one emulated engine until told to end: the process of an :class:`EmulatedFleet`.

    Parameters
    ----------
    text : str
        JSON of :class:`EmulatedSettings`.

    Examples
    --------
    >>> import json
    >>> from dataclasses import asdict
    >>> settings = EmulatedSettings(instance="d0", role="decode", port=8000, library="libfake.so",
    ...                             profile="a100-sxm-80gb/llama-3.1-8b", gpus=(0,), plugin={})
    >>> run_engine(json.dumps(asdict(settings)))  # doctest: +SKIP
    """
    told: dict[str, Any] = json.loads(text)
    settings = EmulatedSettings(**{**told, "gpus": tuple(told["gpus"])})
    role = Role(settings.role)
    profile = load_profile(settings.profile)
    instance = InstanceSpec(id=settings.instance, role=role, profile=profile)
    card = FakeCard([attached_gpu(Path(settings.library), one) for one in settings.gpus])
    listening = listen("127.0.0.1", settings.port, what="emulate")
    inside = InEngine(InEngineSettings.read(settings.plugin), role)
    engine = EmulatedEngine(instance, card, inside)
    server = bounded_server(EngineApp(engine), what="emulate", lifespan=True, drain_s=1.0)
    try:
        server.run(listening)
    finally:
        inside.close()
        card.draw(0.0)


class EmulatedFleet:
    """Processes of a fleet of emulated engines on fake GPUs; a context manager ends them.

    In `folder` there are then ``fleet.toml``, for the commands that run on a fleet, the orders of
    the governors inside (``orders``), and the lock files of the GPUs (``locks``). Commands that
    are started with :attr:`env` find the fake driver where the real one would be.

    Parameters
    ----------
    fleet : str
        Fleet in short, such as ``2P2D`` or ``4C``.
    profile : str
        Profile at its true speed.
    dilation : float
        Factor by which everything takes longer than the profile says, the promises included.
    slo : str
        Promises at the true speed, see :meth:`~voltana_ctrl.types.Slo.parse`.
    folder : Path, optional
        Folder of its files; if left out, one that is removed at the end.
    governed : bool
        Whether engines host governors; without, agents ask them at every tick.
    mode : {"observe", "act"}
        Mode of the plugins inside the engines.
    nodes : int
        Machines that the instances are spread over, in turn.

    Attributes
    ----------
    fake : FakeNvml
        The GPUs.
    urls : tuple of str
        Addresses of the engines.
    slo_text : str
        Promises, stretched by `dilation`, as ``Slo.parse`` reads them.

    Raises
    ------
    ConfigError
        If there is no C compiler, or the fleet does not fit.
    BackendError
        If an engine does not start.

    Examples
    --------
    >>> with EmulatedFleet("2P2D", dilation=10.0) as fleet:  # doctest: +SKIP
    ...     print(fleet.urls)
    """

    def __init__(
        self,
        fleet: str = "2P2D",
        *,
        profile: str = "a100-sxm-80gb/llama-3.1-8b",
        dilation: float = 10.0,
        slo: str = "ttft=0.6,itl=0.06",
        folder: Path | None = None,
        governed: bool = True,
        mode: str = "act",
        nodes: int = 1,
    ) -> None:
        from voltana_ctrl.types import Slo

        at_speed = Slo.parse(slo)
        self.slo_text = (
            f"ttft={at_speed.ttft_s * dilation:g},itl={at_speed.itl_s * dilation:g},"
            f"attainment={at_speed.attainment:g}"
        )
        self.profile = profile if dilation == 1.0 else f"{profile}@{dilation:g}"
        self.spec = FleetSpec.parse(fleet, load_profile(self.profile))
        self.governed = governed
        self._own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="voltana-emulated-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fleet_file = self.folder / "fleet.toml"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._mode, self._nodes = mode, nodes
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        spec, folder = self.spec, self.folder
        gpus = [one.gpus for one in spec.instances]
        self.fake = FakeNvml(folder, gpus=sum(gpus))
        for gpu in self.fake.gpus:
            gpu.cap_inert = 1.0  # what a cap does stands in the profile already
            gpu.min_mhz, gpu.max_mhz = float(spec.min_mhz[0]), float(spec.max_mhz[0])
            gpu.step_mhz = float(spec.instances[0].clocks_mhz[1] - spec.instances[0].clocks_mhz[0])
        for name in ("orders", "locks"):
            (folder / name).mkdir(mode=0o755, exist_ok=True)
        ports = free_ports(2 * len(spec))
        self.urls = tuple(f"http://127.0.0.1:{port}" for port in ports[: len(spec)])
        first, tables = 0, []
        self.settings: list[EmulatedSettings] = []
        for i, one in enumerate(spec.instances):
            numbers = tuple(range(first, first + one.gpus))
            first += one.gpus
            for k in numbers:
                self.fake.gpus[k].told_w = one.idle_w / one.gpus
            uuids = [self.fake.gpus[k].uuid for k in numbers]
            fpm = f"tcp://127.0.0.1:{ports[len(spec) + i]}"
            limits = folder / "orders" / f"{one.id}.json"
            tables.append(self._table(i, uuids, fpm, limits))
            plugin = {
                "VOLTANA_CTRL_MODE": self._mode if self.governed else "observe",
                "VOLTANA_CTRL_PROFILE": self.profile,
                "VOLTANA_CTRL_SLO": self.slo_text,
                "VOLTANA_CTRL_GPUS": ",".join(uuids),
                "VOLTANA_CTRL_ROLE": one.role.value,
                "VOLTANA_CTRL_LIMITS": str(limits),
                "VOLTANA_CTRL_FPM": fpm,
                "VOLTANA_CTRL_LOCK_DIR": str(folder / "locks"),
                "VOLTANA_CTRL_LIBRARY": str(self.fake.library),
            }
            self.settings.append(
                EmulatedSettings(
                    instance=one.id, role=one.role.value, profile=self.profile,
                    port=ports[i], library=str(self.fake.library), gpus=numbers, plugin=plugin,
                )
            )  # fmt: skip
        self.fleet_file.write_text("\n".join(tables), encoding="utf-8")
        self._processes = [self._spawn(one) for one in self.settings]
        for i in range(len(spec)):
            self.wait(i)

    def _table(self, i: int, uuids: list[str], fpm: str, limits: Path) -> str:
        one = self.spec.instances[i]
        quoted = ", ".join(f'"{uuid}"' for uuid in uuids)
        held = f', limits = "{limits}"' if self.governed else ""
        return (
            f'[[instance]]\nid = "{one.id}"\nrole = "{one.role.value}"\n'
            f'node = "node{i % self._nodes}"\nprofile = "{self.profile}"\n'
            f'engine = {{ kind = "vllm", url = "{self.urls[i]}", fpm = "{fpm}",'
            f" gpus = [{quoted}]{held} }}\n"
        )

    @property
    def env(self) -> dict[str, str]:
        """Environment for commands: the fake driver in place of the real one."""
        return self.fake.env

    def _spawn(self, settings: EmulatedSettings) -> subprocess.Popen[bytes]:
        told = {name: getattr(settings, name) for name in EmulatedSettings.__slots__}
        program = "from voltana_ctrl.engines.emulated.fleet import run_engine; import sys;"
        return subprocess.Popen(
            [sys.executable, "-c", f"{program} run_engine(sys.argv[1])", json.dumps(told)],
            env={**self.env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )

    def wait(self, instance: int, limit_s: float = _START_S) -> None:
        """Wait until an engine answers.

        Parameters
        ----------
        instance : int
            Index of the engine in the fleet.
        limit_s : float
            Seconds to wait at most.

        Raises
        ------
        BackendError
            If it does not answer by then, or has ended.
        """
        port, process = self.settings[instance].port, self._processes[instance]
        until_s = time.monotonic() + limit_s
        while process.poll() is None and time.monotonic() < until_s:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1.0):
                    return
            except OSError:
                time.sleep(0.05)
        raise BackendError(f"emulate: {self.settings[instance].instance} did not start")

    def kill(self, instance: int) -> None:
        """End an engine without notice.

        Parameters
        ----------
        instance : int
            Index of the engine in the fleet.
        """
        self._processes[instance].send_signal(signal.SIGKILL)
        self._processes[instance].wait(10.0)

    def restart(self, instance: int) -> None:
        """Start an engine again that has ended.

        Parameters
        ----------
        instance : int
            Index of the engine in the fleet.
        """
        self._processes[instance] = self._spawn(self.settings[instance])
        self.wait(instance)

    def slow(self, instance: int, slow_frac: float) -> None:
        """Have an engine take so many times as long as its profile says.

        Parameters
        ----------
        instance : int
            Index of the engine in the fleet.
        slow_frac : float
            Factor of the time of every iteration from now on; 1 is as the profile says.

        Raises
        ------
        BackendError
            If the engine does not answer.
        """
        import httpx

        try:
            httpx.post(
                f"{self.urls[instance]}/emulate", json={"slow_frac": slow_frac}, trust_env=False,
                timeout=30.0,
            ).raise_for_status()  # fmt: skip
        except httpx.HTTPError as error:
            raise BackendError(f"emulate: {self.spec.ids[instance]}: {error}") from error

    def close(self) -> None:
        """End all engines; may be called twice."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10.0)
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> EmulatedFleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens on, now.

    Parameters
    ----------
    n : int
        Number of ports.

    Returns
    -------
    list of int
        Different ports; another process may take one before it is used.

    Raises
    ------
    ConfigError
        If there are not as many.

    Examples
    --------
    >>> len(set(free_ports(3)))
    3
    """
    sockets = []
    try:
        for _ in range(n):
            one = socket.socket()
            one.bind(("127.0.0.1", 0))
            sockets.append(one)
        return [int(one.getsockname()[1]) for one in sockets]
    except OSError as error:
        raise ConfigError(f"emulate: no free port: {error}") from error
    finally:
        for one in sockets:
            one.close()
