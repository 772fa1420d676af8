"""An event loop and a network in the hands of a test.

The loop turns, and its clock moves, only when told. A stream's messages wait until the test
delivers them, late, twice or never.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from core.stream import StreamBroken
from kv_transfer.server import PeerDoor
from wire import peer_pb2

MAX_TURNS = 1_000

T = TypeVar("T")


# -- time ---------------------------------------------------------------------------------------


class HandLoop(asyncio.SelectorEventLoop):
    """Turns when told, and so does its clock: no step depends on how fast the machine is."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.complaints: list[str] = []
        super().__init__()
        self.set_exception_handler(lambda _, context: self.complaints.append(str(context)))

    def time(self) -> float:
        return self.now_s

    @property
    def resting(self) -> bool:
        """Nothing is ready, no timer is due."""
        timers = self._scheduled  # type: ignore[attr-defined]
        return not self._ready and not (timers and timers[0].when() <= self.now_s)  # type: ignore[attr-defined]

    def turn(self) -> None:
        """Run what is ready, but not what that makes ready."""
        self.call_soon(self.stop)
        self.run_forever()

    def settle(self) -> None:
        """Turn until nothing is ready."""
        for _ in range(MAX_TURNS):
            if self.resting:
                return
            self.turn()
        raise AssertionError("the event loop never rests")


# -- the network --------------------------------------------------------------------------------


class Fate(Enum):
    """What becomes of a message: LATE, those under way overtake it; DOUBLE, a copy is late."""

    PASS = "pass"
    DROP = "drop"
    DOUBLE = "double"
    LATE = "late"


class Steps:
    """Counts the steps of a test; messages and reads take some of them."""

    def __init__(self) -> None:
        self.number = 0


@dataclass(frozen=True, slots=True)
class Sent(Generic[T]):
    """A message under way; None: the stream has ended."""

    message: T | None
    at_step: int


class Pipe(Generic[T]):
    """One direction of a stream: a message is under way, then delivered, then read."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.under_way: deque[Sent[T]] = deque()
        self.faithful = True
        self._ended = False
        self._delivered: deque[T | None] = deque()
        self._came = asyncio.Event()

    def write(self, message: T | None) -> None:
        if not self._ended:
            self.under_way.append(Sent(message, self._steps.number))
            self._ended = message is None

    def due(self, latency: int) -> bool:
        """The first message was sent that many steps ago."""
        return bool(self.under_way) and self.under_way[0].at_step + latency <= self._steps.number

    def cut(self) -> None:
        """What is under way is lost; that the stream has ended is to be noticed."""
        self.under_way.clear()
        self._ended = False
        self.write(None)

    def deliver(self, fate: Fate = Fate.PASS) -> T | None:
        """Move the first message on. Hellos and the end of the stream have no other fate."""
        sent = self.under_way.popleft()
        message = sent.message
        if message is None or message.WhichOneof("message") == "hello":  # type: ignore[attr-defined]
            fate = Fate.PASS
        self.faithful = self.faithful and fate is Fate.PASS
        if fate in (Fate.DOUBLE, Fate.LATE):
            self.under_way.insert(len(self.under_way) - self._ended, sent)
        if fate in (Fate.DOUBLE, Fate.PASS):
            self._delivered.append(message)
            self._came.set()
        return message

    async def read(self) -> T | None:
        while not self._delivered:
            self._came.clear()
            await self._came.wait()
        return self._delivered.popleft()


class Link:
    """One PeerStream. `door` is the owner's handler of it, `reader` who said hello."""

    def __init__(self, steps: Steps) -> None:
        self.to_owner: Pipe[peer_pb2.FromReader] = Pipe(steps)
        self.to_reader: Pipe[peer_pb2.FromOwner] = Pipe(steps)
        self.reader = ""
        self.door: asyncio.Task[None]

    def deliver(self, to_owner: bool, fate: Fate = Fate.PASS) -> None:
        """Move the first message of one direction; a handler is cancelled when its stream ends."""
        if not to_owner:
            self.to_reader.deliver(fate)
        elif self.to_owner.deliver(fate) is None:
            self.door.cancel()

    def cut(self) -> None:
        """Both ends will notice, each in its time."""
        self.to_owner.cut()
        self.to_reader.cut()

    @property
    def quiet(self) -> bool:
        return not self.to_owner.under_way and not self.to_reader.under_way

    @property
    def faithful(self) -> bool:
        return self.to_owner.faithful and self.to_reader.faithful


class ReaderEnd:
    """The stream as PeerConnection has it."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def send(self, message: peer_pb2.FromReader) -> None:
        if message.WhichOneof("message") == "hello":
            self._link.reader = message.hello.worker_id
        self._link.to_owner.write(message)

    async def read(self) -> peer_pb2.FromOwner:
        message = await self._link.to_reader.read()
        if message is None:
            raise StreamBroken("cut")
        return message

    async def deliver(self, take: Callable[[peer_pb2.FromOwner], bool]) -> peer_pb2.FromOwner:
        while take(message := await self.read()):
            pass
        return message


class OwnerEnd:
    """The stream as PeerDoor has it."""

    other_end = "a reader"

    def __init__(self, link: Link) -> None:
        self._link = link

    def send(self, message: peer_pb2.FromOwner) -> None:
        self._link.to_reader.write(message)

    def flush(self) -> None:
        """What was sent is under way already."""

    async def read(self) -> peer_pb2.FromReader | None:
        return await self._link.to_owner.read()

    async def deliver(
        self, take: Callable[[peer_pb2.FromReader], bool]
    ) -> peer_pb2.FromReader | None:
        while (message := await self.read()) is not None and take(message):
            pass
        return message


class Network:
    """All streams to the one door; `dial` takes the place of core.stream.dial."""

    def __init__(self, loop: HandLoop, steps: Steps) -> None:
        self._loop = loop
        self._steps = steps
        self.links: list[Link] = []
        self.service: PeerDoor

    @asynccontextmanager
    async def dial(self, _address: str, _parse: object) -> AsyncIterator[ReaderEnd]:
        link = self.open()
        try:
            yield ReaderEnd(link)
        finally:
            link.to_owner.write(None)

    def open(self) -> Link:
        link = Link(self._steps)
        stream = self.service.serve(OwnerEnd(link))  # type: ignore[arg-type]
        link.door = self._loop.create_task(stream)
        link.door.add_done_callback(lambda door: self._door_shut(link, door))
        self.links.append(link)
        return link

    def _door_shut(self, link: Link, door: "asyncio.Task[None]") -> None:
        link.to_reader.write(None)
        error = None if door.cancelled() else door.exception()
        if error is not None:
            self._loop.complaints.append(repr(error))

    def forget_ended(self) -> None:
        """Drop the streams that have ended at both ends."""
        self.links = [link for link in self.links if not (link.door.done() and link.quiet)]
