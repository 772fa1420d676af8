"""Small parts that the in-process tests are built from: engines, sequences, workers, a cluster."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, TypeVar

import grpc
from hypothesis import HealthCheck, settings

from cluster.worker.outlet import RouterOutlet
from cluster.worker.router_door import serving_routers
from cluster.worker.server import add_worker_service
from cluster.worker.worker import Worker, WorkerIdentity, WorkerSettings
from core.blocks import root_hash
from core.channel import SERVER_OPTIONS
from core.clock import Clock, SystemClock
from core.errors import BatonError
from core.ids import (
    BlockId,
    RequestId,
    Role,
    SequenceId,
    WorkerId,
    new_incarnation,
)
from core.messages import (
    Accepted,
    DecodeSubmit,
    Handoff,
    LegFailed,
    LegTokens,
    PrefillSubmit,
    Rejected,
    TokenFrame,
    WorkerToRouter,
)
from core.registry import MemoryRegistry, Registry, WorkerRecord
from core.sampling import FinishReason, SamplingParams
from core.step import StepBudget
from core.stream import address_of, listen
from decode_worker.config import DecodeConfig
from engine import runner as engine_runner
from engine.config import EngineConfig, TimedConfig
from engine.pool import BlockPool
from engine.sequence import Sequence as EngineSequence
from engine.timed import TimedEngine
from engine.types import Sampled, SeqStep
from kv_transfer.config import TransferConfig
from kv_transfer.loopback import LoopbackHub, LoopbackTransport
from kv_transfer.server import serving_peers
from kv_transfer.transports import Transports
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.fleet import Fleet
from router.flow import Flow
from router.policies.base import DecodePolicy, Slo
from router.policies.build import DEFAULT_SLO, build_policies
from router.types import GenerateRequest

BLOCK_SIZE = 4
BLOCK_BYTES = 128
VOCAB_SIZE = 1000
WAIT_S = 10.0

M = TypeVar("M")

QUICK = settings(
    database=None,
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)


async def until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Let the event loop turn until `condition` holds; fails after WAIT_S."""
    clock = SystemClock()
    give_up_s = clock.now_s() + WAIT_S
    while not condition():
        assert clock.now_s() < give_up_s, f"{what} did not come true"
        await asyncio.sleep(0.001)


