"""Four routers that all see one idle worker among busy ones do not all send everything there.

Streams, fleets and flows are real; the workers behind the doors take what they are sent and report
nothing of it, as if their next reports were still to come: nobody sees what the others do.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random

from core.blocks import unpack_tokens
from core.clock import SystemClock
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LoadReport, WorkerHello
from core.registry import MemoryRegistry, WorkerRecord
from core.stream import MessageStream, StreamBroken, accepting, address_of, listen
from router.codec import to_router
from router.config import PrefillPolicyName, RouterConfig
from router.fleet import Fleet
from router.flow import Flow
from router.policies.build import build_policies
from tests.builders import make_prompt, make_request, until
from tests.processes import collect
from wire import worker_pb2

ROUTERS, WORKERS, BURSTS = 4, 32, 5
PROMPT_TOKENS = 1000
PROMPTS_PER_ROUTER = 4
QUEUED_TOKENS = 2000
"""At every worker but one."""
MODEL = ModelId("m")


@dataclass
class Door:
    """A worker's door: says once what it is and how busy, and counts the prompts it is sent."""

    name: str
    role: Role
    queued_tokens: int
    placed_tokens: int = 0
    streams: list[MessageStream[worker_pb2.ToWorker]] = field(default_factory=list)

    async def serve(self, stream: MessageStream[worker_pb2.ToWorker]) -> None:
        for message in (self._hello(), KvSnapshot(next_number=1), self._load()):
            stream.send(to_router(message))
        try:
            while (said := await stream.read()) is not None:
                if said.HasField("prefill"):
                    self.placed_tokens += len(unpack_tokens(said.prefill.tokens))
        except StreamBroken:
            pass  # the router has gone

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            worker_id=WorkerId(self.name),
            incarnation=Incarnation(self.name),
            role=self.role,
            epoch=1,
            model_id=MODEL,
            layout=KvLayout(block_size=16, num_kv_heads=1, num_layers=1, head_dim=4, dtype="uint8"),
            num_blocks=10_000,
            context_tokens=100_000,
            peer_address="",
        )

    def _load(self) -> LoadReport:
        return LoadReport(
            last_submit=0,
            queued_tokens=self.queued_tokens,
            waiting=self.queued_tokens // PROMPT_TOKENS,
            running=0,
            context_tokens=0,
            free_blocks=10_000,
            total_blocks=10_000,
        )


@asynccontextmanager
async def doors() -> AsyncIterator[tuple[list[Door], MemoryRegistry]]:
    registry = MemoryRegistry(SystemClock())
    prefill = [Door(f"p{i}", Role.PREFILL, QUEUED_TOKENS if i else 0) for i in range(WORKERS)]
    async with AsyncExitStack() as stack:
        for door in [*prefill, Door("d", Role.DECODE, 0)]:
            listener = listen("127.0.0.1", 0)
            record = WorkerRecord(
                worker_id=WorkerId(door.name),
                incarnation=Incarnation(door.name),
                role=door.role,
                epoch=1,
                address="",
                router_address=address_of(listener),
                model_id=MODEL,
                pid=1,
            )
            await stack.enter_async_context(
                accepting(listener, worker_pb2.ToWorker.FromString, door.serve)
            )
            await registry.register(record, 3600.0)
        yield prefill, registry


@asynccontextmanager
async def routers(registry: MemoryRegistry, policy: PrefillPolicyName) -> AsyncIterator[list[Flow]]:
    config = RouterConfig(prefill_policy=policy, admission="off", local_prefill=False)
    flows, tasks = [], []
    for number in range(ROUTERS):
        fleet = Fleet(registry, router_id=f"r{number}", model_id=MODEL, silence_s=60.0)
        flows.append(
            Flow(
                fleet=fleet,
                policies=build_policies(config),
                config=config,
                clock=SystemClock(),
                random=Random(number),
            )
        )
        tasks.append(asyncio.create_task(fleet.run()))
    try:
        for flow in flows:
            await until(lambda f=flow: sum(w.connected for w in f.workers()) == WORKERS + 1)  # type: ignore[misc]
        yield flows
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def burst(policy: PrefillPolicyName, seeds: count) -> float:
    """The longest queue after a burst through all routers at once, over the mean of all queues."""
    async with doors() as (prefill, registry), routers(registry, policy) as flows:
        prompts = [
            (flow, make_prompt(PROMPT_TOKENS, seed=next(seeds)))
            for flow in flows
            for _ in range(PROMPTS_PER_ROUTER)
        ]
        tasks = [
            asyncio.create_task(collect(flow, make_request(prompt, name=f"req-{i}")))
            for i, (flow, prompt) in enumerate(prompts)
        ]
        total = PROMPT_TOKENS * len(prompts)
        await until(lambda: sum(door.placed_tokens for door in prefill) == total, "all placed")
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        queues = [door.queued_tokens + door.placed_tokens for door in prefill]
        return max(queues) * len(queues) / sum(queues)


async def median_of_bursts(policy: PrefillPolicyName) -> float:
    seeds = count()
    return sorted([await burst(policy, seeds) for _ in range(BURSTS)])[BURSTS // 2]


async def test_routers_do_not_herd_and_the_least_predicted_ttft_does() -> None:
    """The control shows that the bound is one that a herd breaks."""
    assert await median_of_bursts("baton") < 2.5
    assert await median_of_bursts("mooncake_ttft") > 2.5
