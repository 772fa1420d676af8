"""A control call moves a running answer to another decode worker; the client sees only a pause."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from core.errors import BatonError, InvalidRequest, NoWorkers
from core.ids import RequestId, Role, WorkerId
from decode_worker.migration import Migration
from kv_transfer.leases import Lease
from router.types import MigrationReport, Timings
from tests.builders import (
    BLOCK_BYTES,
    Cluster,
    RouterEnd,
    ServedWorker,
    decode_submit,
    expected_tokens,
    make_prompt,
    make_request,
    make_settings,
    running_cluster,
    until,
    until_idle,
)
from tests.router.test_flow import Reading, busy

PROMPT = make_prompt(22)
MAX_TOKENS = 40
NAME = RequestId("req")


@dataclass(slots=True)
class Scene:
    """One answer that decodes at `source`, a step per permit; `other` is empty and gated too."""

    cluster: Cluster
    client: Reading
    source: ServedWorker
    other: ServedWorker
    group: asyncio.TaskGroup

    def migrate(
        self, to: str | None = None, timeout_s: float = 10.0
    ) -> "asyncio.Task[MigrationReport]":
        worker_id = None if to is None else WorkerId(to)
        return self.group.create_task(
            self.cluster.flow.migrate(NAME, 0, worker_id, timeout_s=timeout_s)
        )

    async def refused(self, to: str | None = None) -> BatonError:
        with pytest.raises(BatonError) as caught:
            await self.cluster.flow.migrate(NAME, 0, None if to is None else WorkerId(to), 10.0)
        return caught.value

    async def copied(self) -> Lease:
        """The destination has all that was announced; the source's next step is its last."""
        leases = self.source.worker.leases

        def is_ready() -> bool:
            listeners = [lease.listener for lease in leases.all()]
            return any(isinstance(one, Migration) and one.ready for one in listeners)

        await until(is_ready, "a copy")
        return leases.all()[-1]

    async def stopped(self) -> None:
        """The source stands still for the last block, which the destination reads now."""
        lease = await self.copied()
        self.source.gate.allow(1)
        await until(lambda: lease.tokens is not None, "the stop")

    async def over_there(self, migrating: "asyncio.Task[MigrationReport]") -> MigrationReport:
        """Lets source and destination take one step each; then the answer is the destination's."""
        await self.stopped()
        self.other.gate.allow(1)
        report = await migrating
        self.source, self.other = self.other, self.source
        return report

    def open_gates(self) -> None:
        for served in self.cluster.decode:
            served.gate.open()

    async def right_to_the_end(self, *, attempts: int, migrations: int) -> Timings:
        """The rest of the answer; on the way out nothing is left anywhere."""
        self.open_gates()
        assert await self.client.ended() == expected_tokens(PROMPT, MAX_TOKENS)
        timings = self.client.items[-1].timings
        assert timings is not None
        assert (timings.attempts, timings.migrations) == (attempts, migrations)
        return timings


@asynccontextmanager
async def scene(said: int = 3, **cluster_fields: Any) -> AsyncIterator[Scene]:
    """`said` tokens are out, the next step is in flight."""
    async with (
        running_cluster(gated_decode=True, **cluster_fields) as cluster,
        asyncio.TaskGroup() as group,
    ):
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=MAX_TOKENS))
        await until(lambda: bool(busy(cluster.decode)), "a decode leg")
        (source,) = busy(cluster.decode)
        source.gate.allow(said - 1)
        await client.said(said)
        others = [served for served in cluster.decode if served is not source]
        yield Scene(cluster, client, source, others[0] if others else source, group)
        await client.task
        living = [link.record.incarnation for link in cluster.fleet.links() if link.view]
        everybody = [*cluster.prefill, *cluster.decode]
        await until_idle(*(s.worker for s in everybody if s.record.incarnation in living))


# -- when all goes well ---------------------------------------------------------------------------


