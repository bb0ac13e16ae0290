"""Plants behind one port: simulated, replayed, hardware. Loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "CpufreqBackend": "cpufreq",
    "DeadTime": "nvml.dead_time",
    "NvmlBackend": "nvml.gpus",
    "Recorder": "replay",
    "ReplayBackend": "replay",
    "SimBackend": "sim",
    "measure_dead_time": "nvml.dead_time",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from voltana_ctrl.backends.cpufreq import CpufreqBackend as CpufreqBackend
    from voltana_ctrl.backends.nvml.dead_time import DeadTime as DeadTime
    from voltana_ctrl.backends.nvml.dead_time import measure_dead_time as measure_dead_time
    from voltana_ctrl.backends.nvml.gpus import NvmlBackend as NvmlBackend
    from voltana_ctrl.backends.replay import Recorder as Recorder
    from voltana_ctrl.backends.replay import ReplayBackend as ReplayBackend
    from voltana_ctrl.backends.sim import SimBackend as SimBackend
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
