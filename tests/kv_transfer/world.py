"""The world of test_interleavings.py: what moves by itself after each step, and what must hold."""

import asyncio
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

from hypothesis.stateful import RuleBasedStateMachine

from core.clock import FakeClock
from core.errors import DeadlineExceeded, TransferFailed
from core.ids import Incarnation, LeaseId
from core.messages import Handoff
from engine.sequence import Sequence
from kv_transfer import client, landing
from kv_transfer.leases import Lease
from kv_transfer.reader import FetchedPrefix, Pulled
from kv_transfer.seals import Seals
from tests.kv_transfer.cranked import Fate, HandLoop, Link, Network, Steps
from tests.kv_transfer.interleaved import (
    LEASE_S,
    OwnerLife,
    Parts,
    ReaderLife,
    Received,
    next_token,
)
from tests.kv_transfer.watched import LAYOUT, SIZE, Promise, WatchedPool, WatchedTable

CHUNK_TOKENS = 3
LONGEST_TOKENS = 15
TICK_S = 0.5
REST_TICKS = 80


@dataclass(frozen=True, slots=True, eq=False)
class Bringing:
    """A pull under way, or a fetch (no `handoff`), of `sequence` as the reader knows it."""

    reader: ReaderLife
    sequence: Sequence
    handoff: Handoff | None
    task: "asyncio.Task[Pulled] | asyncio.Task[FetchedPrefix]"

    @property
    def kind(self) -> str:
        if self.handoff is None:
            return "cached"
        return "running" if self.handoff.live else "prefill"


