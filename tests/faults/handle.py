"""The test's end of one worker process: signals, faults, and what the kernel says of it."""

import asyncio
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc

from core.channel import CHANNEL_OPTIONS
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import WorkerRecord
from tests.faults.fault import Fault
from wire import worker_pb2, worker_pb2_grpc

READY_S = 20.0
WAIT_S = 15.0
"""For a row to be set up; what is promised has deadlines of its own."""


class WorkerHandle:
    """One forked worker. `ready` before anything else, `close` at last."""

    def __init__(self, pid: int, control: socket.socket, log: Path) -> None:
        self.pid = pid
        self.log = log
        self.ended = asyncio.Event()
        self.hits: Counter[Fault] = Counter()
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfd, self._on_end)
        self._control = control
        self._control.setblocking(False)
        self._loop.add_reader(control, self._on_readable)
        self._text = b""
        self._changed = asyncio.Event()
        self._asked = self._done = 0
        self._ready: dict[str, str] | None = None

    async def ready(self) -> WorkerRecord:
        """Wait until it serves."""
        await self._until(lambda: self._ready is not None, READY_S, "serve")
        assert self._ready is not None
        fields = self._ready
        self.record = WorkerRecord(
            worker_id=WorkerId(fields["worker_id"]),
            incarnation=Incarnation(fields["incarnation"]),
            role=Role(fields["role"]),
            epoch=int(fields["epoch"]),
            address=fields["address"],
            router_address=fields["router_address"],
            model_id=ModelId(fields["model_id"]),
            pid=int(fields["pid"]),
        )
        self._channel = grpc.aio.insecure_channel(self.record.address, options=CHANNEL_OPTIONS)
        self._stub = worker_pb2_grpc.WorkerStub(self._channel)
        return self.record

    @property
    def name(self) -> str:
        return self.record.worker_id

    @property
    def peer_address(self) -> str:
        """Where other workers read from it."""
        assert self._ready is not None
        return self._ready["peer_address"]

    @property
    def ports(self) -> tuple[int, int]:
        """Of its doors for routers and for other workers."""
        router, peers = (
            a.rpartition(":")[2] for a in (self.record.router_address, self.peer_address)
        )
        return int(router), int(peers)

    async def close(self) -> None:
        """End the process, if it lives, and everything this end holds of it."""
        await self.kill()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._loop.remove_reader(self._control)
        self._control.close()
        if hasattr(self, "_channel"):
            await self._channel.close()

    # -- faults ---------------------------------------------------------------------------------

    async def arm(self, fault: Fault, times: int, each: int | None = None) -> None:
        """From when this returns, the fault happens the next `times` times; 0 disarms it.

        `each`: of those that befall a lease, to no lease more often.
        """
        self.hits[fault] = 0
        await self._command({"arm": fault, "times": times, "each": each})

    async def go(self, fault: Fault) -> None:
        """Open the gate."""
        await self._command({"go": fault})

    async def hit(self, fault: Fault, times: int) -> None:
        """Wait until the fault has happened so often since it was armed."""
        await self._until(lambda: self.hits[fault] >= times, WAIT_S, f"have {fault} {times} times")

    def stop_serving(self) -> None:
        """It is told to stop, and has nothing more to be told; it drains and ends."""
        self._control.shutdown(socket.SHUT_WR)

    async def collect(self) -> None:
        """Let Python free what is in cycles: sockets of closed channels among it."""
        await self._command({"collect": True})

    async def start_threads(self) -> None:
        """Let it have all threads that its pool may ever have."""
        await self._command({"start_threads": True})

    # -- signals --------------------------------------------------------------------------------

    async def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        if not self.ended.is_set():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            await self.ended.wait()

    async def ends(self, within_s: float) -> None:
        """Wait until it has ended by itself."""
        try:
            async with asyncio.timeout(within_s):
                await self.ended.wait()
        except TimeoutError:
            raise AssertionError(f"{self.name} lives on after {within_s} s:{self.tail()}") from None

    def stop(self) -> None:
        """SIGSTOP: it hangs, its sockets and memory stay."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)

    def resume(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    async def stats(self) -> worker_pb2.StatsReply:
        """What the worker says of itself."""
        try:
            reply: worker_pb2.StatsReply = await self._stub.Stats(
                worker_pb2.StatsRequest(), timeout=WAIT_S
            )
        except grpc.aio.AioRpcError as error:
            await asyncio.sleep(0.1)  # for the news of its end
            ended = "it has ended" if self.ended.is_set() else "it lives"
            raise AssertionError(f"{self.name}: {error.code()}, {ended}:{self.tail()}") from None
        return reply

    # -- the control socket ---------------------------------------------------------------------

    async def _command(self, command: dict[str, object]) -> None:
        await self._loop.sock_sendall(self._control, json.dumps(command).encode() + b"\n")
        self._asked += 1
        asked = self._asked
        await self._until(lambda: self._done >= asked, WAIT_S, "obey")

    async def _until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    if self.ended.is_set():
                        raise AssertionError(f"the worker ended before it did {what}:{self.tail()}")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"worker {self.pid} did not {what} within {timeout_s} s:{self.tail()}"
            ) from None

    def tail(self) -> str:
        """The last of its log."""
        return "\n" + self.log.read_text()[-3000:]

    def _on_readable(self) -> None:
        try:
            data = self._control.recv(65_536)
        except (BlockingIOError, ConnectionResetError):
            return
        if not data:
            self._loop.remove_reader(self._control)
            return
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "hit" in message:
                self.hits[Fault(message["hit"])] += 1
            elif "ready" in message:
                self._ready = message["ready"]
            else:
                self._done += 1
        self._changed.set()

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.ended.set()
        self._changed.set()
