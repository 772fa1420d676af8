"""What `baton status` learns from workers, over real gRPC, and how it shows it."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from cluster.config import ClusterConfig
from cluster.deaths import DeathBook, Deaths, read_deaths
from cluster.events import WorkerDied
from cluster.run_dir import RunDir
from cluster.status import BlockCounts, WorkerStats, WorkerStatus, collect
from cluster.status_view import ClusterStatus, read_status, show_status, status_json
from cluster.worker_control import GrpcWorkerControl
from core.clock import FakeClock
from core.errors import Unavailable
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import WorkerRecord
from router.types import WorkerStatus as RoutersWorker
from tests.router.http_builders import ScriptedGenerator, model_directory, running, saying
from wire import common_pb2, worker_pb2, worker_pb2_grpc

CONFIG = ClusterConfig.model_validate(
    {"model": {"path": "/m"}, "prefill": {"workers": 1}, "decode": {"workers": 1}}
)
REPLY = worker_pb2.StatsReply(
    who=worker_pb2.WorkerHello(incarnation="one", role=common_pb2.ROLE_PREFILL),
    load=worker_pb2.LoadReport(waiting=1, running=2, queued_tokens=3, context_tokens=4),
    blocks_free=10,
    blocks_cached=5,
    blocks_in_use=3,
    blocks_receiving=2,
    blocks_quarantined=1,
    blocks_held=4,
    pool_error="block 7 is in two states",
    leases=[
        worker_pb2.Lease(
            lease_id=9,
            sequence_id=common_pb2.SequenceId(request_id="req-1", choice=1, attempt=2),
            reader="decode-0/one#3",
            blocks=4,
            age_s=1.5,
            expires_in_s=8.5,
        ),
        worker_pb2.Lease(lease_id=10, age_s=0.5, expires_in_s=-1),
    ],
    leases_opened=8,
    leases_closed=5,
    leases_aborted=1,
    leases_expired=0,
    leases_withdrawn=2,
    readers=[
        worker_pb2.ReaderLeases(reader_id="decode-0", ended={"closed": 5, "aborted": 1}),
        worker_pb2.ReaderLeases(reader_id="", ended={"withdrawn": 2}),
    ],
    pid=77,
    transports=["nixl", "collective"],
    peers=[
        worker_pb2.PeerTransfers(
            owner_id="prefill-0",
            transport="nixl",
            handoffs=3,
            reads=4,
            nbytes=4096,
            blocks=2,
            descriptors=5,
            seconds=0.5,
            hidden_s=0.25,
            sealed=2,
            failures={"expired": 1},
        )
    ],
    preemptions=6,
    metrics_address="127.0.0.1:9101",
)


class OneReply(worker_pb2_grpc.WorkerServicer):
    async def Stats(  # noqa: N802
        self, request: object, context: object
    ) -> worker_pb2.StatsReply:
        return REPLY


class Silent(worker_pb2_grpc.WorkerServicer):
    async def Stats(  # noqa: N802
        self, request: object, context: object
    ) -> worker_pb2.StatsReply:
        await asyncio.sleep(60)
        return REPLY


@asynccontextmanager
async def worker_door(
    servicer: worker_pb2_grpc.WorkerServicer | None = None,
) -> AsyncIterator[str]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer or OneReply(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def record(worker_id: str, address: str) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(worker_id),
        incarnation=Incarnation("one"),
        role=Role.PREFILL,
        epoch=1,
        address=address,
        router_address=address,
        model_id=ModelId("m"),
        pid=77,
    )


def read_stats() -> WorkerStats:
    async def read() -> WorkerStats:
        async with worker_door() as address:
            return await GrpcWorkerControl().stats(address, timeout_s=5)

    return asyncio.run(read())


def test_every_number_of_a_worker_arrives_where_it_belongs() -> None:
    stats = read_stats()
    assert (stats.role, stats.pid, stats.preemptions) == ("prefill", 77, 6)
    assert stats.transports == ("nixl", "collective")
    assert stats.metrics_address == "127.0.0.1:9101"
    assert (stats.waiting, stats.running, stats.queued_tokens, stats.context_tokens) == (1, 2, 3, 4)
    assert stats.blocks == BlockCounts(
        free=10, cached=5, in_use=3, receiving=2, quarantined=1, held=4
    )
    assert stats.blocks.total == 21
    assert (stats.leases_opened, stats.leases_closed, stats.leases_aborted) == (8, 5, 1)
    assert stats.leases_withdrawn == 2
    assert [(r.reader_id, r.leases) for r in stats.readers] == [
        ("decode-0", {"closed": 5, "aborted": 1}),
        ("", {"withdrawn": 2}),
    ]
    assert (stats.transfer_bytes, stats.transfer_blocks, stats.transfer_failures) == (4096, 2, 1)
    (peer,) = stats.peers
    assert (peer.owner_id, peer.transport) == ("prefill-0", "nixl")
    assert (peer.handoffs, peer.reads, peer.nbytes, peer.blocks, peer.descriptors) == (
        3,
        4,
        4096,
        2,
        5,
    )
    assert (peer.seconds, peer.hidden_s, peer.failures) == (0.5, 0.25, {"expired": 1})


def test_a_lease_tells_its_sequence_reader_and_times() -> None:
    bound, running = read_stats().leases
    assert (bound.lease_id, bound.reader, bound.blocks) == (9, "decode-0/one#3", 4)
    assert bound.sequence_id == "req-1/1.2"
    assert (bound.age_s, bound.expires_in_s) == (1.5, 8.5)
    assert running.expires_in_s is None


def test_a_worker_that_is_gone_is_unavailable() -> None:
    async def read() -> None:
        async with worker_door() as address:
            pass
        await GrpcWorkerControl().stats(address, timeout_s=1)

    with pytest.raises(Unavailable, match="does not answer"):
        asyncio.run(read())


def test_workers_that_are_absent_or_silent_are_lines_not_errors() -> None:
    async def read() -> tuple[WorkerStatus, ...]:
        async with worker_door() as closed:
            pass
        async with worker_door() as address:
            records = (record("prefill-0", address), record("spare", closed))
            return await collect(CONFIG, records, GrpcWorkerControl())

    absent, answering, silent = asyncio.run(read())
    assert (absent.worker_id, absent.role, absent.stats) == ("decode-0", "decode", None)
    assert absent.problem.startswith("not registered")
    assert answering.worker_id == "prefill-0"
    assert answering.stats is not None
    assert silent.worker_id == "spare"
    assert "does not answer" in silent.problem


def test_a_worker_that_may_hang_is_said_with_what_to_do() -> None:
    (absent, _) = asyncio.run(collect(CONFIG, (), GrpcWorkerControl()))
    assert absent.problem.endswith(
        "one that hangs is killed and started again after 60 s without an answer (hang_timeout_s)"
    )
    never = CONFIG.model_copy(update={"hang_timeout_s": 0.0})
    (absent, _) = asyncio.run(collect(never, (), GrpcWorkerControl()))
    assert "one that hangs is not replaced until it is killed" in absent.problem
    assert absent.problem.endswith("its pid is in decode-0.log")


def test_a_worker_that_does_not_answer_in_time_is_said_in_words() -> None:
    async def read() -> None:
        async with worker_door(Silent()) as address:
            await GrpcWorkerControl().stats(address, timeout_s=0.2)

    with pytest.raises(Unavailable, match=r"does not answer: nothing came within 0\.2 s"):
        asyncio.run(read())


def test_while_redis_is_away_the_workers_are_those_that_the_router_knows(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    registry = {"kind": "redis", "url": "redis://127.0.0.1:9/0"}
    config = CONFIG.model_dump(mode="json") | {"registry": registry}
    run = RunDir.create(tmp_path, "tiny")
    run.write_config(json.dumps(config))

    async def read() -> ClusterStatus:
        async with worker_door() as address:
            view = RoutersWorker(
                worker_id="prefill-0", role="prefill", address=address, connected=True
            )
            generator = ScriptedGenerator(saying("a"), views=(view,))
            async with running(generator, model_directory(tmp_path / "model")) as router:
                run.update(router_url=router.url)
                return await read_status(run, GrpcWorkerControl())

    try:
        status = asyncio.run(read())
        with pytest.raises(Unavailable, match="starting or ending: Redis at"):
            asyncio.run(read_status(run, GrpcWorkerControl()))  # the router is gone as well
    finally:
        run.remove()
    absent, answering = status.workers
    assert answering.stats is not None
    assert absent.worker_id == "decode-0"
    assert status.registry_problem.startswith("Redis at redis://127.0.0.1:9/0 does not answer")
    stream = io.StringIO()
    show_status(status, Console(file=stream, width=40), leases=False)
    (line,) = [line for line in stream.getvalue().splitlines() if "the registry:" in line]
    assert "none that starts now is found until the registry is back" in line


def cluster_status(**left_out: Any) -> ClusterStatus:
    reader = WorkerStatus(worker_id="decode-0", role="decode", problem="not registered")
    owner = WorkerStatus(worker_id="prefill-0", role="prefill", stats=read_stats())
    return ClusterStatus(
        run_id="abcd",
        pid=1,
        model="tiny",
        url="http://127.0.0.1:1",
        ready=False,
        logs="/tmp/x",
        workers=(reader, owner),
        **(left_out or {"ejected": {"prefill-0": "slow"}}),
    )


def shown(*, leases: bool, transfers: bool = False, **left_out: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=140)
    show_status(cluster_status(**left_out), console, leases=leases, transfers=transfers)
    return stream.getvalue()


def test_transfers_show_who_read_how_much_from_whom_and_why_some_failed() -> None:
    text = shown(leases=False, transfers=True)
    assert "KV transfers" in text
    assert "1 expired" in text
    assert "50 %" in text


def test_transfers_show_what_became_of_each_readers_leases() -> None:
    ended = shown(leases=False, transfers=True).partition("KV leases that ended")[2]
    rows = [line.split() for line in ended.splitlines()]
    assert ["prefill-0", "decode-0", "5", "1", "0", "0"] in rows
    assert ["prefill-0", "nobody", "0", "0", "0", "2"] in rows


def test_the_table_shows_load_blocks_problems_and_absence() -> None:
    text = shown(leases=False)
    assert "not ready" in text
    assert "6 of 21" in text
    assert "decode-0: not registered" in text
    assert "prefill-0: block 7 is in two states" in text
    assert "req-1" not in text


def test_names_are_shown_as_they_are_and_not_taken_for_markup() -> None:
    named = WorkerStatus(worker_id="a[/b]", role="decode", problem="away", stats=None)
    console = Console(file=io.StringIO(), width=200)
    status = replace(
        cluster_status(), model="llama[awq]", workers=(named,), unreached={"c[/d]": ""}
    )
    show_status(status, console, leases=True, transfers=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in text for name in ("llama[awq]", "a[/b]", "c[/d]"))


def test_leases_show_who_holds_which_blocks_for_how_long() -> None:
    text = shown(leases=True)
    (line,) = [line for line in text.splitlines() if "req-1/1.2" in line]
    assert line.split() == ["prefill-0", "9", "req-1/1.2", "decode-0", "4", "1.5", "s", "8.5", "s"]
    (line,) = [line for line in text.splitlines() if "nobody yet" in line]
    assert line.split()[-1] == "-"


def test_json_has_everything() -> None:
    status = json.loads(status_json(cluster_status()))
    assert status["workers"][1]["stats"]["leases"][0]["sequence_id"] == "req-1/1.2"
    assert status["workers"][0]["stats"] is None
    assert status["ejected"] == {"prefill-0": "slow"}


def test_an_ejected_worker_is_shown_with_the_reason() -> None:
    text = shown(leases=False)
    assert "ejected: slow" in text
    assert "prefill-0: the router sends it nothing for now: it was far slower" in text


def test_a_worker_that_the_router_does_not_reach_is_shown_with_the_reason() -> None:
    text = shown(leases=False, unreached={"prefill-0": "it serves model a, not b"})
    assert "not connected" in text
    assert "prefill-0: the router sends it nothing, as they are not connected: it serves" in text


def test_deaths_are_counted_with_the_last_reason_and_shown(tmp_path: Path) -> None:
    run, clock = RunDir.create(tmp_path, "tiny"), FakeClock(1000.0)
    try:
        assert read_deaths(run) == {}
        book = DeathBook(run, clock)
        for pid, reason in ((7, "it crashed: SIGSEGV"), (8, "it hung: nothing came")):
            clock.advance(10.0)
            book.note(
                WorkerDied(
                    worker_id=WorkerId("decode-0"),
                    pid=pid,
                    reason=reason,
                    log=run.log_path("decode-0"),
                    restart_in_s=0.0,
                )
            )
        deaths = read_deaths(run)
        run.deaths.write_text('{"decode-0": {"of": "another version"}}')
        with pytest.raises(ValueError, match=r"deaths\.json is of another version"):
            read_deaths(run)
    finally:
        run.remove()
    last = Deaths(count=2, last_pid=8, last_reason="it hung: nothing came", last_s=1020.0)
    assert deaths == {"decode-0": last}
    assert (
        json.loads(status_json(cluster_status(deaths=deaths)))["deaths"]["decode-0"]["count"] == 2
    )
    (line,) = [line for line in shown(leases=False, deaths=deaths).splitlines() if "died" in line]
    assert line.startswith("decode-0: died 2 times, last at ")
    assert line.endswith(" (pid 8): it hung: nothing came")


async def test_a_cluster_of_another_version_is_called_that(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "tiny")
    (run.path / "run.json").write_text('{"pid": 1}')
    with pytest.raises(Unavailable, match="started by another version"):
        await read_status(run, GrpcWorkerControl())
    run.remove()
