"""The spans of a sequence, as OpenTelemetry's own exporter sees them."""

import asyncio
from contextlib import aclosing
from random import Random
from typing import NoReturn

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from core import telemetry
from core.clock import Clock, FakeClock, SystemClock
from core.errors import DeadlineExceeded, NoWorkers, Overloaded
from core.stages import Stage
from router.config import RouterConfig
from router.flow import Flow
from router.policies.build import build_policies
from router.progress import Mark, Observed, Progress, SequenceEnd
from router.spans import SpanRecorder
from router.types import Enough, Generated, Timings
from tests.builders import Cluster, make_prompt, make_request, running_cluster, until_idle

STAGES = list(telemetry.STAGE_SPANS.values())


class Recorded:
    """A recorder, and what came out of it."""

    def __init__(self, clock: Clock) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.recorder = SpanRecorder(provider.get_tracer("test"), clock)

    def spans(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The request's span and its stages, by their start; checks what holds for every tree."""
        *stages, root = self._exporter.get_finished_spans()
        assert root.name == telemetry.SPAN_REQUEST and root.parent is None
        assert root.context is not None
        assert {stage.parent.span_id for stage in stages if stage.parent} == {root.context.span_id}
        edges = [time for stage in stages for time in (stage.start_time, stage.end_time)]
        assert edges == sorted(edges, key=lambda time: time or 0)
        assert (root.start_time, root.end_time) == (edges[0], edges[-1])
        assert edges[1:-1:2] == edges[2::2], "a stage begins where the last one ended"
        return root, stages


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def make_end(
    *marks: tuple[Stage, float, int], outcome: str = "ok", attempts: tuple[str, ...] = ("ok",)
) -> SequenceEnd:
    return SequenceEnd(
        request=make_request(make_prompt(3)),
        outcome=outcome,
        attempts=attempts,
        marks=tuple(
            Mark(stage=stage, at_s=at_s, attempt=attempt, worker_id=f"w-{stage.label}")
            for stage, at_s, attempt in marks
        ),
        ended_at_s=9.0,
        timings=Timings(
            cached_tokens=2,
            transfer_bytes=64,
            transfer_descriptors=3,
            transfer_s=0.5,
            transfer_hidden_s=0.4,
        ),
        output_tokens=5,
    )


ONCE = (
    (Stage.ADMIT, 1.0, 0),
    (Stage.ROUTE, 2.0, 0),
    (Stage.PREFILL, 2.5, 0),
    (Stage.KV_TRANSFER, 4.0, 0),
    (Stage.DECODE, 5.0, 0),
)


def test_stages_stand_in_order_inside_the_request_with_their_times() -> None:
    recorded = Recorded(FakeClock(10.0))
    recorded.recorder.ended(make_end(*ONCE))
    root, stages = recorded.spans()
    assert names(stages) == STAGES
    assert [span.start_time for span in stages] == [int(at_s * 1e9) for _, at_s, _ in ONCE]
    assert root.end_time == 9_000_000_000
    assert root.status.status_code is StatusCode.UNSET
    assert root.attributes == {
        telemetry.ATTR_REQUEST_ID: "req",
        telemetry.ATTR_CHOICE: 0,
        telemetry.ATTR_OUTCOME: "ok",
        telemetry.ATTR_OUTPUT_TOKENS: 5,
        telemetry.ATTR_CACHED_TOKENS: 2,
        telemetry.ATTR_TRANSFER_BYTES: 64,
    }
    assert stages[2].attributes == {
        telemetry.ATTR_ATTEMPT: 0,
        telemetry.ATTR_WORKER_ID: "w-prefill",
    }


def test_the_transfer_says_what_it_moved_and_how_much_of_it_was_hidden() -> None:
    recorded = Recorded(FakeClock(10.0))
    again = [(stage, at_s + 3, 1) for stage, at_s, _ in ONCE[1:]]
    recorded.recorder.ended(make_end(*ONCE[:4], *again, attempts=("kv_transfer_failed", "ok")))
    _, stages = recorded.spans()
    failed, done = (span for span in stages if span.name == "kv_transfer")
    common = {telemetry.ATTR_WORKER_ID: "w-kv_transfer"}
    assert failed.attributes == {**common, telemetry.ATTR_ATTEMPT: 0}
    assert done.attributes == {
        **common,
        telemetry.ATTR_ATTEMPT: 1,
        telemetry.ATTR_TRANSFER_BYTES: 64,
        telemetry.ATTR_TRANSFER_DESCRIPTORS: 3,
        telemetry.ATTR_TRANSFER_OVERLAP: 0.8,
    }


def test_monotonic_marks_become_wall_time() -> None:
    class Shifted(FakeClock):
        def wall_s(self) -> float:
            return self.now_s() + 1000.0

    recorded = Recorded(Shifted(10.0))
    recorded.recorder.ended(make_end(*ONCE))
    root, _ = recorded.spans()
    assert root.start_time == 1_001_000_000_000


def test_a_failure_marks_the_request_and_the_stage_it_happened_in() -> None:
    recorded = Recorded(FakeClock(10.0))
    recorded.recorder.ended(make_end(*ONCE[:3], outcome="worker_lost", attempts=("worker_lost",)))
    root, stages = recorded.spans()
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "worker_lost")
    assert [span.status.description for span in stages] == [None, None, "worker_lost"]


