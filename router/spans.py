"""Spans of one sequence: its stages, in order, under one request span.

A retry repeats stages, each with the number of its attempt. A span has the status error when what
it stands for failed; one whose client went away has not.
"""

from itertools import pairwise

from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context

from core import telemetry
from core.clock import Clock
from core.errors import Cancelled
from core.stages import Stage
from router.progress import COMPLETE, Mark, SequenceEnd


class SpanRecorder:
    """Implements router.progress.SequenceObserver."""

    def __init__(self, tracer: Tracer, clock: Clock) -> None:
        self._tracer = tracer
        self._clock = clock

    def ended(self, end: SequenceEnd) -> None:
        to_wall_s = self._clock.wall_s() - self._clock.now_s()

        def ns(at_s: float) -> int:
            return int((at_s + to_wall_s) * 1e9)

        root = self._tracer.start_span(
            telemetry.SPAN_REQUEST,
            start_time=ns(end.marks[0].at_s),
            attributes={
                telemetry.ATTR_REQUEST_ID: end.request.request_id,
                telemetry.ATTR_CHOICE: end.request.choice,
                telemetry.ATTR_OUTCOME: end.outcome,
                telemetry.ATTR_OUTPUT_TOKENS: end.output_tokens,
                telemetry.ATTR_CACHED_TOKENS: end.timings.cached_tokens,
                telemetry.ATTR_TRANSFER_BYTES: end.timings.transfer_bytes,
            },
        )
        context = set_span_in_context(root)
        for mark, following in pairwise([*end.marks, None]):
            if mark is None:
                break
            span = self._tracer.start_span(
                telemetry.STAGE_SPANS[mark.stage],
                context=context,
                start_time=ns(mark.at_s),
                attributes=_attributes(mark, end),
            )
            if following is None or following.attempt != mark.attempt:
                # Refused before its first attempt, the sequence has only its own outcome.
                tried = mark.attempt < len(end.attempts)
                _set_status(span, end.attempts[mark.attempt] if tried else end.outcome)
            span.end(ns(end.ended_at_s if following is None else following.at_s))
        _set_status(root, end.outcome)
        root.end(ns(end.ended_at_s))


def _attributes(mark: Mark, end: SequenceEnd) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {telemetry.ATTR_ATTEMPT: mark.attempt}
    if mark.worker_id:
        attributes[telemetry.ATTR_WORKER_ID] = mark.worker_id
    if mark.stage is Stage.KV_TRANSFER and mark.attempt == len(end.attempts) - 1:
        # The timings are those of the last attempt.
        attributes[telemetry.ATTR_TRANSFER_BYTES] = end.timings.transfer_bytes
        attributes[telemetry.ATTR_TRANSFER_DESCRIPTORS] = end.timings.transfer_descriptors
        attributes[telemetry.ATTR_TRANSFER_OVERLAP] = end.timings.transfer_overlap
    return attributes


def _set_status(span: Span, outcome: str) -> None:
    if outcome not in COMPLETE and outcome != Cancelled.code:
        span.set_status(Status(StatusCode.ERROR, outcome))
