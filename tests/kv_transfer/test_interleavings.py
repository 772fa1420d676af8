"""An owner and two readers in random order: HELD means held, and nothing is lost or leaked.

The model: an announced block holds the KV of its sequence's tokens, written by one allocation; a
hand-off that returns brings exactly that, in order; and everything comes to rest in the end.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import count
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from core.ids import BlockId, Incarnation, LeaseId, SequenceId
from core.messages import Handoff, PrefixSource
from engine.sequence import Sequence as EngineSequence
from kv_transfer.landing import Landing
from kv_transfer.leases import Lease
from kv_transfer.messages import Abort, Bind, Close, FromReader, LeaseOutcome, Ready, Renew
from kv_transfer.owner import Owner
from kv_transfer.reader import FetchRequest, PullRequest
from tests.builders import QUICK
from tests.kv_transfer.cranked import Fate
from tests.kv_transfer.interleaved import (
    Decoding,
    OwnerLife,
    Parts,
    Prefill,
    ReaderLife,
    WatchedReader,
    sequence_of,
)
from tests.kv_transfer.watched import (
    LAYOUT,
    SIZE,
    ChosenTransport,
    Read,
    WatchedPool,
    WatchedTable,
)
from tests.kv_transfer.world import TICK_S, Bringing, World

T = TypeVar("T")
Act = Callable[..., None]

NEVER = 10_000
CALM_STEPS = 5
PROMPTS = [(family,) * length for length in (3, 1, 4, 6, 9) for family in (0, 0, 1)]

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


def step(**draws: st.SearchStrategy[Any]) -> Callable[[Act], Act]:
    """A rule, after which the world reacts and is checked."""

    as_rule: Callable[[Act], Act] = rule(**draws)  # type: ignore[call-overload]

    def wrap(act: Act) -> Act:
        @wraps(act)
        def stepped(world: World, **drawn: object) -> None:
            world.seen["steps"] += 1
            try:
                act(world, **drawn)
                world.react()
            except BaseException:
                world.failed = True
                raise

        return as_rule(stepped)

    return wrap


def having(what: Callable[["Interleavings"], object]) -> Callable[[Act], Act]:
    return precondition(lambda world: bool(what(world)))


def newest(things: Sequence[T], pick: int) -> T:
    return things[-1 - pick % len(things)]


class Interleavings(World):
    """Every operation of an owner, its readers, their network and their time."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self._numbers = count(1)
        super().__init__()

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
    @step(pick=PICK, token=st.integers(0, 1))
    def decode(self, pick: int, token: int) -> None:
        newest(self.owner.decodings, pick).decode(token)

    @having(lambda world: world.rough and world.owner.decodings)
    @step(pick=PICK, how=st.sampled_from([Decoding.drop, Decoding.end]))
    def end(self, pick: int, how: Callable[[Decoding], None]) -> None:
        how(newest(self.owner.decodings, pick))

    @having(lambda world: world.offers)
    @step(pick=PICK, what=st.sampled_from([Close, Abort, Renew, Ready, Bind]))
    def stranger_speaks(self, pick: int, what: type[FromReader]) -> None:
        """A reader that has no business with a lease."""
        offer = newest(self.offers, pick)
        message = _of_stranger(what, offer.handoff.lease_id, offer.sequence.sequence_id)
        self.owner.owner.handle(self.owner.stranger, message)

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
        """The same prompt, or the next turn of its chat, somewhere else."""
        tokens = tuple(newest(self.offers, pick).sequence.tokens)
        sequence = sequence_of(next(self._numbers), tokens)
        hello = self.owner.hello
        request = FetchRequest(
            source=PrefixSource(
                worker_id=hello.worker_id,
                address="",
                incarnation=hello.incarnation,
                num_blocks=len(tokens) // SIZE,
            ),
            sequence_id=sequence.sequence_id,
            hashes=sequence.block_hashes(len(tokens) // SIZE, SIZE),
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
        lives: list[OwnerLife | ReaderLife] = [*self.readers, self.owner]
        life = lives[where]
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
        """What moves by itself from now on."""
        self.engines, self.turns = engines, turns
        self.message_steps, self.fate, self.read_steps = messages, fate, reads

    @having(lambda world: not world.loop.resting)
    @step(turns=st.integers(1, 4))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.loop.turn()

    @having(lambda world: not all(link.quiet for link in world.network.links))
    @step(pick=PICK, to_owner=st.booleans(), fate=FATE)
    def message(self, pick: int, to_owner: bool, fate: Fate) -> None:
        link = newest([link for link in self.network.links if not link.quiet], pick)
        if not (link.to_owner if to_owner else link.to_reader).under_way:
            to_owner = not to_owner
        self.deliver(link, to_owner, fate)

    @having(lambda world: any(life.transport.reads for life in world.readers))
    @step(pick=PICK, how=st.sampled_from([ChosenTransport.move, ChosenTransport.fail]))
    def read(self, pick: int, how: Callable[[ChosenTransport, Read], None]) -> None:
        transport = newest([t for r in self.readers if (t := r.transport).reads], pick)
        how(transport, newest(transport.reads, pick))

    @having(lambda world: world.rough and world.network.links)
    @step(pick=PICK, owner_dies=SELDOM)
    def cut(self, pick: int, owner_dies: bool) -> None:
        """A stream is torn; or the owner starts anew: same door, same memory, another life."""
        newest(self.network.links, pick).cut()
        if owner_dies:
            for link in self.network.links:
                link.cut()
                link.door.cancel()
            self.owner = self.new_owner()

    @step(
        ticks=st.sampled_from([1, 3, 8, 14]),
        only=st.sampled_from(["", "", "owner", "readers"]),
        sweeps=st.booleans(),
        renews=st.booleans(),
    )
    def time_passes(self, ticks: int, only: str, sweeps: bool, renews: bool) -> None:
        """For all alike, or for one side `only`, as if the other one had been stopped.

        `renews`: the router keeps leases alive to which no reader is bound.
        """
        if only == "readers":
            self.loop.now_s += ticks * TICK_S
            return
        if only == "owner":
            self.clock.advance(ticks * TICK_S)
            if sweeps:
                self.owner.owner.sweep()
            return
        for _ in range(ticks):
            if renews:
                self.owner.table.renew([lease.lease_id for lease in self.owner.table.all()], None)
            self.tick(sweeps=sweeps)


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


def _of_stranger(what: type[FromReader], lease_id: LeaseId, sequence_id: SequenceId) -> FromReader:
    if what is Bind:
        return Bind(lease_id=lease_id, sequence_id=replace(sequence_id, attempt=1))
    if what is Renew:
        return Renew(lease_ids=(lease_id,))
    if what is Abort:
        return Abort(lease_id=lease_id, reason="strange")
    return Ready(lease_id=lease_id) if what is Ready else Close(lease_id=lease_id)


def interleave(
    parts: Parts | None = None, *, examples: int, phases: Sequence[Phase] = tuple(Phase)
) -> Counter[str]:
    """Run it; answers what was seen."""

    class Watched(Interleavings):
        pass

    Watched.parts = parts or Parts()
    Watched.seen = Counter()
    run_state_machine_as_test(
        Watched,
        settings=settings(
            QUICK,
            max_examples=examples,
            stateful_step_count=70,
            phases=phases,
            report_multiple_bugs=False,
        ),
    )
    return Watched.seen


# -- the tests ----------------------------------------------------------------------------------

COMMON = (
    "came prefill",
    "came running",
    "came cached",
    "came ended",
    "came with cached blocks",
    "cancelled",
    "failed deadline",
    "failed expired",
    "failed no_memory",
    "failed not_held",
    "failed other",
    "failed owner_ended",
    "failed owner_lost",
    "failed owner_restarted",
    "failed owner_silent",
    "failed read_failed",
    "message double",
    "message drop",
    "message late",
    "quarantined",
)


@pytest.mark.timeout(600)
def test_whatever_happens_in_between_held_means_held_and_nothing_leaks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, logger="kv_transfer")
    seen = interleave(examples=100)
    assert not caplog.records
    assert seen["steps"] >= 5_000
    assert not [what for what in COMMON if seen[what] < 5], seen


# -- what is broken is found --------------------------------------------------------------------


class FreesUnderReads(WatchedPool):
    def quarantine(self, block_ids: Sequence[BlockId]) -> None:
        self.abandon(block_ids)

    def release_quarantined(self, block_ids: Sequence[BlockId]) -> None:
        pass


class TrustsAnybody(WatchedTable):
    def close(self, lease_id: LeaseId, reader: str) -> LeaseOutcome:
        super().close(lease_id, reader)
        return LeaseOutcome.HELD


class KeepsLeasesOfTheLost(Owner):
    def detach(self, reader: str) -> None:
        del self._readers[reader]


class ForgetsWhatWasCached(WatchedReader):
    def give_back(self, landing: Landing) -> None:
        landing.cached = []
        super().give_back(landing)


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (Parts(reader_pool=FreesUnderReads), "is FREE under a read"),
        (Parts(table=TrustsAnybody), "outcome=<LeaseOutcome.HELD"),
        (Parts(owner=KeepsLeasesOfTheLost), "reader='reader"),
        (Parts(reader=ForgetsWhatWasCached), "running references"),
    ],
)
def test_a_protection_that_is_gone_is_missed(parts: Parts, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        interleave(parts, examples=100, phases=(Phase.generate,))


def test_a_reader_that_does_not_ask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def confirm(landing: Landing) -> None:
        landing._room.pool.received(landing.fresh)

    monkeypatch.setattr(Landing, "confirm", confirm)
    with pytest.raises(AssertionError, match="not said to be HELD"):
        interleave(examples=100, phases=(Phase.generate,))


# -- what was found -----------------------------------------------------------------------------


@contextmanager
def standing_still() -> Iterator[Interleavings]:
    """A world in which nothing moves by itself."""

    class Still(Interleavings):
        parts = Parts()
        seen: ClassVar[Counter[str]] = Counter()

    world = Still()
    world.failed = True
    world.engines = False
    world.message_steps = world.read_steps = NEVER
    try:
        yield world
        world.failed = False
    finally:
        world.teardown()


def carry(world: World, kind: str, *, to_owner: bool) -> None:
    """Deliver the messages of the one stream up to the first of this kind."""
    (link,) = world.network.links
    under_way = (link.to_owner if to_owner else link.to_reader).under_way
    carried = ""
    while carried != kind:
        sent = under_way[0].message
        carried = "" if sent is None else sent.WhichOneof("message")
        world.deliver(link, to_owner, Fate.PASS)
        world.react()


def submit_and_bind(world: Interleavings) -> None:
    """A prefill at the owner, and a pull that follows it."""
    world.submit(prompt=(0, 0, 0), to=0)
    carry(world, "hello", to_owner=True)
    carry(world, "hello", to_owner=False)
    carry(world, "bind", to_owner=True)


def test_the_answer_to_a_pull_given_up_is_not_that_to_the_next_one() -> None:
    with standing_still() as world:
        submit_and_bind(world)
        world.compute(pick=0, num_tokens=9, ends=False)
        world.time_passes(ticks=5, only="", sweeps=False, renews=False)  # it asks again
        carry(world, "bind", to_owner=True)
        carry(world, "announce", to_owner=False)
        move_reads(world)
        world.bringing[0].task.cancel()
        world.react()
        world.pull(reader=0, pick=0, timeout_s=12.0, stale="")
        carry(world, "close", to_owner=True)
        carry(world, "abort", to_owner=True)
        world.owner.others += [world.owner.pool.allocate(world.owner.pool.available) or []]
        carry(world, "announce", to_owner=False)
        carry(world, "closed", to_owner=False)
        move_reads(world)
        assert world.seen["came prefill"] == 0
        assert not world.readers[0].received


def move_reads(world: World) -> None:
    transport = world.readers[0].transport
    while transport.reads:
        transport.move(transport.reads[0])
    world.react()


def test_a_fetch_cancelled_as_its_answer_comes_gives_the_lease_back() -> None:
    with standing_still() as world:
        submit_and_bind(world)
        world.compute(pick=0, num_tokens=9, ends=False)
        world.fetch(reader=0, pick=0, timeout_s=12.0)
        carry(world, "fetch", to_owner=True)
        fetching = world.bringing[-1].task
        (link,) = world.network.links
        world.turns = 0
        while link.to_reader.under_way:
            world.deliver(link, False, Fate.PASS)
        waits_for = fetching._fut_waiter  # type: ignore[union-attr]
        while not waits_for.done():
            world.loop.turn()
        fetching.cancel()
        world.turns = None
        world.react()
        assert fetching.cancelled()
        carry(world, "abort", to_owner=True)
        assert all(lease.tokens for lease in world.owner.table.all()), "that of the fetch is open"
