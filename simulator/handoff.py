"""KV on its way from a prefill worker to a decode worker, as kv_transfer moves it.

    submit -> first announcement -> blocks reserved -> chunks sent as they are final -> last one
    arrived -> closing question -> usable: the sequence joins, the owner's lease ends

Whoever waits for memory waits in order of its first announcement (kv_transfer/reader.py).
"""

from collections import deque
from collections.abc import Callable, Sequence

from core.ids import BlockHash, BlockId
from simulator.events import Events
from simulator.links import Link, send
from simulator.sequence import SimSequence
from simulator.worker import SimWorker


class PullQueue:
    """Pulls into one worker that found no memory yet."""

    def __init__(self) -> None:
        self._waiting: deque[Handoff] = deque()

    def ask(self, handoff: "Handoff") -> None:
        """Reserve for it, now or when its turn comes."""
        self._waiting.append(handoff)
        if len(self._waiting) == 1:
            self.look()

    def drop(self, handoff: "Handoff") -> None:
        """It needs nothing any more."""
        if handoff in self._waiting:
            self._waiting.remove(handoff)
            self.look()

    def look(self) -> None:
        """Blocks may have been freed."""
        while self._waiting and self._waiting[0].reserve():
            self._waiting.popleft()


class Handoff:
    """One prompt's KV. `on_usable` hears when it is all there."""

    def __init__(
        self,
        events: Events,
        *,
        source: SimWorker,
        target: SimWorker,
        queue: PullQueue,
        path: tuple[Link, ...],
        control_s: float,
        sequence: SimSequence,
        hashes: Sequence[BlockHash],
        on_usable: "Callable[[Handoff], None]",
    ) -> None:
        self.source = source
        self.target = target
        self.sequence = sequence
        """To run on the target."""
        self._events = events
        self._queue = queue
        self._path = path
        self._control_s = control_s
        self._hashes = hashes
        self._on_usable = on_usable
        self._leased: list[BlockId] = []
        self._reserved: tuple[list[BlockId], list[BlockId]] | None = None
        self._asked = self._over = False
        self._ready_tokens = self._sent_tokens = 0
        self._arrives_s = 0.0
        self.sent_bytes = 0
        target.pulling(1, sequence.context_tokens)

    def announce(self, tokens: int) -> None:
        """The KV of the first `tokens` is final at the source."""
        if self._over:
            return
        self._ready_tokens = tokens
        if not self._asked:
            self._asked = True
            self._queue.ask(self)
        elif self._reserved is not None:
            self._send()

    def lease(self, blocks: Sequence[BlockId]) -> None:
        """The source has computed all of it, and keeps it until it is read."""
        if not self._over:
            self._leased = list(blocks)
            self.source.pool.lease(blocks)

    def reserve(self) -> bool:
        """Whether the target had the blocks; then what is ready is sent."""
        sequence, size = self.sequence, self.target.spec.block_size
        blocks = -(-sequence.context_tokens // size)
        self._reserved = self.target.reserve(self._hashes, blocks)
        if self._reserved is None:
            return False
        self._sent_tokens = len(self._reserved[0]) * size
        self._send()
        return True

    def abort(self) -> None:
        """Nothing of it is needed any more; both sides give back what they hold."""
        if self._over:
            return
        self._over = True
        self._queue.drop(self)
        self._leave()
        if self._reserved is not None:
            self.target.pool.release(self._reserved[0])
            self.target.pool.abandon(self._reserved[1])
            self._queue.look()
        self._unlease()

    def _send(self) -> None:
        now_s, tokens = self._events.now_s(), self._ready_tokens
        if tokens > self._sent_tokens:
            nbytes = (tokens - self._sent_tokens) * self.source.spec.kv_bytes_per_token
            self._arrives_s = max(self._arrives_s, send(self._path, now_s, nbytes))
            self._sent_tokens = tokens
            self.sent_bytes += nbytes
        if tokens == self.sequence.context_tokens:
            self._events.at(max(now_s, self._arrives_s) + self._control_s, Handoff._close, self)

    def _close(self) -> None:
        if self._over or self._reserved is None:
            return
        self._over = True
        self._leave()
        self._unlease()
        cached, fresh = self._reserved
        self.target.pool.received(fresh)
        sequence = self.sequence
        sequence.blocks = [*cached, *fresh]
        sequence.computed = sequence.context_tokens
        sequence.published = len(cached)
        sequence.cached_tokens = len(cached) * self.target.spec.block_size
        sequence.append()
        sequence.publish(self.target.pool, self.target.spec.block_size)
        self._on_usable(self)
        self.target.join(sequence)
        self.target.tell_kv()

    def _leave(self) -> None:
        self.target.pulling(-1, -self.sequence.context_tokens)

    def _unlease(self) -> None:
        if self._leased:
            self.source.pool.unlease(self._leased)
            self._leased = []
            self.source.look()
