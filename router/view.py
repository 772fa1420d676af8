"""What the router believes of one worker. A hint: the worker's own accept or reject repairs it."""

from collections.abc import Sequence

from core.ids import BlockHash
from core.messages import KvEvents, KvSnapshot, KvStored, LoadReport, WorkerHello


class WorkerView:
    """Built from one stream's messages and this router's own submits; gone with the stream."""

    def __init__(self, hello: WorkerHello) -> None:
        self.hello = hello
        self.load: LoadReport | None = None
        self._own: dict[int, int] = {}
        self._cached: set[BlockHash] = set()
        self._next_event: int | None = None
        self._snapshot: set[BlockHash] = set()

    # -- load -----------------------------------------------------------------------------------

    def submitted(self, number: int, tokens: int) -> None:
        """This router sent a submit that the worker's reports may not show yet."""
        self._own[number] = tokens

    def ended(self, number: int) -> None:
        """That leg is over."""
        self._own.pop(number, None)

    def reported(self, load: LoadReport) -> None:
        """A report holds every submit up to the one it names."""
        self.load = load
        for number in [number for number in self._own if number <= load.last_submit]:
            del self._own[number]

    @property
    def unseen_tokens(self) -> int:
        """Tokens of own submits that no report holds yet."""
        return sum(self._own.values())

    @property
    def unseen_submits(self) -> int:
        return len(self._own)

    @property
    def sequences(self) -> int:
        """Sequences that wait or run there, own unseen ones included."""
        reported = self.load.running + self.load.waiting if self.load is not None else 0
        return reported + self.unseen_submits

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence the worker can hold."""
        arena = self.hello.num_blocks * self.hello.layout.block_size
        return min(self.hello.context_tokens, arena)

    # -- cache ----------------------------------------------------------------------------------

    def apply_events(self, message: KvEvents) -> bool:
        """False when events are missing: a snapshot must be asked for."""
        if self._next_event is None:
            return True  # before the first snapshot, which holds these
        if message.first_number > self._next_event:
            return False
        for number, event in enumerate(message.events, message.first_number):
            if number < self._next_event:
                continue
            if isinstance(event, KvStored):
                self._cached.update(event.hashes)
            else:
                self._cached.difference_update(event.hashes)
            self._next_event = number + 1
        return True

    def apply_snapshot(self, message: KvSnapshot) -> None:
        """Chunks gather beside what is known and replace it with the last one."""
        self._snapshot.update(message.hashes)
        if message.last:
            self._cached, self._snapshot = self._snapshot, set()
            self._next_event = message.next_number

    def cached_blocks(self, hashes: Sequence[BlockHash], at_least: int = 0) -> int:
        """Length of the longest prefix of `hashes` held, in blocks; 0 if less than `at_least`.

        Holdings are closed under prefix (eviction is leaf first), so it can be bisected, and one
        look tells whether it is as long as that.
        """
        if at_least > len(hashes) or (at_least and hashes[at_least - 1] not in self._cached):
            return 0
        low, high = at_least, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in self._cached:
                low = middle + 1
            else:
                high = middle
        return low
