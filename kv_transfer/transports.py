"""A worker's ways to move blocks, best first, and the choice of one for each peer.

NIXL and torch.distributed are imported where they are started: a worker without one of them serves
with what it has.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from core.errors import ConfigError, InternalError, TransferCause, TransferFailed
from core.ids import Incarnation, ShardId
from engine.arena import Arena
from kv_transfer.config import TransferConfig
from kv_transfer.loopback import LoopbackHub, LoopbackTransport
from kv_transfer.messages import Memory
from kv_transfer.plan import ReadPlan
from kv_transfer.seals import Seals
from kv_transfer.transport import ReadStats, Sealed, Transport

log = logging.getLogger(__name__)

_AUTO = ("nixl", "collective")
CLOSE_TIMEOUT_S = 6.0
"""Of a way that does not close; the worker ends without it."""

# What starting a transport raises where its package is absent, or cannot work on this machine.
_NO_START = (ImportError, OSError, RuntimeError, InternalError)


def common_way(mine: Sequence[str], theirs: Sequence[str]) -> str:
    """The first of mine that the peer also offers. Raises TransferFailed where there is none."""
    for name in mine:
        if name in theirs:
            return name
    raise TransferFailed(
        f"no common way to move KV: the peer offers {_listed(theirs)}, "
        f"this worker {_listed(mine)}; set transfer.backend alike on both, or to auto",
        cause=TransferCause.NO_TRANSPORT,
    )


class Transports:
    """All of one worker, on its event loop. A peer is read by the way chosen at its `connect`.
    `seals` are those that peers can read beside the arena by some of the ways.
    """

    def __init__(self, ways: Sequence[Transport], seals: Seals | None = None) -> None:
        self.seals = seals
        self._ways = {way.name: way for way in ways}
        self.started = tuple(self._ways)
        """The ways that worked at first, best first."""
        self._routes: dict[ShardId, Transport] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The ways that work now, best first."""
        return tuple(self._ways)

    def memories(self) -> tuple[Memory, ...]:
        """What peers must know to read from here by each way, best first. A way that cannot tell
        is left out.
        """
        told = (self._memory(way) for way in self._ways.values())
        return tuple(memory for memory in told if memory is not None)

    async def connect(self, peer: ShardId, memories: Sequence[Memory]) -> str:
        """Make ready to read from a shard that offers `memories`; answers the way's name.

        Raises TransferFailed, with cause NO_TRANSPORT where the two have no way in common.
        """
        name = common_way(self.names, [memory.transport for memory in memories])
        way = self._ways[name]
        memory = next(memory for memory in memories if memory.transport == name)
        known = self._routes.get(peer)
        if known is not None and known is not way:
            await self.disconnect(peer)
        self._routes[peer] = way
        await way.connect(peer, memory)
        return name

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        """As Transport.start_read, by the way of that peer. Raises nothing: whoever reads from
        several shards would lose sight of the reads that run already.
        """
        way = self._routes.get(peer)
        if way is None:
            return _failed(
                TransferFailed(f"not connected to {peer}", cause=TransferCause.READ_FAILED)
            )
        try:
            return way.start_read(peer, plan, sealed)
        except Exception as error:  # a bug of that way, which the read's future carries on
            log.exception("transport_bug name=%s", way.name)
            return _failed(error)

    async def disconnect(self, peer: ShardId) -> None:
        """After the last read from that shard; may repeat. Raises nothing: whatever the way says,
        the peer is not read by it any more.
        """
        way = self._routes.pop(peer, None)
        if way is None:
            return
        try:
            await way.disconnect(peer)
        except TransferFailed as error:
            log.warning("peer_not_forgotten shard=%s error=%s", peer, error.message)
        except Exception:  # a bug of that way, which is not to end its caller
            log.exception("transport_bug name=%s", way.name)

    async def failed(self) -> Exception:
        """Wait until the last way has failed; mostly for ever.

        A way that fails while another is left is only logged and no more offered: its peers
        connect anew by the other one.
        """
        watches = {asyncio.create_task(_failure_of(way)): way for way in self._ways.values()}
        try:
            while True:
                done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
                for watch in done:
                    way, error = watches.pop(watch), watch.result()
                    if not watches:
                        return error
                    log.error("transport_failed name=%s error=%s", way.name, error)
                    await self._drop(way)
        finally:
            for watch in watches:
                watch.cancel()

    async def close(self) -> None:
        """End all reads, free what was registered. Raises nothing, and is bounded."""
        await asyncio.gather(*(_close(way) for way in self._ways.values()))

    async def _drop(self, way: Transport) -> None:
        del self._ways[way.name]
        for peer in [peer for peer, known in self._routes.items() if known is way]:
            del self._routes[peer]
        await _close(way)

    def _memory(self, way: Transport) -> Memory | None:
        try:
            return way.memory()
        except Exception:  # a bug of that way; others may do
            log.exception("transport_bug name=%s", way.name)
            return None


def make_transports(
    config: TransferConfig,
    arena: Arena,
    incarnation: Incarnation,
    host: str,
    *,
    hub: LoopbackHub | None = None,
) -> Transports:
    """Start what `transfer.backend` asks for; called on the event loop.

    `host` is where this worker's peers reach it. `hub` joins loopback transports of one process.
    Raises ConfigError where nothing that was asked for starts here.
    """
    seals = Seals()
    start: Mapping[str, Callable[[], Transport]] = {
        "nixl": partial(_start_nixl, config, arena, incarnation, seals),
        "collective": partial(_start_collective, config, arena, host),
        "loopback": partial(LoopbackTransport, arena, hub or LoopbackHub(), seals),
    }
    ways, missing = [], []
    for name in _AUTO if config.backend == "auto" else (config.backend,):
        try:
            ways.append(start[name]())
        except _NO_START as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            missing.append(f"{name}: {reason}")
            log.warning("transport_unavailable name=%s reason=%s", name, reason)
        else:
            log.info("transport_ready name=%s backend=%s", name, config.backend)
    if not ways:
        raise ConfigError(
            f"transfer.backend is {config.backend}, and no such transport starts here; "
            + "; ".join(missing)
        )
    return Transports(ways, seals)


def _start_nixl(
    config: TransferConfig, arena: Arena, incarnation: Incarnation, seals: Seals
) -> Transport:
    from kv_transfer.nixl import NixlTransport  # noqa: PLC0415 - may be absent

    return NixlTransport(arena, incarnation, read_timeout_s=config.read_timeout_s, seals=seals)


def _start_collective(config: TransferConfig, arena: Arena, host: str) -> Transport:
    from kv_transfer.collective import CollectiveTransport  # noqa: PLC0415 - may be absent

    return CollectiveTransport(
        arena,
        host,
        read_timeout_s=config.read_timeout_s,
        connect_timeout_s=config.connect_timeout_s,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _failed(error: Exception) -> "asyncio.Future[ReadStats]":
    read: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
    read.set_exception(error)
    return read


async def _failure_of(way: Transport) -> Exception:
    try:
        return await way.failed()
    except Exception as error:  # a bug of that way, which nobody watches any more: it has failed
        log.exception("transport_bug name=%s", way.name)
        return error


async def _close(way: Transport) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await way.close()
    except TimeoutError:
        log.error("transport_not_closed name=%s timeout_s=%g", way.name, CLOSE_TIMEOUT_S)
    except Exception:  # a bug of that way; the rest of the worker is to be closed as well
        log.exception("transport_bug name=%s", way.name)
