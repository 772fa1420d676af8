"""A few streams through a real router process, with real stand-ins behind it."""

import asyncio
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.kept import Kept
from benchmarks.router.bench import BENCH
from benchmarks.router.client import chat_body
from benchmarks.router.direct import direct_to
from benchmarks.router.loops import Bodies, measure_loop, measure_stalls
from benchmarks.router.rig import Rig, RigHost, hosted
from benchmarks.run import choose_parts, find_bench
from benchmarks.types import PEERS, Run
from benchmarks.zygote import Zygote
from core.errors import InvalidRequest
from core.ids import Role


def quiet(text: str, done: int, total: int) -> None:
    """Progress nobody looks at."""


def bodies(rig: Rig, tokens: int) -> Bodies:
    return lambda number: chat_body(rig.model, rig.prompt(number, 200), tokens)


@pytest.fixture(scope="module")
def host() -> Iterator[RigHost]:
    """One router for all tests here, ended at the end."""
    with Zygote() as zygote, Kept() as kept:
        run = Run(quick=True, device="cpu", progress=quiet, zygote=zygote, kept=kept)
        first = hosted(run)
        assert hosted(run) is first, "parts of one run share it"
        yield first
    assert psutil.Process().children() == []


@pytest.mark.processes
def test_every_answer_through_the_router_has_its_tokens_and_costs_cpu(host: RigHost) -> None:
    async def measure(rig: Rig) -> None:
        loop = await measure_loop(rig, bodies(rig, 8), clients=3, answer_tokens=8, seconds=0.3)
        assert loop.answers >= 3
        assert loop.events_per_answer >= 8
        assert loop.cpu_us_per_answer > 0
        assert 0 < loop.ttft_ms_p50 <= loop.ttft_ms_p99

    host.run(measure)


@pytest.mark.processes
def test_what_was_asked_before_the_time_was_up_is_answered_and_counts(host: RigHost) -> None:
    async def measure(rig: Rig) -> None:
        loop = await measure_stalls(rig, bodies(rig, 16), 0.01, quick_acks=True)
        assert loop.answers == 4
        assert loop.events_per_answer >= 16

    host.run(measure)


@pytest.mark.processes
def test_the_worker_is_reached_without_the_router_too(host: RigHost) -> None:
    async def measure(rig: Rig) -> None:
        async with direct_to(rig.worker(Role.PREFILL).router_address) as worker:
            async with asyncio.timeout(10):
                assert await worker.ttft_s(tuple(range(64))) > 0

    host.run(measure)


def test_peers_are_measured_only_where_they_are_asked_for() -> None:
    assert not any(part.option for part in choose_parts(BENCH, ()))
    assert [part.name for part in choose_parts(BENCH, (), {PEERS})][-2:] == [
        "peers-16",
        "peers-128",
    ]
    assert [part.name for part in choose_parts(BENCH, ("peers-16",))] == ["peers-16"]


def test_a_bench_without_peers_says_so() -> None:
    with pytest.raises(InvalidRequest, match="bench transfer knows no peers"):
        choose_parts(find_bench("transfer"), (), {PEERS})


def test_all_keys_that_were_promised_are_there_once() -> None:
    keys = [key for part in BENCH.parts for key in part.keys]
    assert len(keys) == len(set(keys))
    assert {*keys} >= {
        "cpu_us_per_token",
        "cpu_us_per_request",
        "added_ttft_ms_p50",
        "added_ttft_ms_p99",
        "decision_us_p99_64",
        "decision_us_p99_1024",
        "index_bytes_per_block",
        "peers",
        "tokens_per_cpu_s",
    }
    assert next(part for part in BENCH.parts if "peers" in part.keys).otherwise == {"peers": {}}
