"""A bug in what a worker does with one router's message costs the leg it is about, and no other."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from cluster.worker.metrics import WorkerCollector
from core.errors import WorkerFailed
from core.ids import Role
from core.messages import SnapshotRequest
from decode_worker.role import DecodeRole
from engine.runner import Runner
from prefill_worker.role import PrefillRole
from router.client import WorkerLink
from router.config import RouterConfig
from tests.builders import (
    Cluster,
    expected_tokens,
    make_prompt,
    make_request,
    running_cluster,
    until,
    until_idle,
)

PROMPT = make_prompt(22)


def breaks_for_unlucky(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """A method with a bug that shows with requests of this name only."""
    sound: Callable[..., object] = getattr(owner, method)

    def buggy(self: object, subject: object, *rest: object) -> object:
        if "unlucky" in str(getattr(subject, "sequence_id", "")):
            raise ZeroDivisionError("oops")
        return sound(self, subject, *rest)

    monkeypatch.setattr(owner, method, buggy)


async def answer(cluster: Cluster, name: str, max_tokens: int) -> list[int]:
    request = make_request(make_prompt(22, seed=len(name)), name=name, max_tokens=max_tokens)
    async with asyncio.timeout(20):
        items = [item async for item in cluster.flow.generate(request)]
    assert items[-1].timings is not None
    assert items[-1].timings.attempts == 1
    return [token for item in items for token in item.tokens]


@pytest.mark.parametrize(
    ("owner", "method"),
    [(PrefillRole, "submit"), (DecodeRole, "submit"), (Runner, "submit")],
    ids=["before a prefill's lease", "before a decode's leg", "after a prefill's lease"],
)
async def test_it_fails_that_leg_and_is_logged_and_counted(
    owner: type, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaks_for_unlucky(monkeypatch, owner, method)
    async with running_cluster(prefill=1, decode=1, gated_decode=True) as cluster:
        views = [link.view for link in cluster.fleet.links()]
        others = [asyncio.create_task(answer(cluster, name, 8)) for name in ("before", "besides")]
        await until(lambda: cluster.decode[0].worker.open_legs == 2, "two legs on the stream")
        with pytest.raises(WorkerFailed, match="a bug in the worker"):
            await answer(cluster, "unlucky", 8)
        cluster.decode[0].gate.open()
        for name, task in zip(("before", "besides"), others, strict=True):
            assert await task == expected_tokens(make_prompt(22, seed=len(name)), 8)
        assert await answer(cluster, "later", 8)
        await until_idle(*cluster.workers)
        assert [link.view for link in cluster.fleet.links()] == views
        tries = RouterConfig().max_attempts  # there is no other worker
        assert sum(worker.message_bugs for worker in cluster.workers) == tries
        told = [r for r in caplog.records if r.getMessage().startswith("router_message_bug")]
        assert [(r.levelno, r.exc_info is not None) for r in told] == [
            (logging.ERROR, True)
        ] * tries


async def test_it_is_among_the_workers_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    breaks_for_unlucky(monkeypatch, PrefillRole, "submit")
    async with running_cluster(prefill=1, decode=0) as cluster:
        with pytest.raises(WorkerFailed):
            await answer(cluster, "unlucky", 1)
        collector = WorkerCollector(cluster.prefill[0].worker, asyncio.get_running_loop())
        metrics = await asyncio.to_thread(lambda: list(collector.collect()))
        (bugs,) = (metric for metric in metrics if metric.name == "baton_router_message_bugs")
        assert [sample.value for sample in bugs.samples] == [RouterConfig().max_attempts]


async def test_what_is_about_no_leg_ends_the_stream_which_comes_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_cluster(prefill=1, decode=1) as cluster:
        (worker,) = (served.worker for served in cluster.prefill)

        def the_link() -> WorkerLink:
            return next(li for li in cluster.fleet.links() if li.record.role is Role.PREFILL)

        def broken(outlet: object) -> None:
            monkeypatch.undo()
            raise ZeroDivisionError("oops")

        first = the_link()
        monkeypatch.setattr(worker, "_send_snapshot", broken)
        first.send(SnapshotRequest())
        await until(lambda: the_link() is not first and the_link().routable is not None, "a stream")
        assert await answer(cluster, "later", 8)
        assert worker.message_bugs == 0
