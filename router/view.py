"""What the router believes of one worker. A hint: the worker's own accept or reject repairs it."""

from core.ids import Role
from core.messages import KvEvents, KvSnapshot, KvStored, LoadReport, WorkerHello
from router.curves import WorkerKind, kind_of
from router.index import Holdings

_MAX_OWN = 4096


class WorkerView:
    """Built from one stream's messages and this router's own submits; gone with the stream.

    With `is_colocated` the worker answers every prompt that it computes, in steps that nothing
    bounds, as most servers do. No live worker is such a one, simulated ones may be.
    """

    def __init__(
        self, hello: WorkerHello, holdings: Holdings, *, is_colocated: bool = False
    ) -> None:
        self.hello = hello
        self.is_colocated = is_colocated
        self.kind: WorkerKind = kind_of(hello, is_colocated=is_colocated)
        self.domain = hello.network_domain or domain_of(hello.peer_address)
        """Within which KV moves best."""
        self.load: LoadReport | None = None
        self.hung = False
        """By the last report; whoever follows the fleet judges."""
        self.holdings = holdings
        self.unseen_tokens = 0
        """Tokens whose KV own submits will hold there that no report shows yet."""
        self.unseen_prompt_tokens = 0
        """Of these, prompt tokens that are to be computed there."""
        self._own: dict[int, tuple[int, int]] = {}
        self._next_event: int | None = None
        self._asked = True

    # -- load -----------------------------------------------------------------------------------

    def submitted(self, number: int, tokens: int, prompt_tokens: int) -> None:
        """This router sent a submit, numbered upwards, that no report shows yet."""
        self._own[number] = tokens, prompt_tokens
        if len(self._own) > _MAX_OWN:  # its reports are frozen: all of it stays counted
            eldest = self._own.pop(next(iter(self._own)))
            self._own[number] = tokens + eldest[0], prompt_tokens + eldest[1]
        self.unseen_tokens += tokens
        self.unseen_prompt_tokens += prompt_tokens

    def ended(self, number: int) -> None:
        """That leg is over."""
        tokens, prompt_tokens = self._own.pop(number, (0, 0))
        self.unseen_tokens -= tokens
        self.unseen_prompt_tokens -= prompt_tokens

    def reported(self, load: LoadReport) -> None:
        """A report holds every submit up to the one it names."""
        self.load = load
        while self._own and (number := next(iter(self._own))) <= load.last_submit:
            self.ended(number)

    @property
    def queue_step_tokens(self) -> int:
        """What a step takes of the prompts that wait: short ones share it."""
        hello, load = self.hello, self.load
        if load is None:
            return hello.chunk_tokens
        prompts = load.waiting + load.running - load.decoding + len(self._own)
        is_short = self.queued_tokens <= prompts * hello.chunk_tokens
        return hello.step_tokens if is_short else hello.chunk_tokens

    @property
    def is_prefill(self) -> bool:
        return self.hello.role is Role.PREFILL

    @property
    def unseen_submits(self) -> int:
        return len(self._own)

    @property
    def sequences(self) -> int:
        """Sequences that wait or run there, own unseen ones included."""
        load = self.load
        reported = load.running + load.waiting if load is not None else 0
        return reported + self.unseen_submits

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait or are computed there, own unseen submits included."""
        load = self.load
        return self.unseen_prompt_tokens + (load.queued_tokens if load is not None else 0)

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence the worker can hold."""
        arena = self.hello.num_blocks * self.hello.layout.block_size
        return min(self.hello.context_tokens, arena)

    # -- cache ----------------------------------------------------------------------------------

    def apply_events(self, message: KvEvents) -> bool:
        """False when events are missing and a snapshot must be asked for: once per gap."""
        if self._next_event is None:
            return True  # before the first snapshot, which holds these
        if message.first_number > self._next_event:
            asked, self._asked = self._asked, True
            return asked
        for number, event in enumerate(message.events, message.first_number):
            if number < self._next_event:
                continue
            if isinstance(event, KvStored):
                self.holdings.stored(event.hashes)
            else:
                self.holdings.removed(event.hashes)
            self._next_event = number + 1
        return True

    def apply_snapshot(self, message: KvSnapshot) -> None:
        """Chunks gather beside what is known and replace it with the last one."""
        self.holdings.gather(message.hashes)
        if message.last:
            self.holdings.swap()
            self._next_event, self._asked = message.next_number, False


def domain_of(address: str) -> str:
    """The network domain where no label says it: the host. Within it KV moves by shared memory."""
    return address.rpartition(":")[0]
