"""A running answer moves between real processes over real NIXL, and what may befall it on the way.

The timed engine verifies the KV that arrived before every token it emits. The worst moments are
reached exactly: workers stand still inside a step or a read until the test lets them go on.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.ids import WorkerId
from router.flow import Flow
from router.types import GenerateRequest, MigrationReport
from tests.driving import Reference, random_prompt
from tests.faults.fault import Fault
from tests.faults.handle import WorkerHandle
from tests.faults.rig import VISIBLE_S, Answer, Asked, Rig, Shape, running_rig
from tests.faults.zygote import Zygote
from tests.models import write_checkpoint
from tests.processes import (
    WorkerProcess,
    collect,
    flow_over,
    make_request,
    output_tokens,
    wait_until_idle,
    worker_processes,
    write_config,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

SILENCE_S = 2.5
"""More than twice a heartbeat: an engine that a test has stopped is not a worker that hangs."""
ONE_PAIR = Shape(workers=("p0", "d0", "d1"), silence_s=SILENCE_S)
MAX_TOKENS = 300
LONG_S = 20.0


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


# -- the worst moments ----------------------------------------------------------------------------


@dataclass(slots=True)
class Scene:
    """An answer that decodes at `source`, whose engine stands inside a step."""

    rig: Rig
    asked: Asked
    migrating: "asyncio.Task[MigrationReport]"

    @property
    def source(self) -> WorkerHandle:
        return self.rig.workers["d0"]

    @property
    def destination(self) -> WorkerHandle:
        return self.rig.workers["d1"]

    async def in_the_copy(self) -> None:
        """Half of the first read has arrived."""
        await self.destination.arm(Fault.IN_READ, 1)
        await self.begin()
        await self.destination.hit(Fault.IN_READ, 1)

    async def copied(self) -> None:
        """All full blocks are there, and the source knows: its next step is its last."""
        await self.destination.arm(Fault.AFTER_READ, 1)
        await self.begin()
        await self.destination.hit(Fault.AFTER_READ, 1)
        await self.destination.go(Fault.AFTER_READ)
        for handle in (self.destination, self.source, self.destination, self.source):
            await handle.stats()  # longer than Ready needs

    async def stopped(self) -> None:
        """The source stands still for its last blocks, of which the read is not posted yet."""
        await self.copied()
        await self.destination.arm(Fault.BEFORE_READ, 1)
        await self.source.go(Fault.IN_STEP)
        await self.destination.hit(Fault.BEFORE_READ, 1)
        (lease,) = (await self.source.stats()).leases
        assert lease.expires_in_s >= 0, "not the last announcement"

    async def moved(self) -> None:
        """The destination has spoken, and stands inside a later step."""
        await self.begin()
        await self.source.go(Fault.IN_STEP)
        report = await self.migrating
        assert (report.moved, report.reason) == (True, "")
        await self.destination.arm(Fault.IN_STEP, 1)
        await self.destination.hit(Fault.IN_STEP, 1)

    async def begin(self) -> None:
        """Make the control call."""
        self.migrating = asyncio.create_task(migrate(self.rig.flow, self.asked.request, "d1"))

    async def go_on(self) -> None:
        """Open every gate of whoever can hear it."""
        for handle in self.rig.workers.values():
            for gate in (Fault.IN_READ, Fault.BEFORE_READ, Fault.IN_STEP):
                await handle.go(gate)

    async def answer(self) -> Answer:
        """The whole answer; the rig's own check says that it is right."""
        await asyncio.wait([self.asked.answer], timeout=LONG_S)
        answer = self.asked.answer.result()
        self.rig.assert_right(answer)
        return answer


Moment = Callable[[Scene], Awaitable[None]]
BEFORE: list[Moment] = [Scene.in_the_copy, Scene.copied, Scene.stopped]
MOMENTS: list[Moment] = [*BEFORE, Scene.moved]


def name_of(moment: Moment) -> str:
    return getattr(moment, "__name__", "")


async def migrate(flow: Flow, request: GenerateRequest, to: str | None) -> MigrationReport:
    worker_id = None if to is None else WorkerId(to)
    return await flow.migrate(request.request_id, 0, worker_id, timeout_s=LONG_S)


