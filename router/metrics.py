"""Metrics of the HTTP edge, in a registry of their own. Counted per request, never per token."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from core import telemetry

_LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75),
    *(1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 600),
)
_TPOT_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2),
)


class EdgeMetrics:
    """One router's. Other parts of the router may add theirs to `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_endpoint = ("endpoint",)
        self.requests = Counter(
            telemetry.HTTP_REQUESTS,
            "Requests ended, by the status they ended with (499: the client went away)",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            telemetry.REQUESTS_IN_FLIGHT, "Requests being served", registry=self.registry
        )
        self.ttft_s = Histogram(
            telemetry.TTFT,
            "From the request's head to its first token, per choice",
            by_endpoint,
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.tpot_s = Histogram(
            telemetry.TPOT,
            "Mean time per token after the first, per choice",
            by_endpoint,
            buckets=_TPOT_BUCKETS_S,
            registry=self.registry,
        )
        self.duration_s = Histogram(
            telemetry.REQUEST_DURATION,
            "From the request's head to the end of its answer",
            by_endpoint,
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.prompt_tokens = self._counter(telemetry.PROMPT_TOKENS, "Prompt tokens")
        self.cached_tokens = self._counter(
            telemetry.CACHED_TOKENS, "Prompt tokens whose KV was in a prefix cache"
        )
        self.output_tokens = self._counter(telemetry.OUTPUT_TOKENS, "Tokens generated")
        self.stream_events = self._counter(telemetry.STREAM_EVENTS, "SSE events sent")
        self.coalesced_events = self._counter(
            telemetry.STREAM_EVENTS_COALESCED, "SSE events that shared a write with an earlier one"
        )
        self.slow_clients = self._counter(
            telemetry.SLOW_CLIENTS, "Requests cancelled because their client did not read"
        )

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)