def test_a_retry_repeats_its_stages_and_only_the_failed_attempt_is_an_error() -> None:
    again = [(stage, at_s + 3, 1) for stage, at_s, _ in ONCE[1:]]
    recorded = Recorded(FakeClock(10.0))
    recorded.recorder.ended(make_end(*ONCE[:3], *again, attempts=("worker_lost", "ok")))
    root, stages = recorded.spans()
    assert names(stages) == STAGES[:3] + STAGES[1:]
    assert [dict(span.attributes or {})[telemetry.ATTR_ATTEMPT] for span in stages] == [
        *(0, 0, 0),
        *(1, 1, 1, 1),
    ]
    failed = [span.name for span in stages if span.status.status_code is StatusCode.ERROR]
    assert failed == ["prefill"]
    assert root.status.status_code is StatusCode.UNSET


def test_a_cancelled_sequence_says_so_and_is_no_error() -> None:
    recorded = Recorded(FakeClock(10.0))
    recorded.recorder.ended(make_end(*ONCE, outcome="cancelled", attempts=("cancelled",)))
    root, stages = recorded.spans()
    assert dict(root.attributes or {})[telemetry.ATTR_OUTCOME] == "cancelled"
    assert {span.status.status_code for span in [root, *stages]} == {StatusCode.UNSET}


# -- of the real flow ---------------------------------------------------------------------------


def recorded_flow(cluster: Cluster, config: RouterConfig | None = None) -> tuple[Flow, Recorded]:
    clock = SystemClock()
    recorded = Recorded(clock)
    flow = Flow(
        fleet=cluster.fleet,
        policies=build_policies(config or RouterConfig()),
        config=config or RouterConfig(),
        clock=clock,
        random=Random(0),
        observers=[recorded.recorder],
    )
    return flow, recorded


async def test_an_answer_has_all_stages_and_the_workers_that_served_them() -> None:
    async with running_cluster(prefill=1, decode=1) as cluster:
        flow, recorded = recorded_flow(cluster)
        async with asyncio.timeout(20):
            items = [item async for item in flow.generate(make_request(make_prompt(22)))]
        timings = items[-1].timings
    root, stages = recorded.spans()
    attributes = dict(root.attributes or {})
    assert names(stages) == STAGES
    workers = [dict(span.attributes or {}).get(telemetry.ATTR_WORKER_ID) for span in stages]
    assert workers == [None, None, "prefill-0", "decode-0", "decode-0"]
    assert timings is not None and timings.transfer_bytes > 0
    assert attributes[telemetry.ATTR_TRANSFER_BYTES] == timings.transfer_bytes
    assert attributes[telemetry.ATTR_OUTPUT_TOKENS] == 16
    assert stages[3].start_time is not None and root.start_time is not None
    assert (stages[3].start_time - root.start_time) / 1e9 == pytest.approx(timings.ttft_s, abs=0.05)


async def test_a_client_that_closes_after_the_last_token_had_its_whole_answer() -> None:
    async with running_cluster(prefill=1, decode=1) as cluster:
        flow, recorded = recorded_flow(cluster)
        async with asyncio.timeout(20), aclosing(flow.generate(make_request([1]))) as items:
            async for item in items:
                if item.finish is not None:
                    break
    root, _ = recorded.spans()
    assert dict(root.attributes or {})[telemetry.ATTR_OUTCOME] == "ok"


