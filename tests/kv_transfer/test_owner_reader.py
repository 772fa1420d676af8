"""A hand-off of a prefill: what arrives, what goes wrong, and the owner's door."""

import asyncio
import logging
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch

from core.errors import DeadlineExceeded, TransferCause, TransferFailed
from core.ids import BlockId, Incarnation, LeaseId, ShardId
from core.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR
from core.stream import MessageStream, dial
from kv_transfer import bound
from kv_transfer.bound import BoundLease
from kv_transfer.client import PeerConnection
from kv_transfer.codec import from_reader_to_wire
from kv_transfer.leases import Lease, reader_name
from kv_transfer.messages import Announce, Bind, LeaseOutcome
from kv_transfer.metrics import LeaseEnd
from kv_transfer.plan import ReadPlan
from kv_transfer.reader import Pulled
from kv_transfer.transport import QueuedRead, ReadStats, Sealed
from tests.builders import NEWER_MESSAGE, soon, until
from tests.kv_transfer.halves import (
    LAST,
    LAYOUT,
    LEASE_S,
    NUM_BLOCKS,
    SEQUENCE,
    Pair,
    failure,
    pair,
)
from wire import peer_pb2


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[LeaseId]:
    """Of which lease the closing question was asked, in order."""
    asked: list[LeaseId] = []
    ask = PeerConnection.ask_close

    def note(self: PeerConnection, lease: BoundLease, verify: tuple[BlockId, ...]) -> None:
        asked.append(lease.lease_id)
        ask(self, lease, verify)

    monkeypatch.setattr(PeerConnection, "ask_close", note)
    return asked


# -- what arrives -------------------------------------------------------------------------------


async def test_blocks_are_read_while_later_chunks_still_run() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(5)
        pulling = group.create_task(p.pull(lease, 5))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.reads == 1)
        p.owner.owner.announce(lease, blocks[2:3])
        await until(lambda: p.half.transport.reads == 2)
        assert not pulling.done()
        p.owner.owner.finish(lease, blocks[3:], LAST, ended=False)
        pulled = await soon(pulling)
        assert isinstance(pulled, Pulled)
        assert (pulled.tokens, pulled.ended) == ((77,), False)
        assert pulled.stats.nbytes == 5 * LAYOUT.block_bytes
        p.assert_arrived(pulled, blocks)
        await p.owner_holds_nothing()
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1


async def test_blocks_the_reader_has_already_are_not_read() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(5)
        pulled = await p.pull(lease, 5, cached=3)
        assert pulled.cached_blocks == 3
        assert pulled.stats.nbytes == 2 * LAYOUT.block_bytes
        p.assert_arrived(pulled, blocks[3:])


async def test_a_reader_that_has_everything_reads_nothing_and_still_asks() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(4)
        pulled = await p.pull(lease, 4, cached=4)
        assert (pulled.cached_blocks, pulled.stats.nbytes, pulled.tokens) == (4, 0, (77,))
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1


async def test_binding_before_the_wanted_blocks_exist_waits_for_them() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(5)
        p.owner.owner.announce(lease, blocks[:2])
        pulling = group.create_task(p.pull(lease, 5, cached=3))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[2:4])
        p.owner.owner.finish(lease, blocks[4:], LAST, ended=False)
        p.assert_arrived(await pulling, blocks[3:])


async def test_binding_after_the_prefill_has_ended_reads_all_at_once() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(4)
        pulled = await p.pull(lease, 4)
        assert p.half.transport.reads == 1
        p.assert_arrived(pulled, blocks)


async def test_a_reader_that_binds_after_the_answer_has_ended_is_told_so() -> None:
    async with pair() as p:
        lease, blocks = p.owner.open(3)
        p.owner.owner.finish(lease, blocks, (5,), ended=True)
        pulled = await p.pull(lease, 3)
        assert (pulled.blocks, pulled.tokens, pulled.ended) == ((), (5,), True)
        p.assert_reader_holds_nothing()


