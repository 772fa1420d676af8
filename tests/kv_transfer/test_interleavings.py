"""An owner and two readers in random order: HELD means held, and nothing is lost or leaked.

The model: an announced block holds the KV of its sequence's tokens, written by one allocation; a
hand-off that returns brings exactly that, in order, and everything comes to rest in the end.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from itertools import count
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

import grpc
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.clock import FakeClock
from core.errors import DeadlineExceeded, TransferFailed
from core.ids import Incarnation, LeaseId, SequenceId
from core.messages import Handoff, PrefixSource
from engine.sequence import Sequence as EngineSequence
from kv_transfer import landing
from kv_transfer.leases import Lease
from kv_transfer.reader import FetchedPrefix, FetchRequest, Pulled, PullRequest
from tests.builders import QUICK
from tests.kv_transfer.cranked import Fate, HandLoop, Network, Steps
from tests.kv_transfer.interleaved import (
    LAYOUT,
    LEASE_S,
    SIZE,
    ChosenTransport,
    Decoding,
    OwnerLife,
    Parts,
    Prefill,
    Promise,
    Read,
    ReaderLife,
    Received,
    WatchedPool,
    next_token,
    sequence_of,
)

T = TypeVar("T")

PROMPTS = [(family,) * length for length in (3, 1, 4, 6, 9) for family in (0, 0, 1)]

CHUNK_TOKENS = 3
LONGEST_TOKENS = 15
TICK_S = 0.5
NEVER = 10_000
CALM_STEPS = 5
REST_TICKS = 80

PROMPT = st.sampled_from(PROMPTS)
PICK = st.integers(0, 5)
READER = st.integers(0, 1)
SELDOM = st.sampled_from([False] * 5 + [True])
OFTEN = st.sampled_from([True, True, False])
TO = st.sampled_from([0, 1, None])
LATENCY = st.sampled_from([0, 1, 1, 2, 4, NEVER])
TURNS = st.sampled_from([None, None, None, None, 1, 0])
FATE = st.sampled_from([Fate.PASS] * 4 + [Fate.DROP, Fate.DOUBLE, Fate.LATE])
TIMEOUT_S = st.sampled_from([12.0, 12.0, 3.0])


@dataclass(frozen=True, slots=True)
class Offer:
    """What a router would pass to a decode worker."""

    handoff: Handoff
    sequence: EngineSequence


@dataclass(frozen=True, slots=True, eq=False)
class Bringing:
    """A pull under way, or a fetch (no `handoff`), of `sequence` as the reader knows it."""

    reader: ReaderLife
    sequence: EngineSequence
    handoff: Handoff | None
    task: "asyncio.Task[Pulled] | asyncio.Task[FetchedPrefix]"


def step(**draws: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule, after which the world reacts at its pace and is checked."""

    def wrap(act: Callable[..., None]) -> Callable[..., None]:
        @rule(**draws)
        @wraps(act)
        def stepped(world: "Interleavings", **drawn: object) -> None:
            world.seen["steps"] += 1
            world.seen["rule " + act.__name__] += 1
            try:
                act(world, **drawn)
                world.react()
            except BaseException:
                world.failed = True
                raise

        return stepped

    return wrap


def having(what: Callable[["Interleavings"], object]) -> Callable[[T], T]:
    return precondition(lambda world: bool(what(world)))  # type: ignore[return-value]


def newest(things: list[T], pick: int) -> T:
    return things[-1 - pick % len(things)]