@asynccontextmanager
async def scene(zygote: Zygote, **shape: Any) -> AsyncIterator[Scene]:
    async with running_rig(zygote, replace(ONE_PAIR, **shape)) as rig:
        await rig.answers(1)  # first contact is made
        async with rig.asking(1, max_tokens=MAX_TOKENS) as (asked,):
            await rig.until(lambda: asked.seen > 20, "tokens from the decode worker")
            await rig.workers["d0"].arm(Fault.IN_STEP, 1)
            await rig.workers["d0"].hit(Fault.IN_STEP, 1)
            never = asyncio.create_task(asyncio.Event().wait())
            s = Scene(rig, asked, never)  # type: ignore[arg-type]
            try:
                yield s
            finally:
                for task in (never, s.migrating):
                    task.cancel()
                await asyncio.gather(never, s.migrating, return_exceptions=True)


@contextmanager
def stopped_process(handle: WorkerHandle) -> Iterator[None]:
    handle.stop()
    try:
        yield
    finally:
        handle.resume()


async def test_it_moves(zygote: Zygote) -> None:
    async with scene(zygote) as s:
        await s.moved()
        await s.go_on()
        answer = await s.answer()
        assert answer.attempts == ("ok",)
        assert answer.end is not None
        assert answer.end.timings.decode_worker == "d1"
        assert answer.end.timings.migrations == 1
        await s.rig.free()


@pytest.mark.parametrize("moment", BEFORE, ids=name_of)
async def test_a_destination_killed_before_the_move_is_not_missed(
    zygote: Zygote, moment: Moment
) -> None:
    async with scene(zygote) as s:
        await moment(s)
        await s.rig.kill("d1")
        await s.go_on()
        assert not (await s.migrating).moved
        assert (await s.answer()).attempts == ("ok",)
        await s.rig.free()


@pytest.mark.parametrize("moment", BEFORE, ids=name_of)
async def test_a_destination_that_hangs_before_the_move_is_left_alone(
    zygote: Zygote, moment: Moment
) -> None:
    async with scene(zygote) as s:
        await moment(s)
        with stopped_process(s.destination):
            await s.source.go(Fault.IN_STEP)
            report = await s.migrating
            assert not report.moved
            assert (await s.answer()).attempts == ("ok",)
            await s.rig.free(VISIBLE_S, ["p0", "d0"])
        await s.rig.back("d1")
        await s.go_on()
        await s.rig.free()


async def test_a_destination_killed_after_the_move_costs_an_attempt(zygote: Zygote) -> None:
    async with scene(zygote) as s:
        await s.moved()
        await s.rig.kill("d1")
        assert (await s.answer()).attempts == ("worker_lost", "ok")
        await s.rig.free()


async def test_a_destination_that_hangs_after_the_move_costs_an_attempt(zygote: Zygote) -> None:
    async with scene(zygote) as s:
        await s.moved()
        with stopped_process(s.destination):
            assert (await s.answer()).attempts == ("worker_lost", "ok")
        await s.rig.back("d1")
        await s.go_on()
        await s.rig.free()


@pytest.mark.parametrize("moment", BEFORE, ids=name_of)
async def test_a_source_killed_before_the_move_costs_an_attempt(
    zygote: Zygote, moment: Moment
) -> None:
    async with scene(zygote) as s:
        await moment(s)
        await s.rig.kill("d0")
        await s.go_on()
        assert not (await s.migrating).moved
        assert (await s.answer()).attempts == ("worker_lost", "ok")
        await s.rig.free()


@pytest.mark.parametrize("moment", BEFORE, ids=name_of)
async def test_a_source_that_hangs_before_the_move_costs_an_attempt(
    zygote: Zygote, moment: Moment
) -> None:
    async with scene(zygote) as s:
        await moment(s)
        with stopped_process(s.source):
            for gate in (Fault.IN_READ, Fault.BEFORE_READ):
                await s.destination.go(gate)
            assert not (await s.migrating).moved
            assert (await s.answer()).attempts == ("worker_lost", "ok")
            await s.rig.free(VISIBLE_S, ["p0", "d1"])
        await s.rig.back("d0")
        await s.go_on()
        await s.rig.free()


@pytest.mark.parametrize("how", ["kill", "hang"])
async def test_a_source_lost_after_the_move_is_not_missed(zygote: Zygote, how: str) -> None:
    async with scene(zygote) as s:
        await s.moved()
        if how == "kill":
            await s.rig.kill("d0")
            await s.go_on()
            assert (await s.answer()).attempts == ("ok",)
        else:
            with stopped_process(s.source):
                await s.destination.go(Fault.IN_STEP)
                assert (await s.answer()).attempts == ("ok",)
            await s.rig.back("d0")
        await s.rig.free()


