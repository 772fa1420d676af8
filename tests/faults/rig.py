"""A cluster for one fault row: forked workers, and the router's side in the test's own process."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cluster.config import ClusterConfig
from cluster.config_file import load_config
from core.clock import SystemClock
from core.errors import BatonError
from core.registry import MemoryRegistry, WorkerRecord
from engine.build import describe_model
from router.client import WorkerLink
from router.fleet import Fleet
from router.flow import Flow
from router.policies.base import Decision, Query, Stateless
from router.policies.build import Policies
from router.progress import SequenceEnd
from router.types import GenerateRequest
from tests.faults.fault import Birth
from tests.faults.handle import WAIT_S, WorkerHandle
from tests.faults.oracle import Oracle
from tests.faults.zygote import Zygote
from tests.processes import make_request, write_config, write_model
from wire import worker_pb2

VOCAB = 500
BLOCK_TOKENS = 16
NUM_BLOCKS = 256
LEASE_S = 0.9
SWEEP_S = 0.25
SILENCE_S = 1.5
VISIBLE_S = 1.0
"""A survivor is free by then when the failure could be seen."""
HIDDEN_S = LEASE_S + SWEEP_S + 0.3
"""And by then when it could not: the lease, the sweep's period, and some slack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Which workers a row needs, and how they are set up."""

    workers: tuple[str, ...] = ("p0", "p1", "d0", "d1")
    """`p` is a prefill, `d` a decode worker; placement prefers them in this order."""
    verify: str = "off"
    seals: bool = True
    """Without them the owner's answer decides."""
    tcp: bool = False
    """UCX may use TCP only: a read is a conversation, it can be interrupted."""
    silence_s: float = SILENCE_S
    lease_s: float = LEASE_S
    num_blocks: int = NUM_BLOCKS
    read_timeout_s: float = 0.9
    deadline_s: float = 20.0

    def tree(self, model: Path) -> dict[str, object]:
        """The cluster config: short leases, a small arena, an engine that takes no time."""
        timed = {
            "prefill_base_ms": 0.3,
            "prefill_per_token_ms": 0.001,
            "decode_base_ms": 0.3,
            "kv_bytes_per_token": 256,
        }
        return {
            "model": {"path": str(model)},
            "engine": {
                "kind": "timed",
                "kv_memory_mb": self.num_blocks * BLOCK_TOKENS * 256 / 2**20,
                "block_size": BLOCK_TOKENS,
                "step_tokens": 64,
                "timed": timed,
            },
            "transfer": {
                "backend": "nixl",
                "verify": self.verify,
                "seals": self.seals,
                "lease_s": self.lease_s,
                "read_timeout_s": self.read_timeout_s,
                "connect_timeout_s": 0.9,
            },
            "router": {
                "max_attempts": 5,
                "local_prefill": False,  # a row asks for the hand-off it damages
                "eject_after_failures": 0,  # and for the worker it names
                "admission": "off",  # and for all of its crowd
            },
        }


FOUR = Shape()
"""A pair, and a spare of each."""


class Preferred(Stateless):
    """Places on the first of `order` that is open, else on any."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def choose(self, query: Query) -> Decision:
        rank = {name: place for place, name in enumerate(self.order)}
        open_workers = [worker for worker in query.pool if query.is_open(worker)]
        return Decision(min(open_workers, key=lambda w: rank.get(w, len(rank))), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a request ended, as its client saw it."""

    request: GenerateRequest
    tokens: list[int]
    error: BatonError | None
    end: SequenceEnd | None

    @property
    def attempts(self) -> tuple[str, ...]:
        """The outcome of each attempt."""
        return () if self.end is None else self.end.attempts


@dataclass(slots=True)
class Asked:
    """A request under way: its answer to be, and how many tokens its client has."""

    request: GenerateRequest
    answer: "asyncio.Task[Answer]"
    seen: int = 0

    def leave(self) -> None:
        """The client goes away."""
        self.answer.cancel()


