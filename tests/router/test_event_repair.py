"""KV events lost, doubled or out of order on a real stream: the index repairs itself by a snapshot.

Between a real worker's door and a real link stands a relay that passes all messages on but these.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count

import pytest

from core.blocks import chain_hashes, root_hash
from core.ids import BlockHash, Role
from core.messages import KvRemoved
from core.registry import WorkerRecord
from core.stream import MessageStream, StreamBroken, accepting, address_of, dial, listen
from kv_transfer.loopback import LoopbackHub
from router.client import WorkerLink
from router.codec import from_worker
from router.index import PrefixIndex
from tests.builders import (
    BLOCK_SIZE,
    WAIT_S,
    RouterEnd,
    ServedWorker,
    make_prompt,
    make_settings,
    prefill_submit,
    served_worker,
    until,
)
from wire import worker_pb2

NUM_BLOCKS = 64
PROMPT_TOKENS = 40

Passing = Callable[[int, worker_pb2.ToRouter], list[worker_pb2.ToRouter]]
"""What goes on to the router for the n-th message of KV events."""


@dataclass
class Relay:
    """A door for routers that leads to the worker's own."""

    inner: str
    tamper: Passing | None = None
    events: int = 0
    snapshots: int = 0
    removals: int = 0

    async def serve(self, router: MessageStream[worker_pb2.ToWorker]) -> None:
        with contextlib.suppress(StreamBroken):
            async with dial(self.inner, worker_pb2.ToRouter.FromString) as worker:
                down = asyncio.create_task(self._down(worker, router))
                try:
                    while (said := await router.read()) is not None:
                        worker.send(said)
                finally:
                    down.cancel()
                    await asyncio.wait([down])

    async def _down(
        self,
        worker: MessageStream[worker_pb2.ToRouter],
        router: MessageStream[worker_pb2.ToWorker],
    ) -> None:
        with contextlib.suppress(StreamBroken):
            while (said := await worker.read()) is not None:
                self.snapshots += said.HasField("kv_snapshot")
                for message in self._passed(said):
                    router.send(message)

    def _passed(self, said: worker_pb2.ToRouter) -> list[worker_pb2.ToRouter]:
        if not said.HasField("kv_events"):
            return [said]
        self.removals += sum(isinstance(e, KvRemoved) for e in from_worker(said).events)  # type: ignore[union-attr]
        self.events += 1
        return [said] if self.tamper is None else self.tamper(self.events, said)


class Reordered:
    """Every third message comes after the one that follows it."""

    def __init__(self) -> None:
        self._held: worker_pb2.ToRouter | None = None

    def __call__(self, number: int, said: worker_pb2.ToRouter) -> list[worker_pb2.ToRouter]:
        if number % 3 == 0:
            self._held = said
            return []
        held, self._held = self._held, None
        return [said] if held is None else [said, held]


def lost(number: int, said: worker_pb2.ToRouter) -> list[worker_pb2.ToRouter]:
    return [] if number % 3 == 0 else [said]


def doubled(_number: int, said: worker_pb2.ToRouter) -> list[worker_pb2.ToRouter]:
    return [said, said]


@asynccontextmanager
async def relayed(record: WorkerRecord) -> AsyncIterator[tuple[Relay, WorkerRecord]]:
    relay, listener = Relay(record.router_address), listen("127.0.0.1", 0)
    passed = replace(record, router_address=address_of(listener))
    async with accepting(listener, worker_pb2.ToWorker.FromString, relay.serve):
        yield relay, passed


class Watched:
    """A worker with a small cache, and what a router behind the relay knows of it."""

    def __init__(self, served: ServedWorker, relay: Relay, index: PrefixIndex) -> None:
        self.served = served
        self.relay = relay
        self._index = index
        self._end = RouterEnd(served.worker)
        self._numbers = count(1)
        self._root = root_hash(served.engine.info.model_id)
        self._told: set[BlockHash] = set()

    async def prompts(self, number: int) -> None:
        """Run so many new ones; old blocks make room for theirs."""
        for _ in range(number):
            submit = next(self._numbers)
            prompt = make_prompt(PROMPT_TOKENS, seed=submit)
            self._told.update(chain_hashes(prompt, BLOCK_SIZE, self._root))
            leg = prefill_submit(submit, prompt, name=str(submit), max_tokens=1)
            self.served.worker.handle(self._end.outlet, leg)
            await self._end.answered(submit)

    def exact(self) -> bool:
        """The router knows the blocks that are cached there, and no others."""
        known = {h for h in self._told if self._index.holders(h) & self._index.live}
        return known == set(self.served.worker.pool.hashes())


@asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    index = PrefixIndex()
    settings = make_settings(num_blocks=NUM_BLOCKS)
    async with (
        served_worker("p", Role.PREFILL, LoopbackHub(), worker_settings=settings) as served,
        relayed(served.record) as (relay, record),
    ):
        model = served.engine.info.model_id
        link = WorkerLink(record, "router", model, WAIT_S, index=index)
        running = asyncio.create_task(link.run())
        try:
            await until(lambda: link.routable is not None, "the link routable")
            yield Watched(served, relay, index)
            assert not running.done(), "the stream goes on"
        finally:
            running.cancel()
            await asyncio.wait([running])


async def test_events_that_pass_as_they_are_need_no_second_snapshot() -> None:
    async with watched() as worker:
        await worker.prompts(30)
        await until(worker.exact, "the index is exact")
        assert worker.relay.snapshots == 1
        assert worker.relay.removals > 0


@pytest.mark.parametrize("tamper", [lost, Reordered()], ids=["lost", "out of order"])
async def test_a_gap_is_repaired_by_a_snapshot(tamper: Passing) -> None:
    async with watched() as worker:
        worker.relay.tamper = tamper
        await worker.prompts(31)
        worker.relay.tamper = None
        await worker.prompts(1)  # a loss is seen by what comes after it
        await until(worker.exact, "the index is exact")
        assert worker.relay.snapshots > 1


async def test_events_told_twice_count_once() -> None:
    async with watched() as worker:
        worker.relay.tamper = doubled
        await worker.prompts(30)
        await until(worker.exact, "the index is exact")
        assert worker.relay.snapshots == 1
