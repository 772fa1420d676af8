"""Many workers' doors in one process: each tells a router at once of a cache full of blocks."""

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from cluster.config_file import load_config
from cluster.registries import connect_registry
from core.ids import BlockHash, Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LoadReport, WorkerHello
from core.registry import WorkerRecord
from core.stream import MessageStream, StreamBroken, accepting, address_of, listen
from engine.build import describe_model
from router.codec import to_router
from wire import worker_pb2

BLOCKS = 16_384
"""Of each: less than one snapshot message holds."""
DOORS = 32
REGISTERED = "all registered"


def run_doors(arguments: list[str]) -> int:
    """CONFIG NUMBER: serve DOORS workers, found in the config's registry, until killed."""
    asyncio.run(_serve(Path(arguments[0]), int(arguments[1])))
    return 0


async def _serve(config_file: Path, number: int) -> None:
    config = load_config(config_file)
    model_id = describe_model(config.model.path, config.engine).model_id
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(connect_registry(config.registry))
        for i in range(DOORS):
            role = Role.PREFILL if i % 2 else Role.DECODE
            door = _Door(_hello(f"{number}-{i}", role, model_id))
            listener = listen("127.0.0.1", 0)
            await registry.register(door.record(address_of(listener)), 3600.0)
            await stack.enter_async_context(
                accepting(listener, worker_pb2.ToWorker.FromString, door.serve)
            )
        sys.stdout.write(REGISTERED + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


class _Door:
    """Hello, all that is cached, the load; then it listens."""

    def __init__(self, hello: WorkerHello) -> None:
        self._hello = hello
        data = os.urandom(16 * BLOCKS)
        hashes = tuple(BlockHash(data[i : i + 16]) for i in range(0, len(data), 16))
        load = LoadReport(
            last_submit=0,
            queued_tokens=0,
            waiting=0,
            running=0,
            context_tokens=0,
            free_blocks=0,
            total_blocks=BLOCKS,
        )
        said = (hello, KvSnapshot(next_number=1, hashes=hashes), load)
        self._said = [to_router(message) for message in said]

    def record(self, address: str) -> WorkerRecord:
        return WorkerRecord(
            worker_id=self._hello.worker_id,
            incarnation=self._hello.incarnation,
            role=self._hello.role,
            epoch=1,
            address="",
            router_address=address,
            model_id=self._hello.model_id,
            pid=os.getpid(),
        )

    async def serve(self, stream: MessageStream[worker_pb2.ToWorker]) -> None:
        try:
            await stream.read()  # the router's hello
            for message in self._said:
                stream.send(message)
            while await stream.read() is not None:
                pass
        except StreamBroken:
            pass  # the router has gone


def _hello(name: str, role: Role, model_id: ModelId) -> WorkerHello:
    return WorkerHello(
        worker_id=WorkerId(name),
        incarnation=Incarnation(name),
        role=role,
        epoch=1,
        model_id=model_id,
        layout=KvLayout(block_size=16, num_kv_heads=1, num_layers=1, head_dim=8, dtype="uint8"),
        num_blocks=BLOCKS,
        context_tokens=100_000,
        peer_address="",
    )
