"""What a live router was told, told to a simulated one: it decides the same, to the last digit.

Recorded are the messages of real workers over real streams, in order, and the calls that asked the
router's chooser, with the times its clock gave it. No decision is recorded but to be compared.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from core.clock import SystemClock
from core.ids import WorkerId
from kv_transfer.leases import LeaseTable
from router.chooser import Chooser
from router.config import RouterConfig
from router.learning import Learning
from router.placement import Considered, Placement
from router.policies.base import Slo
from router.types import Generated
from router.view import WorkerView
from simulator.events import Events
from simulator.fleet import Member, SimFleet
from simulator.handoff import PullQueue
from simulator.links import Network
from simulator.router import SimRouter
from simulator.spec import SimSpec
from simulator.worker import SimWorker
from tests.builders import Cluster, make_prompt, make_request, running_cluster
from tests.simulator.clusters import WORKER, split

CONFIG = RouterConfig(worker_wait_s=0, admission="off")
SLO = Slo(ttft_s=5.0, tpot_s=1.0)
TOLD = ("reported", "submitted", "ended", "apply_events", "apply_snapshot")
ASKED = ("consider", "place", "place_locally", "for_decode")
LEARNED = ("prefilled", "decoding", "ended")


@dataclass
class Call:
    """Of a view (`worker` names it), of the chooser or of what it learns by."""

    name: str
    args: tuple[Any, ...]
    keys: dict[str, Any]
    worker: WorkerId | None = None
    times_s: list[float] = field(default_factory=list)
    answer: Any = None


class Recorder(SystemClock):
    """Notes outermost calls of the patched methods, and the times asked within."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self._inside: Call | None = None
        for name in TOLD:
            self._patch(monkeypatch, WorkerView, name)
        for name in ASKED:
            self._patch(monkeypatch, Chooser, name)
        for name in LEARNED:
            self._patch(monkeypatch, Learning, name)

    def now_s(self) -> float:
        now_s = super().now_s()
        if self._inside is not None:
            self._inside.times_s.append(now_s)
        return now_s

    def _patch(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def noted(this: Any, *args: Any, **keys: Any) -> Any:
            if self._inside is not None:
                return real(this, *args, **keys)
            worker = this.hello.worker_id if isinstance(this, WorkerView) else None
            call = self._inside = Call(name, args, keys, worker)
            self.calls.append(call)
            try:
                call.answer = real(this, *args, **keys)
            finally:
                self._inside = None
            return call.answer

        monkeypatch.setattr(owner, name, noted)


class Told(Events):
    """A clock that says the recorded times."""

    def __init__(self) -> None:
        super().__init__()
        self.times_s: list[float] = []

    def now_s(self) -> float:
        return self.times_s.pop(0) if self.times_s else 0.0


async def ask(cluster: Cluster, name: str, prompt: tuple[int, ...], max_tokens: int) -> None:
    tokens: list[Generated] = []
    async for generated in cluster.flow.generate(
        make_request(prompt, name=name, max_tokens=max_tokens)
    ):
        tokens.append(generated)
    assert tokens


async def converse(cluster: Cluster) -> None:
    """Prompts that share prefixes, several at a time, of which later ones repeat earlier ones."""
    for turn in range(4):
        prompts = [make_prompt(40 + 16 * turn + 7 * i, seed=i % 3) for i in range(6)]
        asking = (
            ask(cluster, f"{turn}-{i}", prompt, 6 + 5 * i) for i, prompt in enumerate(prompts)
        )
        await asyncio.gather(*asking)


def simulated_router(live: Cluster, seed: int = 0) -> tuple[SimRouter, Told]:
    clock, spec = Told(), split()
    network, fleet_of = Network(1.0), live.fleet
    spec = SimSpec(pools=spec.pools, router=CONFIG, slo=SLO)
    index = type(fleet_of.index)()
    fleet = SimFleet(index, sees_truth=False)
    for link in fleet_of.links():
        assert link.view is not None
        hello = link.view.hello
        worker = SimWorker(hello.worker_id, WORKER, Events())
        fleet.join(
            Member(
                record=link.record,
                hello=hello,
                worker=worker,
                queue=PullQueue(),
                port=network.port(0, 1.0),
                pool="",
                holdings=index.join(hello.worker_id),
                unheard=[],
                leases=LeaseTable(worker.pool, clock, 10.0),
            )
        )
    router = SimRouter(spec, fleet, clock, network, random=Random(seed), on_end=lambda record: None)
    return router, clock


def replay(calls: list[Call], router: SimRouter, clock: Told) -> list[tuple[Call, Any]]:
    """The answers of the simulated router's chooser beside the recorded ones."""
    considered: dict[int, Any] = {}
    answers: list[tuple[Call, Any]] = []
    links = {link.record.worker_id: link for link in router.fleet.links()}
    for call in calls:
        if call.worker is not None:
            getattr(links[call.worker].view, call.name)(*call.args, **call.keys)
            continue
        args = list(call.args)
        if call.name in ("place", "place_locally"):
            args[0] = considered[id(args[0])]
        elif call.name in ("prefilled", "decoding"):
            args[0] = links[args[0].record.worker_id]
        clock.times_s = list(call.times_s)
        asked = router.chooser.learning if call.name in LEARNED else router.chooser
        answer = getattr(asked, call.name)(*args, **call.keys)
        if call.name == "consider":
            considered[id(call.answer)] = answer
        answers.append((call, answer))
    return answers


def said(answer: Any) -> tuple[Any, ...]:
    """What was decided, without the links."""
    if isinstance(answer, Considered):
        placement = answer.local.placement
        local = None if placement is None else placement.decision
        return answer.decision, answer.local.verdict, local
    if isinstance(answer, Placement):
        return answer.link.record.worker_id, answer.decision, answer.load_tokens, answer.source
    return (answer,)


async def test_recorded_inputs_of_a_live_run_give_identical_decisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder(monkeypatch)
    async with running_cluster(prefill=3, decode=3, router=CONFIG, slo=SLO, clock=recorder) as live:
        await converse(live)
        router, clock = simulated_router(live)
        calls = list(recorder.calls)
        monkeypatch.undo()
        answers = replay(calls, router, clock)
        others = replay(calls, *simulated_router(live, seed=1))
    decided = [(call, answer) for call, answer in answers if call.answer is not None]
    assert len(decided) >= 2 * 24  # three where the prompt crosses
    workers = {
        call.answer.link.record.worker_id
        for call, _ in decided
        if isinstance(call.answer, Placement)
    }
    assert len(workers) >= 5
    for call, answer in decided:
        assert said(answer) == said(call.answer), call.name
    assert any(said(answer) != said(call.answer) for call, answer in others if call.answer)