async def soon(awaitable: Awaitable[object]) -> object:
    """The result, within WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        return await awaitable


# -- engines ------------------------------------------------------------------------------------


def make_config(num_blocks: int = 64, **fields: object) -> EngineConfig:
    """A timed engine with 4-token blocks of 128 bytes; `fields` are EngineConfig's."""
    return EngineConfig(
        kind="timed",
        block_size=BLOCK_SIZE,
        kv_memory_mb=num_blocks * BLOCK_BYTES / 2**20,
        timed=TimedConfig(kv_bytes_per_token=BLOCK_BYTES // BLOCK_SIZE),
        **fields,
    )


def make_engine(
    num_blocks: int = 64,
    *,
    config: EngineConfig | None = None,
    eos_token_ids: Iterable[int] = (),
    sleep: Callable[[float], None] = lambda _: None,
) -> TimedEngine:
    return TimedEngine(
        config or make_config(num_blocks),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset(eos_token_ids),
        sleep=sleep,
    )


def make_prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    random = Random(f"{seed}/{num_tokens}")
    return tuple(random.randrange(VOCAB_SIZE) for _ in range(num_tokens))


def make_step(
    tokens: Sequence[int],
    start: int,
    end: int,
    table: Sequence[int],
    *,
    name: str = "r",
    sample: bool | None = None,
) -> SeqStep:
    """Feeds [start, end); samples when that reaches the last token, unless told."""
    draws = end == len(tokens) if sample is None else sample
    return SeqStep(
        sequence_id=SequenceId(RequestId(name)),
        tokens=tokens,
        start=start,
        end=end,
        block_table=[BlockId(b) for b in table],
        sample=SamplingParams(max_tokens=10_000) if draws else None,
    )


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What the timed engine answers to `prompt`: one fresh engine, one sequence, whole prompt."""
    blocks = -(-(len(prompt) + count) // BLOCK_SIZE)
    engine = make_engine(blocks)
    tokens, fed = list(prompt), 0
    for _ in range(count):
        (sampled,) = engine.step([make_step(tokens, fed, len(tokens), range(blocks))])
        assert isinstance(sampled, Sampled), sampled
        fed = len(tokens)
        tokens.append(sampled.token)
    return tokens[len(prompt) :]


class StepGate:
    """An engine's `sleep` that lets a step pass per permit; open for ever after `open`."""

    def __init__(self, permits: int = 0) -> None:
        self._permits = threading.Semaphore(permits)
        self._opened = threading.Event()
        self.waiting = threading.Event()

    def __call__(self, _seconds: float) -> None:
        while not self._opened.is_set():
            self.waiting.set()
            if self._permits.acquire(timeout=0.005):
                break
        self.waiting.clear()

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def close(self) -> None:
        """Permits that no step has taken are void."""
        while self._permits.acquire(blocking=False):
            pass

    def open(self) -> None:
        self._opened.set()


# -- sequences and the runner -------------------------------------------------------------------


def make_sequence(
    prompt: Sequence[int],
    *,
    name: str = "r",
    max_tokens: int = 8,
    deadline_at_s: float = 1e9,
    arrived_at_s: float = 0.0,
    stop_token_ids: Iterable[int] = (),
    output_position: int = 0,
) -> EngineSequence:
    return EngineSequence(
        sequence_id=SequenceId(RequestId(name)),
        context=tuple(prompt),
        output_position=output_position,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset(stop_token_ids)),
        root=root_hash(make_engine(1).info.model_id),
        deadline_at_s=deadline_at_s,
        arrived_at_s=arrived_at_s,
    )


@dataclass
class Heard:
    """A SequenceListener that notes what it is told."""

    tokens: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    error: BatonError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def on_blocks(self, sequence: EngineSequence) -> None:
        self.computed.append(sequence.computed)

    def on_token(
        self, sequence: EngineSequence, sampled: Sampled, finish: FinishReason | None
    ) -> None:
        self.tokens.append(sampled.token)
        self.finish = finish
        if finish is not None:
            self.ended.set()

    def on_failed(self, sequence: EngineSequence, error: BatonError) -> None:
        self.error = error
        self.ended.set()


@dataclass
class RunnerParts:
    """A running engine loop and its pool."""

    runner: engine_runner.Runner
    pool: BlockPool
    engine: TimedEngine

    def submit(self, sequence: EngineSequence) -> Heard:
        heard = Heard()
        self.runner.submit(sequence, heard)
        return heard


@asynccontextmanager
async def running_engine_loop(
    engine: TimedEngine,
    clock: Clock | None = None,
    *,
    step_tokens: int = 16,
    chunk_tokens: int | None = None,
    max_batch: int = 8,
    budget: StepBudget | None = None,
) -> AsyncIterator[RunnerParts]:
    """Checks the pool after every step, and that nothing is left referenced at the end."""
    pool = BlockPool(engine.info.num_blocks)
    runner = engine_runner.Runner(
        engine,
        pool,
        clock or SystemClock(),
        step_tokens=step_tokens,
        chunk_tokens=chunk_tokens,
        max_batch=max_batch,
        step_timeout_s=30.0,
        on_step_end=pool.check,
        budget=budget,
    )
    task = asyncio.create_task(runner.run())
    try:
        yield RunnerParts(runner, pool, engine)
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait([task])


# -- workers ------------------------------------------------------------------------------------


