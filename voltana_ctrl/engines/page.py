"""Numbers from a page in Prometheus' text format, by the table of an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from voltana_ctrl.backends.meter import GpuReading
from voltana_ctrl.engines.latency import Histogram
from voltana_ctrl.engines.names import DCGM, HISTOGRAMS, TABLES, Metric
from voltana_ctrl.errors import BackendError, ConfigError

__all__ = ["BadPage", "read_dcgm_page", "read_engine_page", "read_histograms"]

_Sample = tuple[Mapping[str, str], float]
# Ranks whose labels tell apart who reports, not who works: tensor, pipeline, context and expert
# ranks of one model share its requests and show the same numbers. A data-parallel rank has its own.
_OWN_RANKS = ("dp_rank", "attn_dp_rank")


class BadPage(BackendError):
    """Text that is no page of metrics, or holds none that is known."""


def read_engine_page(kind: str, text: str, *, worker_id: int | None = None) -> dict[str, float]:
    """Numbers that a page of an engine tells, by names that are the same for all engines.

    Parameters
    ----------
    kind : {"vllm", "sglang", "trtllm", "dynamo"}
        The engine.
    text : str
        The page.
    worker_id : int, optional
        Take only what Dynamo says of this worker, where a page speaks of several.

    Returns
    -------
    dict of str to float
        Such as ``running_req``, ``queue_req``, ``kv_frac``, ``finished_req`` and ``output_tok``;
        those of all data-parallel engines together. What the page does not tell is left out.

    Raises
    ------
    BadPage
        If the text is no such page, or tells nothing of the engine.
    ConfigError
        If prometheus-client is not installed.

    Examples
    --------
    >>> page = '''
    ... vllm:num_requests_running{engine="0",model_name="llama"} 3.0
    ... vllm:num_requests_running{engine="1",model_name="llama"} 4.0
    ... vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.25
    ... '''
    >>> read_engine_page("vllm", page)
    {'running_req': 7.0, 'kv_frac': 0.25}
    """
    table = TABLES[kind]
    samples = _samples(text, (metric for metrics in table.values() for metric in metrics))
    if worker_id is not None:
        samples = {name: _of_worker(found, worker_id) for name, found in samples.items()}
    told = {}
    for field, metrics in table.items():
        for metric in metrics:
            value = _value(metric, samples)
            if value is not None:
                told[field] = value
                break
    if not told:
        raise BadPage(f"metrics: nothing of {kind} on a page of {len(text)} characters")
    return told


def read_histograms(kind: str, text: str) -> dict[str, Histogram]:
    """Histograms of TTFT and ITL on a page of an engine.

    Parameters
    ----------
    kind : {"vllm", "sglang", "trtllm", "dynamo"}
        The engine; a Dynamo worker shows its engine's.
    text : str
        The page.

    Returns
    -------
    dict of str to Histogram
        ``ttft``, ``itl`` and ``token_itl``, see
        :meth:`~voltana_ctrl.engines.latency.LatencyDeltas.take`; those that the page has.

    Raises
    ------
    BadPage
        If the text is no such page.
    ConfigError
        If prometheus-client is not installed.

    Examples
    --------
    >>> page = '''
    ... vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5"} 3.0
    ... vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 4.0
    ... vllm:time_to_first_token_seconds_sum{engine="0"} 1.5
    ... '''
    >>> read_histograms("vllm", page)["ttft"].counts
    (3.0, 4.0)
    """
    tables = HISTOGRAMS.values() if kind == "dynamo" else (HISTOGRAMS[kind],)
    names = {name for table in tables for named in table.values() for name in named}
    ends = ("_bucket", "_sum")
    samples = _samples(text, [Metric(names=tuple(n + end for n in names for end in ends))])
    told: dict[str, Histogram] = {}
    for table in tables:
        for latency, named in table.items():
            for name in named:
                made = _histogram(samples.get(f"{name}_bucket", ()), samples.get(f"{name}_sum", ()))
                if made is not None and latency not in told:
                    told[latency] = made
    return told


def _histogram(buckets: Iterable[_Sample], sums: Iterable[_Sample]) -> Histogram | None:
    """Counts of all series together; None where there are none."""
    counts: dict[float, float] = {}
    for labels, value in buckets:
        try:
            edge_s = float(labels["le"])
        except (LookupError, ValueError):
            continue
        counts[edge_s] = counts.get(edge_s, 0.0) + value
    edges_s = tuple(sorted(counts))
    if len(edges_s) < 2 or not math.isinf(edges_s[-1]):
        return None
    return Histogram(
        edges_s=edges_s,
        counts=tuple(counts[edge] for edge in edges_s),
        total_s=sum(value for _, value in sums),
    )


def read_dcgm_page(text: str) -> dict[str, GpuReading]:
    """What DCGM exporter tells of each GPU.

    Parameters
    ----------
    text : str
        Page of DCGM exporter.

    Returns
    -------
    dict of str to GpuReading
        By the UUID of the GPU; MIG slices are left out.

    Raises
    ------
    BadPage
        If the text is no such page, or tells of no whole GPU.
    ConfigError
        If prometheus-client is not installed.

    Examples
    --------
    >>> page = 'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-1"} 2500'
    >>> read_dcgm_page(page)["GPU-1"].counter_j
    2.5
    """
    samples = _samples(text, DCGM.values())
    gpus: dict[str, dict[str, float]] = {}
    slices = set()
    for field, metric in DCGM.items():
        for labels, value in samples.get(metric.names[0], ()):
            uuid = labels.get("UUID") or labels.get("uuid")
            if uuid and labels.get("GPU_I_ID"):  # a slice shows the clock of the whole
                slices.add(uuid)
            elif uuid:
                gpus.setdefault(uuid, {})[field] = value * metric.scale_frac
    if not gpus:
        found = f"only MIG slices of {', '.join(sorted(slices))}" if slices else "no GPU"
        raise BadPage(f"metrics: {found} of DCGM exporter on a page of {len(text)} characters")
    return {
        uuid: GpuReading(
            clock_mhz=told.get("clock_mhz"),
            power_w=told.get("power_w"),
            counter_j=told.get("counter_j"),
        )
        for uuid, told in gpus.items()
    }


def _samples(text: str, metrics: Iterable[Metric]) -> dict[str, list[_Sample]]:
    """Samples of the wanted names; the parser is shown no other line of a long page."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise ConfigError(
            "metrics: prometheus-client is not installed; pip install 'voltana-ctrl[server]'"
        ) from error
    wanted = {name for metric in metrics for name in (*metric.names, metric.times) if name}
    lines = []
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in wanted:
            lines.append(line)
    found: dict[str, list[_Sample]] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                if math.isfinite(sample.value) and sample.value >= 0.0:
                    found.setdefault(sample.name, []).append((sample.labels, sample.value))
    # The parser was written for pages of friends.
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadPage(f"metrics: not in Prometheus' text format: {error}") from error
    return {name: _without_copies(samples) for name, samples in found.items()}


