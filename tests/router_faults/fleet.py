"""A fleet as in production, but small: Redis, four routers, six workers, each a process."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from core import telemetry
from core.clock import SystemClock
from core.ids import Role
from tests.cluster.test_router_main import bare_directory
from tests.forks import Forked, Main, fork
from tests.processes import write_config
from tests.redis_server import RedisServer, redis_server
from tests.router_faults.bodies import run_router, run_worker
from wire import worker_pb2, worker_pb2_grpc

ROUTERS = 4
PREFILL = ("p0", "p1", "p2")
DECODE = ("d0", "d1", "d2")
SILENCE_S = 2.1
REQUEST_TIMEOUT_S = 20.0
TRANSFER_LEASE_S = 2.0
START_S = 40.0
WAIT_S = 15.0


Settings = dict[str, dict[str, object]]


def settings_of(model: Path) -> Settings:
    """The cluster config: short waits, a small arena, steps short enough for many requests."""
    return {
        "model": {"path": str(model)},
        "engine": {
            "kind": "timed",
            "kv_memory_mb": 4,
            "step_tokens": 256,
            "timed": {"prefill_base_ms": 4, "decode_base_ms": 8, "context_tokens": 4096},
        },
        "transfer": {
            "backend": "nixl",
            "lease_s": TRANSFER_LEASE_S,
            "read_timeout_s": 2.0,
            "connect_timeout_s": 1.5,
        },
        "router": {
            "worker_silence_s": SILENCE_S,
            "request_timeout_s": REQUEST_TIMEOUT_S,
            "tokenizer_threads": 1,
            "local_prefill": False,  # each request has a hand-off to lose
        },
        # A fault may cost a pause of seconds, which is no reason to refuse: no request is lost.
        "slo": {"ttft_ms": 1000 * REQUEST_TIMEOUT_S},
    }


class RunningWorker:
    """One worker process and a connection to its control door."""

    def __init__(self, name: str, forked: Forked) -> None:
        self.name = name
        self.process = forked
        self._channel: grpc.aio.Channel | None = None

    async def ready(self) -> None:
        """Wait for the record that it prints when it serves."""
        address = await found(self.process, r'^\{.*"address": "([^"]+)".*$')
        self._channel = grpc.aio.insecure_channel(address)

    async def stats(self) -> worker_pb2.StatsReply:
        assert self._channel is not None
        stub = worker_pb2_grpc.WorkerStub(self._channel)
        reply: worker_pb2.StatsReply = await stub.Stats(worker_pb2.StatsRequest(), timeout=WAIT_S)
        return reply

    async def close(self) -> None:
        self.process.kill()
        if self._channel is not None:
            await self._channel.close()


class RunningRouter:
    """One router process and where it listens."""

    def __init__(self, url: str, forked: Forked) -> None:
        self.url = url
        self.process = forked

    async def value(self, client: httpx.AsyncClient, metric: str) -> float:
        """The sum over all labels of one of its metrics."""
        reply = await client.get(f"{self.url}/metrics")
        return sum(
            sample.value
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
            if sample.name == metric
        )


class RunningFleet:
    """Entered by `running_fleet`."""

    def __init__(
        self, folder: Path, settings: Settings, redis: RedisServer, client: httpx.AsyncClient
    ) -> None:
        self.redis = redis
        self.client = client
        self.folder = folder
        self.model = Path(str(settings["model"]["path"])).name
        registry = {"kind": "redis", "url": redis.url, "cluster": "faults"}
        self.config = write_config(folder, {**settings, "registry": registry})
        self.workers: dict[str, RunningWorker] = {}
        self.routers: list[RunningRouter] = []
        self._logs = 0

    # -- processes ------------------------------------------------------------------------------

    async def start_worker(self, name: str, body: Main = run_worker) -> RunningWorker:
        """A process of this name, serving on return; routers find it a little later."""
        role = Role.PREFILL if name.startswith("p") else Role.DECODE
        arguments = ["--config", str(self.config), "--role", role, "--worker-id", name]
        worker = self.workers[name] = RunningWorker(name, fork(body, arguments, self._log(name)))
        await worker.ready()
        return worker

    async def replace(self, name: str) -> None:
        """After a kill: a new life of the same name, known to all routers on return."""
        await self.workers[name].close()
        await self.start_worker(name)
        await self.connected()

    async def start_router(self, body: Main = run_router) -> RunningRouter:
        """It listens on return, on a port of its own choice: one that is free now may be taken by
        some connection a moment later.
        """
        arguments = ["--config", str(self.config), "--port", "0"]
        process = fork(body, arguments, self._log("router"))
        address = await found(process, r"router_listens address=(\S+)")
        router = RunningRouter(f"http://{address}", process)
        self.routers.append(router)
        return router

    async def connected(self) -> None:
        """Wait until every router has a stream to every worker."""
        for router in self.routers:
            await self.until_router(router, telemetry.WORKERS_CONNECTED, len(self.workers))

    async def until_router(self, router: RunningRouter, metric: str, value: float) -> None:
        """Wait until one of its metrics has this value."""
        give_up_s = _now_s() + START_S
        seen: object = None
        while seen != value:
            assert _now_s() < give_up_s, f"{metric} is {seen}, not {value}:{router.process.tail()}"
            try:
                seen = await router.value(self.client, metric)
            except httpx.TransportError as error:  # it does not listen yet
                seen = error
            if seen != value:
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        for router in self.routers:
            router.process.kill()
        for worker in self.workers.values():
            await worker.close()

    def _log(self, name: str) -> Path:
        self._logs += 1
        return self.folder / f"{name}-{self._logs}.log"

    # -- what must hold -------------------------------------------------------------------------

    async def total(self, metric: str) -> float:
        """Over all routers."""
        return sum([await router.value(self.client, metric) for router in self.routers])

    async def clean(self) -> None:
        """Wait until nothing is open anywhere; fails if something stays open longer than it may."""
        give_up_s = _now_s() + WAIT_S
        while left := await self._left():
            assert _now_s() < give_up_s, f"still open: {left}"
            await asyncio.sleep(0.1)

    async def _left(self) -> list[str]:
        replies = [await worker.stats() for worker in self.workers.values()]
        in_flight = await self.total(telemetry.REQUESTS_IN_FLIGHT)
        return [_brief(r) for r in replies if not is_free(r)] + (
            [f"{in_flight} requests"] if in_flight else []
        )


def is_free(reply: worker_pb2.StatsReply) -> bool:
    """No leg, no lease, no block that is neither free nor cached, and the pool adds up."""
    busy = reply.blocks_in_use + reply.blocks_receiving + reply.blocks_quarantined
    return not (reply.open_legs or reply.leases or reply.blocks_held or busy or reply.pool_error)


def _brief(reply: worker_pb2.StatsReply) -> str:
    return (
        f"{reply.who.worker_id}: legs={reply.open_legs} leases={len(reply.leases)} "
        f"held={reply.blocks_held} in_use={reply.blocks_in_use} receiving={reply.blocks_receiving} "
        f"quarantined={reply.blocks_quarantined} {reply.pool_error}"
    )


@asynccontextmanager
async def running_fleet(
    folder: Path,
    settings: Settings | None = None,
    *,
    routers: int = ROUTERS,
    workers: Sequence[str] = (*PREFILL, *DECODE),
) -> AsyncIterator[RunningFleet]:
    """Everything started and connected; killed on the way out."""
    settings = settings or settings_of(bare_directory(folder))
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(redis_server())
        client = await stack.enter_async_context(
            httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S + 5, trust_env=False)
        )
        fleet = RunningFleet(folder, settings, redis, client)
        stack.push_async_callback(fleet.close)
        for _ in range(routers):
            await fleet.start_router()
        for name in workers:
            await fleet.start_worker(name)
        await fleet.connected()
        yield fleet


async def found(process: Forked, pattern: str) -> str:
    """The first group of a line of its log."""
    give_up_s = _now_s() + START_S
    while True:
        text = process.log.read_text() if process.log.exists() else ""
        match = re.search(pattern, text, re.MULTILINE)
        if match:
            return match.group(1)
        assert not process.ended and _now_s() < give_up_s, f"it did not start:{process.tail()}"
        await asyncio.sleep(0.02)


def _now_s() -> float:
    return SystemClock().now_s()