class World(RuleBasedStateMachine):
    """One owner, which may start anew, and two readers.

    After each step move by themselves: sequences, if `engines`; messages and halves of reads that
    are `message_steps` and `read_steps` old, every third message to its `fate`; the event loop by
    `turns`, or until it rests.
    """

    parts: ClassVar[Parts]
    seen: ClassVar[Counter[str]]
    """Steps taken, and what happened in them; of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = False
        self.loop = HandLoop()
        self.clock = FakeClock()
        self.steps = Steps()
        self.network = Network(self.loop, self.steps)
        self._patches = ExitStack()
        self._patches.enter_context(patch.object(client, "dial", self.network.dial))
        hand_time = SimpleNamespace(monotonic=self.loop.time)
        self._patches.enter_context(patch.object(landing, "time", hand_time))
        self._writers = count(1)
        self.lives: dict[Incarnation, OwnerLife] = {}
        self.owner = self.new_owner()
        self.readers = [self._new_reader(f"reader{i}", headroom=2 * i) for i in range(2)]
        self._hosts = [self.loop.create_task(reader.host()) for reader in self.readers]
        self.bringing: list[Bringing] = []
        self._deaf_since_s: dict[Bringing, float] = {}
        self.engines = True
        self.message_steps = self.read_steps = 0
        self.fate = Fate.PASS
        self.turns: int | None = None
        self._moved = 0
        self.react()

    def new_owner(self) -> OwnerLife:
        """A life of the owner; its door is the one that readers find from now on."""
        owner = OwnerLife(self.parts, self.clock, len(self.lives), self._writers)
        self.lives[owner.hello.incarnation] = owner
        self.network.service = owner.service
        return owner

    def _new_reader(self, name: str, headroom: int) -> ReaderLife:
        return ReaderLife(
            name, self.parts, self._writers, self._memory, steps=self.steps, headroom=headroom
        )

    def _memory(self) -> tuple[WatchedPool, Seals]:
        return self.owner.pool, self.owner.seals

    # -- what moves by itself -------------------------------------------------------------------

    def react(self) -> None:
        """The rest of a step: all that moves by itself, then the checks."""
        self.steps.number += 1
        if self.engines:
            self._step_engines()
        if self.turns is None:
            self.loop.settle()
            while self._move():
                self.loop.settle()
        else:
            self._move()
            for _ in range(self.turns):
                self.loop.turn()
        self.network.forget_ended()
        for bringing in [b for b in self.bringing if b.task.done()]:
            self.bringing.remove(bringing)
            self._note_end(bringing)
        self.check()

    def tick(self, *, sweeps: bool) -> None:
        """Time passes, for all alike."""
        self.clock.advance(TICK_S)
        self.loop.now_s += TICK_S
        if sweeps:
            self.owner.owner.sweep()
        self.react()

    def _step_engines(self) -> None:
        for prefill in list(self.owner.prefills):
            prefill.compute(CHUNK_TOKENS, ends=prefill.lease.lease_id % 8 == 0)
        for decoding in list(self.owner.decodings) if self.steps.number % 2 else ():
            decoding.decode(next_token(decoding.sequence))
            if len(decoding.sequence.tokens) > LONGEST_TOKENS:
                decoding.end()
        for life in self.readers:
            for received in list(life.received):
                life.use(received)

    def _move(self) -> bool:
        """One message of each stream that is due, half of each such read; whether any was."""
        before = self._moved
        for link in self.network.links:
            for to_owner, pipe in ((True, link.to_owner), (False, link.to_reader)):
                if pipe.due(self.message_steps):
                    self._moved += 1
                    self.deliver(link, to_owner, Fate.PASS if self._moved % 3 else self.fate)
        for life in self.readers:
            for read in life.transport.due(self.read_steps):
                self._moved += 1
                life.transport.move(read)
        return self._moved > before

    def deliver(self, link: Link, to_owner: bool, fate: Fate) -> None:
        """The next message of a stream meets its fate."""
        self.seen[f"message {fate.value}"] += 1
        link.deliver(to_owner, fate)

    # -- how hand-offs end ----------------------------------------------------------------------

    def _note_end(self, bringing: Bringing) -> None:
        """Take what came, or make sure that it failed in a way it may."""
        task = bringing.task
        if task.cancelled():
            self.seen["cancelled"] += 1
            return
        error = task.exception()
        if isinstance(error, TransferFailed):
            self.seen[f"failed {error.cause}"] += 1
        elif isinstance(error, DeadlineExceeded):
            self.seen["failed deadline"] += 1
        elif error is not None:
            raise error
        else:
            self._take(bringing, task.result())

    def _take(self, bringing: Bringing, result: Pulled | FetchedPrefix) -> None:
        """What came must be what was promised: of these tokens, in order, written by whom the
        owner said, with nothing written over it since.
        """
        life, sequence = bringing.reader, bringing.sequence
        if isinstance(result, Pulled):
            sequence.tokens += result.tokens
            positions = len(sequence.tokens) - 1
            if result.ended:
                self.seen["came ended"] += 1
                assert result.blocks == ()
                return
        else:
            positions = len(result.blocks) * SIZE
        self.seen[f"came {bringing.kind}"] += 1
        self.seen[f"came {bringing.kind}, sealed"] += result.stats.sealed
        self.seen["came with cached blocks"] += bool(result.cached_blocks)
        assert len(result.blocks) == len(set(result.blocks)) == LAYOUT.num_blocks(positions)
        came = [life.pool.kv[block_id] for block_id in result.blocks]
        for i, kv in enumerate(came):
            assert kv.tokens == tuple(sequence.tokens[: min((i + 1) * SIZE, positions)]), (i, kv)
        fresh = slice(result.cached_blocks, len(came))
        promises = self._confirmed(bringing, result)
        assert any(promise.kv[fresh] == came[fresh] for promise in promises), "not said to be HELD"
        sequence.blocks = list(result.blocks)
        sequence.computed = positions
        sequence.published = result.cached_blocks
        life.received.append(Received(life.pool, sequence))

    def _confirmed(self, bringing: Bringing, result: Pulled | FetchedPrefix) -> list[Promise]:
        """The leases that this can have come from, and of which its reader was told HELD, or found
        the seal whole.
        """
        handoff = bringing.handoff
        lives = [
            life
            for incarnation, life in self.lives.items()
            if handoff is None or handoff.owner_incarnation == incarnation
        ]
        promises = [
            life.table.promises[lease_id]
            for life in lives
            for lease_id in _confirmed_to(bringing.reader, life.table)
            if handoff is None or handoff.lease_id == lease_id
        ]
        return [
            promise
            for promise in promises
            if promise.lease.sequence_id == bringing.sequence.sequence_id
            and (isinstance(result, FetchedPrefix) or promise.lease.tokens == result.tokens)
        ]

    # -- what must hold -------------------------------------------------------------------------

    def check(self) -> None:
        """What holds at any time."""
        self.owner.check()
        for life in self.readers:
            pulling = any(bringing.reader is life for bringing in self.bringing)
            life.check(pulling=pulling, settled=self.loop.resting)
            if not pulling:
                self._check_told(life)
            self.seen["quarantined"] += bool(life.pool.counts().quarantined)
        self._check_heard()
        assert not self.loop.complaints, self.loop.complaints

    def _in_touch(self, life: ReaderLife) -> bool:
        """Owner and reader have heard all that the other one has said."""
        links = [link for link in self.network.links if link.reader == life.name]
        return self.loop.resting and all(link.quiet and link.faithful for link in links)

    def _check_told(self, life: ReaderLife) -> None:
        """The owner holds nothing for a reader that wants nothing."""
        if self._in_touch(life):
            for lease in self.owner.table.all():
                assert not bound(lease, life), lease

    def _check_heard(self) -> None:
        """No pull goes on whose lease has ended. While one waits for memory it looks now and then,
        and if it is the answer that has ended, its router ends the wait.
        """
        now_s = self.loop.now_s
        deaf = [b for b in self.bringing if self._in_touch(b.reader) and not self._has_lease(b)]
        self._deaf_since_s = {b: self._deaf_since_s.get(b, now_s) for b in deaf}
        for bringing, since_s in self._deaf_since_s.items():
            assert bringing.reader.reader.waiting, bringing
            assert now_s - since_s < TICK_S, bringing

    def _has_lease(self, bringing: Bringing) -> bool:
        handoff = bringing.handoff
        if handoff is None:
            return True
        if handoff.owner_incarnation != self.owner.hello.incarnation:
            return False
        lease = self.owner.table.get(handoff.lease_id)
        if lease is None:
            return self.owner.table.ended_unread(handoff.lease_id) is not None
        return bound(lease, bringing.reader)

    # -- the end --------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if not self.failed:
                self._come_to_rest()
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.settle()
            self.loop.close()
            self._patches.close()

    def _come_to_rest(self) -> None:
        """Everything ends, by its deadline at the latest, and nothing is left."""
        self.engines, self.turns = False, None
        self.message_steps, self.fate, self.read_steps = 0, Fate.PASS, 0
        lives: list[OwnerLife | ReaderLife] = [self.owner, *self.readers]
        for life in lives:
            for blocks in life.others:
                life.pool.release(blocks)
            life.others.clear()
        for prefill in list(self.owner.prefills):
            prefill.cancel()
        for decoding in list(self.owner.decodings):
            decoding.end()
        self.react()
        for _ in range(REST_TICKS):
            if not self.bringing:
                break
            self.tick(sweeps=True)
        assert not self.bringing, "a hand-off outlived its deadline"
        self.clock.advance(LEASE_S)
        self.owner.owner.sweep()
        for reader in self.readers:
            for received in list(reader.received):
                reader.release(received)
            reader.stop.set()
        self.react()
        self.owner.check_over()
        for reader in self.readers:
            reader.pool.check_idle()
            assert reader.pool.counts().quarantined == 0
        assert all(host.done() and host.exception() is None for host in self._hosts)


def _confirmed_to(reader: ReaderLife, table: WatchedTable) -> set[LeaseId]:
    told = {lease for lease, to in table.confirmed.items() if to.startswith(f"{reader.name}/")}
    return told | {table.sealed[word] for word in reader.transport.found if word in table.sealed}


def bound(lease: Lease, life: ReaderLife) -> bool:
    """Over some stream of that reader."""
    return (lease.reader or "").startswith(f"{life.name}/")