@pytest.mark.parametrize("moment", MOMENTS, ids=name_of)
async def test_a_client_that_leaves_leaves_nothing_behind(zygote: Zygote, moment: Moment) -> None:
    async with scene(zygote) as s:
        await moment(s)
        s.asked.leave()
        await asyncio.wait([s.asked.answer])
        assert (await s.migrating).moved == (moment is Scene.moved)
        await s.go_on()
        await s.rig.free()


@pytest.mark.parametrize(
    ("fault", "times"), [(Fault.ANNOUNCEMENT_LOST, 1), (Fault.ANNOUNCEMENT_DOUBLED, 3)]
)
async def test_announcements_lost_or_doubled_do_not_stop_a_move(
    zygote: Zygote, fault: Fault, times: int
) -> None:
    async with scene(zygote) as s:
        await s.source.arm(fault, times)
        await s.copied()
        await s.source.hit(fault, 1)
        await s.source.go(Fault.IN_STEP)
        assert (await s.migrating).moved
        assert (await s.answer()).attempts == ("ok",)
        await s.rig.free()


@pytest.mark.parametrize(
    ("worker", "fault"),
    [
        ("d0", Fault.STREAM_BROKEN),
        ("d1", Fault.READ_FAILS_AT_ONCE),
        ("d1", Fault.READ_FAILS_LATER),
    ],
)
async def test_a_copy_that_fails_is_not_missed(zygote: Zygote, worker: str, fault: Fault) -> None:
    async with scene(zygote) as s:
        await s.rig.workers[worker].arm(fault, 1)
        await s.begin()
        assert not (await s.migrating).moved
        await s.source.go(Fault.IN_STEP)
        assert (await s.answer()).attempts == ("ok",)
        await s.rig.free()


@pytest.mark.parametrize(
    ("fault", "times", "attempts"),
    [
        (Fault.LAST_ANNOUNCEMENT_LOST, 1, ("ok",)),
        (Fault.CLOSE_LOST, 1, ("ok",)),
        (Fault.CLOSED_LOST, 1, ("ok",)),
        (Fault.CLOSED_LOST, 9, ("kv_transfer_failed", "ok")),
    ],
)
async def test_what_is_lost_at_the_stop_is_asked_again(
    zygote: Zygote, fault: Fault, times: int, attempts: tuple[str, ...]
) -> None:
    """Without any answer to its closing question the destination has nothing, and the source has
    let go.
    """
    async with scene(zygote) as s:
        await s.copied()
        await s.source.arm(fault, times)
        await s.source.go(Fault.IN_STEP)
        await s.source.hit(fault, 1)
        assert (await s.answer()).attempts == attempts
        assert ((await s.migrating).reason == "") == (len(attempts) == 1)
        await s.source.arm(fault, 0)
        await s.rig.free()


async def test_blocks_that_arrive_damaged_are_never_continued_from(zygote: Zygote) -> None:
    async with scene(zygote, verify="all") as s:
        await s.destination.arm(Fault.BYTE_FLIPPED, 1)
        await s.copied()
        await s.source.go(Fault.IN_STEP)
        assert (await s.answer()).attempts == ("kv_transfer_failed", "ok")
        await s.rig.free()


async def test_a_destination_without_memory_for_it_is_not_moved_to(zygote: Zygote) -> None:
    async with running_rig(zygote, replace(ONE_PAIR, num_blocks=64)) as rig:
        rig.prefer("d1")
        asked = [rig.ask(rig.request(prompt_tokens=440, max_tokens=200)) for _ in range(2)]
        await rig.until(lambda: all(one.seen > 1 for one in asked), "tokens")
        await rig.workers["d1"].arm(Fault.IN_STEP, 1)
        await rig.workers["d1"].hit(Fault.IN_STEP, 1)
        rig.prefer("d0")
        asked.append(rig.ask(rig.request(max_tokens=MAX_TOKENS)))
        await rig.until(lambda: asked[-1].seen > 1, "tokens")
        report = await migrate(rig.flow, asked[-1].request, "d1")
        assert (report.moved, "no memory" in report.reason) == (False, True), report
        await rig.workers["d1"].go(Fault.IN_STEP)
        for one in asked:
            answer = await one.answer
            rig.assert_right(answer)
            assert answer.attempts == ("ok",)
        await rig.free()


# -- many at once ---------------------------------------------------------------------------------


