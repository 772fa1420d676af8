"""Many sequences at once, and workers that die, through real processes and real NIXL.

The timed engine verifies the KV it received before every token it emits, and its text is a function
of the prompt alone: a wrong, lost or reused block cannot pass for an answer.
"""

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest

from core.ids import BlockId, SequenceId
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.timed import TimedEngine
from engine.types import Sampled, SeqStep
from router.types import GenerateRequest
from tests.processes import (
    WorkerProcess,
    bytes_read,
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
from wire import worker_pb2

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

VOCAB = 500
ROLES = ("prefill", "prefill", "decode", "decode")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("timed"), VOCAB)


@pytest.fixture
def roomy(model: Path, tmp_path: Path) -> Path:
    return timed_config(model, tmp_path, kv_memory_mb=16)


def timed_config(model: Path, directory: Path, kv_memory_mb: float) -> Path:
    engine = {"kind": "timed", "kv_memory_mb": kv_memory_mb}
    router = {"admission": "off"}  # crowds, all of them to be answered
    tree = {"model": {"path": str(model)}, "engine": engine, "router": router}
    return write_config(directory, tree)


class Oracle:
    """What the timed engine must answer to a prompt, one sequence alone, no time taken."""

    def __init__(self) -> None:
        config = EngineConfig(kind="timed", kv_memory_mb=16)
        self._engine = TimedEngine(config, vocab_size=VOCAB, sleep=lambda _: None)

    def answer(self, request: GenerateRequest) -> list[int]:
        tokens = list(request.prompt_tokens)
        start = 0
        while len(tokens) < len(request.prompt_tokens) + request.sampling.max_tokens:
            blocks = range(-(-len(tokens) // 16))
            step = SeqStep(
                sequence_id=SequenceId(request.request_id),
                tokens=tokens,
                start=start,
                end=len(tokens),
                block_table=[BlockId(b) for b in blocks],
                sample=SamplingParams(max_tokens=1),
            )
            start = len(tokens)
            sampled = self._engine.step([step])[0]
            assert isinstance(sampled, Sampled)
            tokens.append(sampled.token)
        return tokens[len(request.prompt_tokens) :]


def mixed_requests(count: int, seed: int) -> list[GenerateRequest]:
    """Prompts of 5 to 1,500 tokens, half of them shared among a few families."""
    random = Random(seed)
    requests = []
    for i in range(count):
        length = random.choice([5, 50, 200, 500, 1500])
        family = random.randrange(5)
        shared = [(family * 7 + j) % VOCAB for j in range(length // 2)]
        own = [(i * 31 + j * j) % VOCAB for j in range(length - length // 2)]
        new_tokens = random.choice([1, 2, 8, 48])
        requests.append(make_request(f"r{seed}-{i}", [*shared, *own], max_tokens=new_tokens))
    return requests


async def answers(
    config: Path, workers: Sequence[WorkerProcess], requests: list[GenerateRequest]
) -> list[list[int]]:
    async with flow_over(config, workers) as flow:
        results = await asyncio.gather(*(collect(flow, request) for request in requests))
    return [output_tokens(items) for items in results]


def assert_clean(replies: Sequence[worker_pb2.StatsReply]) -> None:
    for reply in replies:
        assert reply.pool_error == ""
        assert (reply.open_legs, reply.blocks_held, reply.blocks_in_use) == (0, 0, 0)
        assert (reply.blocks_receiving, reply.blocks_quarantined) == (0, 0)
        assert not reply.leases


@pytest.fixture
def four(roomy: Path) -> Iterator[list[WorkerProcess]]:
    with worker_processes(roomy, ROLES) as workers:
        yield workers


async def test_five_hundred_at_once_all_finish_with_the_right_text(
    roomy: Path, four: list[WorkerProcess]
) -> None:
    requests = mixed_requests(500, seed=1)
    oracle = Oracle()
    got = await answers(roomy, four, requests)
    assert got == [oracle.answer(request) for request in requests]
    replies = await wait_until_idle(four)
    assert_clean(replies)
    assert all(bytes_read(reply) > 0 for reply in replies[2:])
    # A prompt that waits too long for its worker may move to another: no failure. Nor is a fetch of
    # a prefix that a prefill worker loses patience with; those two are not asked.
    failures = sum((Counter(p.failures) for reply in replies[2:] for p in reply.peers), Counter())
    assert not failures.keys() - {"withdrawn", "cancelled"}


async def test_an_arena_far_too_small_for_all_at_once_only_makes_them_wait(
    model: Path, tmp_path: Path
) -> None:
    config = timed_config(model, tmp_path, kv_memory_mb=1)  # 4,096 tokens
    requests = mixed_requests(120, seed=2)
    oracle = Oracle()
    with worker_processes(config, ROLES) as workers:
        got = await answers(config, workers, requests)
        assert_clean(await wait_until_idle(workers))
    assert got == [oracle.answer(request) for request in requests]


async def test_killed_workers_cost_a_pause_and_no_text(
    roomy: Path, four: list[WorkerProcess]
) -> None:
    requests = [
        make_request(f"k{i}", [(i * 13 + j) % VOCAB for j in range(100)], max_tokens=150)
        for i in range(40)
    ]
    oracle = Oracle()
    async with flow_over(roomy, four) as flow:
        running = asyncio.gather(*(collect(flow, request) for request in requests))
        await started(four[2])
        four[2].kill()
        four[0].kill()
        results = await running
    assert [output_tokens(items) for items in results] == [oracle.answer(r) for r in requests]
    attempts = [timings.attempts for items in results if (timings := items[-1].timings)]
    assert max(attempts) > 1
    assert_clean(await wait_until_idle([four[1], four[3]]))


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    roomy: Path, four: list[WorkerProcess]
) -> None:
    requests = mixed_requests(100, seed=3)
    random = Random(4)
    async with flow_over(roomy, four) as flow:

        async def leave_early(request: GenerateRequest) -> None:
            try:
                async with asyncio.timeout(random.uniform(0, 1.0)):
                    await collect(flow, request)
            except TimeoutError:
                pass

        await asyncio.gather(*(leave_early(request) for request in requests))
        assert_clean(await wait_until_idle(four))


async def started(worker: WorkerProcess) -> None:
    """Wait until the worker decodes something."""
    async with asyncio.timeout(30):
        while (await stats(worker)).load.running == 0:
            await asyncio.sleep(0.01)


async def test_a_worker_that_hangs_is_left_within_its_silence(
    roomy: Path, four: list[WorkerProcess]
) -> None:
    requests = [
        make_request(f"h{i}", [(i * 17 + j) % VOCAB for j in range(100)], max_tokens=100)
        for i in range(12)
    ]
    oracle = Oracle()
    async with flow_over(roomy, four) as flow:
        running = asyncio.gather(*(collect(flow, request) for request in requests))
        await started(four[2])
        four[2].process.send_signal(signal.SIGSTOP)
        try:
            results = await running
        finally:
            four[2].process.send_signal(signal.SIGCONT)
        assert_clean(await wait_until_idle(four))
    assert [output_tokens(items) for items in results] == [oracle.answer(r) for r in requests]


async def test_a_worker_told_to_stop_finishes_what_it_has(
    roomy: Path, four: list[WorkerProcess]
) -> None:
    requests = [
        make_request(f"s{i}", [(i * 19 + j) % VOCAB for j in range(100)], max_tokens=80)
        for i in range(12)
    ]
    oracle = Oracle()
    async with flow_over(roomy, four) as flow:
        running = asyncio.gather(*(collect(flow, request) for request in requests))
        await started(four[2])
        four[2].process.terminate()
        results = await running
    assert await asyncio.to_thread(four[2].process.wait, 20) == 0
    assert [output_tokens(items) for items in results] == [oracle.answer(r) for r in requests]
    assert {items[-1].timings.attempts for items in results if items[-1].timings} == {1}
