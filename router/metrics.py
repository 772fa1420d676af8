"""Metrics of the router: of its HTTP edge and of its flow, in one registry of their own.

Counted at the end of a request or of a sequence, never per token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from core import telemetry
from core.ids import Role
from router.index import PrefixIndex
from router.local import LocalVerdict
from router.progress import SequenceEnd
from router.types import WorkerStatus
from router.watcher import EjectReason, RejectReason, Requeue

_LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75),
    *(1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 600),
)
_TPOT_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2),
)
M = TypeVar("M", Counter, Histogram)


class Labelled(Generic[M]):
    """A metric by the values of its labels, each looked up once: prometheus_client's own `labels`
    takes longer than to count.
    """

    def __init__(self, metric: M) -> None:
        self._metric: M = metric
        self._children: dict[tuple[str, ...], M] = {}

    def labels(self, *values: str) -> M:
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._metric.labels(*values)
        return child


class EdgeMetrics:
    """One router's; other parts of it add theirs to `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        self._gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = Labelled(
            counter(
                telemetry.HTTP_REQUESTS,
                "Requests ended, by the status they ended with (499: the client went away)",
                ("endpoint", "status"),
            )
        )
        self.in_flight = self._gauge(telemetry.REQUESTS_IN_FLIGHT, "Requests being served")
        self.ttft_s = Labelled(
            histogram(
                telemetry.TTFT,
                "From the request's head to its first token, per choice",
                ("endpoint",),
                buckets=_LATENCY_BUCKETS_S,
            )
        )
        self.tpot_s = Labelled(
            histogram(
                telemetry.TPOT,
                "Mean time per token after the first, per choice",
                ("endpoint",),
                buckets=_TPOT_BUCKETS_S,
            )
        )
        self.duration_s = Labelled(
            histogram(
                telemetry.REQUEST_DURATION,
                "From the request's head to the end of its answer",
                ("endpoint",),
                buckets=_LATENCY_BUCKETS_S,
            )
        )
        self.prompt_tokens = counter(telemetry.PROMPT_TOKENS, "Prompt tokens")
        self.cached_tokens = counter(
            telemetry.CACHED_TOKENS, "Prompt tokens whose KV was in a prefix cache"
        )
        self.output_tokens = counter(telemetry.OUTPUT_TOKENS, "Tokens generated")
        self.stream_events = counter(telemetry.STREAM_EVENTS, "SSE events sent")
        self.coalesced_events = counter(
            telemetry.STREAM_EVENTS_COALESCED, "SSE events that shared a write with an earlier one"
        )
        self.slow_clients = counter(
            telemetry.SLOW_CLIENTS, "Requests cancelled because their client did not read"
        )

    def watch_workers(self, workers: Callable[[], Sequence[WorkerStatus]]) -> None:
        """Count them whenever the metrics are read."""
        connected = self._gauge(
            telemetry.WORKERS_CONNECTED, "Workers whose stream to this router lives", ("role",)
        )
        left_out = self._gauge(
            telemetry.WORKERS_LEFT_OUT,
            "Workers this router leaves out of placement now, as they failed, were slow or hang",
            ("role",),
        )

        def count(role: Role) -> int:
            return sum(view.connected and view.role == role for view in workers())

        def count_ejected(role: Role) -> int:
            return sum(view.ejected and view.role == role for view in workers())

        for role in Role:
            connected.labels(role).set_function(partial(count, role))
            left_out.labels(role).set_function(partial(count_ejected, role))

    def watch_index(self, index: PrefixIndex) -> None:
        """Read its size whenever the metrics are read."""
        blocks = self._gauge(telemetry.INDEX_BLOCKS, "Blocks in the prefix index")
        blocks.set_function(lambda: index.blocks)
        not_taken = self._gauge(
            telemetry.INDEX_NOT_TAKEN,
            "Cached blocks that found the prefix index full, since the start",
        )
        not_taken.set_function(lambda: index.not_taken)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class FlowMetrics:
    """Implements router.progress.SequenceObserver and router.watcher.FlowWatcher."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        seconds = partial(Histogram, registry=registry, buckets=_LATENCY_BUCKETS_S)
        self._attempts = Labelled(
            counter(
                telemetry.ATTEMPTS,
                "Placements of sequences, by outcome: ok or the code of what ended them "
                "(enough: a stop string matched; cancelled: the client went away)",
                ("outcome",),
            )
        )
        self._retries = counter(telemetry.RETRIES, "Placements after a sequence's first")
        self._admission_wait_s = seconds(
            telemetry.ADMISSION_WAIT, "From a sequence's arrival to its admission"
        )
        self._admission_queue = Gauge(
            telemetry.ADMISSION_QUEUE,
            "Sequences held in the router until a worker can keep their TTFT target, or is there",
            registry=registry,
        )
        self._admission_rejected = Labelled(
            counter(
                telemetry.ADMISSION_REJECTED,
                "Sequences refused with 429: their target cannot be kept, or too many are held",
                ("reason",),
            )
        )
        self._placed = Labelled(
            counter(
                telemetry.LOCAL_PREFILLS,
                "Sequences placed, by whether one worker serves them alone: local (a decode"
                " worker), stays (the prefill worker), or why no decode worker does",
                ("verdict",),
            )
        )
        self._ejected = Labelled(
            counter(
                telemetry.WORKERS_EJECTED,
                "Workers left out of placement for a while, by reason",
                ("reason",),
            )
        )
        self._readmitted = counter(
            telemetry.WORKERS_READMITTED, "Ejected workers that answered a probe in time"
        )
        self._requeued = Labelled(
            counter(
                telemetry.REQUEUES,
                "Prompts queued at a prefill worker that fell behind: asked to move to another, and"
                " moved, as they had not begun",
                ("step",),
            )
        )
        self._queue_s = seconds(
            telemetry.QUEUE, "From a prefill worker's accept to the start of the prefill"
        )
        self._prefill_s = seconds(
            telemetry.PREFILL, "From the start of the prefill to the first token"
        )
        self._transfer_s = seconds(
            telemetry.KV_TRANSFER, "Time of a KV transfer, as its decode worker saw it"
        )
        self._transfer_bytes = counter(
            telemetry.KV_TRANSFER_BYTES, "KV bytes decode workers pulled"
        )
        self._transfer_blocks = counter(
            telemetry.KV_TRANSFER_BLOCKS, "KV blocks decode workers pulled"
        )
        self._transfer_descriptors = counter(
            telemetry.KV_TRANSFER_DESCRIPTORS, "Contiguous runs those blocks were read in"
        )
        self._transfer_hidden_s = counter(
            telemetry.KV_TRANSFER_HIDDEN,
            "Time of KV transfers that passed while their prefill still ran",
        )
        self._migrations = counter(
            telemetry.MIGRATIONS, "Moves of running sequences to another decode worker"
        )

    def requeued(self, step: Requeue) -> None:
        self._requeued.labels(step).inc()

    def admitted(self, waited_s: float) -> None:
        self._admission_wait_s.observe(waited_s)

    def rejected(self, reason: RejectReason) -> None:
        self._admission_rejected.labels(reason).inc()

    def queued(self, requests: int) -> None:
        self._admission_queue.set(requests)

    def placed(self, verdict: LocalVerdict) -> None:
        self._placed.labels(verdict).inc()

    def ejected(self, reason: EjectReason) -> None:
        self._ejected.labels(reason).inc()

    def readmitted(self) -> None:
        self._readmitted.inc()

    def ended(self, end: SequenceEnd) -> None:
        for outcome in end.attempts:
            self._attempts.labels(outcome).inc()
        if len(end.attempts) > 1:
            self._retries.inc(len(end.attempts) - 1)
        timings = end.timings
        if end.output_tokens:
            self._queue_s.observe(timings.queue_s)
            self._prefill_s.observe(timings.prefill_s)
        if timings.transfer_blocks:
            self._transfer_s.observe(timings.transfer_s)
            self._transfer_bytes.inc(timings.transfer_bytes)
            self._transfer_blocks.inc(timings.transfer_blocks)
            self._transfer_descriptors.inc(timings.transfer_descriptors)
            self._transfer_hidden_s.inc(timings.transfer_hidden_s)
        if timings.migrations:
            self._migrations.inc(timings.migrations)
