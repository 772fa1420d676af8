"""What the flow counts of a sequence at its end, and the workers a scrape sees."""

from dataclasses import replace

from prometheus_client import CollectorRegistry

from core.ids import BlockHash, WorkerId
from router.index import PrefixIndex
from router.local import LocalVerdict
from router.metrics import EdgeMetrics, FlowMetrics
from router.progress import SequenceEnd
from router.types import Timings, WorkerStatus
from router.watcher import EjectReason, RejectReason
from tests.builders import make_request


def make_end(
    *attempts: str, output_tokens: int = 5, transfer_s: float = 0.2, transfer_blocks: int = 3
) -> SequenceEnd:
    return SequenceEnd(
        request=make_request([1]),
        outcome=attempts[-1],
        attempts=attempts,
        marks=(),
        ended_at_s=1.0,
        timings=Timings(
            queue_s=0.5,
            prefill_s=0.25,
            transfer_s=transfer_s,
            transfer_bytes=100 * transfer_blocks,
            transfer_blocks=transfer_blocks,
            transfer_descriptors=2 * transfer_blocks,
            transfer_hidden_s=transfer_s / 2,
            migrations=1,
        ),
        output_tokens=output_tokens,
    )


class Counted:
    """The flow's metrics after these ends."""

    def __init__(self, *ends: SequenceEnd) -> None:
        self._registry = CollectorRegistry()
        metrics = FlowMetrics(self._registry)
        for end in ends:
            metrics.ended(end)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"baton_{name}", labels)


def test_admission_counts_refusals_by_reason_and_shows_who_waits() -> None:
    registry = CollectorRegistry()
    metrics = FlowMetrics(registry)
    metrics.admitted(0.25)
    metrics.rejected(RejectReason.TARGET)
    metrics.rejected(RejectReason.TARGET)
    metrics.rejected(RejectReason.QUEUE_FULL)
    metrics.queued(7)
    value = registry.get_sample_value
    assert value("baton_admission_wait_seconds_sum") == 0.25
    assert value("baton_admission_rejected_total", {"reason": "target"}) == 2
    assert value("baton_admission_rejected_total", {"reason": "queue_full"}) == 1
    assert value("baton_admission_queue_requests") == 7


def test_placements_count_by_whether_the_decode_worker_computes_the_prompt_and_why_not() -> None:
    registry = CollectorRegistry()
    metrics = FlowMetrics(registry)
    for verdict in (*LocalVerdict, LocalVerdict.TPOT):
        metrics.placed(verdict)
    counts = {
        verdict: registry.get_sample_value("baton_local_prefills_total", {"verdict": verdict})
        for verdict in LocalVerdict
    }
    assert counts == {verdict: 1 + (verdict is LocalVerdict.TPOT) for verdict in LocalVerdict}


def test_ejections_count_by_reason() -> None:
    registry = CollectorRegistry()
    metrics = FlowMetrics(registry)
    metrics.ejected(EjectReason.SLOW)
    metrics.readmitted()
    value = registry.get_sample_value
    assert value("baton_workers_ejected_total", {"reason": "slow"}) == 1
    assert value("baton_workers_readmitted_total") == 1


def test_attempts_count_by_outcome_and_all_but_the_first_are_retries() -> None:
    counted = Counted(make_end("ok"), make_end("worker_lost", "no_workers", "ok"))
    assert counted("attempts_total", outcome="ok") == 2
    assert counted("attempts_total", outcome="worker_lost") == 1
    assert counted("attempts_total", outcome="no_workers") == 1
    assert counted("retries_total") == 2


def test_times_and_transfers_add_up() -> None:
    counted = Counted(make_end("ok"), make_end("ok", transfer_s=0.3, transfer_blocks=2))
    assert counted("queue_seconds_sum") == 1.0
    assert counted("prefill_seconds_sum") == 0.5
    assert counted("kv_transfer_seconds_sum") == 0.5
    assert counted("kv_transfer_bytes_total") == 500
    assert counted("kv_transfer_blocks_total") == 5
    assert counted("kv_transfer_descriptors_total") == 10
    assert counted("kv_transfer_hidden_seconds_total") == 0.25
    assert counted("migrations_total") == 2


def test_what_did_not_happen_is_not_timed() -> None:
    counted = Counted(make_end("worker_lost", output_tokens=0, transfer_blocks=0))
    assert counted("queue_seconds_count") == 0
    assert counted("prefill_seconds_count") == 0
    assert counted("kv_transfer_seconds_count") == 0


def test_connected_workers_are_counted_when_the_metrics_are_read() -> None:
    metrics = EdgeMetrics()
    views: list[WorkerStatus] = []
    metrics.watch_workers(lambda: views)

    def connected() -> list[float | None]:
        name, read = "baton_workers_connected", metrics.registry.get_sample_value
        return [read(name, {"role": role}) for role in ("prefill", "decode")]

    assert connected() == [0, 0]
    views += [
        WorkerStatus(worker_id="p0", role="prefill", address="x", connected=True),
        WorkerStatus(worker_id="p1", role="prefill", address="x", connected=False),
        WorkerStatus(worker_id="d0", role="decode", address="x", connected=True),
    ]
    assert connected() == [1, 1]
    assert b'baton_workers_connected{role="decode"} 1.0' in metrics.render()


def test_workers_left_out_are_counted_by_role() -> None:
    metrics = EdgeMetrics()
    view = WorkerStatus(worker_id="p0", role="prefill", address="x", connected=True)
    views = [view, replace(view, worker_id="p1", ejected=True)]
    metrics.watch_workers(lambda: views)
    read = metrics.registry.get_sample_value
    assert read("baton_workers_left_out", {"role": "prefill"}) == 1
    assert read("baton_workers_left_out", {"role": "decode"}) == 0


def test_an_index_that_is_full_says_so() -> None:
    metrics, index = EdgeMetrics(), PrefixIndex(max_bytes=20 * 200)
    metrics.watch_index(index)
    holdings = index.join(WorkerId("w"))
    holdings.gather([BlockHash(i.to_bytes(16, "little")) for i in range(40)])
    read = metrics.registry.get_sample_value
    assert read("baton_index_blocks") == index.max_blocks < 40
    assert read("baton_index_blocks_not_taken") == 40 - index.max_blocks
