"""One worker's metrics for Prometheus: its KV blocks, leases, and what it read from whom.

The HTTP thread of prometheus_client asks the event loop for the numbers, as everything counted here
belongs to it.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.worker.worker import Worker
from core import telemetry
from core.errors import ConfigError
from kv_transfer.metrics import LeaseEnd

log = logging.getLogger(__name__)

_SCRAPE_TIMEOUT_S = 5.0


class WorkerCollector(Collector):
    """Reads a worker whenever the metrics are asked for, from any thread but the loop's own."""

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        """Nothing before the first scrape: the loop does not serve yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        reading: Future[list[Metric]] = Future()
        self._loop.call_soon_threadsafe(self._read, reading)
        try:
            return reading.result(_SCRAPE_TIMEOUT_S)
        finally:
            reading.cancel()  # or a loop that hangs would find one for each scrape meanwhile

    def _read(self, reading: "Future[list[Metric]]") -> None:
        """On the loop; does nothing for a scrape that has been given up."""
        if not reading.set_running_or_notify_cancel():
            return
        worker = self._worker
        try:
            parts = (
                _leases(worker),
                _blocks(worker),
                _fetches(worker),
                _transfers(worker),
                _bugs(worker),
            )
            reading.set_result([metric for part in parts for metric in part])
        except Exception as error:  # noqa: BLE001 - raised where it is waited for, in `collect`
            reading.set_exception(error)


def _leases(worker: Worker) -> Iterator[Metric]:
    counters = worker.leases.counters
    ended = CounterMetricFamily(
        telemetry.LEASES_ENDED, "Leases that ended, by how", labels=["outcome"]
    )
    for how in LeaseEnd:
        ended.add_metric([how], counters.ended[how])
    yield ended
    by_reader = CounterMetricFamily(
        telemetry.PAIR_LEASES_ENDED,
        "Leases that ended, by the worker bound to them (empty: none was) and how",
        labels=["reader", "outcome"],
    )
    for reader, pair in counters.by_reader.items():
        for how, count in pair.items():
            by_reader.add_metric([reader, how], count)
    yield by_reader
    yield GaugeMetricFamily(
        telemetry.LEASES_OPEN, "Leases open now", value=len(worker.leases.all())
    )


def _blocks(worker: Worker) -> Iterator[Metric]:
    counts = worker.pool.counts()
    blocks = GaugeMetricFamily(
        telemetry.KV_BLOCKS, "KV blocks of the arena, by state", labels=["state"]
    )
    blocks.add_metric(["free"], counts.free)
    blocks.add_metric(["cached"], counts.cached)
    blocks.add_metric(["in_use"], counts.in_use)
    blocks.add_metric(["receiving"], counts.receiving)
    blocks.add_metric(["quarantined"], counts.quarantined)
    yield blocks
    yield GaugeMetricFamily(
        telemetry.KV_BLOCKS_HELD, "KV blocks with at least one lease", value=counts.held
    )
    yield CounterMetricFamily(
        telemetry.PREEMPTIONS,
        "Sequences whose KV was given up and computed again",
        value=worker.runner.preemptions,
    )


def _fetches(worker: Worker) -> Iterator[Metric]:
    counters = worker.prefill.fetches
    ended = CounterMetricFamily(
        telemetry.PREFIX_FETCHES,
        "Prefixes wanted from another worker's cache, by what came of it",
        labels=["outcome", "reason"],
    )
    ended.add_metric(["won", ""], counters.won)
    for outcome, reasons in (("failed", counters.failed), ("skipped", counters.skipped)):
        for reason, count in reasons.items():
            ended.add_metric([outcome, reason], count)
    yield ended
    yield CounterMetricFamily(
        telemetry.PREFIX_FETCHED_TOKENS,
        "Prompt tokens read from another worker's cache",
        value=counters.tokens,
    )


def _transfers(worker: Worker) -> Iterator[Metric]:
    pair_labels = ["owner", "transport"]
    columns = {
        "handoffs": (telemetry.PAIR_HANDOFFS, "Hand-offs from this owner that became usable"),
        "nbytes": (telemetry.PAIR_BYTES, "KV bytes read from this owner"),
        "descriptors": (telemetry.PAIR_DESCRIPTORS, "Contiguous runs they were read in"),
        "seconds": (telemetry.PAIR_SECONDS, "Time some read from this owner was under way"),
        "hidden_s": (telemetry.PAIR_HIDDEN, "Of it, while the owner's prefill still ran"),
        "sealed": (telemetry.PAIR_SEALED, "Hand-offs for which the owner was not waited for"),
    }
    pairs = worker.reader.metrics.pairs
    for column, (name, text) in columns.items():
        family = CounterMetricFamily(name, text, labels=pair_labels)
        for owner_id, pair in pairs.items():
            family.add_metric([owner_id, pair.transport], getattr(pair, column))
        yield family
    ways = GaugeMetricFamily(
        telemetry.KV_WAYS, "1 of a way to move KV, 0 since it was given up", labels=["transport"]
    )
    for name in worker.transports.started:
        ways.add_metric([name], name in worker.transports.names)
    yield ways
    yield GaugeMetricFamily(
        telemetry.PULLS_WAITING,
        "Hand-offs to this worker that wait for blocks to be free",
        value=worker.reader.waiting_for_memory,
    )
    failures = CounterMetricFamily(
        telemetry.PAIR_FAILURES,
        "Hand-offs that brought nothing, by cause",
        labels=["owner", "cause"],
    )
    for owner_id, pair in pairs.items():
        for cause, count in pair.failures.items():
            failures.add_metric([owner_id, cause], count)
    yield failures


def _bugs(worker: Worker) -> Iterator[Metric]:
    yield CounterMetricFamily(
        telemetry.MESSAGE_BUGS,
        "Messages of routers that a bug kept the worker from handling; each ended its leg",
        value=worker.message_bugs,
    )


@contextmanager
def serving_metrics(worker: Worker, host: str, port: int | None) -> Iterator[str]:
    """Inside the block /metrics answers at the host:port given; None serves nothing, at ""."""
    if port is None:
        yield ""
        return
    registry = CollectorRegistry()
    registry.register(WorkerCollector(worker, asyncio.get_running_loop()))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"the worker's metrics cannot be served on {host}:{port}: {error.strerror}; "
            "set telemetry.worker_metrics_port to a free port, or leave it out"
        ) from error
    address = f"{host}:{server.server_port}"
    log.info("worker_metrics address=%s", address)
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_SCRAPE_TIMEOUT_S)
