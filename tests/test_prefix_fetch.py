"""Prefixes read from other workers' caches, through real processes and real NIXL.

The timed engine verifies the KV under every token it emits, so a block that is not what the prompt
needs fails the request. Its prefill is slow here, two milliseconds per token: a fetch pays.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc
import pytest

from core.blocks import chain_hashes, root_hash
from core.ids import BlockHash, BlockId, RequestId, SequenceId, new_request_id
from core.messages import LegTimes, LegTokens, PrefillSubmit, PrefixSource
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.timed import TimedEngine
from engine.types import Sampled, SeqStep
from router.client import Leg, LegEvent, WorkerLink
from router.curves import Curves
from router.index import PrefixIndex
from router.place import Knowledge, PrefillPoolQuery
from router.policies.build import DEFAULT_SLO
from router.pool import Pool
from router.types import Generated, Timings
from tests.processes import (
    WorkerProcess,
    collect,
    flow_over,
    make_request,
    output_tokens,
    stats,
    wait_until_idle,
    worker_processes,
    write_config,
    write_model,
)
from wire import worker_pb2, worker_pb2_grpc

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

VOCAB = 500
BLOCK = 16
BLOCK_BYTES = BLOCK * 256
SLOW = {"prefill_base_ms": 20, "prefill_per_token_ms": 2, "prefill_per_token2_ms": 0}
FREE = {"prefill_base_ms": 0, "prefill_per_token_ms": 0, "prefill_per_token2_ms": 0}
NO_BOUNDS: Mapping[str, int] = {}
WAIT_S = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("timed"), VOCAB)


@contextmanager
def started(
    model: Path,
    directory: Path,
    *roles: str,
    timed: Mapping[str, float] = SLOW,
    prefill: Mapping[str, int] = NO_BOUNDS,
) -> Iterator[tuple[Path, list[WorkerProcess]]]:
    """Workers with an arena of 64 blocks, and their config."""
    engine = {"kind": "timed", "kv_memory_mb": 0.25, "timed": dict(timed)}
    tree = {"model": {"path": str(model)}, "engine": engine, "prefill": dict(prefill)}
    config = write_config(directory, tree)
    with worker_processes(config, roles) as workers:
        yield config, workers


@pytest.fixture(scope="module")
def four(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[WorkerProcess]]]:
    """Three prefill workers and a decode worker that outlive a test; prompts are never the same."""
    directory = tmp_path_factory.mktemp("four")
    with started(model, directory, "prefill", "prefill", "prefill", "decode") as running:
        yield running


def prompt_of(num_tokens: int, seed: int) -> tuple[int, ...]:
    return tuple((seed * 101 + i * i + 3 * i) % VOCAB for i in range(num_tokens))


def oracle(prompt: Sequence[int], count: int) -> list[int]:
    """What the timed engine must answer to a prompt, alone, no time taken."""
    engine_config = EngineConfig(kind="timed", kv_memory_mb=16)
    engine = TimedEngine(engine_config, vocab_size=VOCAB, sleep=lambda _: None)
    tokens, start = list(prompt), 0
    for _ in range(count):
        step = SeqStep(
            sequence_id=SequenceId(RequestId("oracle")),
            tokens=tokens,
            start=start,
            end=len(tokens),
            block_table=[BlockId(b) for b in range(-(-len(tokens) // BLOCK))],
            sample=SamplingParams(max_tokens=1),
        )
        start = len(tokens)
        (sampled,) = engine.step([step])
        assert isinstance(sampled, Sampled)
        tokens.append(sampled.token)
    return tokens[len(prompt) :]


# -- a router that sends prefills where the test wants them ---------------------------------------


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    times: LegTimes


class Links:
    """Streams to some workers, as a router has them."""

    def __init__(self, links: Sequence[WorkerLink], index: PrefixIndex) -> None:
        self.links = links
        self.known = Knowledge(index=index, curves=Curves(), slo=DEFAULT_SLO, random=Random(0))

    def hashes(self, prompt: Sequence[int]) -> list[BlockHash]:
        view = self.links[0].view
        assert view is not None
        return chain_hashes(prompt, BLOCK, root_hash(view.hello.model_id, ""))

    async def source(self, chosen: int, prompt: Sequence[int], num_blocks: int) -> PrefixSource:
        """Whom the router would name, once the KV events of `num_blocks` blocks have come."""
        async with asyncio.timeout(WAIT_S):
            while True:
                views = {w.record.worker_id: w.view for w in self.links if w.view is not None}
                everyone, hashes = Pool(views), self.hashes(prompt)
                query = PrefillPoolQuery(
                    everyone, self.known, 0.0, tokens=len(prompt), hashes=hashes
                )
                source = query.source(self.links[chosen].record.worker_id, everyone, ())
                if source is not None and source.num_blocks >= num_blocks:
                    return source
                await asyncio.sleep(0.005)

    async def prefill(
        self, worker: int, prompt: Sequence[int], source: PrefixSource | None = None
    ) -> Answer:
        """One prefill leg of one output token; a failed one fails the test."""
        ended: asyncio.Future[LegEvent] = asyncio.get_running_loop().create_future()

        def hear(leg: Leg, event: LegEvent) -> None:
            if not ended.done() and getattr(event, "lease_id", None) is None:
                ended.set_result(event)

        link, sequence_id = self.links[worker], SequenceId(new_request_id())
        leg = link.submit(
            lambda number: PrefillSubmit(
                number=number,
                sequence_id=sequence_id,
                tokens=tuple(prompt),
                output_position=0,
                sampling=SamplingParams(max_tokens=1),
                deadline_s=WAIT_S,
                source=source,
            ),
            hear,
            len(prompt),
            len(prompt),
        )
        async with asyncio.timeout(WAIT_S):
            event = await ended
        link.finish(leg)
        assert isinstance(event, LegTokens), event
        assert event.times is not None
        return Answer(event.tokens, event.times)


@asynccontextmanager
async def linked(workers: Sequence[WorkerProcess]) -> AsyncIterator[Links]:
    index = PrefixIndex()
    links = [WorkerLink(w.record, "test", w.record.model_id, 60.0, index=index) for w in workers]
    tasks = [asyncio.create_task(link.run()) for link in links]
    try:
        async with asyncio.timeout(WAIT_S):
            while not all(link.routable for link in links):
                await asyncio.sleep(0.005)
        yield Links(links, index)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def assert_clean(workers: Sequence[WorkerProcess]) -> list[worker_pb2.StatsReply]:
    replies = await wait_until_idle(workers)
    for reply in replies:
        assert reply.pool_error == ""
        assert (reply.open_legs, reply.blocks_held, reply.blocks_in_use) == (0, 0, 0)
        assert (reply.blocks_receiving, reply.blocks_quarantined) == (0, 0)
    return replies


async def drain(worker: WorkerProcess) -> None:
    async with grpc.aio.insecure_channel(worker.record.address) as channel:
        request = worker_pb2.DrainRequest(timeout_s=1.0)
        await worker_pb2_grpc.WorkerStub(channel).Drain(request, timeout=10)


# -- (a) from a prefill worker --------------------------------------------------------------------


async def test_a_hot_prefix_replicates_itself(four: tuple[Path, list[WorkerProcess]]) -> None:
    workers = four[1][:2]
    prompt = prompt_of(500, seed=1)
    before = (await stats(workers[1])).prefix_fetches
    async with linked(workers) as links:
        await links.prefill(1, prompt_of(40, seed=2))  # so that its prefill is measured
        computed = await links.prefill(0, prompt)
        source = await links.source(1, prompt, num_blocks=31)
        assert source.worker_id == workers[0].record.worker_id
        fetched = await links.prefill(1, prompt, source)
        again = await links.prefill(1, prompt, source)
    assert computed.tokens == fetched.tokens == again.tokens == tuple(oracle(prompt, 1))
    assert (computed.times.cached_tokens, computed.times.fetched_tokens) == (0, 0)
    assert (fetched.times.cached_tokens, fetched.times.fetched_tokens) == (496, 496)
    assert (again.times.cached_tokens, again.times.fetched_tokens) == (496, 0)
    assert fetched.times.transfer_bytes == 31 * BLOCK_BYTES
    assert fetched.times.prefill_s < computed.times.prefill_s / 5
    _, reader = await assert_clean(workers)
    after = reader.prefix_fetches
    assert (after.tried - before.tried, after.won - before.won) == (1, 1)
    assert after.tokens - before.tokens == 496
    (pair,) = (p for p in reader.peers if p.owner_id == workers[0].record.worker_id)
    assert pair.nbytes >= 31 * BLOCK_BYTES
    assert pair.transport == "nixl"


async def test_a_request_sent_elsewhere_finds_its_prefix_and_the_text_is_right(
    model: Path, tmp_path: Path
) -> None:
    prompt = prompt_of(400, seed=3)
    with started(model, tmp_path, "prefill", "prefill", "decode") as (config, workers):
        async with flow_over(config, workers) as flow:
            warm = make_request("warm", (*prompt, 1), max_tokens=1)
            await collect(flow, warm)
            first, second = workers[:2]
            holder, other = (first, second) if await has_blocks(first) else (second, first)
            async with linked([other]) as links:
                await links.prefill(0, prompt_of(40, seed=4))
            await drain(holder)
            async with asyncio.timeout(WAIT_S):
                while not any(status.draining for status in flow.workers()):
                    await asyncio.sleep(0.005)
            request = make_request("elsewhere", (*prompt, 7, 7, 7), max_tokens=20)
            items = await collect(flow, request)
        assert output_tokens(items) == oracle(request.prompt_tokens, 20)
        timings = ended(items)
        assert timings.prefill_worker == other.record.worker_id
        assert (timings.cached_tokens, timings.fetched_tokens) == (400, 400)
        await assert_clean(workers)


async def test_a_prompt_that_its_prefixs_holder_has_no_room_for_takes_the_prefix_along(
    model: Path, tmp_path: Path
) -> None:
    prompt, bounds = prompt_of(400, seed=15), {"max_queued_tokens": 450}
    with started(model, tmp_path, "prefill", "prefill", "decode", prefill=bounds) as cluster:
        config, workers = cluster
        async with flow_over(config, workers) as flow:
            await collect(flow, make_request("warm", (*prompt, 1), max_tokens=1))
            first, second = workers[:2]
            holder, other = (first, second) if await has_blocks(first) else (second, first)
            async with linked([other, holder]) as links:
                await links.prefill(0, prompt_of(40, seed=16))
                load = asyncio.create_task(links.prefill(1, prompt_of(200, seed=17)))
                async with asyncio.timeout(WAIT_S):
                    while not any(status.queued_tokens for status in flow.workers()):
                        await asyncio.sleep(0.005)
                request = make_request("forwarded", (*prompt, 7, 7, 7), max_tokens=20)
                items = await collect(flow, request)
                await load
        assert output_tokens(items) == oracle(request.prompt_tokens, 20)
        timings = ended(items)
        assert (timings.prefill_worker, timings.attempts) == (other.record.worker_id, 2)
        assert (timings.cached_tokens, timings.fetched_tokens) == (400, 400)
        await assert_clean(workers)


# -- (b) from a decode worker ---------------------------------------------------------------------


async def test_the_next_turn_of_a_chat_computes_nothing_of_the_last_answer(
    four: tuple[Path, list[WorkerProcess]],
) -> None:
    config, workers = four
    chat, known = list(prompt_of(200, seed=5)), 0
    async with flow_over(config, workers) as flow:
        for turn in range(3):
            request = make_request(f"turn{turn}", chat, max_tokens=100)
            items = await collect(flow, request)
            assert output_tokens(items) == oracle(chat, 100)
            timings = ended(items)
            assert timings.cached_tokens == known // BLOCK * BLOCK
            assert (timings.fetched_tokens > 0) == (turn > 0)
            chat += output_tokens(items)
            known = len(chat) - 1  # the last token was never fed: it has no KV
            chat += prompt_of(20, seed=turn)
            await wait_until_idle(workers)
    await assert_clean(workers)


# -- when it does not work out --------------------------------------------------------------------


async def test_a_source_that_was_killed_costs_no_more_than_computing_and_a_moment(
    model: Path, tmp_path: Path
) -> None:
    prompt = prompt_of(400, seed=6)
    with started(model, tmp_path, "prefill", "prefill") as (_, workers):
        async with linked(workers) as links:
            await links.prefill(1, prompt_of(40, seed=7))
            await links.prefill(0, prompt)
            source = await links.source(1, prompt, num_blocks=24)
            workers[0].kill()
            answer = await links.prefill(1, prompt, source)
        (reader,) = await assert_clean(workers[1:])
    assert answer.tokens == tuple(oracle(prompt, 1))
    assert answer.times.fetched_tokens == 0
    assert answer.times.transfer_s < 1.0
    assert sum(reader.prefix_fetches.failed.values()) == 1


async def test_a_source_that_hangs_costs_a_bounded_pause_once(
    four: tuple[Path, list[WorkerProcess]],
) -> None:
    workers = four[1][1:3]
    prompts = [prompt_of(400, seed=8), prompt_of(400, seed=9)]
    async with linked(workers) as links:
        await links.prefill(0, prompt_of(40, seed=10))
        for prompt in prompts:
            await links.prefill(1, prompt)
        sources = [await links.source(0, prompt, num_blocks=24) for prompt in prompts]
        workers[1].process.send_signal(signal.SIGSTOP)
        try:
            answers = [
                await links.prefill(0, prompt, source)
                for prompt, source in zip(prompts, sources, strict=True)
            ]
        finally:
            workers[1].process.send_signal(signal.SIGCONT)
    assert [answer.tokens for answer in answers] == [tuple(oracle(p, 1)) for p in prompts]
    assert 0.5 <= answers[0].times.transfer_s < 1.5
    assert answers[1].times.transfer_s == 0
    reader, _ = await assert_clean(workers)
    assert reader.prefix_fetches.skipped["avoided"] == 1


async def test_a_prefix_evicted_since_the_router_looked_is_computed(
    four: tuple[Path, list[WorkerProcess]],
) -> None:
    workers = four[1][:2]
    prompt = prompt_of(400, seed=11)
    before = (await stats(workers[1])).prefix_fetches
    async with linked(workers) as links:
        await links.prefill(1, prompt_of(40, seed=12))
        await links.prefill(0, prompt)
        source = await links.source(1, prompt, num_blocks=24)
        await links.prefill(0, prompt_of(1020, seed=13))  # all blocks there are
        answer = await links.prefill(1, prompt, source)
    assert answer.tokens == tuple(oracle(prompt, 1))
    assert answer.times.fetched_tokens == 0
    _, reader = await assert_clean(workers)
    after = reader.prefix_fetches
    assert after.failed["not_held"] - before.failed["not_held"] == 1


async def test_a_prefill_faster_than_a_transfer_fetches_nothing(
    model: Path, tmp_path: Path
) -> None:
    prompt = prompt_of(100, seed=14)
    with started(model, tmp_path, "prefill", "prefill", timed=FREE) as (_, workers):
        async with linked(workers) as links:
            await links.prefill(0, prompt)
            for seed in range(20, 30):
                await links.prefill(1, prompt_of(100, seed=seed))
            answer = await links.prefill(1, prompt, await links.source(1, prompt, num_blocks=6))
        _, reader = await assert_clean(workers)
    assert answer.tokens == tuple(oracle(prompt, 1))
    assert answer.times.fetched_tokens == 0
    assert dict(reader.prefix_fetches.skipped) == {"slower": 1}
    assert reader.prefix_fetches.tried == 0


async def has_blocks(worker: WorkerProcess) -> bool:
    return (await stats(worker)).blocks_cached > 0


def ended(items: Sequence[Generated]) -> Timings:
    timings = items[-1].timings
    assert timings is not None
    return timings