async def test_an_answer_that_ended_with_its_first_token_is_not_read() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(3)
        pulling = group.create_task(p.pull(lease, 3))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        p.owner.owner.finish(lease, blocks[2:], (5,), ended=True)
        pulled = await pulling
        assert (pulled.blocks, pulled.tokens, pulled.ended) == ((), (5,), True)
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_many_pulls_share_one_stream() -> None:
    async with pair() as p:
        leases = [p.owner.whole(2) for _ in range(4)]
        pulled = await asyncio.gather(*(p.pull(lease, 2) for lease, _ in leases))
        for each, (_, blocks) in zip(pulled, leases, strict=True):
            here = list(each.blocks)
            assert torch.equal(p.half.arena.data[here], p.owner.arena.data[blocks])
        assert len(p.owner.owner._readers) == 1


async def test_the_reader_renews_while_it_waits() -> None:
    async with pair(lease_s=0.03) as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.whole(2)
        p.half.transport.holds = True
        pulling = group.create_task(p.pull(lease, 2))
        await until(lambda: p.half.transport.waiting == 1)
        p.owner.clock.advance(LEASE_S - 1)
        before_s = lease.expires_at_s
        await until(lambda: lease.expires_at_s > before_s, "a renewal")
        p.half.transport.let_go()
        p.assert_arrived(await pulling, blocks)


# -- what goes wrong ----------------------------------------------------------------------------


async def test_an_abort_by_the_owner_fails_the_pull_and_frees_the_blocks() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.reads == 1)
        p.owner.owner.abort(lease.lease_id, "its request was cancelled")
        assert "its request was cancelled" in await pulling
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_an_expired_lease_discards_what_was_read() -> None:
    async with pair(seals=False) as p, asyncio.TaskGroup() as group:
        lease, _ = p.owner.whole(3)
        p.half.transport.holds = True
        pulling = group.create_task(failure(p.pull(lease, 3)))
        await until(lambda: p.half.transport.waiting == 1)
        p.owner.clock.advance(LEASE_S)
        p.half.transport.let_go()
        assert "the lease expired" in await pulling
        p.assert_reader_holds_nothing()
        assert p.owner.table.counters.ended[LeaseEnd.EXPIRED] == 1


async def test_a_read_that_does_not_end_quarantines_its_blocks_until_it_does() -> None:
    async with pair(read_timeout_s=0.02) as p:
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        assert "did not end in time" in await failure(p.pull(lease, 3))
        assert p.half.pool.counts().quarantined == 3
        await p.owner_holds_nothing()
        p.half.transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()


async def test_the_reads_of_a_pull_that_has_failed_are_given_up() -> None:
    """A transport that has not begun them need not."""
    async with pair() as p, asyncio.TaskGroup() as group:
        reads: list[QueuedRead] = []

        def queue(*_: object) -> QueuedRead:
            reads.append(QueuedRead())
            return reads[-1]

        p.half.transport.start_read = queue  # type: ignore[method-assign]
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: lease.reader is not None, "the reader bound")
        for i in range(2):
            p.owner.owner.announce(lease, blocks[i : i + 1])
        await until(lambda: len(reads) == 2, "both were asked for")
        assert not any(read.given_up for read in reads)
        p.owner.owner.abort(lease.lease_id, "cancelled")
        await pulling
        assert all(read.given_up for read in reads)
        assert p.half.pool.counts().quarantined == 4
        for read in reads:
            read.set_result(ReadStats(nbytes=0, descriptors=0, seconds=0.0))
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()


async def test_blocks_stay_quarantined_until_the_last_of_their_reads_ends() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        p.half.transport.holds = True
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: lease.reader is not None, "the reader bound")
        for i in range(2):
            p.owner.owner.announce(lease, blocks[i : i + 1])
            await until(lambda i=i: p.half.transport.waiting == i + 1)  # type: ignore[misc]
        p.owner.owner.abort(lease.lease_id, "cancelled")
        await pulling
        p.half.transport.let_go(1)
        await asyncio.sleep(0)
        assert p.half.pool.counts().quarantined == 4
        p.half.transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()


