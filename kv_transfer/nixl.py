"""NIXL: RDMA, NVLink, shared memory or TCP, whatever UCX finds between the two workers.

The agent belongs to one thread. A read over shared memory copies inside the post call itself, over
TCP it stays in progress and is polled; either way neither the event loop nor the engine waits.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from nixl import _bindings
from nixl._api import nixl_agent, nixl_agent_config

from core.errors import InternalError, TransferFailed
from core.ids import Incarnation
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.plan import Descriptor
from kv_transfer.transport import ReadStats, TransportCounters

log = logging.getLogger(__name__)

_POLL_S = 0.0002
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0

T = TypeVar("T")

# The bindings' errors share no base but Exception; everything they can raise, and what this file
# raises itself on the transfer thread.
_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(
        error
        for name in dir(_bindings)
        if name.startswith("nixl") and name.endswith("Error")
        for error in [getattr(_bindings, name)]
    ),
)


class _Handle(Protocol):
    """NIXL's opaque transfer handle."""

    def release(self) -> None: ...


@dataclass(slots=True)
class _Reading:
    """A posted read, on the transfer thread."""

    peer: Incarnation
    handle: _Handle
    future: "asyncio.Future[ReadStats]"
    stats: ReadStats
    started_s: float


@dataclass(slots=True)
class _Peer:
    agent_name: str
    memory: Memory


@dataclass(slots=True)
class _ThreadState:
    """Everything only the transfer thread touches."""

    agent: nixl_agent
    peers: dict[Incarnation, _Peer] = field(default_factory=dict)
    reading: list[_Reading] = field(default_factory=list)
    leaving: set[Incarnation] = field(default_factory=set)
    """Peers to forget once no read from them is in flight: until then it may write."""


