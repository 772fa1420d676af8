"""One worker serves a prompt alone, through real processes: a decode worker takes what would wait
for the prefill worker, a prefill worker keeps what it has cached.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from router.flow import Flow
from tests.builders import make_prompt
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

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

TIMED = {"prefill_base_ms": 30, "prefill_per_token_ms": 1, "prefill_per_token2_ms": 0}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(
        tmp_path,
        {
            "model": {"path": str(write_model(tmp_path))},
            "engine": {"kind": "timed", "kv_memory_mb": 4, "step_tokens": 64, "timed": TIMED},
            "slo": {"ttft_ms": 20_000, "tpot_ms": 2_000},
        },
    )


async def test_of_a_burst_the_decode_worker_computes_some_prompts_itself(config: Path) -> None:
    prompts = [make_prompt(100, seed) for seed in range(200, 208)]
    with worker_processes(config, ["prefill", "decode"]) as workers:
        async with flow_over(config, workers) as flow:
            for i in range(4):  # until what a prefill takes is known
                await collect(flow, make_request(f"warm-{i}", make_prompt(100, 100 + i)))
            answers = await asyncio.gather(
                *(collect(flow, make_request(f"r-{i}", p)) for i, p in enumerate(prompts))
            )
            again = [await collect(flow, make_request(f"s-{i}", p)) for i, p in enumerate(prompts)]
        timings = [answer[-1].timings for answer in answers]
        local = [t for t in timings if t is not None and t.prefill_worker == t.decode_worker]
        assert 0 < len(local) < len(prompts), "both workers compute some"
        assert all(t is not None and t.attempts == 1 for t in timings)
        assert [output_tokens(a) for a in answers] == [output_tokens(a) for a in again]
        for reply in await wait_until_idle(workers):
            assert (reply.open_legs, reply.blocks_held, reply.pool_error) == (0, 0, "")


STEPS = {**TIMED, "decode_base_ms": 30}


async def learned(flow: Flow) -> None:
    """What a prefill takes, and a decode step beside others: of these one in 0.25 s counts."""
    for i in range(5):
        await collect(flow, make_request(f"warm-{i}", make_prompt(100, 100 + i), max_tokens=12))


@asynccontextmanager
async def busy_decode(flow: Flow, workers: Sequence[WorkerProcess]) -> AsyncIterator[None]:
    """Answers run at the last worker meanwhile."""
    requests = [make_request(f"long-{i}", make_prompt(90, i), max_tokens=1000) for i in range(2)]
    running = [asyncio.create_task(collect(flow, request)) for request in requests]
    try:
        async with asyncio.timeout(10):
            while (await stats(workers[-1])).load.decoding < len(running):
                await asyncio.sleep(0.01)
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)


def steady(tmp_path: Path, **router: object) -> Path:
    tree = {
        "model": {"path": str(write_model(tmp_path))},
        "engine": {"kind": "timed", "kv_memory_mb": 4, "step_tokens": 64, "timed": STEPS},
        "router": router,
    }
    return write_config(tmp_path, tree)


async def test_an_answer_stays_at_the_prefill_worker_that_has_its_prompt(tmp_path: Path) -> None:
    config, prompt = steady(tmp_path), make_prompt(100, 7)
    with worker_processes(config, ["prefill", "decode"]) as workers:
        async with flow_over(config, workers) as flow, busy_decode(flow, workers):
            await learned(flow)
            await collect(flow, make_request("kept", prompt, max_tokens=1))
            stayed = await collect(flow, make_request("stays", prompt, max_tokens=12))
        (tmp_path / "split").mkdir()
        async with flow_over(steady(tmp_path / "split", local_prefill=False), workers) as flow:
            crossed = await collect(flow, make_request("crosses", prompt, max_tokens=12))
        for reply in await wait_until_idle(workers):
            assert (reply.open_legs, reply.blocks_held, reply.pool_error) == (0, 0, "")
    timings = [answer[-1].timings for answer in (stayed, crossed)]
    assert [(t.prefill_worker, t.decode_worker) for t in timings if t is not None] == [
        ("prefill-0", "prefill-0"),
        ("prefill-0", "decode-1"),
    ]
    assert output_tokens(stayed) == output_tokens(crossed)


async def test_an_answer_that_stayed_goes_on_elsewhere_when_its_worker_is_killed(
    tmp_path: Path,
) -> None:
    config, prompt = steady(tmp_path), make_prompt(100, 7)
    with worker_processes(config, ["prefill", "prefill", "decode"]) as workers:
        async with flow_over(config, workers) as flow:
            async with busy_decode(flow, workers):
                await learned(flow)
                kept = await collect(flow, make_request("kept", prompt, max_tokens=1))
                where = kept[-1].timings
                assert where is not None
                holder = next(w for w in workers if w.record.worker_id == where.prefill_worker)
                answer = asyncio.create_task(
                    collect(flow, make_request("stays", prompt, max_tokens=60))
                )
                async with asyncio.timeout(10):
                    while not (await stats(holder)).load.decoding:
                        await asyncio.sleep(0.01)
                holder.kill()
                items = await answer
            whole = await collect(flow, make_request("whole", prompt, max_tokens=60))
        left = [worker for worker in workers if worker is not holder]
        for reply in await wait_until_idle(left):
            assert (reply.open_legs, reply.blocks_held, reply.pool_error) == (0, 0, "")
    timings = items[-1].timings
    assert timings is not None
    assert timings.attempts == 2
    assert timings.decode_worker != holder.record.worker_id
    assert output_tokens(items) == output_tokens(whole)