class Rig:
    """Entered by `running_rig`."""

    def __init__(self, zygote: Zygote, shape: Shape, directory: Path) -> None:
        self.shape = shape
        self.oracle = Oracle(VOCAB)
        self._zygote = zygote
        self._directory = directory
        self._config_path = write_config(directory, shape.tree(write_model(directory, VOCAB)))
        config: ClusterConfig = load_config(self._config_path)
        self._registry = MemoryRegistry(SystemClock())
        self.fleet = Fleet(
            self._registry,
            router_id="test",
            model_id=describe_model(config.model.path, config.engine).model_id,
            silence_s=shape.silence_s,
        )
        self._order = Preferred(list(shape.workers))
        self._ends: dict[str, SequenceEnd] = {}
        self.flow = Flow(
            fleet=self.fleet,
            policies=Policies(prefill=self._order, decode=self._order),
            config=config.router,
            clock=SystemClock(),
            random=Random(0),
            observers=[self],
        )
        self.workers: dict[str, WorkerHandle] = {}
        self._stranger: WorkerHandle | None = None
        self.requests = 0
        """How many have been made."""

    def ended(self, end: SequenceEnd) -> None:
        """router.progress.SequenceObserver"""
        self._ends[end.request.request_id] = end

    # -- workers --------------------------------------------------------------------------------

    async def start(self, name: str, *, ports: tuple[int, int] = (0, 0)) -> WorkerHandle:
        """A new process under this name, routable on return."""
        handle = self.fork(name, ports=ports)
        await self._registry.register(await handle.ready(), 3600.0)
        await self.until(lambda: self.link(name) is not None, f"a route to {name}")
        return handle

    def fork(self, name: str, *, ports: tuple[int, int] = (0, 0)) -> WorkerHandle:
        """A new process under this name, not announced to the router."""
        self.workers[name] = self._fork(name, self._config_path, ports)
        return self.workers[name]

    def _fork(self, name: str, config: Path, ports: tuple[int, int] = (0, 0)) -> WorkerHandle:
        log = self._directory / f"{name}.log"
        pid, control = self._zygote.fork(
            Birth(
                worker_id=name,
                role="prefill" if name.startswith("p") else "decode",
                config=str(config),
                log=str(log),
                ports=ports,
                environ={"UCX_TLS": "tcp"} if self.shape.tcp else {},
            )
        )
        return WorkerHandle(pid, control, log)

    async def close(self) -> None:
        """End all workers."""
        for handle in [*self.workers.values(), self._stranger]:
            if handle is not None:
                await handle.close()

    async def kill(self, name: str) -> WorkerHandle:
        """SIGKILL; its record goes too, as Ray's would."""
        handle = self.workers.pop(name)
        await handle.kill()
        await self._registry.deregister(handle.record.worker_id, handle.record.incarnation)
        await handle.close()
        return handle

    def link(self, name: str) -> WorkerLink | None:
        """The router's open stream to the living process of this name."""
        handle = self.workers[name]
        for link in self.fleet.links():
            if link.routable and link.record.incarnation == handle.record.incarnation:
                return link
        return None

    async def back(self, name: str, *, may_end: bool = False) -> None:
        """Wait until the router has found the way back to a worker that hung.

        `may_end`: it may also have ended meanwhile, then another takes its place.
        """
        ended = self.workers[name].ended.is_set
        await self.until(lambda: self.link(name) is not None or ended(), f"a route to {name}")
        if ended():
            assert may_end, f"{name} has ended:{self.workers[name].tail()}"
            await self.kill(name)
            await self.start(name)

    async def stranger(self) -> tuple[WorkerRecord, str]:
        """A prefill worker of another model, which the router does not know, and its address for
        other workers.
        """
        if self._stranger is None:
            directory = self._directory / "stranger"
            directory.mkdir()
            config = write_config(directory, self.shape.tree(write_model(directory, VOCAB // 2)))
            self._stranger = self._fork("p9", config)
        record = await self._stranger.ready()
        return record, self._stranger.peer_address

    async def until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S
    ) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < give_up_s, f"no {what} within {timeout_s} s"
            await asyncio.sleep(0.002)

    async def set_up_all(self) -> None:
        """What a process sets up once and at need is set up: a stream of each pair, the threads of
        its pool.
        """
        order = list(self._order.order)
        for owner in [name for name in self.workers if name.startswith("p")]:
            for reader in [name for name in self.workers if name.startswith("d")]:
                self.prefer(owner)
                self.prefer(reader)
                await self.answers(1)
        self._order.order[:] = order
        for handle in self.workers.values():
            await handle.start_threads()

    # -- requests -------------------------------------------------------------------------------

    def prefer(self, name: str) -> None:
        """Place there from now on, where its role fits."""
        self._order.order.remove(name)
        self._order.order.insert(0, name)

    async def fill(self, name: str) -> None:
        """Let this prefill worker write every block of its arena anew."""
        self.prefer(name)
        whole = self.shape.num_blocks * BLOCK_TOKENS
        for _ in range(4):
            await self.answers(1, prompt_tokens=whole * 3 // 8, max_tokens=2)

    async def crowd(self, name: str) -> None:
        """Let this decode worker use every block that it thinks may be used."""
        self.prefer(name)
        reply = await self.workers[name].stats()
        assert reply.blocks_free + reply.blocks_cached > 0
        await self.answers(4, prompt_tokens=self.shape.num_blocks * BLOCK_TOKENS // 4)

    def request(
        self, *, prompt_tokens: int = 200, max_tokens: int = 8, deadline_s: float = 0.0
    ) -> GenerateRequest:
        """A prompt nobody has seen before."""
        self.requests += 1
        random = Random(self.requests)
        prompt = [random.randrange(VOCAB) for _ in range(prompt_tokens)]
        made = make_request(f"r{self.requests}", prompt, max_tokens=max_tokens)
        return GenerateRequest(
            request_id=made.request_id,
            choice=0,
            prompt_tokens=made.prompt_tokens,
            sampling=made.sampling,
            deadline_s=deadline_s or self.shape.deadline_s,
        )

    def ask(self, request: GenerateRequest) -> Asked:
        """Send a request; whoever asked awaits its answer or leaves."""
        task = asyncio.create_task(self._answer(request, lambda n: setattr(asked, "seen", n)))
        asked = Asked(request, task)
        return asked

    async def _answer(self, request: GenerateRequest, on_tokens: Callable[[int], None]) -> Answer:
        tokens: list[int] = []
        error: BatonError | None = None
        try:
            async with aclosing(self.flow.generate(request)) as items:
                async for item in items:
                    tokens += item.tokens
                    on_tokens(len(tokens))
        except BatonError as raised:
            error = raised
        end = self._ends.pop(request.request_id, None)
        return Answer(request=request, tokens=tokens, error=error, end=end)

    @asynccontextmanager
    async def asking(
        self, count: int, *, prompt_tokens: int = 200, max_tokens: int = 8
    ) -> AsyncIterator[list[Asked]]:
        """`count` fresh requests under way. On the way out all have ended with the right text, but
        for those whose client has left.
        """
        asked = [
            self.ask(self.request(prompt_tokens=prompt_tokens, max_tokens=max_tokens))
            for _ in range(count)
        ]
        try:
            yield asked
            await asyncio.wait([one.answer for one in asked])
            for one in asked:
                if not one.answer.cancelled():
                    self.assert_right(one.answer.result())
        finally:
            for one in asked:
                one.leave()
            await asyncio.gather(*(one.answer for one in asked), return_exceptions=True)

    async def answers(
        self, count: int, *, prompt_tokens: int = 200, max_tokens: int = 8
    ) -> list[Answer]:
        """As many fresh requests at once, all right."""
        async with self.asking(count, prompt_tokens=prompt_tokens, max_tokens=max_tokens) as asked:
            pass
        return [one.answer.result() for one in asked]

    def assert_right(self, answer: Answer) -> None:
        """The whole right text, and no KV that was proven wrong on the way to it."""
        seen = f"{answer.request.request_id} attempts={answer.attempts} error={answer.error!r}"
        assert answer.error is None, seen
        assert "kv_mismatch" not in answer.attempts, seen
        assert not {"internal_error", "worker_failed"} & set(answer.attempts), seen
        assert answer.tokens == self.oracle.answer(answer.request), seen

    # -- survivors ------------------------------------------------------------------------------

    async def free(self, limit_s: float = VISIBLE_S, names: Sequence[str] = ()) -> float:
        """Assert that these (or all) workers hold nothing within `limit_s`; answers the seconds."""
        handles = [self.workers[name] for name in names or self.workers]
        return await self.holds(limit_s, handles, is_free, "free")

    async def holds(
        self,
        limit_s: float,
        handles: Sequence[WorkerHandle],
        condition: Callable[[worker_pb2.StatsReply], bool],
        what: str,
    ) -> float:
        """Assert that the condition comes true of all of them within `limit_s`."""
        began_s = time.monotonic()
        while True:
            replies = [await handle.stats() for handle in handles]
            took_s = time.monotonic() - began_s
            for reply in replies:
                assert reply.pool_error == "", (reply.who.worker_id, reply.pool_error)
            if all(condition(reply) for reply in replies):
                assert took_s <= limit_s, f"{what} only after {took_s:.2f} s"
                return took_s
            assert took_s <= limit_s, f"not {what} within {limit_s:.2f} s: {brief(replies)}"
            await asyncio.sleep(0.005)


def is_free(reply: worker_pb2.StatsReply) -> bool:
    """No leg, no lease, no block that is not free or cached."""
    busy = reply.blocks_in_use + reply.blocks_receiving + reply.blocks_quarantined
    return not (reply.open_legs or reply.leases or reply.blocks_held or busy)


def brief(replies: Sequence[worker_pb2.StatsReply]) -> str:
    return "; ".join(
        f"{r.who.worker_id}: legs={r.open_legs} leases={len(r.leases)} held={r.blocks_held} "
        f"in_use={r.blocks_in_use} receiving={r.blocks_receiving} "
        f"quarantined={r.blocks_quarantined}"
        for r in replies
    )


def failures(reply: worker_pb2.StatsReply) -> Mapping[str, int]:
    """A reader's failed hand-offs by cause, over all owners."""
    causes: dict[str, int] = {}
    for peer in reply.peers:
        for cause, count in peer.failures.items():
            causes[cause] = causes.get(cause, 0) + count
    return causes


@asynccontextmanager
async def running_rig(zygote: Zygote, shape: Shape) -> AsyncIterator[Rig]:
    """All workers of the shape started and connected; killed on the way out."""
    with tempfile.TemporaryDirectory() as directory:
        rig = Rig(zygote, shape, Path(directory))
        fleet = asyncio.create_task(rig.fleet.run())
        try:
            for name in shape.workers:
                await rig.start(name)
            yield rig
        finally:
            await rig.close()
            fleet.cancel()
            await asyncio.wait([fleet])
