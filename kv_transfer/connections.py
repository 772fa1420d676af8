"""A reader's connections to its owners, and what the transports know of peers beyond them."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType

from core.errors import TransferCause, TransferFailed
from core.ids import Incarnation, ShardId, WorkerId
from kv_transfer.client import OwnerAddress, PeerConnection
from kv_transfer.config import TransferConfig
from kv_transfer.messages import PeerHello
from kv_transfer.transports import Transports

log = logging.getLogger(__name__)

_KEEP_KNOWN = 1024


@dataclass(frozen=True, slots=True)
class _Known:
    """What the transports were told to connect to."""

    worker_id: WorkerId
    shards: tuple[ShardId, ...]


class Connections:
    """One to each life of an owner that is read from. Entered once (`async with`); on the way out
    nothing is waited for, as whoever owns the transports closes them next.
    """

    def __init__(
        self, transports: Transports, hello: Callable[[], PeerHello], config: TransferConfig
    ) -> None:
        self._transports = transports
        self._hello = hello
        self._config = config
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._live: dict[Incarnation, tuple[PeerConnection, asyncio.Task[None]]] = {}
        self._known: OrderedDict[Incarnation, _Known] = OrderedDict()
        """In the order of their last use."""

    async def __aenter__(self) -> "Connections":
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    async def to(self, door: OwnerAddress) -> PeerConnection:
        """The connection to this life of the owner; one that ended is waited for and replaced."""
        known = self._live.get(door.incarnation)
        if known is not None and known[0].usable and door.incarnation in self._known:
            self._known.move_to_end(door.incarnation)
            return known[0]
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                while known is not None and known[0].lost:
                    await asyncio.wait([known[1]])
                    known = self._live.get(door.incarnation)
                known = known or self._open(door)
                await asyncio.shield(known[0].ready)
        except TimeoutError as error:  # the connection bounds itself, and others may wait for it
            raise TransferFailed(
                f"no answer from the KV owner {door.worker_id}", cause=TransferCause.NO_ANSWER
            ) from error
        self._note(known[0])
        return known[0]

    def _open(self, door: OwnerAddress) -> tuple[PeerConnection, "asyncio.Task[None]"]:
        connection = PeerConnection(
            door,
            self._hello,
            self._transports,
            renew_every_s=self._config.lease_s / 3,
            connect_timeout_s=self._config.connect_timeout_s,
        )
        task = self._start(self._serve(connection))
        self._live[door.incarnation] = (connection, task)
        return connection, task

    async def _serve(self, connection: PeerConnection) -> None:
        try:
            await connection.run()
        except Exception:  # the root of the connection's task
            log.exception("peer_connection_bug owner=%s", connection.door.worker_id)
        finally:
            del self._live[connection.door.incarnation]
        self._note(connection)

    def _start(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- what the transports know ---------------------------------------------------------------

    def _note(self, connection: PeerConnection) -> None:
        """The transports know this life of a worker; what they know of others may go."""
        life = connection.door.incarnation
        if connection.shards:
            self._known[life] = _Known(connection.door.worker_id, connection.shards)
            self._known.move_to_end(life)
        self._forget()

    def _forget(self) -> None:
        """Of those without a stream: earlier lives, and beyond the bound what was not used longest.

        The end of a stream is not that of a peer: contact made anew for each adds up in NIXL.
        """
        newest = {known.worker_id: life for life, known in self._known.items()}
        over = {life for life, known in self._known.items() if newest[known.worker_id] != life}
        idle = [life for life in self._known if life not in self._live]
        idle.sort(key=lambda life: life not in over)
        excess = max(len(over.intersection(idle)), len(self._known) - _KEEP_KNOWN)
        for life in idle[:excess]:
            for shard in self._known.pop(life).shards:  # a task each: all begin before a new stream
                self._start(self._transports.disconnect(shard))
