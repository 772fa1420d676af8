"""Queued prompts leave a prefill worker that stands still, through real processes.

The worker takes a queue and then stays in one engine step until it is told to go on: what has not
begun there is served by the other, what has begun waits, and every text is the engine's.
"""

import asyncio
import signal
from pathlib import Path

import pytest

from core.clock import SystemClock
from tests.builders import make_prompt
from tests.processes import (
    collect,
    flow_over,
    make_request,
    output_tokens,
    wait_until_idle,
    worker_processes,
    write_config,
    write_model,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

STEP_TOKENS = 64
"""Less than a prompt, so that of those queued at the worker one or two begin."""
TIMED = {"prefill_base_ms": 30, "prefill_per_token_ms": 1, "prefill_per_token2_ms": 0}
WAIT_S = 30.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    engine = {"kind": "timed", "kv_memory_mb": 4, "step_tokens": STEP_TOKENS, "timed": TIMED}
    return write_config(tmp_path, {"model": {"path": str(write_model(tmp_path))}, "engine": engine})


async def test_prompts_queued_at_a_worker_that_stands_still_are_served_by_another(
    config: Path,
) -> None:
    before = [make_prompt(100, seed) for seed in range(100, 108)]
    prompts = [make_prompt(100, seed) for seed in range(200, 208)]
    with worker_processes(config, ["prefill:halting", "prefill", "decode"]) as workers:
        halting, other, _ = workers
        async with flow_over(config, workers) as flow, asyncio.TaskGroup() as group:
            wanted = [
                output_tokens(await collect(flow, make_request(f"warm-{i}", prompt)))
                for i, prompt in enumerate(before)
            ]
            halting.process.send_signal(signal.SIGUSR1)
            tasks = [
                group.create_task(collect(flow, make_request(f"r-{i}", prompt)))
                for i, prompt in enumerate(prompts)
            ]
            await _until_all_but_few_are_done(tasks)
            assert 1 <= sum(not task.done() for task in tasks) <= 2, "some began where it halted"
            halting.process.send_signal(signal.SIGUSR2)
            answers = [await task for task in tasks]
            again = [
                output_tokens(await collect(flow, make_request(f"s-{i}", prompt)))
                for i, prompt in enumerate(prompts)
            ]
        assert [output_tokens(answer) for answer in answers] == again
        assert all(len(tokens) == 16 for tokens in (*wanted, *again))
        timings = [answer[-1].timings for answer in answers]
        moved = [t for t in timings if t is not None and t.attempts == 2]
        assert moved, "nothing was queued there"
        assert {t.prefill_worker for t in moved} == {other.record.worker_id}
        for reply in await wait_until_idle(workers):
            assert (reply.open_legs, reply.blocks_held, reply.pool_error) == (0, 0, "")


async def _until_all_but_few_are_done(tasks: list["asyncio.Task[object]"]) -> None:
    """Until no more than two are left: what has begun there."""
    give_up_s = SystemClock().now_s() + WAIT_S
    while sum(not task.done() for task in tasks) > 2:
        assert SystemClock().now_s() < give_up_s, [task.done() for task in tasks]
        await asyncio.sleep(0.02)