async def test_a_cancelled_pull_ends_the_lease_and_quarantines_what_is_read(
    questions: list[LeaseId],
) -> None:
    async with pair() as p:
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        pulling = asyncio.create_task(p.pull(lease, 3))
        await until(lambda: p.half.transport.waiting == 1)
        pulling.cancel()
        await asyncio.wait([pulling])
        assert p.half.pool.counts().quarantined == 3
        await p.owner_holds_nothing()
        p.half.transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()
    assert not questions


async def test_the_question_leaves_with_the_end_of_the_last_read_and_not_before(
    questions: list[LeaseId],
) -> None:
    async with pair(seals=False) as p, asyncio.TaskGroup() as group:
        p.half.transport.holds = True
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(p.pull(lease, 4))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.waiting == 1)
        p.owner.owner.finish(lease, blocks[2:], LAST, ended=False)
        await until(lambda: p.half.transport.waiting == 2)
        p.half.transport.let_go(1)
        await asyncio.sleep(0)
        assert not questions
        p.half.transport.let_go()
        await asyncio.sleep(0)
        assert questions == [lease.lease_id]
        p.assert_arrived(await pulling, blocks)
    assert questions == [lease.lease_id]


class Buggy:
    """Whoever opened a lease, and cannot bear its end."""

    def on_ready(self, lease: Lease) -> None:
        """Asked of running sequences only."""

    def on_ended(self, lease: Lease, outcome: LeaseOutcome) -> None:
        raise RuntimeError("a bug")


async def test_a_bug_at_the_end_of_one_lease_keeps_no_other_of_a_lost_reader() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        p.half.transport.holds = True
        for waiting in (1, 2):
            lease, blocks = p.owner.open(2, Buggy())
            p.owner.owner.finish(lease, blocks, LAST, ended=False)
            group.create_task(failure(p.pull(lease, 2)))
            await until(lambda n=waiting: p.half.transport.waiting == n)
        p.stream().cancel()
        await p.owner_holds_nothing()
        p.half.transport.let_go()


async def test_a_lost_reader_frees_the_owners_blocks_at_once() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        pulling = group.create_task(failure(p.pull(lease, 3)))
        await until(lambda: p.half.transport.waiting == 1)
        p.stream().cancel()
        await p.owner_holds_nothing()
        assert p.owner.table.counters.ended[LeaseEnd.ABORTED] == 1
        await pulling
        assert p.half.pool.counts().quarantined == 3
        p.half.transport.let_go()
        await until(lambda: p.half.pool.counts().quarantined == 0)
        p.assert_reader_holds_nothing()


async def test_a_lost_owner_fails_the_pull() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.reads == 1)
        await p.owner.stop()
        await pulling
        p.assert_reader_holds_nothing()


async def test_a_transport_that_fails_fails_the_pull(questions: list[LeaseId]) -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        p.half.transport.holds = True
        async with asyncio.TaskGroup() as group:
            pulling = group.create_task(failure(p.pull(lease, 3)))
            await until(lambda: p.half.transport.waiting == 1)
            await p.owner.transport.close()
            p.half.transport.let_go()
            assert "memory is gone" in await pulling
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()
    assert not questions


