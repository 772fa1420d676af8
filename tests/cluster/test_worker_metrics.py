"""A worker's Prometheus metrics, asked for over HTTP as a scraper would."""

import asyncio
import logging
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from cluster.worker.metrics import WorkerCollector, serving_metrics
from core.errors import ConfigError, TransferCause, TransferFailed
from core.ids import Role, WorkerId
from engine.pool import PoolCounts
from kv_transfer.loopback import LoopbackHub
from kv_transfer.metrics import LeaseEnd, PullStats
from tests.builders import served_worker
from tests.processes import write_config, write_model


async def scrape(address: str) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"http://{address}/metrics")).text


async def test_leases_blocks_and_pairs_are_served(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with served_worker("d", Role.DECODE, LoopbackHub()) as served:
        worker = served.worker
        pair = worker.reader.metrics.pair(WorkerId("p"))
        pair.transport = "nixl"
        pair.add(
            PullStats(
                nbytes=640, blocks=5, descriptors=2, reads=1, seconds=0.5, hidden_s=0.4, sealed=True
            )
        )
        expired = TransferFailed("late", cause=TransferCause.EXPIRED)
        worker.reader.metrics.failed(WorkerId("p"), expired)
        worker.leases.counters.end(WorkerId("d1"), LeaseEnd.WITHDRAWN)
        with serving_metrics(worker, "127.0.0.1", 0) as address:
            assert f"worker_metrics address={address}" in caplog.text
            text = await scrape(address)
        assert 'baton_kv_pair_bytes_total{owner="p",transport="nixl"} 640.0' in text
        assert 'baton_kv_pair_hidden_seconds_total{owner="p",transport="nixl"} 0.4' in text
        assert 'baton_kv_pair_sealed_handoffs_total{owner="p",transport="nixl"} 1.0' in text
        assert 'baton_kv_pair_failures_total{cause="expired",owner="p"} 1.0' in text
        assert 'baton_kv_leases_ended_total{outcome="expired"} 0.0' in text
        assert 'baton_kv_leases_ended_total{outcome="withdrawn"} 1.0' in text
        assert 'baton_kv_pair_leases_ended_total{outcome="withdrawn",reader="d1"} 1.0' in text
        assert 'baton_kv_transport_up{transport="loopback"} 1.0' in text
        assert "baton_kv_pulls_waiting_for_memory 0.0" in text
        assert f'baton_kv_blocks{{state="free"}} {worker.pool.num_blocks}.0' in text
        with pytest.raises(httpx.ConnectError):
            await scrape(address)


async def test_a_port_in_use_is_named_with_the_setting() -> None:
    async with served_worker("d", Role.DECODE, LoopbackHub()) as served:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with (
                pytest.raises(ConfigError, match=r"worker_metrics_port"),
                serving_metrics(served.worker, "127.0.0.1", port),
            ):
                await asyncio.sleep(0)


@pytest.mark.processes
def test_a_worker_by_hand_says_it_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        tree = {
            "model": {"path": str(write_model(tmp_path))},
            "engine": {"kind": "timed", "kv_memory_mb": 1},
            "transfer": {"backend": "collective"},
            "telemetry": {"worker_metrics_port": port, "log_level": "warning"},
        }
        config = write_config(tmp_path, tree)
        command = [sys.executable, "-m", "cluster.worker", "--role", "decode"]
        ended = subprocess.run(
            [*command, "--config", str(config)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()  # and its log is as loud as the config says
    assert line.startswith(f"error: the worker's metrics cannot be served on 127.0.0.1:{port}")


async def test_scrapes_of_a_worker_that_hangs_leave_nothing_to_be_done_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[int] = []
    async with served_worker("d", Role.DECODE, LoopbackHub()) as served:
        collector = WorkerCollector(served.worker, asyncio.get_running_loop())
        counts = served.worker.pool.counts

        def noted() -> PoolCounts:
            reads.append(1)
            return counts()

        monkeypatch.setattr(served.worker.pool, "counts", noted)
        monkeypatch.setattr("cluster.worker.metrics._SCRAPE_TIMEOUT_S", 0.01)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                collector.collect()  # from the loop itself, which stands still meanwhile
        for _ in range(5):
            await asyncio.sleep(0)
        assert reads == []
        monkeypatch.setattr("cluster.worker.metrics._SCRAPE_TIMEOUT_S", 10.0)
        assert await asyncio.to_thread(collector.collect)
        assert reads == [1]
