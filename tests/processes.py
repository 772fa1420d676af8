"""Real worker processes for tests, and a router's side in the test's own process."""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc
import yaml
from tokenizers import Tokenizer, models

from cluster.config import ClusterConfig
from cluster.config_file import load_config
from core.clock import SystemClock
from core.ids import Incarnation, ModelId, RequestId, Role, WorkerId
from core.registry import MemoryRegistry, WorkerRecord
from core.sampling import SamplingParams
from engine.build import describe_model
from router.fleet import Fleet
from router.flow import Flow
from router.policies.build import build_policies
from router.types import Generated, GenerateRequest
from wire import worker_pb2, worker_pb2_grpc

START_TIMEOUT_S = 60.0


@dataclass(slots=True)
class WorkerProcess:
    """One running `python -m cluster.worker`."""

    record: WorkerRecord
    process: subprocess.Popen[str]
    log: Path

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


def write_model(directory: Path, vocab_size: int = 500) -> Path:
    """All the timed engine needs of a model: a tokenizer of this many tokens."""
    vocab = {f"w{i}": i for i in range(vocab_size)}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(directory / "tokenizer.json"))
    return directory


def write_config(directory: Path, tree: dict[str, object]) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def worker_processes(config: Path, roles: Sequence[str]) -> Iterator[list[WorkerProcess]]:
    """Start one worker per role, all at once; end them on the way out, however that comes.

    A role `decode:FAULT` or `prefill:FAULT` is a worker of tests/faulty_worker.py.
    """
    with tempfile.TemporaryDirectory() as logs:
        started: list[subprocess.Popen[str]] = []
        try:
            for i, (role, _, fault) in enumerate(kind.partition(":") for kind in roles):
                module = ("tests.faulty_worker", fault) if fault else ("cluster.worker",)
                log = (Path(logs) / f"{role}-{i}.log").open("w")
                command = [sys.executable, "-m", *module, "--config", str(config)]
                command += ["--role", role, "--worker-id", f"{role}-{i}"]
                started.append(
                    subprocess.Popen(
                        command,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )
                log.close()
            yield [
                _wait_ready(process, Path(logs) / f"{role.partition(':')[0]}-{i}.log")
                for i, (role, process) in enumerate(zip(roles, started, strict=True))
            ]
        finally:
            for process in started:
                process.terminate()
            for process in started:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
                if process.stdout is not None:
                    process.stdout.close()


def _wait_ready(process: subprocess.Popen[str], log: Path) -> WorkerProcess:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(f"worker did not start:\n{log.read_text()[-4000:]}")
    fields = json.loads(line)
    record = WorkerRecord(
        worker_id=WorkerId(fields["worker_id"]),
        incarnation=Incarnation(fields["incarnation"]),
        role=Role(fields["role"]),
        epoch=fields["epoch"],
        address=fields["address"],
        router_address=fields["router_address"],
        model_id=ModelId(fields["model_id"]),
        pid=fields["pid"],
    )
    return WorkerProcess(record=record, process=process, log=log)


@asynccontextmanager
async def flow_over(config_path: Path, workers: Sequence[WorkerProcess]) -> AsyncIterator[Flow]:
    """A router without HTTP: the real flow, over real streams to these workers."""
    config: ClusterConfig = load_config(config_path)
    clock = SystemClock()
    registry = MemoryRegistry(clock)
    for worker in workers:
        await registry.register(worker.record, 3600.0)
    model = describe_model(config.model.path, config.engine)
    fleet = Fleet(
        registry,
        router_id="test",
        model_id=model.model_id,
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
        async with asyncio.timeout(START_TIMEOUT_S):
            while sum(view.connected for view in flow.workers()) < len(workers):
                await asyncio.sleep(0.01)
        yield flow
    finally:
        task.cancel()
        await asyncio.wait([task])


async def collect(flow: Flow, request: GenerateRequest) -> list[Generated]:
    return [item async for item in flow.generate(request)]


def output_tokens(items: Sequence[Generated]) -> list[int]:
    return [token for item in items for token in item.tokens]


def make_request(
    request_id: str, prompt: Sequence[int], *, max_tokens: int = 16, **sampling: object
) -> GenerateRequest:
    fields: dict[str, object] = {"temperature": 0.0, **sampling}
    return GenerateRequest(
        request_id=RequestId(request_id),
        choice=0,
        prompt_tokens=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **fields),  # type: ignore[arg-type]
        deadline_s=60.0,
    )


async def stats(worker: WorkerProcess) -> worker_pb2.StatsReply:
    async with grpc.aio.insecure_channel(worker.record.address) as channel:
        reply: worker_pb2.StatsReply = await worker_pb2_grpc.WorkerStub(channel).Stats(
            worker_pb2.StatsRequest(), timeout=10
        )
        return reply


def bytes_read(reply: worker_pb2.StatsReply) -> int:
    """KV bytes this worker has brought from its peers."""
    return sum(peer.nbytes for peer in reply.peers)


async def wait_until_idle(
    workers: Sequence[WorkerProcess], timeout_s: float = 10.0
) -> list[worker_pb2.StatsReply]:
    """Statistics of all workers once none has a leg open; the last ones seen after `timeout_s`."""
    give_up_s = SystemClock().now_s() + timeout_s
    while True:
        replies = [await stats(worker) for worker in workers]
        idle = all(r.open_legs == 0 and r.blocks_held == 0 for r in replies)
        if idle or SystemClock().now_s() > give_up_s:
            return replies
        await asyncio.sleep(0.05)
