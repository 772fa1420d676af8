"""The thread that owns the NIXL agent: it posts reads, polls them, and starts anew after trouble.

    post -> ended well
      '---> under way -> ended well
              |--------> peer lost      this read fails and the peer is forgotten
              |--------> overdue        the agent is destroyed, then all its reads fail; the next
              '--------> agent broken   agent knows all peers but the one at fault

A future ends only when no more bytes can arrive for it: an agent in doubt is destroyed first.
"""

import asyncio
import logging
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from core.errors import InternalError, TransferCause, plain
from core.ids import Incarnation, ShardId
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.nixl_agent import Agent, AgentBroken, PeerLost, ReadRefused, Remote
from kv_transfer.nixl_commands import Command, Commands, Ending, fail
from kv_transfer.plan import ReadPlan
from kv_transfer.seals import Seals
from kv_transfer.traffic import Share, Traffic, patience_s
from kv_transfer.transport import QueuedRead, ReadStats, Sealed

log = logging.getLogger(__name__)

_POLL_SHARE = 1 / 8
_POLL_MIN_S = 0.00005
_POLL_MAX_S = 0.001
_TIDY_AFTER_S = 0.01
_SPENT_MOST = 64
_TIDY_AT_ONCE = 4

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Peer:
    """A connected shard. After a rebuild `remote` is made again at the next read."""

    shard: ShardId
    memory: Memory
    remote: Remote | None
    reads: int = 0


@dataclass(slots=True, eq=False)
class _Reading:
    """A posted read, then that of its seal: `number` is what is under way, `place` where the
    seal's word is found.
    """

    peer: _Peer
    number: int
    plan: ReadPlan
    future: "asyncio.Future[ReadStats]"
    started_s: float
    share: Share
    sealed: Sealed | None
    place: int | None
    seal_asked_s: float = 0.0
    overdue: bool = False

    @property
    def since_s(self) -> float:
        """What is under way was posted."""
        return max(self.started_s, self.seal_asked_s)