class Interleavings(RuleBasedStateMachine):
    """One owner, which may restart, and two readers."""

    parts = Parts()
    seen: ClassVar[Counter[str]] = Counter()
    """Steps taken, and what happened in them; of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = False
        self.loop = HandLoop()
        self.clock = FakeClock()
        self.steps = Steps()
        self.network = Network(self.loop, self.steps)
        self._patches = [
            patch.object(grpc.aio, "insecure_channel", self.network.dial),
            patch.object(landing, "time", SimpleNamespace(monotonic=self.loop.time)),
        ]
        for each in self._patches:
            each.start()
        self._writers = count(1)
        self._numbers = count(1)
        self.lives: dict[Incarnation, OwnerLife] = {}
        self.owner = self._new_owner()
        self.readers = [self._new_reader(f"reader{i}", headroom=2 * i) for i in range(2)]
        self._hosts = [self.loop.create_task(reader.host()) for reader in self.readers]
        self.offers: list[Offer] = []
        self.bringing: list[Bringing] = []
        self._unheard: list[Bringing] = []
        self.engines = True
        self.message_steps = self.read_steps = 0
        self.fate = Fate.PASS
        self.turns: int | None = None
        self.moved = 0
        self.react()

    def _new_owner(self) -> OwnerLife:
        owner = OwnerLife(self.parts, self.clock, len(self.lives), self._writers)
        self.lives[owner.hello.incarnation] = owner
        self.network.service = owner.service
        return owner

    def _new_reader(self, name: str, headroom: int) -> ReaderLife:
        return ReaderLife(
            name,
            self.parts,
            self._writers,
            self._memory,
            steps=self.steps,
            headroom=headroom,
        )

    def _memory(self) -> WatchedPool:
        return self.owner.pool

    @property
    def rough(self) -> bool:
        """What ends things happens every now and then: hand-offs take several steps."""
        return self.steps.number // CALM_STEPS % 2 == 1

    # -- the owner's sequences ------------------------------------------------------------------

    @step(prompt=PROMPT, to=TO)
    def submit(self, prompt: tuple[int, ...], to: int | None) -> None:
        if len(self.owner.prefills) < 4:
            prefill = Prefill(self.owner, sequence_of(next(self._numbers), prompt))
            self._offer(prefill.lease, prefill.sequence, to, live=False)

    @having(lambda world: world.owner.prefills)
    @step(pick=PICK, num_tokens=st.integers(1, 9), ends=SELDOM)
    def compute(self, pick: int, num_tokens: int, ends: bool) -> None:
        newest(self.owner.prefills, pick).compute(num_tokens, ends=ends)

    @having(lambda world: world.rough and world.owner.prefills)
    @step(pick=PICK, how=st.sampled_from([Prefill.preempt, Prefill.cancel, Prefill.fail]))
    def interrupt(self, pick: int, how: Callable[[Prefill], None]) -> None:
        how(newest(self.owner.prefills, pick))

    @step(prompt=PROMPT, to=TO)
    def run(self, prompt: tuple[int, ...], to: int | None) -> None:
        if self.owner.pool.available >= LAYOUT.num_blocks(len(prompt)):
            decoding = Decoding(self.owner, sequence_of(next(self._numbers), prompt))
            if to is not None:
                self._offer(decoding.offer(), decoding.sequence, to, live=True)

    @having(lambda world: world.owner.decodings)
    @step(pick=PICK, to=TO)
    def offer(self, pick: int, to: int | None) -> None:
        decoding = newest(self.owner.decodings, pick)
        if not decoding.held:
            self._offer(decoding.offer(), decoding.sequence, to, live=True)

    @having(lambda world: world.owner.decodings)
    @step(pick=PICK, token=st.integers(0, 1), times=st.integers(1, 3))
    def decode(self, pick: int, token: int, times: int) -> None:
        for _ in range(times):
            newest(self.owner.decodings, pick).decode(token)

    @having(lambda world: world.rough and world.owner.decodings)
    @step(pick=PICK, how=st.sampled_from([Decoding.drop, Decoding.end]))
    def end(self, pick: int, how: Callable[[Decoding], None]) -> None:
        how(newest(self.owner.decodings, pick))

    # -- the readers ----------------------------------------------------------------------------

    @having(lambda world: world.offers)
    @step(
        reader=READER,
        pick=PICK,
        timeout_s=TIMEOUT_S,
        stale=st.sampled_from(["", "", "", "", "lease", "attempt", "choice", "incarnation"]),
    )
    def pull(self, reader: int, pick: int, timeout_s: float, stale: str) -> None:
        self._pull(reader, newest(self.offers, pick), timeout_s, stale)

    def _pull(self, reader: int, offer: Offer, timeout_s: float = 12.0, stale: str = "") -> None:
        handoff, sequence_id = _stale(offer, stale)
        theirs = offer.sequence
        sequence = sequence_of(0, tuple(theirs.tokens[: theirs.context_tokens]))
        sequence.sequence_id = sequence_id
        request = PullRequest(
            handoff=handoff,
            sequence_id=sequence_id,
            hashes=sequence.block_hashes(sequence.context_tokens // SIZE, SIZE),
            context_tokens=sequence.context_tokens,
            timeout_s=timeout_s,
        )
        life = self.readers[reader]
        task = self.loop.create_task(life.reader.pull(request))
        self.bringing.append(Bringing(life, sequence, handoff, task))

    @having(lambda world: world.offers)
    @step(reader=READER, pick=PICK, timeout_s=TIMEOUT_S)
    def fetch(self, reader: int, pick: int, timeout_s: float) -> None:
        """The next turn of a chat, somewhere else."""
        prompt = tuple(newest(self.offers, pick).sequence.tokens)
        sequence = sequence_of(next(self._numbers), prompt)
        hello = self.owner.hello
        request = FetchRequest(
            source=PrefixSource(
                worker_id=hello.worker_id,
                address="",
                incarnation=hello.incarnation,
                num_blocks=len(prompt) // SIZE,
            ),
            sequence_id=sequence.sequence_id,
            hashes=sequence.block_hashes(len(prompt) // SIZE, SIZE),
            timeout_s=timeout_s,
        )
        life = self.readers[reader]
        if len(life.pool.lookup(request.hashes)) < len(request.hashes):
            task = self.loop.create_task(life.reader.fetch(request))
            self.bringing.append(Bringing(life, sequence, None, task))

    @having(lambda world: world.rough and world.bringing)
    @step(pick=PICK)
    def cancel(self, pick: int) -> None:
        newest(self.bringing, pick).task.cancel()

    @having(lambda world: any(life.received for life in world.readers))
    @step(reader=READER, pick=PICK, publish=OFTEN, release=OFTEN)
    def use(self, reader: int, pick: int, publish: bool, release: bool) -> None:
        life = self.readers[reader]
        if life.received:
            received = newest(life.received, pick)
            if publish:
                received.publish()
            if release:
                life.release(received)

    @having(lambda world: world.rough)
    @step(where=st.integers(0, 2), num_blocks=st.sampled_from([2, 4, 6]))
    def others(self, where: int, num_blocks: int) -> None:
        """Another sequence takes blocks, evicting what is cached, or ends."""
        life: OwnerLife | ReaderLife = [*self.readers, self.owner][where]
        if life.others:
            life.pool.release(life.others.pop())
        else:
            life.others = [life.pool.allocate(num_blocks) or []]

    # -- the network, the reads, the time -------------------------------------------------------

    @initialize(messages=st.integers(0, 2), fate=FATE, reads=st.integers(0, 2))
    def pace_at_first(self, messages: int, fate: Fate, reads: int) -> None:
        self.message_steps, self.fate, self.read_steps = messages, fate, reads

    @step(engines=OFTEN, messages=LATENCY, fate=FATE, reads=LATENCY, turns=TURNS)
    def pace(self, engines: bool, messages: int, fate: Fate, reads: int, turns: int | None) -> None:
        """What moves by itself from now on: sequences or not, messages and halves of reads after
        so many steps, every third message to its fate, the loop so many turns or until it rests.
        """
        self.engines, self.turns = engines, turns
        self.message_steps, self.fate, self.read_steps = messages, fate, reads

    @having(lambda world: not world.loop.resting)
    @step(turns=st.integers(1, 4))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.loop.turn()

    @having(lambda world: not all(link.quiet for link in world.network.links))
    @step(
        pick=PICK,
        to_owner=st.booleans(),
        fate=FATE,
    )
    def deliver(self, pick: int, to_owner: bool, fate: Fate) -> None:
        link = newest([link for link in self.network.links if not link.quiet], pick)
        if not (link.to_owner if to_owner else link.to_reader).under_way:
            to_owner = not to_owner
        link.deliver(to_owner, fate)
        self.seen[f"message {fate.value}"] += 1

    @having(lambda world: world.rough and world.network.links)
    @step(pick=PICK, owner_dies=SELDOM)
    def cut(self, pick: int, owner_dies: bool) -> None:
        """A stream is torn; or the owner starts anew: same door, same memory, another life."""
        newest(self.network.links, pick).cut()
        if owner_dies:
            for link in self.network.links:
                link.cut()
                link.door.cancel()
            self.owner = self._new_owner()

    @having(lambda world: any(life.transport.reads for life in world.readers))
    @step(pick=PICK, how=st.sampled_from([ChosenTransport.move, ChosenTransport.fail]))
    def read_moves(self, pick: int, how: Callable[[ChosenTransport, Read], None]) -> None:
        transport = newest([t for r in self.readers if (t := r.transport).reads], pick)
        self.seen[f"read {how.__name__}"] += 1
        how(transport, newest(transport.reads, pick))

    @step(
        ticks=st.sampled_from([1, 3, 8, 14]),
        stopped=st.sampled_from(["", "", "owner", "readers"]),
        sweeps=st.booleans(),
        renews=st.booleans(),
    )
    def time_passes(self, ticks: int, stopped: str, sweeps: bool, renews: bool) -> None:
        """A side that was stopped finds afterwards that time has passed; or it has no part in it.

        `renews`: the router keeps leases alive to which no reader is bound.
        """
        if not stopped:
            for _ in range(ticks):
                if renews:
                    leases = [lease.lease_id for lease in self.owner.table.all()]
                    self.owner.table.renew(leases, None)
                self._tick(sweeps=sweeps)
        elif stopped == "readers":
            self.loop.now_s += ticks * TICK_S
        else:
            self.clock.advance(ticks * TICK_S)
            if sweeps:
                self.owner.owner.sweep()

    # -- what follows by itself -----------------------------------------------------------------

    def _offer(self, lease: Lease, sequence: EngineSequence, to: int | None, *, live: bool) -> None:
        handoff = Handoff(
            owner_id=self.owner.hello.worker_id,
            owner_address="",
            owner_incarnation=self.owner.hello.incarnation,
            lease_id=lease.lease_id,
            live=live,
        )
        self.offers = [*self.offers[-5:], Offer(handoff, sequence)]
        if to is not None:
            self._pull(to, self.offers[-1])

    def _tick(self, *, sweeps: bool) -> None:
        self.clock.advance(TICK_S)
        self.loop.now_s += TICK_S
        if sweeps:
            self.owner.owner.sweep()
        self.react()
        self._check_heard()

    def react(self) -> None:
        """The rest of a step: all that moves by itself, then the checks."""
        self.steps.number += 1
        if self.engines:
            self._step_engines()
        self._turn()
        self.network.forget_ended()
        for bringing in [b for b in self.bringing if b.task.done()]:
            self.bringing.remove(bringing)
            self._note_end(bringing)
        self.check()

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

    def _turn(self) -> None:
        if self.turns is None:
            self.loop.settle()
            while self._move():
                self.loop.settle()
        else:
            self._move()
            for _ in range(self.turns):
                self.loop.turn()

    def _move(self) -> bool:
        """One message of each stream that is due, half of each such read; whether any was."""
        before = self.moved
        for link in self.network.links:
            for to_owner, pipe in ((True, link.to_owner), (False, link.to_reader)):
                if pipe.due(self.message_steps):
                    self.moved += 1
                    link.deliver(to_owner, Fate.PASS if self.moved % 3 else self.fate)
        for life in self.readers:
            for read in life.transport.due(self.read_steps):
                self.moved += 1
                life.transport.move(read)
        return self.moved > before

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
        """What came must be what was promised."""
        life, sequence = bringing.reader, bringing.sequence
        if isinstance(result, Pulled):
            for token in result.tokens:
                sequence.tokens.append(token)
            positions = len(sequence.tokens) - 1
        else:
            positions = len(result.blocks) * SIZE
        kind = _kind(bringing, result)
        self.seen[f"came {kind}"] += 1
        self.seen["came with cached blocks"] += bool(result.cached_blocks)
        if kind == "ended":
            assert result.blocks == ()
            return
        assert len(result.blocks) == LAYOUT.num_blocks(positions)
        assert len(set(result.blocks)) == len(result.blocks)
        came = [life.pool.kv[block_id] for block_id in result.blocks]
        for i, kv in enumerate(came):
            assert kv.tokens == tuple(sequence.tokens[: min((i + 1) * SIZE, positions)]), (i, kv)
        fresh = slice(result.cached_blocks, len(came))
        assert any(lease.kv[fresh] == came[fresh] for lease in self._confirmed(bringing, result)), (
            "nobody said HELD of these blocks"
        )
        sequence.blocks = list(result.blocks)
        sequence.computed = positions
        sequence.published = result.cached_blocks
        life.received.append(Received(life.pool, sequence))

    def _confirmed(self, bringing: Bringing, result: Pulled | FetchedPrefix) -> list[Promise]:
        """The leases that this can have come from, and of which its reader was told HELD."""
        handoff, name = bringing.handoff, f"{bringing.reader.name}/"
        lives = self.lives.values()
        if handoff is not None:
            lives = [self.lives[handoff.owner_incarnation]]
        return [
            life.table.promises[lease_id]
            for life in lives
            for lease_id, reader in life.table.confirmed.items()
            if reader.startswith(name)
            and (handoff is None or lease_id == handoff.lease_id)
            and (handoff is None or life.table.promises[lease_id].lease.tokens == result.tokens)
            and life.table.promises[lease_id].lease.sequence_id == bringing.sequence.sequence_id
        ]

    def check(self) -> None:
        """What holds at any time."""
        self.owner.check()
        settled = self.loop.resting
        for life in self.readers:
            pulling = any(bringing.reader is life for bringing in self.bringing)
            life.check(pulling=pulling, settled=settled)
            if not pulling:
                self._check_told(life)
            self.seen["quarantined"] += bool(life.pool.counts().quarantined)
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
        """No pull goes on whose lease has ended. One that waits for memory has a tick to notice,
        and if it is the answer that has ended, its router ends the wait.
        """
        before, self._unheard = self._unheard, []
        for bringing in self.bringing:
            handoff, life = bringing.handoff, bringing.reader
            if handoff is None or bringing.task.done() or not self._in_touch(life):
                continue
            lease = self.owner.table.get(handoff.lease_id)
            same_life = handoff.owner_incarnation == self.owner.hello.incarnation
            unread = self.owner.table.ended_unread(handoff.lease_id) is not None
            if not (same_life and (unread or (lease is not None and bound(lease, life)))):
                assert bringing not in before, bringing
                self._unheard.append(bringing)

    def teardown(self) -> None:
        try:
            if not self.failed:
                self._come_to_rest()
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.settle()
            self.loop.close()
            for each in self._patches:
                each.stop()

    def _come_to_rest(self) -> None:
        """Everything ends, by its deadline at the latest, and nothing is left."""
        self.engines, self.turns = False, None
        self.message_steps, self.fate, self.read_steps = 0, Fate.PASS, 0
        for life in [self.owner, *self.readers]:
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
            self._tick(sweeps=True)
        assert not self.bringing, "a hand-off outlived its deadline"
        self.clock.advance(LEASE_S)
        self.owner.owner.sweep()
        for life in self.readers:
            for received in list(life.received):
                life.release(received)
            life.stop.set()
        self.react()
        self.owner.check_over()
        for life in self.readers:
            life.pool.check_idle()
            assert life.pool.counts().quarantined == 0
        assert all(host.done() and host.exception() is None for host in self._hosts)


def bound(lease: Lease, life: ReaderLife) -> bool:
    """Over some stream of that reader."""
    return (lease.reader or "").startswith(f"{life.name}/")


def _stale(offer: Offer, how: str) -> tuple[Handoff, SequenceId]:
    """A handoff, or one that is of something else."""
    handoff, sequence_id = offer.handoff, offer.sequence.sequence_id
    match how:
        case "lease":
            return replace(handoff, lease_id=LeaseId(handoff.lease_id + 1_000)), sequence_id
        case "attempt":
            return handoff, replace(sequence_id, attempt=1)
        case "choice":
            return handoff, replace(sequence_id, choice=1)
        case "incarnation":
            return replace(handoff, owner_incarnation=Incarnation("owner.older")), sequence_id
    return handoff, sequence_id


def _kind(bringing: Bringing, result: Pulled | FetchedPrefix) -> str:
    if isinstance(result, FetchedPrefix) or bringing.handoff is None:
        return "cached"
    if result.ended:
        return "ended"
    return "running" if bringing.handoff.live else "prefill"


def interleave(world: type[Interleavings], *, examples: int, steps: int = 70) -> Counter[str]:
    """Run it; answers what was seen."""
    run_state_machine_as_test(
        world, settings=settings(QUICK, max_examples=examples, stateful_step_count=steps)
    )
    return world.seen


def test_whatever_happens_in_between_held_means_held_and_nothing_leaks() -> None:
    class World(Interleavings):
        seen: ClassVar[Counter[str]] = Counter()

    seen = interleave(World, examples=120)
    assert seen["steps"] >= 5_000
