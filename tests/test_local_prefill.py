"""A decode worker takes prompts that would wait for the prefill worker, through real processes."""

import asyncio
from pathlib import Path

import pytest

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
