"""What may happen to an owner and its readers, in any order: the rules over a World."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import count
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from core.ids import Incarnation, LeaseId, SequenceId
from core.messages import Handoff, PrefixSource
from engine.sequence import Sequence as EngineSequence
from kv_transfer.leases import Lease
from kv_transfer.messages import Abort, Bind, Close, FromReader, Ready, Renew
from kv_transfer.reader import FetchRequest, PullRequest
from tests.kv_transfer.cranked import Fate
from tests.kv_transfer.interleaved import (
    Decoding,
    OwnerLife,
    Prefill,
    ReaderLife,
    sequence_of,
)
from tests.kv_transfer.watched import LAYOUT, SIZE, ChosenTransport, Read
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
