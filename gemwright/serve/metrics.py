"""Meters: what /metrics tells Prometheus. Each server has a registry of its own.

Times are measured where the server sees them: the first token from acceptance to the step's end that made it, so
waiting is in it. The engine's own counters and gauges are read when they are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gemwright.engine.request import Stats

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
ROWS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
GAUGES: Final = {
    "waiting": "Samples that wait for a place in the batch.",
    "running": "Samples in the batch.",
    "pages_used": "Pages of the key and value cache in use.",
    "pages_total": "Pages of the key and value cache.",
}
COUNTERS: Final = {
    "steps": "Steps of the engine.",
    "prompt_tokens": "Prompt tokens computed.",
    "cached_tokens": "Prompt tokens found in the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "drafted_tokens": "Tokens proposed by speculation.",
    "accepted_tokens": "Proposed tokens that were accepted.",
    "preemptions": "Samples put back for want of pages.",
    "cancelled": "Samples cancelled.",
    "errors": "Samples ended by an error of the engine.",
}


class Meters:
    """Histograms and counters that the server feeds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"gemwright_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.first_token = histogram("time_to_first_token_seconds", "From acceptance to the first token.", SECONDS)
        self.between_tokens = histogram("inter_token_seconds", "Between two tokens of a sample.", TOKEN_SECONDS)
        self.batch = histogram("step_batch_size", "Samples that a step gave a token.", ROWS)
        self.request = histogram("request_seconds", "From a request's head to its end.", SECONDS, ("route",))
        self.requests = Counter(
            "gemwright_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )

    def watch(self, stats: Callable[[], Stats | None]) -> None:
        """Report the engine's numbers, once there is one."""
        self.registry.register(_EngineNumbers(stats))


class _EngineNumbers(Collector):
    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        values = dataclasses.asdict(stats) if stats is not None else {}
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"gemwright_{name}", text, values.get(name, 0))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"gemwright_{name}", text, values.get(name, 0))
