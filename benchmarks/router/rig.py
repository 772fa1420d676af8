"""A real router process, as a cluster starts it, with stand-in workers behind it."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import uvloop
from tokenizers import Tokenizer

from benchmarks.machine import raise_file_limit
from benchmarks.servers import Server, read_record, server
from benchmarks.types import BenchFailed, Run
from cluster.config import ClusterConfig, ModelConfig
from cluster.events import Event
from cluster.registry_server import serve_registry
from cluster.router_process import RouterProcess
from cluster.run_dir import RunDir, runs_root
from core.clock import SystemClock
from core.ids import ModelId, Role
from core.registry import MemoryRegistry, WorkerRecord
from engine.build import describe_model
from engine.config import EngineConfig
from router.config import RouterConfig
from router.serve import bind_listener

T = TypeVar("T")

_START_TIMEOUT_S = 60.0
_REGISTERED_S = 3600.0
MODEL = Path(__file__).parents[2] / "demo_model" / "checkpoint"
_TEXT = Path(__file__).parents[2] / "README.md"
STEP_S = 0.02
"""A decode step of a large model on an H100, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInProcess:
    """One stand-in worker."""

    server: Server
    record: WorkerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """Where the router listens, and what it has used."""

    port: int
    model: str
    text: str
    """Prose to make prompts of."""
    router: psutil.Process
    workers: tuple[StandInProcess, ...]
    chars_per_token: float
    """Of `text`."""

    def cpu_s(self) -> float:
        """CPU time of the router process so far, all its threads, as the OS counts it."""
        used = self.router.cpu_times()
        return used.user + used.system

    def workers_cpu_s(self) -> float:
        """The same of all stand-ins."""
        return sum(worker.server.cpu_s() for worker in self.workers)

    def rss_bytes(self) -> int:
        return int(self.router.memory_info().rss)

    def step(self, step_s: float) -> None:
        """Set the decode step of all workers; sequences that run take it from their next one."""
        for worker in self.workers:
            worker.server.tell(f"step {step_s}")

    def worker(self, role: Role) -> WorkerRecord:
        return next(w.record for w in self.workers if w.record.role is role)

    def prompt(self, number: int, chars: int) -> str:
        """Of so many characters, each number's own from its first words on."""
        start = f"Request {number}. "
        text = self.text * (1 + chars // len(self.text))
        return (start + text)[:chars]


class RigHost:
    """A rig and the event loop it lives in, for parts of one run that share it."""

    def __init__(self, runner: asyncio.Runner, rig: Rig) -> None:
        self._runner = runner
        self._rig = rig

    def run(self, work: Callable[[Rig], Coroutine[None, None, T]]) -> T:
        """Raises what `work` raises."""
        return self._runner.run(work(self._rig))


def hosted(run: Run) -> RigHost:
    """The run's one router, as a cluster's serves all traffic; started when first asked for."""
    run.progress("the router starts", 0, 1)
    return run.kept.of("router", _host)


@contextmanager
def _host() -> Iterator[RigHost]:
    raise_file_limit()  # the router inherits it
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        rig = runner.run(stack.enter_async_context(router_rig()))
        try:
            yield RigHost(runner, rig)
        finally:
            runner.run(stack.aclose())


@asynccontextmanager
async def router_rig(roles: tuple[Role, ...] = (Role.PREFILL, Role.DECODE)) -> AsyncIterator[Rig]:
    """Start everything; the router is ready inside the block, and nothing is left after it."""
    config = ClusterConfig(
        model=ModelConfig(path=MODEL, served_name="bench"),
        engine=EngineConfig(kind="timed"),
        router=RouterConfig(port=0),
        drain_timeout_s=1.0,
    )
    run = RunDir.create(runs_root(), config.model.name)
    async with AsyncExitStack() as stack:
        stack.callback(run.remove)
        run.write_config(config.model_dump_json())
        listener = stack.enter_context(closing(bind_listener(config.router.host, 0)))
        port = listener.getsockname()[1]
        run.update(router_url=f"http://127.0.0.1:{port}")
        router = RouterProcess(config, run, listener, report=_ignore)
        stack.push_async_callback(router.stop, config.drain_timeout_s)
        supervising = asyncio.create_task(router.supervise())
        stack.callback(supervising.cancel)
        model_id = describe_model(config.model.path, config.engine).model_id
        text = " ".join(_TEXT.read_text(encoding="utf-8").split())
        tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
        workers = _workers(stack, roles, model_id, tokens)
        registry = MemoryRegistry(SystemClock())
        for worker in workers:
            await registry.register(worker.record, _REGISTERED_S)
        await stack.enter_async_context(serve_registry(registry, run.registry_address))
        await _ready(router, supervising)
        if router.pid is None:
            raise BenchFailed("the router has no process")
        yield Rig(
            port=port,
            model=config.model.name,
            text=text,
            router=psutil.Process(router.pid),
            workers=workers,
            chars_per_token=len(text) / len(tokens),
        )


def _workers(
    stack: AsyncExitStack, roles: tuple[Role, ...], model_id: ModelId, text: list[int]
) -> tuple[StandInProcess, ...]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
    file = folder / "text.json"
    file.write_text(json.dumps(text))
    module = (sys.executable, "-m", "benchmarks.router.standin")
    servers = [
        stack.enter_context(server(f"{role}-{i}", (*module, role, model_id, str(file)), folder))
        for i, role in enumerate(roles)
    ]
    return tuple(StandInProcess(server=s, record=read_record(s.first_line())) for s in servers)


async def _ready(router: RouterProcess, supervising: "asyncio.Task[None]") -> None:
    waiting = asyncio.create_task(router.wait_ready())
    done, _ = await asyncio.wait(
        {waiting, supervising}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
    )
    waiting.cancel()
    if supervising in done:
        supervising.result()
    if waiting not in done:
        raise BenchFailed(f"the router was not ready within {_START_TIMEOUT_S:g} s")


def _ignore(_event: Event) -> None:
    """The bench looks for itself."""