@dataclass(slots=True)
class ServedWorker:
    """A worker of this process behind a real gRPC door on loopback."""

    worker: Worker
    engine: TimedEngine
    server: grpc.aio.Server
    record: WorkerRecord
    gate: StepGate
    peer_address: str
    peers: AsyncExitStack

    async def stop_serving(self) -> None:
        """As if the process died: every stream to it breaks at once."""
        await asyncio.gather(self.server.stop(None), self.peers.aclose())


def make_settings(
    *,
    num_blocks: int = 256,
    lease_s: float = 10.0,
    read_timeout_s: float = 10.0,
    step_tokens: int = 64,
    max_batch: int = 64,
    max_queued_tokens: int = 1_000_000,
    max_legs: int = 4096,
    max_sequences: int = 1024,
) -> WorkerSettings:
    return WorkerSettings(
        engine=make_config(num_blocks, step_tokens=step_tokens, max_batch=max_batch),
        transfer=TransferConfig(backend="loopback", lease_s=lease_s, read_timeout_s=read_timeout_s),
        prefill=PrefillConfig(max_queued_tokens=max_queued_tokens, max_legs=max_legs),
        decode=DecodeConfig(max_sequences=max_sequences),
    )


@asynccontextmanager
async def served_worker(
    name: str,
    role: Role,
    hub: LoopbackHub,
    *,
    worker_settings: WorkerSettings | None = None,
    clock: Clock | None = None,
    gated: bool = False,
) -> AsyncIterator[ServedWorker]:
    """A gated worker's engine takes a step only by permit of its gate."""
    chosen = worker_settings or make_settings()
    real_clock = clock or SystemClock()
    gate = StepGate()
    if not gated:
        gate.open()
    engine = make_engine(config=chosen.engine, sleep=gate)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    routers, peers = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
    incarnation = new_incarnation()
    worker = Worker(
        engine=engine,
        transports=Transports([LoopbackTransport(engine.arena, hub)]),
        identity=WorkerIdentity(
            worker_id=WorkerId(name),
            incarnation=incarnation,
            address=address,
            peer_address=address_of(peers),
        ),
        role=role,
        settings=chosen,
        clock=real_clock,
    )
    add_worker_service(server, worker, real_clock, "")
    record = WorkerRecord(
        worker_id=WorkerId(name),
        incarnation=incarnation,
        role=role,
        epoch=1,
        address=address,
        router_address=address_of(routers),
        model_id=engine.info.model_id,
        pid=1,
    )
    async with worker.running() as loop, AsyncExitStack() as door:
        await door.enter_async_context(
            serving_peers(peers, worker.owner, worker.peer_hello, worker.arena)
        )
        await door.enter_async_context(serving_routers(routers, worker))
        await server.start()
        try:
            yield ServedWorker(worker, engine, server, record, gate, address_of(peers), door)
            assert not loop.done(), loop
        finally:
            gate.open()
            await server.stop(None)


def assert_idle(worker: Worker) -> None:
    """Nothing runs, nothing is leased, and every invariant holds."""
    counts, problem = worker.pool_counts()
    assert problem == ""
    assert worker.open_legs == 0
    assert counts.held == counts.in_use == counts.receiving == counts.quarantined == 0, counts


async def until_idle(*workers: Worker) -> None:
    """All legs, leases and transfers have ended, in every worker."""

    def idle(worker: Worker) -> bool:
        counts = worker.pool.counts()
        moving = counts.held + counts.in_use + counts.receiving + counts.quarantined
        return worker.open_legs == 0 and moving == 0

    await until(lambda: all(idle(worker) for worker in workers), "every worker idle")
    for worker in workers:
        assert_idle(worker)