class NixlTransport:
    """Implements kv_transfer.transport.Transport over NIXL's UCX backend."""

    name = "nixl"

    def __init__(self, arena: Arena, incarnation: Incarnation) -> None:
        _use_our_log()
        self._loop = asyncio.get_running_loop()
        self._arena = arena
        self._agent_name = incarnation
        self._device = "VRAM" if arena.data.is_cuda else "DRAM"
        self._device_index = arena.data.get_device() if arena.data.is_cuda else 0
        self._counters = TransportCounters()
        self._failed: asyncio.Future[Exception] = self._loop.create_future()
        self._commands: queue.SimpleQueue[Callable[[_ThreadState], None] | None] = (
            queue.SimpleQueue()
        )
        self._started: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._thread.start()
        try:
            metadata = self._started.get(timeout=_START_TIMEOUT_S)
        except queue.Empty:
            raise InternalError(f"NIXL did not start within {_START_TIMEOUT_S:g} s") from None
        if isinstance(metadata, Exception):
            raise InternalError(f"NIXL did not start: {metadata}") from metadata
        self._metadata = metadata

    # -- event loop -----------------------------------------------------------------------------

    @property
    def counters(self) -> TransportCounters:
        return self._counters

    def memory(self) -> Memory:
        return Memory(
            transport=self.name,
            metadata=self._metadata,
            address=self._arena.address,
            nbytes=self._arena.nbytes,
            device=f"{self._device}:{self._device_index}",
        )

    async def connect(self, peer: Incarnation, memory: Memory) -> None:
        if memory.transport != self.name:
            raise TransferFailed(f"the peer moves KV by {memory.transport}, this worker by nixl")
        future: asyncio.Future[None] = self._loop.create_future()

        def command(state: _ThreadState) -> None:
            state.leaving.discard(peer)
            if peer not in state.peers:
                name = state.agent.add_remote_agent(memory.metadata)
                text = name.decode() if isinstance(name, bytes) else str(name)
                state.peers[peer] = _Peer(agent_name=text, memory=memory)
            self._resolve(future, None)

        self._submit(command, future)
        await future

    def start_read(
        self, peer: Incarnation, plan: Sequence[Descriptor]
    ) -> "asyncio.Future[ReadStats]":
        future: asyncio.Future[ReadStats] = self._loop.create_future()
        self._submit(lambda state: self._post(state, peer, plan, future), future)
        return future

    async def disconnect(self, peer: Incarnation) -> None:
        future: asyncio.Future[None] = self._loop.create_future()

        def command(state: _ThreadState) -> None:
            state.leaving.add(peer)
            self._forget_leaving(state)
            self._resolve(future, None)

        self._submit(command, future)
        await future

    async def failed(self) -> Exception:
        return await asyncio.shield(self._failed)

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("transfer_thread_stuck timeout_s=%s", _STOP_TIMEOUT_S)

    def _submit(self, command: Callable[[_ThreadState], None], future: "asyncio.Future[T]") -> None:
        def guarded(state: _ThreadState) -> None:
            try:
                command(state)
            except _ERRORS as error:
                self._fail(future, error)
            except Exception as error:  # the root of a command; the thread serves the next one
                log.exception("transfer_bug")
                self._fail(future, error)

        self._commands.put(guarded)

    # -- transfer thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            config = nixl_agent_config(backends=["UCX"])
            state = _ThreadState(nixl_agent(self._agent_name, config))
            registered = state.agent.register_memory([self._arena.data.view(-1)])
            self._started.put(state.agent.get_agent_metadata())
        except _ERRORS as error:
            self._started.put(error)
            return
        try:
            while self._serve(state):
                self._poll(state)
        except Exception as error:  # the root of the thread; the worker must end with it
            log.exception("transfer_thread_failed")
            self._call(partial(self._failed.set_result, error))
            return
        for reading in state.reading:
            self._release(state, reading)
            self._fail(reading.future, RuntimeError("this worker is stopping"))
        state.agent.deregister_memory(registered)

    def _forget_leaving(self, state: _ThreadState) -> None:
        busy = {reading.peer for reading in state.reading}
        for peer in state.leaving - busy:
            state.leaving.discard(peer)
            known = state.peers.pop(peer, None)
            if known is not None:
                state.agent.remove_remote_agent(known.agent_name)

    def _serve(self, state: _ThreadState) -> bool:
        """Run waiting commands; sleeps when there is nothing to poll. False: stop."""
        try:
            command = self._commands.get(timeout=_POLL_S if state.reading else None)
        except queue.Empty:
            return True
        if command is None:
            return False
        command(state)
        return True

    def _post(
        self,
        state: _ThreadState,
        peer: Incarnation,
        plan: Sequence[Descriptor],
        future: "asyncio.Future[ReadStats]",
    ) -> None:
        known = state.peers.get(peer)
        if known is None:
            raise RuntimeError(f"not connected to {peer}")
        rows = np.array(
            [(p.local_offset_bytes, p.remote_offset_bytes, p.nbytes) for p in plan], dtype=np.uint64
        )
        if int((rows[:, 1] + rows[:, 2]).max()) > known.memory.nbytes:
            raise RuntimeError("the plan reads past the peer's arena")
        started_s = time.perf_counter()
        local = self._descriptors(
            state, rows[:, 0] + np.uint64(self._arena.address), rows[:, 2], self.memory().device
        )
        remote = self._descriptors(
            state, rows[:, 1] + np.uint64(known.memory.address), rows[:, 2], known.memory.device
        )
        handle = state.agent.initialize_xfer("READ", local, remote, known.agent_name)
        stats = ReadStats(nbytes=int(rows[:, 2].sum()), descriptors=len(plan), seconds=0.0)
        reading = _Reading(peer, handle, future, stats, started_s)
        try:
            status = state.agent.transfer(handle)
        except _ERRORS:
            state.agent.release_xfer_handle(handle)
            raise
        if status == "PROC":
            state.reading.append(reading)
        else:
            self._end(state, reading, status)

    def _descriptors(
        self,
        state: _ThreadState,
        addresses: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.uint64],
        device: str,
    ) -> object:
        kind, _, index = device.partition(":")
        rows = np.empty((len(addresses), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = addresses, lengths, int(index or 0)
        return state.agent.get_xfer_descs(rows, kind)

    def _poll(self, state: _ThreadState) -> None:
        for reading in list(state.reading):
            try:
                status = state.agent.check_xfer_state(reading.handle)
            except _ERRORS as error:
                state.reading.remove(reading)
                self._release(state, reading)
                self._fail(reading.future, error)
                continue
            if status != "PROC":
                state.reading.remove(reading)
                self._end(state, reading, status)
        if state.leaving:
            self._forget_leaving(state)

    def _end(self, state: _ThreadState, reading: _Reading, status: str) -> None:
        self._release(state, reading)
        if status != "DONE":
            self._fail(reading.future, RuntimeError(f"NIXL ended the read with {status}"))
            return
        stats = ReadStats(
            nbytes=reading.stats.nbytes,
            descriptors=reading.stats.descriptors,
            seconds=time.perf_counter() - reading.started_s,
        )
        self._resolve(reading.future, stats)

    def _release(self, state: _ThreadState, reading: _Reading) -> None:
        try:
            state.agent.release_xfer_handle(reading.handle)
        except _ERRORS as error:
            log.warning("transfer_handle_not_released error=%s", error)

    # -- thread to event loop -------------------------------------------------------------------

    def _resolve(self, future: "asyncio.Future[T]", value: T) -> None:
        def settle() -> None:
            if isinstance(value, ReadStats):
                self._counters.add(value)
            if not future.done():
                future.set_result(value)

        self._call(settle)

    def _fail(self, future: "asyncio.Future[T]", error: Exception) -> None:
        def settle() -> None:
            self._counters.failures += 1
            if not future.done():
                future.set_exception(TransferFailed(f"KV read failed: {error}"))

        self._call(settle)

    def _call(self, settle: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the event loop is closed: nobody waits any more
            log.info("transfer_result_unheard")


def _use_our_log() -> None:
    """NIXL's package prints to standard output, which belongs to the process, not to it."""
    theirs = logging.getLogger("nixl")
    theirs.handlers.clear()
    theirs.propagate = True
    theirs.setLevel(logging.WARNING)
