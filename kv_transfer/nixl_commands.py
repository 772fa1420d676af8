"""What the event loop tells the transfer thread, and how it waits for that."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from core.errors import TransferCause, TransferFailed
from kv_transfer.transport import ReadStats

Ending: TypeAlias = "asyncio.Future[ReadStats] | asyncio.Future[None]"


@dataclass(frozen=True, slots=True)
class Command:
    """Something for the thread to do. `future` ends with it; that of a read perhaps later."""

    run: Callable[[], None]
    future: Ending
    refused: TransferCause = TransferCause.READ_FAILED


class Commands:
    """What the thread is told, in order; None: stop.

    The thread waits inside one call of C. Into queue.Queue it goes through some fifteen calls of
    Python, during which the event loop, woken by what the thread has just ended, waits for the
    interpreter.
    """

    def __init__(self) -> None:
        self._commands: deque[Command | None] = deque()
        self._bell = threading.Lock()
        self._bell.acquire()

    def put(self, command: Command | None) -> None:
        """From any thread."""
        self._commands.append(command)
        try:
            self._bell.release()
        except RuntimeError:  # it has rung, and was not heard yet
            return

    def get(self, timeout_s: float | None = None) -> Command | None:
        """The next one, on the transfer thread alone; without a timeout, whenever it comes. Raises
        queue.Empty. A ring may be left over from a command that was taken without waiting.
        """
        while not self._commands:
            if not self._bell.acquire(timeout=-1 if timeout_s is None else timeout_s):
                raise queue.Empty
        return self._commands.popleft()

    def take_left(self) -> list[Command]:
        """Those nobody will run, once the thread has ended."""
        left, self._commands = self._commands, deque()
        return [command for command in left if command is not None]


def fail(future: Ending, reason: str, cause: TransferCause) -> None:
    """On the event loop: end a future that has not ended."""
    if not future.done():
        future.set_exception(TransferFailed(f"KV read failed: {reason}", cause=cause))
