"""A sweep on a Ray cluster: an executor of twenty lines, as compare() takes any.

Ray runs again what a lost node had; with the store a sweep outlives the whole cluster.

Run: pip install ray '.[tables]' && python examples/sweep_on_ray.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from voltana_ctrl import compare
from voltana_ctrl.experiment import ResultStore


class RayExecutor(Executor):
    """Runs functions as tasks of Ray."""

    def __init__(self, ray: Any) -> None:
        self._task = ray.remote(max_retries=3)(lambda function, a, k: function(*a, **k))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self._task.remote(fn, args, kwargs).future()
        return future


def main() -> None:
    try:
        import ray
    except ImportError:
        print("Ray is not installed; pip install ray to run this example")
        return
    ray.init()  # or ray.init("ray://head:10001"): whatever that cluster has
    with ResultStore("sweep-on-ray") as store:
        result = compare(
            rates_req_s=[20.0, 40.0],
            duration_s=20.0,
            warmup_s=5.0,
            seeds=2,
            policies=["static-max", "dualscale", "bound"],
            executor=RayExecutor(ray),
            store=store,
            on_progress=lambda done, total: print(f"{done}/{total} runs", file=sys.stderr),
        )
    for run in result.runs:
        print(f"{run['policy']:11s} {run['rate_req_s']:3g} req/s {run['mean_power_w']:5.0f} W")


if __name__ == "__main__":
    main()
