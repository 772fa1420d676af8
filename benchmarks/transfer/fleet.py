"""A small cluster of worker processes, and a router's flow over them in the bench's own process."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TextIO

import yaml
from tokenizers import Tokenizer, models

from benchmarks.servers import last_words, read_record
from benchmarks.types import BenchFailed
from benchmarks.zygote import Forked, Zygote
from cluster.config_file import load_config
from core.clock import SystemClock
from core.ids import Role
from core.registry import MemoryRegistry, WorkerRecord
from engine.build import describe_model
from engine.config import EngineConfig
from router.fleet import Fleet
from router.flow import Flow
from router.policies.build import build_policies

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_REGISTERED_S = 3600.0


@contextmanager
def workers(
    zygote: Zygote,
    engine: EngineConfig,
    vocab_size: int,
    roles: Sequence[Role],
    environment: Mapping[str, str],
) -> Iterator[tuple[Path, list[WorkerRecord]]]:
    """Run `cluster.worker` once per role; answers their config file and records."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-")))
        config = _write_model(folder, engine, vocab_size)
        started = [
            stack.enter_context(_worker(zygote, config, role, f"{role}-{i}", environment))
            for i, role in enumerate(roles)
        ]
        for worker in started:
            stack.callback(worker.process.terminate)  # all of them, before one is waited for
        yield config, [_record(worker) for worker in started]


def _write_model(folder: Path, engine: EngineConfig, vocab_size: int) -> Path:
    """A tokenizer is all the timed engine needs of a checkpoint."""
    vocab = {f"w{i}": i for i in range(vocab_size)}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(folder / "tokenizer.json"))
    tree = {"model": {"path": str(folder)}, "engine": engine.model_dump(mode="json")}
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


@dataclass(frozen=True, slots=True)
class _Started:
    """A worker process: what it prints, and where it logs."""

    process: Forked
    output: TextIO
    log: Path


@contextmanager
def _worker(
    zygote: Zygote, config: Path, role: Role, worker_id: str, environment: Mapping[str, str]
) -> Iterator[_Started]:
    log = config.parent / f"{worker_id}.log"
    arguments = ("--config", str(config), "--role", role, "--worker-id", worker_id)
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as output:
        try:
            with log.open("wb") as errors:
                process = zygote.fork(
                    "cluster.worker.__main__",
                    arguments,
                    environment=environment,
                    output=writing,
                    errors=errors.fileno(),
                )
        finally:
            os.close(writing)
        try:
            yield _Started(process, output, log)
        finally:
            process.terminate()
            process.join(_STOP_TIMEOUT_S)


def _record(worker: _Started) -> WorkerRecord:
    """What the worker prints when it serves."""
    line = worker.output.readline()
    if not line:
        raise BenchFailed(f"a worker did not start\n{last_words(worker.log)}")
    return read_record(line)


@asynccontextmanager
async def flow_over(config_file: Path, records: Sequence[WorkerRecord]) -> AsyncIterator[Flow]:
    """A router without HTTP, connected to all of them."""
    config = load_config(config_file)
    clock = SystemClock()
    registry = MemoryRegistry(clock)
    for record in records:
        await registry.register(record, _REGISTERED_S)
    fleet = Fleet(
        registry,
        router_id="bench",
        model_id=describe_model(config.model.path, config.engine).model_id,
        silence_s=config.router.worker_silence_s,
    )
    flow = Flow(
        fleet=fleet,
        policies=build_policies(config.router),
        config=config.router,
        clock=clock,
        random=Random(0),
    )
    task = asyncio.create_task(fleet.run())
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while sum(w.connected for w in flow.workers()) < len(records):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield flow
    finally:
        task.cancel()
        await asyncio.wait([task])