class TransferThread:
    """`call` runs something on the event loop, where `failed` hears why the thread has ended.

    `busy_since_s` says since when it has been in one piece of work, None while it waits.
    """

    def __init__(
        self,
        arena: Arena,
        incarnation: Incarnation,
        read_timeout_s: float,
        *,
        seals: Seals | None = None,
        call: Callable[[Callable[[], None]], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._arena = arena
        self._incarnation = incarnation
        self._read_timeout_s = read_timeout_s
        self._seals = seals
        self._call = call
        self._failed = failed
        self._commands = Commands()
        self._started: queue.Queue[Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._peers: dict[ShardId, _Peer] = {}
        self._leaving: set[_Peer] = set()
        self._readings: list[_Reading] = []
        self._traffic = Traffic()
        self._moved_s = 0.0
        self._agent: Agent
        self.metadata = b""
        self.device = ""
        self.busy_since_s: float | None = None

    # -- on the event loop ----------------------------------------------------------------------

    def start(self, timeout_s: float) -> None:
        """Returns when the agent is there; raises InternalError if it cannot be."""
        self._thread.start()
        try:
            error = self._started.get(timeout=timeout_s)
        except queue.Empty:
            raise InternalError(f"NIXL did not start within {timeout_s:g} s") from None
        if error is not None:
            raise error

    def submit(self, command: Command) -> None:
        """Run it soon. After the end of the thread it waits for `take_left_over`."""
        self._commands.put(command)

    def take_left_over(self) -> list[Command]:
        """Commands that nobody will run, once the thread has ended."""
        return self._commands.take_left()

    def stop(self, timeout_s: float) -> bool:
        """End all reads, then the thread; blocks. Whether it has ended in time."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- commands, on the thread ----------------------------------------------------------------

    def connect(self, shard: ShardId, memory: Memory, future: "asyncio.Future[None]") -> None:
        """Other memory than before means that the peer's agent is another."""
        known = self._peers.get(shard)
        if known is None or known.memory != memory:
            back = next((p for p in self._leaving if p.shard == shard and p.memory == memory), None)
            peer = back or _Peer(shard, memory, self._agent.add(memory))
            if known is not None:
                self._forget(known)
            self._leaving.discard(peer)
            self._peers[shard] = peer
        self._resolve(future, None)

    def disconnect(self, shard: ShardId, future: "asyncio.Future[None]") -> None:
        """Forget the peer, once no read from it is under way: until then it may write."""
        if shard in self._peers:
            self._forget(self._peers[shard])
        self._resolve(future, None)

    def read(
        self, shard: ShardId, plan: ReadPlan, future: QueuedRead, sealed: Sealed | None
    ) -> None:
        """Post a read, unless nobody waits for it any more."""
        if future.given_up:
            raise ReadRefused("it was given up before its turn came")
        peer = self._peers.get(shard)
        if peer is None:
            raise ReadRefused(f"not connected to {shard}: connect again")
        started_s = time.monotonic()
        try:
            peer.remote = peer.remote or self._agent.add(peer.memory)
            number, place = self._agent.post(peer.remote, plan), None
            if number is None:
                number, place = self._ask_seal(peer, sealed)
        except PeerLost:
            self._forget(peer)
            raise
        except AgentBroken:
            del self._peers[shard]
            raise
        if number is None:
            self._resolve(future, self._stats(plan, started_s, sealed, place))
            return
        self._moved_s = time.monotonic()
        peer.reads += 1
        share = self._traffic.begin(plan.nbytes)
        self._readings.append(_Reading(peer, number, plan, future, started_s, share, sealed, place))

    def _ask_seal(self, peer: _Peer, sealed: Sealed | None) -> tuple[int | None, int | None]:
        """The bytes of a read are here, now its seal is read: what is under way, and the place of
        its word. The answer is late, if another read before it is still under way: none is asked.
        """
        if sealed is None or peer.remote is None:
            return None, None
        if any(other.future in sealed.after for other in self._readings):
            return None, None
        self._moved_s = time.monotonic()
        try:
            return self._agent.post_seal(peer.remote, sealed.seal.slot)
        except ReadRefused as refused:
            log.info("transfer_seal_not_read peer=%s reason=%s", peer.shard, refused)
            return None, None

    def _stats(
        self, plan: ReadPlan, started_s: float, sealed: Sealed | None, place: int | None
    ) -> ReadStats:
        return ReadStats(
            nbytes=plan.nbytes,
            descriptors=plan.descriptors,
            seconds=time.monotonic() - started_s,
            sealed=sealed is not None
            and place is not None
            and self._agent.word(place) == sealed.seal.word,
        )

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._open()
        except InternalError as error:
            self._started.put(error)
            return
        self._started.put(None)
        try:
            while self._serve():
                pass
        except Exception as error:  # noqa: BLE001 - the root of the thread; the worker ends with it
            # Told as text: the frames of the error would keep the agent, to be destroyed next.
            log.error("transfer_thread_failed\n%s", traceback.format_exc())
            self._call(partial(self._failed, InternalError(plain(error))))
        try:
            self._agent.destroy()
            self._fail_readings("this worker is stopping")
        except InternalError as error:  # the targets of its reads must stay out of use
            log.error("transfer_agent_not_destroyed reads=%d error=%s", len(self._readings), error)

    def _open(self) -> None:
        name = f"{self._incarnation}-{secrets.token_hex(4)}"  # peers may still know the last one
        try:
            agent = Agent(name, self._arena, self._seals)
        except AgentBroken as broken:
            raise InternalError(str(broken)) from None
        self._agent, self.metadata, self.device = agent, agent.metadata, agent.device

    def _serve(self) -> bool:
        """Wait, run a command, poll. False: stop."""
        self.busy_since_s = None
        commands: list[Command] = []
        try:
            command = self._commands.get(self._patience_s())
            if command is None:
                return False
            commands.append(command)
        except queue.Empty:
            pass
        self.busy_since_s = time.monotonic()
        broken = self._work(commands)
        if broken:
            self._rebuild(broken, commands)
        return True

    def _patience_s(self) -> float | None:
        """How long to wait for a command before the next poll, or before tidying up.

        A poll takes time from the threads of NIXL that move the bytes, here and, on one machine, at
        the owner: so it comes when another eighth of the time is over. Measured over TCP on two
        cores, 64 MB: polled without pause 71 ms, every 0.02 ms 63, every 0.2 ms 43, every 1 ms 41.
        """
        if not self._readings:
            return _TIDY_AFTER_S if self._agent.spent else None
        since_s = time.monotonic() - self._moved_s
        return min(max(since_s * _POLL_SHARE, _POLL_MIN_S), _POLL_MAX_S)

    def _work(self, commands: list[Command]) -> str:
        """Run and poll; answers what broke the agent. No error leaves: its frames would keep it."""
        try:
            for command in commands:
                self._do(command)
            idle = not commands and not self._readings
            self._poll()
            if idle or self._agent.spent > _SPENT_MOST:
                self._agent.tidy(_TIDY_AT_ONCE)
        except AgentBroken as broken:
            return str(broken)
        return ""

    def _do(self, command: Command) -> None:
        try:
            command.run()
        except ReadRefused as refused:
            self._fail(command.future, str(refused), command.refused)
        except PeerLost as lost:
            self._fail(command.future, str(lost), TransferCause.OWNER_LOST)
        except AgentBroken:
            raise
        except Exception as error:  # the root of a command; the thread serves the next one
            log.exception("transfer_bug")
            self._fail(command.future, str(error), TransferCause.OTHER)

    def _poll(self) -> None:
        overdue = 0
        for reading in list(self._readings):
            try:
                done = self._agent.poll(reading.number) and self._is_over(reading)
            except PeerLost as lost:
                self._ended(reading)
                self._forget(reading.peer)
                self._fail(reading.future, str(lost), TransferCause.OWNER_LOST)
                continue
            except AgentBroken:
                self._peers.pop(reading.peer.shard, None)
                raise
            if done:
                self._resolve(
                    reading.future,
                    self._stats(reading.plan, reading.started_s, reading.sealed, reading.place),
                )
                self._ended(reading)
            elif time.monotonic() - reading.since_s > self._patience_for(reading):
                overdue += 1
                reading.overdue = True
                self._peers.pop(reading.peer.shard, None)
        if overdue:
            raise AgentBroken(f"{overdue} reads did not end in time")

    def _is_over(self, reading: _Reading) -> bool:
        """What was under way has ended; after the read's bytes its seal may be."""
        if reading.place is not None:
            return True
        number, reading.place = self._ask_seal(reading.peer, reading.sealed)
        if number is None:
            return True
        reading.number, reading.seal_asked_s = number, time.monotonic()
        return False

    def _patience_for(self, reading: _Reading) -> float:
        return patience_s(self._read_timeout_s, reading.share.beside)

    def _ended(self, reading: _Reading) -> None:
        self._readings.remove(reading)
        self._traffic.end(reading.share)
        self._moved_s = time.monotonic()
        peer = reading.peer
        peer.reads -= 1
        if peer in self._leaving:
            self._forget(peer)

    def _forget(self, peer: _Peer) -> None:
        """Drop a peer, now or when its last read has ended."""
        if self._peers.get(peer.shard) is peer:
            del self._peers[peer.shard]
        if peer.reads:
            self._leaving.add(peer)
            return
        self._leaving.discard(peer)
        if peer.remote is not None:
            self._agent.drop(peer.remote)
            peer.remote = None

    def _rebuild(self, reason: str, commands: list[Command]) -> None:
        """Raises InternalError where that fails: then the worker has no transport any more."""
        log.error("transfer_agent_broken reads=%d reason=%s", len(self._readings), reason)
        started_s = time.monotonic()
        self._agent.destroy()
        for peer in self._peers.values():
            peer.remote, peer.reads = None, 0
        self._leaving.clear()
        try:
            self._open()  # first, as who hears of the failure may ask for the new metadata
        finally:
            self._fail_readings(reason)
            for command in commands:
                self._fail(command.future, reason, TransferCause.READ_FAILED)
        seconds = time.monotonic() - started_s
        log.warning("transfer_agent_rebuilt peers=%d seconds=%.3f", len(self._peers), seconds)

    def _fail_readings(self, reason: str) -> None:
        for reading in self._readings:
            cause = TransferCause.READ_SLOW if reading.overdue else TransferCause.READ_FAILED
            self._fail(reading.future, reason, cause)
            self._traffic.end(reading.share)
        self._readings.clear()

    def _resolve(self, future: "asyncio.Future[T]", value: T) -> None:
        self._call(lambda: None if future.done() else future.set_result(value))

    def _fail(self, future: Ending, reason: str, cause: TransferCause) -> None:
        self._call(partial(fail, future, reason, cause))
