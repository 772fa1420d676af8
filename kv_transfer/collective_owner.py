"""The owner's end of the pairs of the `collective` transport."""

import errno
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from core.stream import place_of
from kv_transfer.chunks import Int64s, Runs
from kv_transfer.collective_group import Work
from kv_transfer.collective_link import LINK_ERRORS, Home, Link, describe, inside, wait
from kv_transfer.traffic import patience_s

log = logging.getLogger(__name__)

_MAX_READERS = 1024
_ACCEPT_RETRY_S = 0.1
_PASSING = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EPROTO,
        errno.EPERM,
    }
)


class Door:
    """Where readers come in: one thread that accepts, and one for each reader."""

    def __init__(
        self, home: Home, listener: socket.socket, on_broken: Callable[[Exception], None]
    ) -> None:
        self._home = home
        self._listener = listener
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._links: dict[threading.Thread, Link] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="kv-door", daemon=True)
        host, port = listener.getsockname()[:2]
        self.address = f"{host}:{port}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake accept()
        except OSError as error:
            log.info("transfer_door_shut error=%s", error)
        with self._lock:
            for link in self._links.values():
                link.close()

    def threads(self) -> list[threading.Thread]:
        with self._lock:
            return [self._thread, *self._links]

    def _accept(self) -> None:
        try:
            while not self._closing.is_set():
                try:
                    sock, name = self._listener.accept()
                    self._admit(sock, place_of(name))
                except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
                    if not self._closing.is_set():
                        self._pause(error)
        except Exception as error:  # the root of the thread; no reader can come in any more
            log.exception("transfer_door_failed")
            self._on_broken(error)
        finally:
            self._listener.close()

    def _pause(self, error: OSError | RuntimeError) -> None:
        """One reader was lost, or the system is out of something; a broken door is raised."""
        if isinstance(error, OSError) and error.errno not in _PASSING:
            raise error
        log.warning("transfer_accept_failed error=%s", error)
        self._closing.wait(_ACCEPT_RETRY_S)

    def _admit(self, sock: socket.socket, place: str) -> None:
        link = Link(sock)
        thread = threading.Thread(
            target=self._serve, args=(link, place), name="kv-owner", daemon=True
        )
        with self._lock:
            if self._closing.is_set() or len(self._links) >= _MAX_READERS:
                link.drop()
                return
            self._links[thread] = link
        try:
            thread.start()
        except RuntimeError:
            self._forget(thread)
            raise

    def _forget(self, thread: threading.Thread) -> None:
        self._links[thread].drop()
        with self._lock:
            del self._links[thread]

    def _serve(self, link: Link, place: str) -> None:
        home = self._home
        try:
            with home.gate.stream():
                link.admit(home.gate, time.monotonic() + home.connect_timeout_s)
                while True:
                    offsets, lengths = link.await_question(home.read_timeout_s)
                    self._answer(link, offsets, lengths)
        except EOFError:
            pass  # the reader left
        except LINK_ERRORS as error:
            if not link.closed:
                log.info("transfer_pair_ended from=%s error=%s", place, describe(error))
        except Exception:  # the root of the thread; other readers are served on
            log.exception("transfer_bug from=%s", place)
        finally:
            self._forget(threading.current_thread())

    def _answer(self, link: Link, offsets: Int64s, lengths: Int64s) -> None:
        until_s = time.monotonic() + self._home.read_timeout_s
        arena = self._home.arena
        if not inside(offsets, lengths, arena.nbytes) or (lengths == 0).any():
            link.say("the plan reads past the owner's arena", until_s, good=False)
            return
        link.say("", until_s)
        until_s = time.monotonic() + patience_s(self._home.read_timeout_s, int(lengths.sum()))
        runs = Runs(offsets, lengths, link.chunk_bytes)
        sending: deque[Work] = deque()
        for number, pieces in enumerate(runs):
            if len(sending) == 2:
                wait(sending.popleft(), until_s)
            # What is sent late, from blocks that have changed since, is never used by the reader:
            # so here, unlike at its end, a copy is not needed
            data = arena.one_run(pieces) if arena.device == link.device else None
            if data is None:
                data = link.staging(number, pieces.nbytes)
                arena.read(pieces, data)
            sending.append(link.send(data))
        for work in sending:
            wait(work, until_s)
