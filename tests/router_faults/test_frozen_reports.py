"""A worker whose load reports freeze looks idle for ever: the router must not send it everything.

Workers, streams and the flow are real and of this process, so that the load is exact: engines take
no step until the end, and all that a worker was sent waits there. What protects is that a router
counts its own submits until a report names them; the control takes that away, and the row fails.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import count

import pytest

from cluster.worker.outlet import RouterOutlet
from core.ids import Role, WorkerId
from core.messages import LoadReport
from router.config import RouterConfig
from router.types import GenerateRequest
from router.view import WorkerView
from tests.builders import (
    Cluster,
    expected_tokens,
    make_prompt,
    make_request,
    make_settings,
    running_cluster,
    soon,
    until,
    until_idle,
)
from tests.processes import collect, output_tokens

WORKERS, PROMPTS, PROMPT_TOKENS = 3, 30, 100
FAIR = PROMPTS / WORKERS
FROZEN = WorkerId("prefill-0")

Report = Callable[[LoadReport, float], None]
Freeze = Callable[[RouterOutlet, LoadReport], Report]


def stale(outlet: RouterOutlet, idle: LoadReport) -> Report:
    """Its heartbeats go on; what they say is what it was at the freeze."""
    report = outlet.report
    return lambda _load, now_s: report(idle, now_s)


def withheld(outlet: RouterOutlet, idle: LoadReport) -> Report:
    """Nothing is reported; what legs say still comes."""
    return lambda _load, _now_s: None


class Row:
    """Requests through a router to workers that compute nothing yet."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._numbers = count()
        self._asked: dict[tuple[int, ...], asyncio.Task[list[int]]] = {}
        view = cluster.fleet.pool(Role.PREFILL).views[FROZEN]
        assert view.load is not None
        self.view, self.idle = view, view.load
        (self.outlet,) = cluster.prefill[0].worker._outlets

    async def ask(self, prompts: int) -> int:
        """Place so many, one after the other; answers how many of them the worker got."""
        before = self._cluster.prefill[0].worker.open_legs
        for _ in range(prompts):
            placed = self._placed()
            prompt = make_prompt(PROMPT_TOKENS, seed=next(self._numbers))
            request = make_request(prompt, name=f"r{len(self._asked)}", max_tokens=2)
            self._asked[prompt] = asyncio.create_task(tokens_of(self._cluster, request))
            await until(lambda n=placed: self._placed() > n, "a placement")  # type: ignore[misc]
            for served in self._cluster.prefill:
                served.worker._step_ended()  # it reports, as if a step had ended
            await until(self._others_known, "reports of the others")
        return self._cluster.prefill[0].worker.open_legs - before

    async def answers(self) -> None:
        """Let the engines run: every answer must be right, and nothing is left."""
        for served in self._cluster.prefill:
            served.gate.open()
        for prompt, task in self._asked.items():
            assert await soon(task) == expected_tokens(prompt, 2)
        await until_idle(*self._cluster.workers)

    def _others_known(self) -> bool:
        views = self._cluster.fleet.pool(Role.PREFILL).views
        return all(
            (load := views[served.record.worker_id].load) is not None
            and load.waiting + load.running == served.worker.open_legs
            for served in self._cluster.prefill[1:]
        )

    def _placed(self) -> int:
        return sum(served.worker.open_legs for served in self._cluster.prefill)


async def tokens_of(cluster: Cluster, request: GenerateRequest) -> list[int]:
    return output_tokens(await collect(cluster.flow, request))


def row_cluster() -> AbstractAsyncContextManager[Cluster]:
    settings = make_settings(num_blocks=4096)
    config = RouterConfig(admission="off", local_prefill=False, requeue=False, worker_wait_s=0)
    return running_cluster(
        prefill=WORKERS, decode=1, gated_prefill=True, prefill_settings=settings, router=config
    )


@pytest.mark.parametrize("freeze", [stale, withheld])
async def test_a_worker_whose_reports_freeze_is_no_herds_goal_then_or_after_the_thaw(
    freeze: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with row_cluster() as cluster:
        row = Row(cluster)
        monkeypatch.setattr(row.outlet, "report", freeze(row.outlet, row.idle))
        got = await row.ask(PROMPTS)
        assert got <= 1.5 * FAIR
        assert row.view.unseen_tokens == got * PROMPT_TOKENS, "the freeze has been one"
        monkeypatch.undo()
        await until(lambda: row.view.unseen_tokens == 0, "the thaw")
        assert row.view.load is not None
        assert row.view.load.queued_tokens == got * PROMPT_TOKENS
        assert 1 <= await row.ask(PROMPTS) <= 1.5 * FAIR, "neither a herd nor left out"
        await row.answers()


@pytest.mark.parametrize("freeze", [stale, withheld])
async def test_control_a_router_that_believes_reports_alone_herds(
    freeze: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with row_cluster() as cluster:
        row = Row(cluster)
        monkeypatch.setattr(row.outlet, "report", freeze(row.outlet, row.idle))
        monkeypatch.setattr(WorkerView, "submitted", lambda *_: None)
        assert await row.ask(PROMPTS) > 1.5 * FAIR
        monkeypatch.undo()
        await row.answers()