@pytest.mark.parametrize("raises_at", [1, 2])
async def test_a_read_that_could_not_start_quarantines_what_the_other_ranks_write(
    raises_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair() as p:
        transport, reads = p.half.transport, count(1)
        start_read = transport.start_read

        def start(
            peer: ShardId, plan: ReadPlan, sealed: Sealed | None
        ) -> "asyncio.Future[ReadStats]":
            if next(reads) == raises_at:
                raise TransferFailed("injected", cause=TransferCause.READ_FAILED)
            return start_read(peer, plan, sealed)

        monkeypatch.setattr(transport, "start_read", start)
        transport.holds = True
        p.owner.split_in_two()
        lease, _ = p.owner.whole(3)
        assert "injected" in await failure(p.pull(lease, 3))
        assert transport.waiting == 1
        assert p.half.pool.counts().quarantined == 3
        transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()


async def test_blocks_of_two_ranks_arrive() -> None:
    async with pair() as p:
        p.owner.split_in_two()
        lease, blocks = p.owner.whole(3)
        pulled = await p.pull(lease, 3)
        assert (pulled.stats.reads, pulled.stats.nbytes) == (2, 3 * LAYOUT.block_bytes)
        p.assert_arrived(pulled, blocks)


async def test_a_restarted_owner_is_not_read_from() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        stale = replace(p.owner.handoff(lease), owner_incarnation=Incarnation("before"))
        assert "restarted" in await failure(p.pull_from(stale, 3))
        p.assert_reader_holds_nothing()


async def test_a_reader_of_another_model_is_refused() -> None:
    async with pair(model="another") as p:
        lease, _ = p.owner.whole(3)
        assert "another" in await failure(p.pull(lease, 3))
        p.assert_reader_holds_nothing()


async def test_nobody_at_the_address_fails_the_pull() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        await p.owner.stop()
        await failure(p.pull(lease, 3))
        p.assert_reader_holds_nothing()


async def test_a_lease_that_does_not_exist_fails_the_pull() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(1)
        unknown = replace(p.owner.handoff(lease), lease_id=LeaseId(99))
        assert "no such lease" in await failure(p.pull_from(unknown, 3))


async def test_a_reader_that_comes_after_the_prompt_was_withdrawn_hears_that() -> None:
    async with pair() as p:
        lease, _ = p.owner.open(3)
        p.owner.owner.abort(lease.lease_id, "the router withdrew it", LeaseOutcome.WITHDRAWN)
        assert "withdrawn before its reader came" in await failure(p.pull(lease, 3))
        assert p.reader.metrics.pair(p.owner.hello.worker_id).failures == {"withdrawn": 1}
        p.assert_reader_holds_nothing()


async def test_a_reader_that_comes_after_its_lease_expired_hears_that() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        p.owner.clock.advance(LEASE_S + 0.1)
        p.owner.owner.sweep()
        assert "expired before its reader came" in await failure(p.pull(lease, 3))
        assert p.reader.metrics.pair(p.owner.hello.worker_id).failures == {"expired": 1}
        p.assert_reader_holds_nothing()


@pytest.mark.parametrize("tokens", [(), (77, 78), tuple(range(100))])
async def test_an_end_with_another_number_of_tokens_than_one_fails_the_pull(
    tokens: tuple[int, ...],
) -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        p.owner.owner.says = lambda message: [
            replace(message, tokens=tokens) if isinstance(message, Announce) else message
        ]
        assert f"{len(tokens)} tokens follow" in await failure(p.pull(lease, 3))
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_an_owner_that_says_too_much_is_told_that_its_pull_was_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bound, "_INBOX_MESSAGES", 8)
    async with pair() as p:
        taken = p.half.pool.allocate(NUM_BLOCKS) or []
        lease, _ = p.owner.whole(3)
        p.owner.owner.says = lambda message: (
            [message] * 9 if isinstance(message, Announce) else [message]
        )
        assert "fell behind" in await failure(p.pull(lease, 3))
        await p.owner_holds_nothing()
        p.half.pool.release(taken)
        p.assert_reader_holds_nothing()


async def test_a_lease_has_one_reader() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(2)
        pulling = group.create_task(p.pull(lease, 2))
        await until(lambda: lease.reader is not None, "the reader bound")
        async with p.another() as second:
            assert "reader" in await failure(second.pull(lease, 2))
        p.owner.owner.finish(lease, blocks, LAST, ended=False)
        p.assert_arrived(await pulling, blocks)


