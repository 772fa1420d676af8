"""A running sequence that moves: between two whole workers, and at the owner step by step."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from core.clock import FakeClock
from core.ids import LeaseId, Role
from core.messages import (
    Cancel,
    Handoff,
    LegFailed,
    Moved,
    Offer,
    Offered,
    Rejected,
    TokenFrame,
    WorkerToRouter,
)
from core.sampling import FinishReason
from core.stages import Stage
from decode_worker.config import DecodeConfig
from decode_worker.migration import Migration
from kv_transfer.leases import Lease
from kv_transfer.loopback import LoopbackHub
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    FromOwner,
    LeaseOutcome,
    Ready,
)
from kv_transfer.metrics import LeaseEnd
from tests.builders import (
    BLOCK_SIZE,
    RouterEnd,
    ServedWorker,
    decode_submit,
    expected_tokens,
    handoff_of,
    make_prompt,
    make_settings,
    prefill_submit,
    served_worker,
    until,
    until_idle,
)

PROMPT = make_prompt(22)
MAX_TOKENS = 40


@dataclass(slots=True)
class End:
    """A worker and a router's stream to it."""

    served: ServedWorker
    router: RouterEnd

    def send(self, message: object) -> None:
        self.served.worker.handle(self.router.outlet, message)  # type: ignore[arg-type]

    async def said(self, number: int, count: int) -> list[int]:
        """The leg's first tokens, at least `count`."""
        await self.router.until(lambda: len(self.router.tokens(number)) >= count)
        return self.router.tokens(number)

    async def offer(self, number: int) -> Offered:
        seen = len(self.router.of(Offered))
        self.send(Offer(number=number))
        await self.router.until(lambda: len(self.router.of(Offered)) > seen)
        return self.router.of(Offered)[-1]

    async def moved(self, number: int) -> list[int]:
        """All tokens of a leg that has moved away."""
        await self.router.until(lambda: any(m.number == number for m in self.router.of(Moved)))
        return self.router.tokens(number)

    async def give_away(self, number: int, lease_id: LeaseId | None) -> list[int]:
        """A step at a time, each once all that was announced is copied, until the leg has moved."""
        assert lease_id is not None
        lease = self.served.worker.leases.get(lease_id)
        assert lease is not None and isinstance(lease.listener, Migration)
        migration = lease.listener
        while lease.tokens is None:
            await until(lambda: lease.reader is not None, "bound")
            await until(lambda: migration.ready or not lease.blocks, "ready")
            self.served.gate.allow(1)
            await self.said(number, len(self.router.tokens(number)) + 1)
        self.served.gate.open()
        return await self.moved(number)

    def handoff(self, lease_id: LeaseId | None) -> Handoff:
        assert lease_id is not None
        record = self.served.record
        return Handoff(
            owner_id=record.worker_id,
            owner_address=self.served.peer_address,
            owner_incarnation=record.incarnation,
            lease_id=lease_id,
            live=True,
        )


@dataclass(slots=True)
class Trio:
    """A prefill worker and two decode workers."""

    prefill: End
    decode: list[End]
    next_number: int = 1

    async def start(
        self,
        prompt: Sequence[int] = PROMPT,
        *,
        max_tokens: int = MAX_TOKENS,
        name: str = "r",
        deadline_s: float = 60.0,
    ) -> int:
        """A sequence that decodes at the first decode worker; answers its number."""
        number, self.next_number = self.next_number, self.next_number + 1
        self.prefill.send(prefill_submit(number, prompt, name=name, max_tokens=max_tokens))
        accepted = await self.prefill.router.accepted(number)
        handoff = handoff_of(self.prefill.served, accepted)
        fields = {"name": name, "max_tokens": max_tokens, "deadline_s": deadline_s}
        self.decode[0].send(decode_submit(number, prompt, handoff, **fields))
        return number

    async def move(self, number: int, prompt: Sequence[int], from_: int, to: int) -> Offered:
        """Offer a leg and submit it at the other worker under the same number."""
        offered = await self.decode[from_].offer(number)
        handoff = self.decode[from_].handoff(offered.lease_id)
        submit = decode_submit(number, prompt, handoff, max_tokens=MAX_TOKENS)
        self.decode[to].send(submit)
        return offered

    @property
    def workers(self) -> Iterable[ServedWorker]:
        return (end.served for end in [self.prefill, *self.decode])

    async def idle(self) -> None:
        for served in self.workers:
            served.gate.open()
        await until_idle(*(served.worker for served in self.workers))


