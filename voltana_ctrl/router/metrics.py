"""What a router tells Prometheus, in a registry of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.estimate import RequestClasses
from voltana_ctrl.router.energy import EnergyBook
from voltana_ctrl.router.ledger import Flight, InFlight
from voltana_ctrl.types import Slo

__all__ = ["RouterMetrics"]

#: Label of an instance of the fleet: `instance` is Prometheus' own, of what it scrapes.
INSTANCE = "serving_instance"
_TTFT_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ITL_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1.0)
#: Counters: name, labels, help.
_COUNTERS = (
    ("requests", ("path", "status"), "Requests answered; status 499: the client left."),
    ("sent", (INSTANCE, "phase"), "Requests sent to an instance, each attempt one."),
    ("failures", (INSTANCE,), "Requests and probes that an instance failed."),
    ("output_tokens", (INSTANCE,), "Tokens that an instance generated, as it counts them."),
    ("retries", (), "Attempts that failed before a first token, and were followed by another."),
    ("cancelled", (), "Requests whose client left."),
    ("stalled", (), "Requests whose client was cut off because it read nothing."),
    ("broken_streams", (), "Streams that broke off after their first token."),
    ("uncounted", (), "Answers left out of joules and attainment: their tokens were not told."),
    ("decoded_alone", ("reason",), "Requests that a decode engine prefilled for itself."),
    ("refused_altered", (), "Requests sent anew as they came, since an engine refused our change."),
    ("streams", ("request_class",), "Streams that ended well and were judged."),
    ("streams_met", ("objective", "request_class"), "Those of them that met an objective."),
)  # fmt: skip
_WITHOUT_LABELS = tuple(name for name, labels, _ in _COUNTERS if not labels)


class RouterMetrics:
    """Counts and times of a router, all named ``voltana_router_...``.

    Parameters
    ----------
    counts : InFlight
        Requests in flight and instances that are passed over.
    energy : EnergyBook
        Joules spent so far.
    slo : Slo
        Promises that streams are judged by.

    Raises
    ------
    ConfigError
        If prometheus-client is not installed.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.router import EnergyBook, InFlight
    >>> fleet = FleetSpec.parse("1C", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> metrics = RouterMetrics(InFlight(fleet), EnergyBook(fleet), Slo(ttft_s=0.6, itl_s=0.06))
    >>> metrics.count("retries")
    >>> b"voltana_router_retries_total 1.0" in metrics.page()
    True
    """

    def __init__(self, counts: InFlight, energy: EnergyBook, slo: Slo) -> None:
        try:
            import prometheus_client.core
        except ImportError as error:
            raise ConfigError(
                "router: prometheus-client is not installed; pip install 'voltana-ctrl[server]'"
            ) from error
        self._client: Any = prometheus_client
        self._counts, self._energy, self._slo = counts, energy, slo
        self._ids = counts.fleet.ids
        self._classes = RequestClasses()
        self._told: dict[str, Counter[tuple[str, ...]]] = {
            name: Counter() for name, _, _ in _COUNTERS
        }
        self._registry = prometheus_client.CollectorRegistry()
        self._ttft_s = self._histogram("ttft_seconds", "Time to first token.", _TTFT_BUCKETS_S)
        self._itl_s = self._histogram(
            "itl_seconds", "Mean gap between the tokens of a stream.", _ITL_BUCKETS_S
        )
        for name in _WITHOUT_LABELS:
            self.count(name, by=0)
        for name in self._ids:
            self.count("failures", name, by=0)
            self.count("output_tokens", name, by=0)
        self._registry.register(self)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Count an event.

        Parameters
        ----------
        name : str
            Name of the counter without prefix and ``_total``.
        *labels : str
            Values of the counter's labels, in their order.
        by : int
            Number that is added to the counter.
        """
        self._told[name][labels] += by

    def judge(self, flight: Flight) -> None:
        """Take the times of a stream that ended well, and hold them to the objectives.

        Parameters
        ----------
        flight : Flight
            The request, with its times, and its lengths as the engine counts them.
        """
        further_tok = flight.output_tok - 1
        ttft_s = flight.first_s - flight.begin_s
        itl_s = (flight.last_s - flight.first_s) / further_tok if further_tok > 0 else 0.0
        self._ttft_s.labels(self._ids[flight.prefill]).observe(ttft_s)
        if further_tok > 0:
            self._itl_s.labels(self._ids[flight.decode]).observe(itl_s)
        kind = int(self._classes.of(request_class=[0], prompt_tok=[flight.prompt_tok])[0])
        name = self._classes.names[kind]
        self.count("streams", name)
        met = {"ttft": ttft_s <= self._slo.ttft_s, "itl": itl_s <= self._slo.itl_s}
        for objective, is_met in {**met, "both": all(met.values())}.items():
            self.count("streams_met", objective, name, by=is_met)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        page: bytes = self._client.generate_latest(self._registry)
        return page

    def collect(self) -> Iterator[Any]:
        """Families of counters and gauges, as a registry asks for them."""
        core = self._client.core
        for name, labels, text in _COUNTERS:
            family = core.CounterMetricFamily(f"voltana_router_{name}", text, labels=labels)
            for values, number in sorted(self._told[name].items()):
                family.add_metric(values, number)
            yield family
        joules = core.CounterMetricFamily(
            "voltana_router_energy_joules", "Energy of the requests served.", labels=("part",)
        )
        for part, energy_j in self._energy.spent_j.items():
            joules.add_metric((part,), energy_j)
        yield joules
        for name, text, value in (
            ("in_flight", "Requests sent to an instance that have not ended.",
             self._counts.in_flight_req),
            ("down", "1 while an instance is passed over since it failed.", self._counts.is_down),
        ):  # fmt: skip
            gauge = core.GaugeMetricFamily(f"voltana_router_{name}", text, labels=(INSTANCE,))
            for i, instance in enumerate(self._ids):
                gauge.add_metric((instance,), float(value(i)))
            yield gauge

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        return self._client.Histogram(
            f"voltana_router_{name}", text, (INSTANCE,), registry=self._registry, buckets=buckets
        )
