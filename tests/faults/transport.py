"""A transport that fails, waits or damages where the board says so; else the one inside."""

import asyncio
from collections.abc import AsyncIterator

import torch

from core.errors import TransferCause, TransferFailed
from core.ids import ShardId
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.plan import ReadPlan
from kv_transfer.transport import ReadStats, Sealed, Transport
from tests.faults.board import Board
from tests.faults.fault import Fault

_LATE_S = 0.01


class FaultyTransport:
    """Implements kv_transfer.transport.Transport around another one."""

    def __init__(self, inner: Transport, arena: Arena, board: Board) -> None:
        self._inner = inner
        self._bytes = arena.data.view(-1).view(torch.uint8)
        self._board = board
        self._reads: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        return self._inner.name

    def memory(self) -> Memory:
        if self._board.take(Fault.MEMORY_RAISES):
            raise _bug()
        return self._inner.memory()

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        if self._board.take(Fault.CONNECT_FAILS):
            raise _injected()
        await self._inner.connect(peer, memory)

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        if self._board.take(Fault.READ_RAISES):
            raise _injected()
        answer: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        if self._board.take(Fault.READ_FAILS_AT_ONCE):
            answer.set_exception(_injected())
            return answer
        task = asyncio.create_task(self._read(peer, plan, sealed, answer))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)
        return answer

    async def disconnect(self, peer: ShardId) -> None:
        await self._inner.disconnect(peer)
        if self._board.take(Fault.DISCONNECT_FAILS):
            raise _injected()
        if self._board.take(Fault.DISCONNECT_RAISES):
            raise _bug()

    async def failed(self) -> Exception:
        """As the inner one, or when the board says so."""
        watches = [
            asyncio.create_task(self._inner.failed()),
            asyncio.create_task(self._told(Fault.TRANSPORT_FAILS)),
            asyncio.create_task(self._told(Fault.FAILED_RAISES)),
        ]
        try:
            (first, *_), _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            if first is watches[-1]:
                raise first.result()
            return first.result()
        finally:
            for watch in watches:
                watch.cancel()

    async def _told(self, fault: Fault) -> Exception:
        await self._board.comes(fault)
        return _bug()

    async def close(self) -> None:
        await self._inner.close()
        if self._board.take(Fault.CLOSE_RAISES):
            raise _bug()
        if self._board.take(Fault.CLOSE_HANGS):
            await asyncio.get_running_loop().create_future()
        if self._reads:
            await asyncio.wait(self._reads)

    async def _read(
        self,
        peer: ShardId,
        plan: ReadPlan,
        sealed: Sealed | None,
        answer: "asyncio.Future[ReadStats]",
    ) -> None:
        try:
            answer.set_result(await self._staged(peer, plan, sealed))
        except (TransferFailed, TimeoutError) as error:
            answer.set_exception(error)

    async def _staged(self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None) -> ReadStats:
        board = self._board
        await board.hold(Fault.BEFORE_READ)
        stats = [
            await self._inner.start_read(peer, part, sealed if is_last else None)
            async for part, is_last in self._parts(plan)
        ]
        if board.take(Fault.READ_FAILS_LATER):
            await asyncio.sleep(_LATE_S)
            raise _injected()
        if board.take(Fault.BYTE_FLIPPED):
            _, target, nbytes = (int(number) for number in plan.rows[-1])
            self._bytes[target + nbytes // 2] ^= 0x10
        await board.hold(Fault.AFTER_READ)
        return ReadStats(
            nbytes=plan.nbytes,
            descriptors=plan.descriptors,
            seconds=sum(part.seconds for part in stats),
            sealed=stats[-1].sealed,
        )

    async def _parts(self, plan: ReadPlan) -> AsyncIterator[tuple[ReadPlan, bool]]:
        """The whole plan; or its halves, and the gate between them. The last one is said to be."""
        if not self._board.armed(Fault.IN_READ):
            yield plan, True
            return
        first, second = _halves(plan)
        yield first, False
        await self._board.hold(Fault.IN_READ)
        yield second, True


def _halves(plan: ReadPlan) -> tuple[ReadPlan, ReadPlan]:
    """The first half of the bytes of each run, and the second."""
    first, second = plan.rows.copy(), plan.rows.copy()
    first[:, 2] //= 2
    second[:, :2] += first[:, 2:]
    second[:, 2] -= first[:, 2]
    return ReadPlan(first), ReadPlan(second)


def _injected() -> TransferFailed:
    return TransferFailed("injected by a test", cause=TransferCause.READ_FAILED)


def _bug() -> RuntimeError:
    return RuntimeError("injected by a test")