async def test_an_answer_moves_and_the_client_sees_its_text() -> None:
    async with scene() as s:
        source, other = s.source.record.worker_id, s.other.record.worker_id
        migrating = s.migrate()
        await s.copied()
        report = await s.over_there(migrating)
        assert (report.moved, report.reason) == (True, "")
        assert (report.source, report.destination) == (source, other)
        assert 0 < report.pause_s < report.total_s
        assert report.tokens_meanwhile == 1
        assert (report.transfer_blocks, report.transfer_bytes) == (7, 7 * BLOCK_BYTES)
        timings = await s.right_to_the_end(attempts=1, migrations=1)
        assert timings.decode_worker == other
        assert timings.transfer_blocks == 6  # of the hand-off after the prefill


async def test_an_answer_that_moved_away_takes_nothing_with_it_when_its_first_worker_dies() -> None:
    async with scene() as s:
        await s.over_there(s.migrate())
        await s.other.stop_serving()
        await until(lambda: len(s.cluster.fleet.pool(Role.DECODE).workers) == 1, "the loss noticed")
        await s.right_to_the_end(attempts=1, migrations=1)


async def test_there_and_back_and_there_again() -> None:
    async with scene(said=2) as s:
        for _ in range(3):
            assert (await s.over_there(s.migrate())).moved
        await s.right_to_the_end(attempts=1, migrations=3)


async def test_many_answers_move_both_ways_at_once() -> None:
    prompts = [make_prompt(20 + 9 * i, seed=i) for i in range(16)]
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        clients = [
            Reading(group, cluster, make_request(prompt, name=str(i), max_tokens=60))
            for i, prompt in enumerate(prompts)
        ]
        for served in cluster.decode:
            served.gate.allow(1)
        for client in clients:
            await client.said(1)
        await until(lambda: all(len(busy(cluster.decode)) == 2 for _ in "x"), "both at work")
        await until(lambda: sum(s.worker.load().running for s in cluster.decode) == 16, "decoding")
        moves = [
            group.create_task(cluster.flow.migrate(RequestId(str(i)), 0, None, 10.0))
            for i in range(16)
        ]
        await until(
            lambda: sum(len(s.worker.leases.all()) for s in cluster.decode) == 16, "16 offers"
        )
        for served in cluster.decode:
            served.gate.open()
        answers = [await client.ended() for client in clients]
        assert answers == [expected_tokens(prompt, 60) for prompt in prompts]
        reports = [await move for move in moves]
        assert {r.source for r in reports} == {"decode-0", "decode-1"}
        assert any(r.moved for r in reports)
        await until_idle(*cluster.workers)


# -- what cannot be tried -------------------------------------------------------------------------


async def test_only_a_running_answer_can_be_moved() -> None:
    async with running_cluster() as cluster:
        with pytest.raises(InvalidRequest, match="no sequence req/0 runs"):
            await cluster.flow.migrate(NAME, 0, None, 1.0)


async def test_there_must_be_somewhere_else_to_go() -> None:
    async with scene() as s:
        assert isinstance(await s.refused("decode-9"), NoWorkers)
        assert isinstance(await s.refused(s.source.record.worker_id), NoWorkers)
        assert isinstance(await s.refused("prefill-0"), NoWorkers)
        await s.right_to_the_end(attempts=1, migrations=0)


async def test_one_move_at_a_time() -> None:
    async with scene() as s:
        first = s.migrate(s.other.record.worker_id)
        await s.copied()
        assert isinstance(await s.refused(), InvalidRequest)
        assert (await s.over_there(first)).moved
        await s.right_to_the_end(attempts=1, migrations=1)


async def test_an_answer_still_in_its_prefill_stays() -> None:
    async with running_cluster(gated_prefill=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=8))
        await until(lambda: bool(busy(cluster.decode)), "a decode leg")
        report = await cluster.flow.migrate(NAME, 0, None, 10.0)
        assert (report.moved, report.reason) == (False, "it does not run now")
        for served in cluster.prefill:
            served.gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 8)
        await until_idle(*cluster.workers)


# -- what goes wrong on the way -------------------------------------------------------------------


async def test_a_destination_without_memory_changes_nothing() -> None:
    async with scene() as s:
        pool = s.other.worker.pool
        taken = pool.allocate(pool.num_blocks - 3) or []
        report = await s.migrate()
        assert not report.moved
        assert "no memory" in report.reason
        pool.release(taken)
        assert (await s.over_there(s.migrate())).moved
        await s.right_to_the_end(attempts=1, migrations=1)