async def test_a_client_that_leaves_early_is_recorded_as_cancelled() -> None:
    async with running_cluster(prefill=1, decode=1, gated_decode=True) as cluster:
        flow, recorded = recorded_flow(cluster)
        async with asyncio.timeout(20), aclosing(flow.generate(make_request([1]))) as items:
            await anext(items)
        for served in cluster.decode:
            served.gate.open()
        await until_idle(*cluster.workers)
    root, _ = recorded.spans()
    assert dict(root.attributes or {})[telemetry.ATTR_OUTCOME] == "cancelled"


async def test_an_answer_that_a_stop_string_ends_is_whole_and_no_error() -> None:
    class Sink:
        def token(self, token: int) -> None:
            raise Enough("a stop string matched")

        def take(self, item: Generated) -> None:
            pass

    async with running_cluster(prefill=1, decode=1) as cluster:
        flow, recorded = recorded_flow(cluster)
        with pytest.raises(Enough):
            async with asyncio.timeout(20):
                await flow.run(make_request([1]), Sink())
    root, stages = recorded.spans()
    assert dict(root.attributes or {})[telemetry.ATTR_OUTCOME] == "enough"
    assert names(stages) == STAGES
    assert {span.status.status_code for span in [root, *stages]} == {StatusCode.UNSET}


async def test_an_answer_of_one_token_moves_nothing() -> None:
    async with running_cluster(prefill=1, decode=1) as cluster:
        flow, recorded = recorded_flow(cluster)
        async with asyncio.timeout(20):
            assert len([i async for i in flow.generate(make_request([1], max_tokens=1))]) == 1
    _, stages = recorded.spans()
    assert names(stages) == ["admit", "route", "prefill"]


async def test_a_sequence_refused_by_admission_is_an_error_of_that_stage_alone() -> None:
    async with running_cluster(prefill=1, decode=1) as cluster:
        flow, recorded = recorded_flow(cluster)
        refusal = Overloaded("full", retry_after_s=3.0)

        def refuse(*_: object) -> NoReturn:
            raise refusal

        flow._admission._judge = refuse  # type: ignore[method-assign]
        with pytest.raises(Overloaded) as caught:
            async with asyncio.timeout(20):
                [item async for item in flow.generate(make_request([1]))]
    root, stages = recorded.spans()
    assert caught.value is refusal
    assert names(stages) == ["admit"]
    assert root.status.description == stages[0].status.description == refusal.code


def test_what_fails_in_an_observer_is_logged_and_changes_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        def ended(self, end: SequenceEnd) -> None:
            raise IndexError

    heard: list[SequenceEnd] = []

    class Next:
        def ended(self, end: SequenceEnd) -> None:
            heard.append(end)

    progress = Progress(make_request([1]), FakeClock())
    with pytest.raises(Overloaded, match="full"), Observed(progress, (Broken(), Next())):
        raise Overloaded("full")
    assert [end.outcome for end in heard] == [Overloaded.code]
    assert "observer_failed request_id=req" in caplog.messages


async def test_a_deadline_that_passes_is_an_error_of_the_stage_it_passed_in() -> None:
    async with running_cluster(prefill=1, decode=1, gated_prefill=True) as cluster:
        flow, recorded = recorded_flow(cluster)
        with pytest.raises(DeadlineExceeded):
            async with asyncio.timeout(20):
                [item async for item in flow.generate(make_request([1], deadline_s=0.05))]
    root, stages = recorded.spans()
    assert root.status.description == stages[-1].status.description == "deadline_exceeded"
    assert stages[-1].name == "prefill"


async def test_attempts_that_found_no_worker_are_recorded_one_by_one() -> None:
    async with running_cluster(prefill=1, decode=0) as cluster:
        flow, recorded = recorded_flow(cluster, RouterConfig(max_attempts=2, worker_wait_s=0))
        with pytest.raises(NoWorkers):
            async with asyncio.timeout(20):
                [item async for item in flow.generate(make_request([1]))]
    root, stages = recorded.spans()
    assert names(stages) == ["admit", "route", "prefill", "route", "prefill"]
    errors = [span.status.description for span in stages]
    assert errors == [None, None, "no_workers", None, "no_workers"]
    assert root.status.description == "no_workers"


async def test_a_sequence_that_waited_in_vain_for_a_worker_was_never_placed() -> None:
    async with running_cluster(prefill=0, decode=1) as cluster:
        flow, recorded = recorded_flow(cluster, RouterConfig(worker_wait_s=0))
        with pytest.raises(NoWorkers):
            async with asyncio.timeout(20):
                [item async for item in flow.generate(make_request([1]))]
    root, stages = recorded.spans()
    assert names(stages) == ["admit"]
    assert root.status.description == stages[0].status.description == "no_workers"
