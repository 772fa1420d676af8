"""Spans of a finished sequence: admit, route, prefill, kv_transfer, decode, under one request span.

Recorded once at the end from the marks flow.py kept, so that no token pays for tracing.
"""

from collections.abc import Mapping

from opentelemetry.trace import Tracer, set_span_in_context

from core.clock import Clock
from core.ids import RequestId
from core.stages import Stage
from router.types import Timings


class SpanRecorder:
    """`tracer` None records nothing."""

    def __init__(self, tracer: Tracer | None, clock: Clock) -> None:
        self._tracer = tracer
        self._clock = clock

    def record(self, request_id: RequestId, marks: Mapping[Stage, float], timings: Timings) -> None:
        """`marks` says when each stage began, in monotonic seconds; it ends where the next does."""
        if self._tracer is None:
            return
        end_s = self._clock.now_s()
        to_wall_s = self._clock.wall_s() - end_s
        stages = sorted(marks)
        edges = [marks[stage] for stage in stages] + [end_s]

        def ns(at_s: float) -> int:
            return int((at_s + to_wall_s) * 1e9)

        root = self._tracer.start_span(
            "request",
            start_time=ns(edges[0]),
            attributes={
                "baton.request_id": request_id,
                "baton.prefill_worker": timings.prefill_worker,
                "baton.decode_worker": timings.decode_worker,
                "baton.attempts": timings.attempts,
                "baton.cached_tokens": timings.cached_tokens,
                "baton.transfer_bytes": timings.transfer_bytes,
            },
        )
        context = set_span_in_context(root)
        for stage, start_s, stop_s in zip(stages, edges, edges[1:], strict=False):
            span = self._tracer.start_span(stage.label, context=context, start_time=ns(start_s))
            span.end(ns(stop_s))
        root.end(ns(end_s))
