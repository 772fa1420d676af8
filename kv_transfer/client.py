"""The reader's end of a PeerStream: one to one incarnation of one owner."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from core.channel import describe_break, heed_cancel
from core.errors import TransferCause, TransferFailed
from core.ids import (
    BlockHash,
    BlockId,
    Incarnation,
    LeaseId,
    SequenceId,
    ShardId,
    WorkerId,
    shard_id,
)
from core.stream import MessageStream, StreamBroken, dial
from kv_transfer.bound import BoundLease, afresh
from kv_transfer.codec import (
    UnknownMessage,
    from_owner_from_wire,
    from_reader_to_wire,
)
from kv_transfer.greeting import check_hello
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    Fetch,
    Fetched,
    FromOwner,
    FromReader,
    LeaseOutcome,
    PeerHello,
    Ready,
    Refused,
    Renew,
    Renewed,
)
from kv_transfer.plan import ArenaShape
from kv_transfer.transports import Transports
from wire import peer_pb2

log = logging.getLogger(__name__)

Stream = MessageStream[peer_pb2.FromOwner]

_CLOSE_ASKS = 4
_ASKED_LEASES = 4_096
_CAUSES = {
    LeaseOutcome.EXPIRED: TransferCause.EXPIRED,
    LeaseOutcome.WITHDRAWN: TransferCause.WITHDRAWN,
}
_BREAKS = (StreamBroken, UnknownMessage)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerAddress:
    """Where an owner is reached, and which life of it is meant."""

    worker_id: WorkerId
    address: str
    incarnation: Incarnation


class PeerConnection:
    """`run` is its only task and ends with the stream."""

    def __init__(
        self,
        door: OwnerAddress,
        hello: Callable[[], PeerHello],
        transports: Transports,
        renew_every_s: float,
        connect_timeout_s: float,
    ) -> None:
        self.door = door
        self._hello = hello
        self._transports = transports
        self._renew_every_s = renew_every_s
        self._connect_timeout_s = connect_timeout_s
        self._stream: Stream | None = None
        self._leases: dict[LeaseId, BoundLease] = {}
        self._asked: OrderedDict[LeaseId, None] = OrderedDict()
        self._unanswered: OrderedDict[LeaseId, None] = OrderedDict()
        """Over by their seal; until the owner hears so it holds their blocks."""
        self._fetches: dict[int, asyncio.Future[Fetched]] = {}
        self._next_fetch = 1
        self._lost: TransferFailed | None = None
        self._heard = 0
        self._retired = asyncio.Event()
        self.shapes: tuple[ArenaShape, ...] = ()
        self.transport_name = ""
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # -- used by the reader ---------------------------------------------------------------------

    @property
    def shards(self) -> tuple[ShardId, ...]:
        """What the transports were told to connect to. They stay so when the stream has ended."""
        return tuple(shard_id(self.door.incarnation, rank) for rank in range(len(self.shapes)))

    @property
    def lost(self) -> bool:
        return self._lost is not None

    @property
    def usable(self) -> bool:
        """Both have said hello, and the stream lives."""
        return self.ready.done() and self._lost is None

    def retire(self) -> None:
        """A read failed: the next pull shall make contact anew."""
        self._retired.set()

    @contextmanager
    def bind(self, lease_id: LeaseId, sequence_id: SequenceId) -> Iterator[BoundLease]:
        """Bound inside; on the way out the owner is told, unless the lease was closed."""
        with self._hold(lease_id) as lease:
            self.bind_again(lease_id, sequence_id, 0)
            yield lease

    def bind_again(self, lease_id: LeaseId, sequence_id: SequenceId, first_index: int) -> None:
        """Ask for what was announced from `first_index` on, perhaps not for the first time."""
        bind = Bind(lease_id=lease_id, sequence_id=sequence_id, first_index=first_index)
        self._send(bind)

    @asynccontextmanager
    async def fetch(
        self, sequence_id: SequenceId, hashes: Sequence[BlockHash], first_index: int
    ) -> AsyncIterator[tuple[BoundLease, Fetched]]:
        """A lease on cached blocks from `first_index` on, and which; raises if there are none.

        A late answer to a question given up is answered with an abort.
        """
        self._raise_lost()
        number, self._next_fetch = self._next_fetch, self._next_fetch + 1
        answer: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        self._fetches[number] = answer
        question = Fetch(
            number=number,
            sequence_id=sequence_id,
            hashes=tuple(hashes),
            first_index=first_index,
        )
        self._send(question)
        try:
            fetched = await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._decline(answer.result())  # it came in the moment of giving up
            raise
        finally:
            self._fetches.pop(number, None)
        if not fetched.block_ids:
            raise TransferFailed(
                "the KV owner holds no more of the prefix", cause=TransferCause.NOT_HELD
            )
        with self._hold(fetched.lease_id) as lease:
            yield lease, fetched

    @contextmanager
    def _hold(self, lease_id: LeaseId) -> Iterator[BoundLease]:
        """Bound inside. Afterwards no read that ends late asks the closing question: with the
        abort lost, HELD would commit a move that nobody takes.
        """
        self._raise_lost()
        if lease_id in self._leases or lease_id in self._asked:
            raise TransferFailed(
                "the lease is bound already, or was closed, by another pull of this worker"
            )
        lease = self._leases[lease_id] = BoundLease(lease_id)
        try:
            yield lease
        finally:
            del self._leases[lease_id]
            if lease.asked:
                self._asked[lease_id] = None  # a HELD under way is the answer to this pull alone
                if len(self._asked) > _ASKED_LEASES:
                    self._asked.popitem(last=False)
            if lease.closed is not None and lease.asked and not lease.answered:
                self._unanswered[lease_id] = None
                if len(self._unanswered) > _ASKED_LEASES:
                    self._unanswered.popitem(last=False)
            if lease.closed is None:
                self._send(Abort(lease_id=lease_id, reason="the reader gave up"))
            lease.fail(TransferFailed("the pull is over"))

    def send_ready(self, lease_id: LeaseId) -> None:
        """All that was announced of a running sequence is here."""
        self._send(Ready(lease_id=lease_id))

    def ask_close(self, lease: BoundLease, verify: tuple[BlockId, ...]) -> None:
        """Ask the closing question; `closed_lease` hears the answer."""
        lease.asked = True
        self._send(Close(lease_id=lease.lease_id, verify=verify))

    async def closed_lease(
        self, lease: BoundLease, verify: tuple[BlockId, ...], timeout_s: float
    ) -> Closed:
        """The answer to the closing question, asked again while it is late; silence is UNKNOWN."""
        for ask in range(_CLOSE_ASKS):
            if ask or not lease.asked:
                self.ask_close(lease, verify)
            try:
                async with asyncio.timeout(timeout_s / _CLOSE_ASKS):
                    while lease.closed is None:
                        lease.changed.clear()
                        await lease.changed.wait()
                    return lease.closed
            except TimeoutError:
                continue
        return lease.closed or Closed(lease_id=lease.lease_id, outcome=LeaseOutcome.UNKNOWN)

    def _raise_lost(self) -> None:
        if self._lost is not None:
            raise afresh(self._lost)

    # -- the stream -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, say hello, serve until the stream ends; then every bound lease has failed."""
        failure = TransferFailed("the stream to the KV owner ended", cause=TransferCause.OWNER_LOST)
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self._connect_timeout_s):
                    dialled = dial(self.door.address, peer_pb2.FromOwner.FromString)
                    stream = self._stream = await stack.enter_async_context(dialled)
                    self._send(self._hello())
                    await self._greet(await stream.read())
                self.ready.set_result(None)
                await self._serve(stream)
        except* TimeoutError:
            failure = TransferFailed(
                "the KV owner did not answer in time", cause=TransferCause.NO_ANSWER
            )
        except* _BREAKS as errors:
            failure = TransferFailed(
                f"the stream to the KV owner broke: {describe_break(errors)}",
                cause=TransferCause.OWNER_LOST,
            )
        except* TransferFailed as errors:  # the reason, where the stream broke for it
            failure = _first(errors)
        finally:
            self._lose(failure)
        heed_cancel()

    async def _serve(self, stream: Stream) -> None:
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(self._renew()),
                group.create_task(self._end_retired()),
            ]
            await stream.deliver(self._dispatch)
            for helper in helpers:
                helper.cancel()

    async def _greet(self, raw: peer_pb2.FromOwner | None) -> None:
        try:
            hello = from_owner_from_wire(raw) if raw is not None else None
        except UnknownMessage as unknown:
            raise TransferFailed(
                f"the KV owner says hello with what this version does not know: {unknown}",
                cause=TransferCause.OTHER_PROTOCOL,
            ) from None
        shards = check_hello(hello, self.door.incarnation, self._hello().model_id)
        self.shapes = tuple(
            ArenaShape(shard.layout, shard.memories[0].nbytes // shard.layout.block_bytes)
            for shard in shards
        )
        for rank, shard in enumerate(shards):
            self.transport_name = await self._transports.connect(
                shard_id(self.door.incarnation, rank), shard.memories
            )

    def _dispatch(self, raw: peer_pb2.FromOwner) -> bool:
        self._heard += 1
        try:
            message = from_owner_from_wire(raw)
        except UnknownMessage as unknown:
            log.info("peer_message_skipped %s", unknown)
        else:
            self.hear(message)
        return True

    def hear(self, message: FromOwner) -> None:
        """One message of the owner, to whom it concerns."""
        match message:
            case PeerHello() | Renewed():
                return
            case Refused():
                raise TransferFailed(
                    f"the KV owner refused: {message.reason}", cause=TransferCause.OTHER_PROTOCOL
                )
            case Fetched():
                self._answer_fetch(message)
                return
        lease = self._leases.get(message.lease_id)
        if lease is None:
            if isinstance(message, Closed | Abort):
                self._unanswered.pop(message.lease_id, None)
            return
        match message:
            case Announce():
                lease.hear(message)
            case Closed():
                lease.answer(message)
            case Abort():
                cause = _CAUSES.get(message.outcome, TransferCause.OWNER_ENDED)
                reason = f"the KV owner ended the lease: {message.reason}"
                lease.fail(TransferFailed(reason, cause=cause))

    def _answer_fetch(self, fetched: Fetched) -> None:
        waiting = self._fetches.get(fetched.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(fetched)
        else:
            self._decline(fetched)

    def _decline(self, fetched: Fetched) -> None:
        if fetched.block_ids:
            self._send(Abort(lease_id=fetched.lease_id, reason="the fetch was given up"))

    def _send(self, message: FromReader) -> None:
        if self._stream is not None:
            self._stream.send(from_reader_to_wire(message))

    async def _end_retired(self) -> None:
        await self._retired.wait()
        raise TransferFailed("a read from the KV owner failed", cause=TransferCause.READ_FAILED)

    async def _renew(self) -> None:
        """Keep the bound leases alive, and ask again what was not answered. The owner answers each
        renewal: silence is a lost owner.
        """
        while True:
            asked, heard = bool(self._leases or self._fetches or self._unanswered), self._heard
            if asked:
                self._send(Renew(lease_ids=tuple(self._leases)))
            for lease_id in self._unanswered:
                self._send(Close(lease_id=lease_id))
            for _ in range(2):  # a pause of this process is not one of the owner
                await asyncio.sleep(self._renew_every_s / 2)
            if asked and heard == self._heard:
                raise TransferFailed(
                    f"the KV owner said nothing for {self._renew_every_s:.1f} s",
                    cause=TransferCause.OWNER_SILENT,
                )

    def _lose(self, failure: TransferFailed) -> None:
        self._lost = failure
        for lease in self._leases.values():
            lease.fail(failure)
        for answer in self._fetches.values():
            if not answer.done():
                answer.set_exception(afresh(failure))
        if not self.ready.done():
            self.ready.set_exception(afresh(failure))
            self.ready.exception()  # it may be that nobody waits for it


def _first(errors: BaseExceptionGroup[TransferFailed]) -> TransferFailed:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, TransferFailed)
    return afresh(error)
