"""The owner's end of a PeerStream: one per reader."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from core import telemetry
from core.ids import LeaseId
from core.messages import PROTOCOL_MAJOR
from core.stream import MessageStream, StreamBroken, accepting
from engine.arena import Arena
from kv_transfer.checksum import checksum_blocks
from kv_transfer.codec import UnknownMessage, from_owner_to_wire, from_reader_from_wire
from kv_transfer.messages import Close, Closed, FromOwner, FromReader, PeerHello, Refused
from kv_transfer.owner import Owner
from wire import peer_pb2

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_SUMS_AT_ONCE = 2
"""Questions; each takes a core while its turn lasts."""

Stream = MessageStream[peer_pb2.FromReader]


class NotServed(Exception):
    """The reader is refused; it is told why."""


class PeerDoor:
    """Translates; all decisions are the Owner's. `hello` is asked for each stream: the transports'
    metadata may have changed.
    """

    def __init__(self, owner: Owner, hello: Callable[[], PeerHello], arena: Arena) -> None:
        self._owner = owner
        self._hello = hello
        self._arena = arena
        self._turns = asyncio.Semaphore(_SUMS_AT_ONCE)

    async def serve(self, stream: Stream) -> None:
        """One stream to its end; raises nothing."""
        try:
            await self._serve(stream)
        except (NotServed, StreamBroken) as error:
            _tell_end(stream, str(error))
        except TimeoutError:
            _tell_end(stream, "no hello in time")
        except Exception:  # the root of a stream's task
            log.exception("peer_stream_bug from=%s", stream.other_end)

    async def _serve(self, stream: Stream) -> None:
        def send(message: FromOwner) -> None:
            stream.send(from_owner_to_wire(message))
            if isinstance(message, Closed):
                stream.flush()

        mine = self._hello()
        send(mine)
        reader = self._owner.attach(await self._admit(mine, stream), send)
        try:
            await self._answer(reader, stream)
        except StreamBroken as error:
            _tell_end(stream, str(error), reader)
        finally:
            self._owner.detach(reader)

    async def _admit(self, mine: PeerHello, stream: Stream) -> PeerHello:
        """The reader's hello. Raises NotServed, after telling it."""
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            try:
                raw = await stream.read()
                hello = from_reader_from_wire(raw) if raw is not None else None
                return _check_hello(mine, hello)
            except (NotServed, UnknownMessage) as error:
                stream.send(from_owner_to_wire(Refused(reason=str(error))))
                raise NotServed(str(error)) from None

    async def _answer(self, reader: str, stream: Stream) -> None:
        """Messages are answered within the event loop's read callback, but for a question with
        checksums: it waits for them in a task of its own, so that its reader's renewals, and all
        its other leases, do not wait too.
        """
        broken: StreamBroken | None = None
        async with asyncio.TaskGroup() as group:
            questions = _Questions(self._owner, self._arena, self._turns, reader, group)
            try:
                await stream.deliver(questions.take)
            except StreamBroken as error:
                broken = error
            finally:
                questions.drop_all()
        if broken is not None:
            raise broken


class _Questions:
    """One reader's messages, and those of its closing questions that wait for checksums: one at a
    time for each of its leases. `turns` bounds how many of the door's are summed at once.
    """

    def __init__(
        self,
        owner: Owner,
        arena: Arena,
        turns: asyncio.Semaphore,
        reader: str,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._owner = owner
        self._arena = arena
        self._turns = turns
        self._reader = reader
        self._tasks = tasks
        self._waiting: dict[LeaseId, asyncio.Task[None]] = {}

    def take(self, raw: peer_pb2.FromReader) -> bool:
        """One message."""
        try:
            message = from_reader_from_wire(raw)
        except UnknownMessage as unknown:
            log.info("peer_message_skipped %s", unknown)
            return True
        if not isinstance(message, Close) or not self._waits(message):
            self._owner.handle(self._reader, message)
        return True

    def _waits(self, question: Close) -> bool:
        """Whether its answer, or that to the same asked before, comes with checksums."""
        lease_id = question.lease_id
        if lease_id in self._waiting:
            return True
        if not question.verify or not self._owner.may_verify(self._reader, question):
            return False
        task = self._waiting[lease_id] = self._tasks.create_task(self._sum(question))
        task.add_done_callback(lambda _: self._waiting.pop(lease_id))
        return True

    async def _sum(self, question: Close) -> None:
        """The blocks stay leased meanwhile, or the outcome says that they did not."""
        async with self._turns:
            checksums = await checksum_blocks(self._arena, question.verify)
        self._owner.close(self._reader, question, checksums)

    def drop_all(self) -> None:
        """The stream has ended."""
        for task in self._waiting.values():
            task.cancel()


def _tell_end(stream: Stream, reason: str, reader: str | None = None) -> None:
    """`reader` is not known of a stream that was not admitted."""
    fields = {"reader": reader, "from": stream.other_end, "reason": reason}
    log.info(telemetry.log_line("peer_stream_ended", **fields))


def _check_hello(mine: PeerHello, hello: FromReader | None) -> PeerHello:
    if not isinstance(hello, PeerHello):
        raise NotServed("a hello must come first")
    if hello.protocol_major != PROTOCOL_MAJOR:
        raise NotServed(f"protocol {hello.protocol_major} speaks to protocol {PROTOCOL_MAJOR}")
    if hello.model_id != mine.model_id:
        raise NotServed(f"reader's model {hello.model_id} is not this owner's {mine.model_id}")
    return hello


@asynccontextmanager
async def serving_peers(
    listener: socket.socket, owner: Owner, hello: Callable[[], PeerHello], arena: Arena
) -> AsyncIterator[None]:
    """Serve PeerStreams inside; closes `listener`."""
    door = PeerDoor(owner, hello, arena)
    async with accepting(listener, peer_pb2.FromReader.FromString, door.serve):
        yield