class RouterEnd:
    """A router's side of a worker without a network: an outlet, and all that came out of it."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._said: asyncio.Queue[WorkerToRouter] = asyncio.Queue()
        self.outlet: RouterOutlet = worker.attach(self._said.put_nowait)
        self.messages: list[WorkerToRouter] = []

    async def until(self, condition: Callable[[], bool]) -> None:
        """Take what the worker sends until `condition` holds."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.messages.append(await self._said.get())

    def of(self, kind: type[M]) -> list[M]:
        """What came of this kind so far."""
        return [message for message in self.messages if isinstance(message, kind)]

    async def first(self, kind: type[M]) -> M:
        """The first message of this kind."""
        await self.until(lambda: bool(self.of(kind)))
        return self.of(kind)[0]

    async def accepted(self, number: int) -> Accepted:
        """The worker's yes to a leg."""
        await self.until(lambda: any(m.number == number for m in self.of(Accepted)))
        return next(m for m in self.of(Accepted) if m.number == number)

    async def answered(self, number: int) -> list[int]:
        """The leg's tokens, once it has finished; LegFailed and Rejected fail the test."""
        await self.until(lambda: self._finished(number))
        return self.tokens(number)

    async def all_said(self) -> None:
        """Take the rest."""
        self.outlet.flush()
        while not self._said.empty():
            self.messages.append(self._said.get_nowait())

    def entries(self, number: int) -> list[LegTokens]:
        frames = [message for message in self.messages if isinstance(message, TokenFrame)]
        return [e for frame in frames for e in frame.entries if e.number == number]

    def tokens(self, number: int) -> list[int]:
        return [token for entry in self.entries(number) for token in entry.tokens]

    def failure(self, number: int) -> str:
        """The code a leg failed with so far, or nothing."""
        return next((m.code for m in self.of(LegFailed) if m.number == number), "")

    def _finished(self, number: int) -> bool:
        for message in self.messages:
            if isinstance(message, LegFailed | Rejected) and message.number == number:
                raise AssertionError(message)
        return any(entry.finish is not None for entry in self.entries(number))


# -- a cluster ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Cluster:
    """Prefill and decode workers, and the real flow over real streams to them."""

    flow: Flow
    fleet: Fleet
    prefill: list[ServedWorker]
    decode: list[ServedWorker]
    registry: Registry
    hub: LoopbackHub

    @property
    def workers(self) -> list[Worker]:
        return [served.worker for served in [*self.prefill, *self.decode]]


@asynccontextmanager
async def running_cluster(
    *,
    prefill: int = 2,
    decode: int = 2,
    gated_prefill: bool = False,
    gated_decode: bool = False,
    prefill_settings: WorkerSettings | None = None,
    decode_settings: WorkerSettings | None = None,
    router: RouterConfig | None = None,
    decode_policy: DecodePolicy | None = None,
    registry: Registry | None = None,
    clock: Clock | None = None,
    slo: Slo = DEFAULT_SLO,
) -> AsyncIterator[Cluster]:
    clock = clock or SystemClock()
    registry = registry or MemoryRegistry(clock)
    hub = LoopbackHub()
    config = router or RouterConfig(worker_wait_s=0)
    async with AsyncExitStack() as stack:
        pools: dict[Role, list[ServedWorker]] = {Role.PREFILL: [], Role.DECODE: []}
        for role, count, gated, chosen in (
            (Role.PREFILL, prefill, gated_prefill, prefill_settings),
            (Role.DECODE, decode, gated_decode, decode_settings),
        ):
            for i in range(count):
                served = await stack.enter_async_context(
                    served_worker(
                        f"{role}-{i}",
                        role,
                        hub,
                        worker_settings=chosen,
                        clock=clock,
                        gated=gated,
                    )
                )
                pools[role].append(served)
                await registry.register(served.record, 3600.0)
        model_id = make_engine(1).info.model_id
        fleet = Fleet(
            registry,
            router_id="test",
            model_id=model_id,
            silence_s=5.0,
            hung_step_s=config.hung_step_s,
        )
        policies = build_policies(config, slo)
        if decode_policy is not None:
            policies = replace(policies, decode=decode_policy)
        flow = Flow(
            fleet=fleet,
            policies=policies,
            config=config,
            clock=clock,
            random=Random(0),
        )
        task = asyncio.create_task(fleet.run())
        try:
            total = prefill + decode
            await until(lambda: sum(link.routable is not None for link in fleet.links()) == total)
            yield Cluster(flow, fleet, pools[Role.PREFILL], pools[Role.DECODE], registry, hub)
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait([task])


