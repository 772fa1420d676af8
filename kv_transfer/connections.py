"""A reader's connections to its owners, and what the transports know of them meanwhile."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import TracebackType

from core.errors import TransferCause, TransferFailed
from core.ids import Incarnation, ShardId, WorkerId
from kv_transfer.client import OwnerAddress, PeerConnection
from kv_transfer.config import TransferConfig
from kv_transfer.messages import PeerHello
from kv_transfer.transports import Transports

log = logging.getLogger(__name__)

_KEEP_REACHABLE = 1024


class Connections:
    """One to each life of an owner that is read from. Entered once (`async with`)."""

    def __init__(
        self, transports: Transports, hello: Callable[[], PeerHello], config: TransferConfig
    ) -> None:
        self._transports = transports
        self._hello = hello
        self._config = config
        self._tasks = asyncio.TaskGroup()
        self._live: dict[Incarnation, tuple[PeerConnection, asyncio.Task[None]]] = {}
        self._reachable: OrderedDict[WorkerId, tuple[ShardId, ...]] = OrderedDict()

    async def __aenter__(self) -> "Connections":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, task in self._live.values():
            task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    async def to(self, door: OwnerAddress) -> PeerConnection:
        """The connection to this life of the owner; one that ended is waited for and replaced."""
        known = self._live.get(door.incarnation)
        if known is not None and known[0].usable and door.worker_id in self._reachable:
            self._reachable.move_to_end(door.worker_id)
            return known[0]
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                while known is not None and known[0].lost:
                    await asyncio.wait([known[1]])
                    known = self._live.get(door.incarnation)
                known = known or self._open(door)
                await asyncio.shield(known[0].ready)
                self._keep_reachable(known[0])
        except TimeoutError as error:  # the connection bounds itself, and others may wait for it
            raise TransferFailed(
                f"no answer from the KV owner {door.worker_id}", cause=TransferCause.NO_ANSWER
            ) from error
        return known[0]

    def _open(self, door: OwnerAddress) -> tuple[PeerConnection, "asyncio.Task[None]"]:
        connection = PeerConnection(
            door,
            self._hello,
            self._transports,
            renew_every_s=self._config.lease_s / 3,
            connect_timeout_s=self._config.connect_timeout_s,
        )
        task = self._tasks.create_task(self._serve(connection))
        self._live[door.incarnation] = (connection, task)
        return connection, task

    async def _serve(self, connection: PeerConnection) -> None:
        try:
            await connection.run()
        except Exception:  # the root of the connection's task
            log.exception("peer_connection_bug owner=%s", connection.door.worker_id)
        finally:
            known = self._live.get(connection.door.incarnation)
            if known is not None and known[0] is connection:
                del self._live[connection.door.incarnation]

    def _keep_reachable(self, connection: PeerConnection) -> None:
        """Keep what the transports know of this life of a worker, drop what they knew of others.

        The end of a stream is not that of a peer: contact made anew for each adds up in NIXL.
        """
        shards, lives = connection.shards, self._reachable
        stale = set(lives.pop(connection.door.worker_id, ())) - set(shards)
        lives[connection.door.worker_id] = shards
        for worker_id in list(lives)[: len(lives) - _KEEP_REACHABLE]:
            stale |= set(lives.pop(worker_id))
        if stale:
            self._tasks.create_task(self._disconnect(stale))

    async def _disconnect(self, shards: Iterable[ShardId]) -> None:
        for shard in shards:
            try:
                await self._transports.disconnect(shard)
            except TransferFailed as error:
                log.warning("peer_not_forgotten shard=%s error=%s", shard, error.message)