async def test_a_destination_that_says_no_changes_nothing() -> None:
    async with scene(decode_settings=make_settings(max_sequences=1)) as s:
        sink = RouterEnd(s.other.worker)
        s.other.worker.handle(sink.outlet, decode_submit(1, make_prompt(5), None))
        report = await s.migrate()
        assert (report.moved, report.reason) == (False, "1 sequences are held already")
        s.open_gates()
        await sink.answered(1)
        await s.right_to_the_end(attempts=1, migrations=0)


async def test_a_destination_lost_in_the_copy_changes_nothing() -> None:
    async with scene() as s:
        migrating = s.migrate()
        await s.copied()
        await s.other.stop_serving()
        report = await migrating
        assert not report.moved
        assert "was lost" in report.reason
        await s.right_to_the_end(attempts=1, migrations=0)


async def test_a_destination_lost_after_the_move_costs_an_attempt() -> None:
    async with scene() as s:
        migrating = s.migrate()
        await s.stopped()
        await until(lambda: s.source.worker.open_legs == 0, "moved")
        await s.other.stop_serving()
        report = await migrating
        assert report.moved
        assert "was lost" in report.reason
        await s.right_to_the_end(attempts=2, migrations=1)


async def test_a_source_lost_in_the_copy_costs_an_attempt() -> None:
    async with scene() as s:
        migrating = s.migrate()
        await s.copied()
        await s.source.stop_serving()
        report = await migrating
        assert not report.moved
        # of its two streams, to the router and to the destination, either may be seen to end first
        assert "was lost" in report.reason or "stream to the KV owner" in report.reason
        await s.right_to_the_end(attempts=2, migrations=0)


async def test_kv_that_arrives_wrong_costs_an_attempt() -> None:
    async with scene() as s:
        migrating = s.migrate()
        await s.copied()
        s.other.engine.arena.data[:] = 0
        s.source.gate.allow(1)
        s.other.gate.allow(1)
        report = await migrating
        assert report.moved
        assert report.reason
        await s.right_to_the_end(attempts=2, migrations=1)


async def test_an_answer_that_ends_first_was_not_moved() -> None:
    async with scene(said=MAX_TOKENS - 1) as s:
        migrating = s.migrate()
        await s.copied()
        s.source.gate.open()
        report = await migrating
        assert (report.moved, report.reason) == (False, "the answer ended first")
        await s.right_to_the_end(attempts=1, migrations=0)


async def test_a_move_that_takes_too_long_is_given_up_and_may_be_tried_again() -> None:
    async with scene() as s:
        report = await s.migrate(timeout_s=0.05)
        assert (report.moved, report.reason) == (False, "it was not done within 0.05 s")
        await until(lambda: not s.source.worker.leases.all(), "given up there")
        assert (await s.over_there(s.migrate())).moved
        await s.right_to_the_end(attempts=1, migrations=1)


async def test_a_caller_that_leaves_calls_its_move_off() -> None:
    async with scene() as s:
        migrating = s.migrate()
        await s.copied()
        migrating.cancel()
        await until(lambda: s.other.worker.open_legs == 0, "given up there")
        await s.right_to_the_end(attempts=1, migrations=0)


@pytest.mark.parametrize("when", ["copied", "stopped"])
async def test_a_client_that_leaves_on_the_way_leaves_nothing_behind(when: str) -> None:
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=MAX_TOKENS))
        await until(lambda: bool(busy(cluster.decode)), "a decode leg")
        (source,) = busy(cluster.decode)
        (other,) = (served for served in cluster.decode if served is not source)
        source.gate.allow(2)
        await client.said(3)
        s = Scene(cluster, client, source, other, group)
        migrating = s.migrate()
        await (s.copied() if when == "copied" else s.stopped())
        client.task.cancel()
        report = await migrating
        assert report.reason
        await until(lambda: not busy([*cluster.prefill, *cluster.decode]), "no leg open")
        s.open_gates()
        await until_idle(*cluster.workers)