def _without_copies(samples: list[_Sample]) -> list[_Sample]:
    """One sample of each group whose labels differ in nothing but who reports."""
    kept: dict[frozenset[tuple[str, str]], _Sample] = {}
    for labels, value in samples:
        told = frozenset(
            (name, label)
            for name, label in labels.items()
            if name in _OWN_RANKS or not name.endswith("_rank")
        )
        kept.setdefault(told, (labels, value))
    return list(kept.values())


def _of_worker(samples: list[_Sample], worker_id: int) -> list[_Sample]:
    # Dynamo's frontend writes the id in decimals, its workers in hexadecimals.
    names = (str(worker_id), f"{worker_id:x}")
    return [one for one in samples if one[0].get("worker_id", names[0]) in names]


def _value(metric: Metric, samples: Mapping[str, list[_Sample]]) -> float | None:
    found = [one for name in metric.names for one in samples.get(name, ())]
    if not found:
        return None
    if metric.label_product:
        products = [_product(labels, metric.label_product) for labels, _ in found]
        known = [product for product in products if product is not None]
        return sum(known) / (len(known) if metric.mean else 1) if known else None
    total = sum(value for _, value in found) * metric.scale_frac
    if metric.mean:
        return total / len(found)
    if metric.times:
        factors = samples.get(metric.times)
        return total * factors[0][1] if factors else None
    return total


def _product(labels: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    product = 1.0
    for name in names:
        try:
            product *= float(labels[name])
        except (LookupError, ValueError):
            return None
    return product if math.isfinite(product) else None
