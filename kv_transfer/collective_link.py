"""One reader and one owner: a control connection, and a torch.distributed group of the two.

    reader                                owner
    connect, HELLO          ->
                            <-            WELCOME: Gloo or NCCL
    join the group         <->            join the group, which finds itself by this connection
                            <-            one byte through the group: it works

    READ: the owner's runs  ->
                            <-            ANSWER: accepted, or why not
                            <-            the bytes of the runs through the group, in chunks

The control connection is a plain socket because a wait on it can be ended from another thread, and
ends by itself with the peer's process. A wait on the group ends with the peer's process too, but
otherwise only by its own bound: Gloo cannot interrupt it.
"""

import asyncio
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch

from kv_transfer.chunks import ArenaBytes, Int64s
from kv_transfer.collective_group import GLOO, NCCL, OWNER, READER, ControlStore, Gate, Group, Work

log = logging.getLogger(__name__)

# Measured over loopback: smaller ones cost more calls, larger ones leave the cache
CHUNK_BYTES = {GLOO: 4 << 20, NCCL: 64 << 20}

_VERSION = 1
_HELLO = struct.Struct("!4sH48s")  # magic, version, which GPU (empty: no NCCL)
_MAGIC = b"BtnC"
_READ = struct.Struct("!I")  # rows; then that many of _ROW
_ROW = np.dtype([("offset", "<u8"), ("length", "<u8")])
_TEXT = struct.Struct("!?H")  # good or not, length of the text; then the text
_MAX_ROWS = 1 << 22
_KEEPALIVE_S = 5
_KEEPALIVE_PROBES = 3

# What the parts of a link raise when the other side is gone, silent, or not what it should be.
LINK_ERRORS = (OSError, RuntimeError, EOFError, ValueError, struct.error)