async def test_kv_that_does_not_come_in_time_fails_the_pull() -> None:
    async with pair() as p:
        lease, _ = p.owner.open(2)
        with pytest.raises(DeadlineExceeded):
            await p.pull(lease, 2, timeout_s=0.05)
        await p.owner_holds_nothing()


async def test_a_new_stream_is_opened_after_one_was_lost() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(2)
        p.assert_arrived(await p.pull(lease, 2), blocks)
        stream = p.stream()
        stream.cancel()
        await asyncio.wait([stream])
        lease, blocks = p.owner.whole(2)
        p.assert_arrived(await p.pull(lease, 2), blocks)


# -- the owner's door ---------------------------------------------------------------------------


@asynccontextmanager
async def bare_stream(p: Pair) -> AsyncIterator[MessageStream[peer_pb2.FromOwner]]:
    """A stream that has heard the owner's hello."""
    async with dial(p.owner.address, peer_pb2.FromOwner.FromString) as stream:
        assert (await soon(stream.read())).WhichOneof("message") == "hello"  # type: ignore[attr-defined]
        yield stream


async def refusal(stream: MessageStream[peer_pb2.FromOwner]) -> str:
    """Why the owner does not serve the stream, which it then ends."""
    message = await soon(stream.read())
    assert isinstance(message, peer_pb2.FromOwner)
    assert await soon(stream.read()) is None
    return message.refused.reason


def hello(p: Pair, **changed: int) -> peer_pb2.FromReader:
    return from_reader_to_wire(replace(p.half.hello, **changed))  # type: ignore[arg-type]


async def test_another_major_version_is_refused() -> None:
    async with pair() as p, bare_stream(p) as stream:
        stream.send(hello(p, protocol_major=PROTOCOL_MAJOR + 1))
        assert "protocol" in await refusal(stream)


async def test_a_stream_without_a_hello_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with pair() as p, bare_stream(p) as stream:
        bind = Bind(lease_id=LeaseId(1), sequence_id=SEQUENCE)
        stream.send(from_reader_to_wire(bind))
        assert "hello must come first" in await refusal(stream)
    assert re.search(r'peer_stream_ended from=127\.\S+:\d+ reason="a hello must', caplog.text)


async def test_the_end_of_a_stream_names_its_reader(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with pair() as p:
        host, port = p.owner.address.split(":")
        answers, writer = await asyncio.open_connection(host, int(port))
        raw, no_length = hello(p).SerializeToString(), b"\xff" * 4
        writer.write(struct.pack(">I", len(raw)) + raw + no_length)
        await soon(answers.read())  # to its end
        writer.close()
    (line,) = [text for text in caplog.messages if text.startswith("peer_stream_ended ")]
    who = reader_name(p.half.hello.worker_id, p.half.hello.incarnation, 0).partition("#")[0]
    assert re.match(rf"peer_stream_ended reader={who}#\d+ from={host}:\d+ reason=", line)


async def test_a_newer_minor_version_and_its_messages_are_served() -> None:
    async with pair() as p, bare_stream(p) as stream:
        lease, blocks = p.owner.whole(2)
        stream.send(hello(p, protocol_minor=PROTOCOL_MINOR + 1))
        stream.send(peer_pb2.FromReader.FromString(NEWER_MESSAGE))
        bind = Bind(lease_id=lease.lease_id, sequence_id=SEQUENCE)
        stream.send(from_reader_to_wire(bind))
        answer = await soon(stream.read())
        assert list(answer.announce.block_ids) == blocks  # type: ignore[attr-defined]


async def test_an_owner_whose_kv_is_of_an_unknown_kind_is_no_lost_one() -> None:
    async with pair() as p:
        (shard,) = p.owner.hello.shards
        newer = replace(shard, layout=replace(shard.layout, dtype="float8_e9"))
        p.owner.hello = replace(p.owner.hello, shards=(newer,))
        lease, _ = p.owner.whole(1)
        with pytest.raises(TransferFailed, match="float8_e9") as caught:
            await p.pull(lease, 1)
        assert caught.value.cause is TransferCause.OTHER_PROTOCOL