def make_request(
    prompt: Sequence[int],
    *,
    name: str = "req",
    max_tokens: int = 16,
    deadline_s: float = 30.0,
    stop_token_ids: Iterable[int] = (),
) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        choice=0,
        prompt_tokens=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset(stop_token_ids)),
        deadline_s=deadline_s,
    )


# -- wires --------------------------------------------------------------------------------------

NEWER_FIELD = b"\xc0\x3e\x01"  # field 1000, a varint, as a newer peer might add
NEWER_MESSAGE = b"\xc2\x3e\x00"  # field 1000, an empty message: a kind of message not known here


# -- legs ---------------------------------------------------------------------------------------


def prefill_submit(
    number: int,
    prompt: Sequence[int],
    *,
    name: str = "r",
    max_tokens: int = 8,
    deadline_s: float = 60.0,
    stop_token_ids: Iterable[int] = (),
) -> PrefillSubmit:
    return PrefillSubmit(
        number=number,
        sequence_id=SequenceId(RequestId(name)),
        tokens=tuple(prompt),
        output_position=0,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset(stop_token_ids)),
        deadline_s=deadline_s,
    )


def decode_submit(
    number: int,
    prompt: Sequence[int],
    handoff: Handoff | None,
    *,
    name: str = "r",
    max_tokens: int = 8,
    deadline_s: float = 60.0,
) -> DecodeSubmit:
    return DecodeSubmit(
        number=number,
        sequence_id=SequenceId(RequestId(name)),
        tokens=tuple(prompt),
        output_position=0,
        sampling=SamplingParams(max_tokens=max_tokens),
        deadline_s=deadline_s,
        handoff=handoff,
    )


def handoff_of(owner: ServedWorker, accepted: Accepted) -> Handoff:
    """Where a decode leg finds what an accepted prefill leg makes."""
    assert accepted.lease_id is not None
    return Handoff(
        owner_id=owner.record.worker_id,
        owner_address=owner.peer_address,
        owner_incarnation=owner.record.incarnation,
        lease_id=accepted.lease_id,
    )


@dataclass(slots=True)
class WorkerPair:
    """A prefill and a decode worker, and a router's end at each."""

    prefill: ServedWorker
    decode: ServedWorker
    to_prefill: RouterEnd
    to_decode: RouterEnd

    async def start_prefill(self, number: int, prompt: Sequence[int], **fields: Any) -> Handoff:
        submit = prefill_submit(number, prompt, **fields)
        self.prefill.worker.handle(self.to_prefill.outlet, submit)
        return handoff_of(self.prefill, await self.to_prefill.accepted(number))

    async def start_decode(
        self, number: int, prompt: Sequence[int], handoff: Handoff | None, **fields: Any
    ) -> None:
        submit = decode_submit(number, prompt, handoff, **fields)
        self.decode.worker.handle(self.to_decode.outlet, submit)
        await self.to_decode.accepted(number)

    async def idle(self) -> None:
        await until_idle(self.prefill.worker, self.decode.worker)


@asynccontextmanager
async def worker_pair(
    *,
    worker_settings: WorkerSettings | None = None,
    clock: Clock | None = None,
    gated_prefill: bool = False,
    gated_decode: bool = False,
) -> AsyncIterator[WorkerPair]:
    hub = LoopbackHub()
    async with (
        served_worker(
            "p",
            Role.PREFILL,
            hub,
            worker_settings=worker_settings,
            clock=clock,
            gated=gated_prefill,
        ) as prefill,
        served_worker(
            "d", Role.DECODE, hub, worker_settings=worker_settings, clock=clock, gated=gated_decode
        ) as decode,
    ):
        yield WorkerPair(prefill, decode, RouterEnd(prefill.worker), RouterEnd(decode.worker))
