"""The server's metrics, for Prometheus."""

from collections.abc import Iterator

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dsmoe.inference.batcher import Batcher

_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _BatcherCollector:
  """Reads the batcher's figures when Prometheus asks for them."""

  def __init__(self, batcher: Batcher):
    self._batcher = batcher

  def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    batcher = self._batcher
    waiting, running = batcher.num_waiting, batcher.num_running
    yield GaugeMetricFamily("dsmoe_queue_length", "Choices that wait in the queue.", waiting)
    yield GaugeMetricFamily("dsmoe_running_rows", "Choices being generated.", running)
    for name, value in batcher.stats().items():
      is_gauge = name.startswith("cache_") or name == "programs"
      family = GaugeMetricFamily if is_gauge else CounterMetricFamily
      yield family(f"dsmoe_batcher_{name}", f"The batcher's {name}.", value)


class Metrics:
  """Counters and histograms on a registry of their own."""

  def __init__(self, batcher: Batcher):
    self.registry = prometheus.CollectorRegistry()
    self.registry.register(_BatcherCollector(batcher))  # type: ignore[arg-type]
    self.requests = prometheus.Counter(
      "dsmoe_requests",
      "HTTP requests by route and status.",
      ["route", "status"],
      registry=self.registry,
    )
    self.vanished = prometheus.Counter(
      "dsmoe_vanished_clients",
      "Clients that left before their answer was complete.",
      registry=self.registry,
    )
    self.prompt_tokens = prometheus.Counter(
      "dsmoe_prompt_tokens", "Tokens of accepted prompts.", registry=self.registry
    )
    self.new_tokens = prometheus.Counter(
      "dsmoe_new_tokens", "Tokens generated for clients.", registry=self.registry
    )
    self.surplus_tokens = prometheus.Counter(
      "dsmoe_surplus_tokens",
      "Tokens generated after a stop string, which no client gets or is charged for.",
      registry=self.registry,
    )
    self.first_token_secs = prometheus.Histogram(
      "dsmoe_first_token_secs",
      "Seconds from a request to its first token.",
      buckets=_SECS,
      registry=self.registry,
    )
    self.request_secs = prometheus.Histogram(
      "dsmoe_request_secs",
      "Seconds from a request to the end of its answer.",
      buckets=_SECS,
      registry=self.registry,
    )

  def text(self) -> bytes:
    """Returns all metrics in Prometheus' text format."""
    return prometheus.generate_latest(self.registry)