async def test_twenty_answers_move_both_ways_at_once_again_and_again(zygote: Zygote) -> None:
    async with running_rig(zygote, ONE_PAIR) as rig:
        asked: list[Asked] = []
        for name in ("d0", "d1"):
            rig.prefer(name)
            few = [
                rig.ask(rig.request(prompt_tokens=16 + 7 * i, max_tokens=400)) for i in range(10)
            ]
            await rig.until(lambda few=few: all(one.seen > 2 for one in few), "tokens")
            asked += few
        moved = 0
        while not all(one.answer.done() for one in asked):
            rounds = await asyncio.gather(
                *(migrate(rig.flow, one.request, None) for one in asked), return_exceptions=True
            )
            reports = [r for r in rounds if isinstance(r, MigrationReport)]
            assert all(isinstance(r, MigrationReport | InvalidRequest) for r in rounds)
            moved += sum(r.moved for r in reports)
        for one in asked:
            answer = one.answer.result()
            rig.assert_right(answer)
            assert answer.attempts == ("ok",)
        assert moved >= 20
        await rig.free()


async def test_a_worker_that_drains_is_emptied_by_moving_its_answers(zygote: Zygote) -> None:
    async with running_rig(zygote, ONE_PAIR) as rig:
        rig.prefer("d0")
        asked = [rig.ask(rig.request(max_tokens=400)) for _ in range(5)]
        await rig.until(lambda: all(one.seen > 2 for one in asked), "tokens")
        reports = await asyncio.gather(*(migrate(rig.flow, one.request, "d1") for one in asked))
        assert all(report.moved for report in reports)
        assert not all(one.answer.done() for one in asked)
        await rig.free(VISIBLE_S, ["d0"])
        for one in asked:
            rig.assert_right(await one.answer)
        await rig.free()


# -- a real model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llamas:
    """A prefill and two decode processes with a small real model, and that model in the library."""

    config: Path
    workers: list[WorkerProcess]
    reference: Reference


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llamas]:
    directory = tmp_path_factory.mktemp("llamas")
    checkpoint = write_checkpoint(directory / "model", "llama")
    engine = {"kv_memory_mb": 48, "step_tokens": 256, "dtype": "float32"}
    config = write_config(directory, {"model": {"path": str(checkpoint)}, "engine": engine})
    with worker_processes(config, ["prefill", "decode", "decode"]) as workers:
        yield Llamas(config, workers, Reference(checkpoint))


async def moved_answer(
    flow: Flow, request: GenerateRequest, at: Sequence[int]
) -> tuple[list[int], list[MigrationReport]]:
    """The answer to a request that is told to move when so many tokens are out."""
    tokens: list[int] = []
    moves: list[asyncio.Task[MigrationReport]] = []
    async with aclosing(flow.generate(request)) as items:
        async for item in items:
            tokens += item.tokens
            if len(moves) < len(at) and len(tokens) >= at[len(moves)]:
                moves.append(asyncio.create_task(migrate(flow, request, None)))
    return tokens, [await move for move in moves]


@pytest.mark.parametrize("context_tokens", [16, 250, 2000])
async def test_a_greedy_answer_is_the_librarys_wherever_it_moves(
    llamas: Llamas, context_tokens: int
) -> None:
    prompt = random_prompt(context_tokens, seed=1)
    wanted = llamas.reference.generate(prompt, 64).tokens
    moved = 0
    async with flow_over(llamas.config, llamas.workers) as flow:
        for at in ([2], [30], [60], [2, 16, 30, 44]):
            name = f"g{context_tokens}-{at}"
            request = make_request(name, prompt, max_tokens=64)
            tokens, reports = await moved_answer(flow, request, at)
            assert tokens == wanted
            moved += sum(report.moved for report in reports)
    assert moved >= 6
    for reply in await wait_until_idle(llamas.workers):
        assert (reply.pool_error, reply.open_legs, reply.blocks_held) == ("", 0, 0)


async def test_a_sampled_answer_is_the_same_wherever_it_moves(llamas: Llamas) -> None:
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 64}
    prompts = [random_prompt(40 + 60 * i, seed=i) for i in range(4)]
    async with flow_over(llamas.config, llamas.workers) as flow:
        for i, prompt in enumerate(prompts):
            still = await collect(flow, make_request(f"s{i}", prompt, **sampled))
            request = make_request(f"m{i}", prompt, **sampled)
            tokens, reports = await moved_answer(flow, request, [3 + i, 25, 45])
            assert tokens == output_tokens(still)
            assert any(report.moved for report in reports)
    for reply in await wait_until_idle(llamas.workers):
        assert (reply.pool_error, reply.open_legs, reply.blocks_held) == ("", 0, 0)