@asynccontextmanager
async def trio(
    *,
    gated: bool = False,
    gated_second: bool = False,
    num_blocks: int = 256,
    blocks_at_second: int | None = None,
    max_sequences: int = 1024,
    stop_s: float = 10.0,
    clock: FakeClock | None = None,
) -> AsyncIterator[Trio]:
    """`gated`: the first decode worker takes a step only by permit; likewise the second."""
    hub = LoopbackHub()
    base = make_settings(num_blocks=num_blocks)
    first = replace(base, decode=DecodeConfig(migration_stop_s=stop_s))
    second = make_settings(num_blocks=blocks_at_second or num_blocks, max_sequences=max_sequences)
    async with (
        served_worker("p", Role.PREFILL, hub, worker_settings=base, clock=clock) as p,
        served_worker(
            "d0", Role.DECODE, hub, worker_settings=first, gated=gated, clock=clock
        ) as d0,
        served_worker(
            "d1", Role.DECODE, hub, worker_settings=second, gated=gated_second, clock=clock
        ) as d1,
    ):
        ends = [End(served, RouterEnd(served.worker)) for served in (p, d0, d1)]
        yield Trio(ends[0], ends[1:])


# -- from worker to worker ------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 22, 100])
@pytest.mark.parametrize("said", [1, 2, 7])
async def test_a_sequence_moves_and_its_text_goes_on(num_tokens: int, said: int) -> None:
    prompt = make_prompt(num_tokens)
    async with trio(gated=True) as t:
        number = await t.start(prompt)
        source, destination = t.decode
        source.served.gate.allow(said)
        await source.said(number, said)
        offered = await t.move(number, prompt, 0, 1)
        head = await source.give_away(number, offered.lease_id)
        tail = await destination.router.answered(number)
        assert len(head) in (said + 1, said + 2)
        assert head + tail == expected_tokens(prompt, MAX_TOKENS)[1:]
        await t.idle()


async def test_moved_comes_after_the_last_token_and_nothing_after_it() -> None:
    async with trio(gated=True) as t:
        number = await t.start()
        source = t.decode[0]
        source.served.gate.allow(1)
        await source.said(number, 1)
        offered = await t.move(number, PROMPT, 0, 1)
        await source.give_away(number, offered.lease_id)
        await t.decode[1].router.answered(number)
        await source.router.all_said()
        ours = [m for m in source.router.messages if _is_of(m, number)]
        assert isinstance(ours[-1], Moved)
        assert isinstance(ours[-2], TokenFrame | Offered)
        await t.idle()


def _is_of(message: WorkerToRouter, number: int) -> bool:
    if isinstance(message, TokenFrame):
        return any(entry.number == number for entry in message.entries)
    return getattr(message, "number", None) == number