class Refused(RuntimeError):
    """The other side said no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """What the threads of one transport share."""

    arena: ArenaBytes
    gate: Gate
    read_timeout_s: float
    connect_timeout_s: float


@dataclass(frozen=True, slots=True)
class _Staging:
    """Two buffers: one is on its way while the other is copied."""

    buffers: tuple[torch.Tensor, torch.Tensor]

    def part(self, number: int, nbytes: int) -> torch.Tensor:
        return self.buffers[number % 2][:nbytes]


class Link:
    """One end of a pair. Its own thread uses it, and ends it with `drop`; `close`, from any thread,
    makes that thread fail: at once in a wait on the control connection, after the running chunk in
    a wait on the group, unless the other side is stuck: then by that wait's own bound.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        self._sock = sock
        self._lock = threading.Lock()
        self._store: ControlStore | None = None
        self._group: Group | None = None
        self._peer_rank = OWNER
        self._staging: _Staging | None = None
        self.device = torch.device("cpu")
        self.chunk_bytes = CHUNK_BYTES[GLOO]
        self.closed = False

    # -- coming and going -----------------------------------------------------------------------

    def connect(self, gate: Gate, until_s: float) -> None:
        """The reader's way in. Raises LINK_ERRORS."""
        self.send_raw(_HELLO.pack(_MAGIC, _VERSION, gate.gpu.encode()), until_s)
        self._join(gate, self.hear(until_s), READER, until_s)

    def admit(self, gate: Gate, until_s: float) -> None:
        """The owner's way in. Raises LINK_ERRORS."""
        magic, version, gpu = _HELLO.unpack(self.receive_raw(_HELLO.size, until_s))
        if magic != _MAGIC or version != _VERSION:
            self.say(f"this worker speaks version {_VERSION}", until_s, good=False)
            raise ValueError("a stranger, or another version")
        backend = gate.backend(gpu.rstrip(b"\0").decode())
        self.say(backend, until_s)
        self._join(gate, backend, OWNER, until_s)

    def _join(self, gate: Gate, backend: str, rank: int, until_s: float) -> None:
        if backend not in CHUNK_BYTES:
            raise ValueError(f"no such group as {backend}")
        store = self._store = ControlStore(self, until_s)
        self._group = gate.join(backend, store, rank, left_s(until_s))
        self._peer_rank = OWNER if rank == READER else READER
        self.device = gate.device if backend == NCCL else torch.device("cpu")
        self.chunk_bytes = CHUNK_BYTES[backend]
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        wait(self.send(byte) if rank == OWNER else self.receive(byte), until_s)
        store.seal()

    def close(self) -> None:
        """Use it no more. May repeat."""
        with self._lock, suppress(OSError):  # not connected any more
            self.closed = True
            self._sock.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Free everything; by the link's own thread, after its last use."""
        self.close()
        with self._lock:  # not while another thread shuts down what is perhaps another's by then
            self._sock.close()
        if self._group is not None:
            with suppress(RuntimeError):
                self._group.abort()
        self._group = self._store = self._staging = None

    # -- control --------------------------------------------------------------------------------

    def ask(self, offsets: Int64s, lengths: Int64s, until_s: float) -> None:
        """The reader wants these runs; returns when the owner is about to send them."""
        if len(offsets) > _MAX_ROWS:
            raise Refused(f"a read of {len(offsets)} runs, at most {_MAX_ROWS} are possible")
        rows = np.empty(len(offsets), dtype=_ROW)
        rows["offset"], rows["length"] = offsets, lengths
        self.send_raw(_READ.pack(len(rows)) + rows.tobytes(), until_s)
        self.hear(until_s)

    def await_question(self, timeout_s: float) -> tuple[Int64s, Int64s]:
        """What the reader asks next, unchecked; waits for it without a bound of its own.

        Ends by itself with the reader's process, and by keep-alive with its machine.
        """
        self._sock.settimeout(None)
        head = self._sock.recv(_READ.size, socket.MSG_WAITALL)
        if len(head) < _READ.size:
            raise EOFError("the reader is gone")
        (count,) = _READ.unpack(head)
        if count > _MAX_ROWS:
            raise ValueError(f"a read of {count} runs")
        raw = self.receive_raw(count * _ROW.itemsize, time.monotonic() + timeout_s)
        rows = np.frombuffer(raw, dtype=_ROW)
        # numbers past int64 become negative, and are refused as such
        return rows["offset"].astype(np.int64), rows["length"].astype(np.int64)

    def say(self, text: str, until_s: float, *, good: bool = True) -> None:
        """Send a short text, good news or bad."""
        raw = text.encode()
        self.send_raw(_TEXT.pack(good, len(raw)) + raw, until_s)

    def hear(self, until_s: float) -> str:
        """The other side's text. Raises Refused where it is bad news."""
        good, nbytes = _TEXT.unpack(self.receive_raw(_TEXT.size, until_s))
        text = self.receive_raw(nbytes, until_s).decode()
        if not good:
            raise Refused(text)
        return text

    def send_raw(self, raw: bytes, until_s: float) -> None:
        self._sock.settimeout(left_s(until_s))
        self._sock.sendall(raw)

    def receive_raw(self, nbytes: int, until_s: float) -> bytes:
        raw = bytearray(nbytes)
        view = memoryview(raw)
        while view:
            self._sock.settimeout(left_s(until_s))
            count = self._sock.recv_into(view)
            if count == 0:
                raise EOFError("the other side is gone")
            view = view[count:]
        return bytes(raw)

    # -- data -----------------------------------------------------------------------------------

    def staging(self, number: int, nbytes: int) -> torch.Tensor:
        """The buffer of chunk `number`, `[nbytes]` uint8; chunk `number + 2` has the same one."""
        if self._staging is None:
            first, second = (
                torch.empty(self.chunk_bytes, dtype=torch.uint8, device=self.device)
                for _ in range(2)
            )
            self._staging = _Staging((first, second))
        return self._staging.part(number, nbytes)

    def send(self, data: torch.Tensor) -> Work:
        """Start to send; `data` must stay as it is until the work is done."""
        return self._open_group().send([data], self._peer_rank, 0)

    def receive(self, data: torch.Tensor) -> Work:
        """Start to receive into `data`."""
        return self._open_group().recv([data], self._peer_rank, 0)

    def _open_group(self) -> Group:
        group = self._group
        if group is None or self.closed:
            raise EOFError("the pair has ended")
        return group


def wait(work: Work, until_s: float) -> None:
    """Raises RuntimeError or TimeoutError unless the work is done by then."""
    if not work.wait(timedelta(seconds=left_s(until_s))):
        raise EOFError("the pair has ended")


def left_s(until_s: float) -> float:
    """Seconds until that moment of time.monotonic(). Raises TimeoutError when it has passed."""
    left = until_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    return left


def listen(host: str) -> socket.socket:
    """A listening socket on a free port. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def inside(offsets: Int64s, lengths: Int64s, nbytes: int) -> bool:
    """Every run lies in `[0, nbytes)`; no sum can overflow here."""
    if (offsets < 0).any() or (lengths < 0).any() or (lengths > nbytes).any():
        return False
    return bool((offsets <= nbytes - lengths).all())


def describe(error: BaseException) -> str:
    """One line of what torch, or the system, says."""
    text = str(error) or type(error).__name__
    return re.sub(r"^\[[^\]]*\.\w+:\d+\] ", "", text.splitlines()[0])


def tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """Run it on the event loop, from any thread."""
    try:
        loop.call_soon_threadsafe(what)
    except RuntimeError:  # the event loop is closed: nobody waits any more
        log.info("transfer_result_unheard")
