"""What Prometheus reads of the server: counts and times, and nothing of what was asked."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coadapt.serving.engine import Stats

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One server's, in a registry of its own."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "coadapt_requests", "Requests that were answered.", ("endpoint", "status"), registry=own
        )
        self.prompt_tokens = Counter("coadapt_prompt_tokens", "Tokens of prompts.", registry=own)
        self.answer_tokens = Counter("coadapt_answer_tokens", "Tokens of answers.", registry=own)
        self.first = Histogram(
            "coadapt_time_to_first_token_seconds",
            "From the request to the first token of each answer.",
            buckets=FIRST,
            registry=own,
        )
        self.each = Histogram(
            "coadapt_time_per_token_seconds",
            "Mean time of each further token of an answer.",
            buckets=EACH,
            registry=own,
        )

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Adds what the engine tells, asked for whenever somebody reads."""
        self.registry.register(_Engine(stats))

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _Engine(Collector):
    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        now = self.stats()
        yield GaugeMetricFamily("coadapt_rows_running", "Rows in the batch.", value=now.running)
        yield GaugeMetricFamily("coadapt_rows_waiting", "Rows in the queue.", value=now.waiting)
        yield GaugeMetricFamily("coadapt_adapters_known", "Adapters that can be asked for.", value=now.known)
        yield GaugeMetricFamily("coadapt_adapters_loaded", "Adapters in memory.", value=len(now.attached))
        yield CounterMetricFamily("coadapt_adapter_loads", "How often an adapter came into memory.", value=now.loads)
        yield CounterMetricFamily("coadapt_adapter_evictions", "How often one had to go.", value=now.evictions)