async def test_the_new_worker_says_what_it_pulled() -> None:
    async with trio(gated=True) as t:
        number = await t.start(make_prompt(100))
        t.decode[0].served.gate.allow(1)
        await t.decode[0].said(number, 1)
        offered = await t.move(number, make_prompt(100), 0, 1)
        head = await t.decode[0].give_away(number, offered.lease_id)
        await t.decode[1].router.answered(number)
        times = t.decode[1].router.entries(number)[0].times
        assert times is not None
        assert times.transfer_blocks == -(-(100 + len(head)) // BLOCK_SIZE)
        assert times.transfer_hidden_s > 0
        await t.idle()


async def test_a_full_destination_lets_the_source_run_on() -> None:
    async with trio(gated=True, blocks_at_second=20) as t:
        number = await t.start()
        source, destination = t.decode
        source.served.gate.allow(1)
        await source.said(number, 1)
        taken = destination.served.worker.pool.allocate(18)
        assert taken is not None
        await t.move(number, PROMPT, 0, 1)
        failed = await destination.router.first(LegFailed)
        assert (failed.code, failed.stage) == ("kv_transfer_failed", Stage.KV_TRANSFER)
        source.served.gate.open()
        assert await source.router.answered(number) == expected_tokens(PROMPT, MAX_TOKENS)[1:]
        destination.served.worker.pool.release(taken)
        await t.idle()


async def test_a_rejected_move_leaves_an_offer_that_ends_with_the_sequence() -> None:
    async with trio(gated=True, gated_second=True, max_sequences=1) as t:
        t.decode[1].send(decode_submit(9, make_prompt(8), None))
        number = await t.start()
        source = t.decode[0]
        source.served.gate.allow(1)
        await source.said(number, 1)
        offered = await source.offer(number)
        t.decode[1].send(decode_submit(10, PROMPT, source.handoff(offered.lease_id)))
        assert (await t.decode[1].router.first(Rejected)).number == 10
        source.served.gate.open()
        assert await source.router.answered(number) == expected_tokens(PROMPT, MAX_TOKENS)[1:]
        await until_idle(source.served.worker)
        t.decode[1].send(Cancel(number=9, reason="enough"))
        await t.idle()


# -- the owner, step by step ----------------------------------------------------------------------


@dataclass
class Taker:
    """The reader's side without a network: says what it is told to, notes what it hears."""

    worker: ServedWorker
    lease: Lease
    heard: list[FromOwner] = field(default_factory=list)
    name: str = ""

    def bind(self) -> None:
        owner = self.worker.worker.owner
        self.name = owner.attach(self.worker.worker.peer_hello(), self.heard.append)
        owner.handle(
            self.name,
            Bind(
                lease_id=self.lease.lease_id,
                sequence_id=self.lease.sequence_id,
                first_index=0,
            ),
        )

    def say(self, message: Ready | Close | Abort) -> None:
        self.worker.worker.owner.handle(self.name, message)

    def close(self) -> LeaseOutcome:
        self.say(Close(lease_id=self.lease.lease_id))
        closed = [m for m in self.heard if isinstance(m, Closed)]
        return closed[-1].outcome

    @property
    def announced(self) -> list[int]:
        blocks: dict[int, int] = {}
        for m in self.heard:
            if isinstance(m, Announce):
                blocks.update(enumerate(m.block_ids, m.first_index))
        assert list(blocks) == list(range(len(blocks)))
        return list(blocks.values())

    @property
    def final(self) -> Announce | None:
        finals = [m for m in self.heard if isinstance(m, Announce) and m.final]
        assert len(finals) < 2
        return finals[0] if finals else None


async def taken(t: Trio, number: int) -> Taker:
    """Offered, and bound by a scripted reader."""
    source = t.decode[0]
    offered = await source.offer(number)
    assert offered.lease_id is not None
    lease = source.served.worker.leases.get(offered.lease_id)
    assert lease is not None
    taker = Taker(source.served, lease)
    taker.bind()
    return taker


async def stopped(t: Trio, number: int, said: int = 3) -> Taker:
    """A sequence that stands still for its last blocks, after `said + 1` decoded tokens."""
    source = t.decode[0]
    source.served.gate.allow(said)
    await source.said(number, said)
    taker = await taken(t, number)
    taker.say(Ready(lease_id=taker.lease.lease_id))
    source.served.gate.allow(1)
    await source.said(number, said + 1)
    assert taker.final is not None
    source.served.gate.open()
    return taker


async def test_full_blocks_are_announced_as_they_are_completed() -> None:
    async with trio(gated=True) as t:
        number, source = await t.start(), t.decode[0]
        source.served.gate.allow(1)
        await source.said(number, 1)
        taker = await taken(t, number)
        assert len(taker.announced) == 23 // BLOCK_SIZE
        source.served.gate.allow(2 * BLOCK_SIZE)
        await source.said(number, 1 + 2 * BLOCK_SIZE)
        assert len(taker.announced) == 23 // BLOCK_SIZE + 2
        assert taker.final is None
        source.send(Cancel(number=number, reason="enough"))
        await t.idle()


async def test_the_stop_announces_the_rest_and_every_token_since_the_submit() -> None:
    async with trio(gated=True) as t:
        number = await t.start()
        taker = await stopped(t, number)
        final = taker.final
        assert final is not None
        assert list(final.tokens) == expected_tokens(PROMPT, 5)
        assert not final.ended
        assert len(taker.announced) == -(-(22 + 4) // BLOCK_SIZE)
        assert t.decode[0].served.worker.load().running == 1
        assert taker.close() is LeaseOutcome.HELD
        await t.decode[0].moved(number)
        assert t.decode[0].router.tokens(number) == expected_tokens(PROMPT, 5)[1:]
        await t.idle()


async def test_only_the_answer_held_makes_it_move() -> None:
    async with trio(gated=True) as t:
        number = await t.start()
        t.decode[0].served.gate.allow(2)
        await t.decode[0].said(number, 2)
        taker = await taken(t, number)
        assert taker.close() is LeaseOutcome.UNKNOWN
        t.decode[0].served.gate.open()
        wanted = expected_tokens(PROMPT, MAX_TOKENS)[1:]
        assert await t.decode[0].router.answered(number) == wanted
        assert any(isinstance(m, Abort) for m in taker.heard)
        await t.idle()


@pytest.mark.parametrize("how", ["abort", "stream ended", "silence"])
async def test_a_stopped_sequence_whose_reader_is_gone_runs_on(how: str) -> None:
    async with trio(gated=True, stop_s=0.05 if how == "silence" else 10.0) as t:
        number = await t.start()
        taker = await stopped(t, number)
        if how == "abort":
            taker.say(Abort(lease_id=taker.lease.lease_id, reason="enough"))
        elif how == "stream ended":
            taker.worker.worker.owner.detach(taker.name)
        wanted = expected_tokens(PROMPT, MAX_TOKENS)[1:]
        assert await t.decode[0].router.answered(number) == wanted
        if how != "stream ended":
            assert taker.close() is LeaseOutcome.ABORTED
        await t.idle()
        assert t.decode[0].router.of(Moved) == []


@pytest.mark.parametrize("how", ["cancel", "router lost"])
async def test_a_stopped_sequence_that_nobody_wants_gives_everything_back(how: str) -> None:
    async with trio(gated=True) as t:
        number = await t.start()
        taker, source = await stopped(t, number), t.decode[0]
        if how == "cancel":
            source.send(Cancel(number=number, reason="enough"))
        else:
            source.served.worker.detach(source.router.outlet)
        await t.idle()
        assert taker.close() is LeaseOutcome.ABORTED
        assert source.router.of(Moved) == []


async def test_a_stopped_sequence_keeps_its_deadline() -> None:
    clock = FakeClock()
    async with trio(gated=True, clock=clock) as t:
        number = await t.start(deadline_s=5.0)
        taker = await stopped(t, number)
        clock.advance(5.0)
        failed = await t.decode[0].router.first(LegFailed)
        assert (failed.number, failed.code) == (number, "deadline_exceeded")
        assert taker.close() is LeaseOutcome.ABORTED
        await t.idle()


async def test_an_answer_that_ends_takes_its_offer_with_it() -> None:
    async with trio(gated=True) as t:
        number, source = await t.start(max_tokens=6), t.decode[0]
        source.served.gate.allow(2)
        await source.said(number, 2)
        taker = await taken(t, number)
        source.served.gate.open()
        assert await source.router.answered(number) == expected_tokens(PROMPT, 6)[1:]
        assert source.router.entries(number)[-1].finish is FinishReason.LENGTH
        assert isinstance(taker.heard[-1], Abort)
        assert taker.final is None
        await t.idle()


async def test_a_preempted_sequence_is_no_longer_offered_and_gives_its_blocks_back() -> None:
    async with trio(gated=True, num_blocks=16) as t:
        source = t.decode[0]
        older = await t.start(make_prompt(8), name="older")
        source.served.gate.allow(1)
        await source.said(older, 1)
        younger = await t.start(make_prompt(8, seed=1), name="younger")
        while not source.router.tokens(younger):
            source.served.gate.allow(1)
            await source.said(older, len(source.router.tokens(older)) + 1)
        taker = await taken(t, younger)
        source.served.gate.open()
        for number, seed in ((older, 0), (younger, 1)):
            wanted = expected_tokens(make_prompt(8, seed=seed), MAX_TOKENS)[1:]
            assert await source.router.answered(number) == wanted
        assert source.served.worker.runner.preemptions > 0
        aborts = [m for m in taker.heard if isinstance(m, Abort)]
        assert [a.reason for a in aborts] == ["the sequence was preempted"]
        await t.idle()


# -- offers ---------------------------------------------------------------------------------------


async def test_what_does_not_run_cannot_be_offered() -> None:
    async with trio(gated=True) as t:
        source = t.decode[0]
        assert (await source.offer(77)).message == "no such leg runs here"
        number = await t.start()
        await source.router.accepted(number)
        refused = await source.offer(number)
        assert (refused.lease_id, refused.message) == (None, "it does not run now")
        source.send(Cancel(number=number, reason="enough"))
        t.prefill.send(Cancel(number=number, reason="enough"))
        await t.idle()


async def test_a_stopped_sequence_cannot_be_offered_again() -> None:
    async with trio(gated=True) as t:
        number = await t.start()
        taker = await stopped(t, number)
        again = await t.decode[0].offer(number)
        assert (again.lease_id, again.message) == (None, "it is being handed over already")
        assert taker.close() is LeaseOutcome.HELD
        await t.idle()


async def test_a_new_offer_replaces_one_that_was_given_up() -> None:
    async with trio(gated=True) as t:
        number = await t.start()
        source, destination = t.decode
        source.served.gate.allow(1)
        await source.said(number, 1)
        first = await source.offer(number)
        assert first.lease_id is not None
        second = await t.move(number, PROMPT, 0, 1)
        head = await source.give_away(number, second.lease_id)
        tail = await destination.router.answered(number)
        assert head + tail == expected_tokens(PROMPT, MAX_TOKENS)[1:]
        assert source.served.worker.leases.counters.ended[LeaseEnd.ABORTED] == 1
        await t.idle()


async def test_a_draining_worker_still_gives_its_sequences_away() -> None:
    async with trio(gated=True) as t:
        number, source = await t.start(), t.decode[0]
        source.served.gate.allow(2)
        await source.said(number, 2)
        assert await source.served.worker.drain(0.0) == 1
        offered = await t.move(number, PROMPT, 0, 1)
        await source.give_away(number, offered.lease_id)
        await until(lambda: source.served.worker.open_legs == 0, "drained")
        await t.decode[1].router.answered(number)
        await t.idle()
