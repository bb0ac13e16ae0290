"""A sweep over policies, loads and seeds on a Dask cluster, with progress as runs finish.

compare() takes any concurrent.futures.Executor; Dask's client lends one. Here the cluster is two
processes on this machine; with Client("tcp://scheduler:8786") it is whatever that cluster has.

Run: pip install '.[dask]' && python examples/sweep_on_dask.py
"""

import sys

from voltana_ctrl import compare


def main() -> None:
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        print("Dask is not installed; pip install 'voltana-ctrl[dask]' to run this example")
        return

    def on_progress(done: int, total: int) -> None:
        sys.stderr.write(f"\r{done}/{total} runs" + ("\n" if done == total else ""))
        sys.stderr.flush()

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        result = compare(
            rates_req_s=[20.0, 40.0],
            duration_s=20.0,
            warmup_s=5.0,
            seeds=2,
            policies=["static-max", "dualscale", "bound"],
            executor=client.get_executor(),
            on_progress=on_progress,
        )
    for run in result.runs:
        print(
            f"{run['policy']:11s} {run['rate_req_s']:3g} req/s, seed {run['seed']}:"
            f" {run['mean_power_w']:5.0f} W  (simulated)"
        )


if __name__ == "__main__":
    main()
