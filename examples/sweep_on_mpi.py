"""A sweep on the ranks of an MPI job: mpi4py brings an executor, and compare() takes any.

A rank that dies takes the job with it; started again, the job does what its store has not.

Run: pip install mpi4py '.[tables]' && mpiexec -n 1 -usize 5 python examples/sweep_on_mpi.py
"""

import sys

from voltana_ctrl import compare
from voltana_ctrl.experiment import ResultStore


def main() -> None:
    try:
        from mpi4py.futures import MPIPoolExecutor
    except ImportError:
        print("mpi4py is not installed; pip install mpi4py to run this example")
        return
    with MPIPoolExecutor() as executor, ResultStore("sweep-on-mpi") as store:
        result = compare(
            rates_req_s=[20.0, 40.0],
            duration_s=20.0,
            warmup_s=5.0,
            policies=["static-max", "dualscale", "bound"],
            executor=executor,
            store=store,
            on_progress=lambda done, total: print(f"{done}/{total} runs", file=sys.stderr),
        )
    for run in result.runs:
        print(f"{run['policy']:11s} {run['rate_req_s']:3g} req/s {run['mean_power_w']:5.0f} W")


if __name__ == "__main__":
    main()
