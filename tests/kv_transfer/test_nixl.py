"""What the NIXL transport promises beyond the contract: its caches, and each way it can fail.

Where the library itself can be brought to fail, it is: stopped and killed owners over TCP, a
protocol that UCX lacks. Elsewhere a fault is put under the calls of the reader's agent.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from nixl import _bindings
from nixl._api import nixl_agent

from core.errors import InternalError, TransferCause, TransferFailed
from core.ids import new_incarnation
from engine.arena import Arena
from kv_transfer import nixl, nixl_thread
from kv_transfer import nixl_agent as agents
from kv_transfer.loopback import LoopbackHub
from kv_transfer.nixl import NixlTransport
from kv_transfer.nixl_agent import Agent
from kv_transfer.transport import ReadStats, Sealed, give_up
from tests.builders import soon, until
from tests.kv_transfer.transport_sides import (
    BLOCK_BYTES,
    LAYOUT,
    Row,
    Side,
    make_plan,
    owner_processes,
    side,
)

ROW: Row = (3 * BLOCK_BYTES, 5 * BLOCK_BYTES, BLOCK_BYTES)
HALF: Row = (BLOCK_BYTES // 2, 0, BLOCK_BYTES // 2)
TIMEOUT_S = 0.5
BOUND_S = 10.0
BACKEND, UNKNOWN, LOST = (
    _bindings.nixlBackendError,
    _bindings.nixlUnknownError,
    _bindings.nixlRemoteDisconnectError,
)


def nixl_side(seed: int) -> AbstractAsyncContextManager[Side]:
    return side("nixl", LoopbackHub(), seed=seed)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Side, Side]]:
    """A reader connected to an owner."""
    async with nixl_side(1) as reader, nixl_side(2) as owner:
        await reader.connect(owner)
        yield reader, owner


async def cause_of(read: "asyncio.Future[ReadStats] | asyncio.Future[None]") -> TransferCause:
    with pytest.raises(TransferFailed) as failure:
        async with asyncio.timeout(BOUND_S):
            await read
    return failure.value.cause


async def reads_exactly(reader: Side, owner: Side, rows: list[Row]) -> None:
    expected = reader.data.copy()
    for source, target, nbytes in rows:
        expected[target : target + nbytes] = owner.data[source : source + nbytes]
    await reader.read(owner, rows)
    assert np.array_equal(reader.data, expected)


# -- a fault under the calls --------------------------------------------------------------------

CALLS = (
    "add_remote_agent",
    "remove_remote_agent",
    "prep_xfer_dlist",
    "make_prepped_xfer",
    "initialize_xfer",
    "transfer",
    "check_xfer_state",
    "release_xfer_handle",
    "release_dlist_handle",
)


@dataclass
class Faults:
    """What the agents made from now on do at a call: an error is raised, a value answered.

    The real call runs first, but for the making of things; so bytes may move all the same.
    """

    plan: dict[str, object] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    broken_start: bool = False

    def call(self, name: str, real: Callable[..., object], *arguments: object) -> object:
        self.calls[name] += 1
        self.order.append(name)
        fault = self.plan.get(name)
        if isinstance(fault, Exception):
            if name.startswith(("release", "remove", "transfer", "check")):
                real(*arguments)
            raise type(fault)(*fault.args)  # a new one: kept frames would keep the agent
        answer = real(*arguments)
        return answer if fault is None else fault


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()

    class FaultyAgent(nixl_agent):  # type: ignore[misc]
        def __init__(self, *arguments: object) -> None:
            if faults.broken_start:
                raise BACKEND("injected")
            super().__init__(*arguments)

        def __getattribute__(self, name: str) -> object:
            real = super().__getattribute__(name)
            if name not in CALLS:
                return real
            return lambda *arguments: faults.call(name, real, *arguments)

    monkeypatch.setattr(agents, "nixl_agent", FaultyAgent)
    return faults


@pytest.fixture
async def faulty(faults: Faults) -> AsyncIterator[tuple[Side, Side]]:
    """A reader that has read from an owner; then faults may come. The owner makes no such calls.

    An agent destroyed while it makes contact leaves an owner that tries to call back for a while.
    """
    async with nixl_side(1) as reader, nixl_side(2) as owner:
        await reader.connect(owner)
        seal = owner.seals.set_one()
        assert seal is not None
        assert (await reader.read(owner, [ROW], Sealed(seal))).sealed
        faults.calls.clear()
        yield reader, owner


@contextmanager
def stuck_reads(reader: Side, faults: Faults) -> Iterator[None]:
    """Reads posted inside stay in progress, and soon for too long."""
    assert isinstance(reader.transport, NixlTransport)
    thread = reader.transport._thread
    patience_s, thread._read_timeout_s = thread._read_timeout_s, TIMEOUT_S
    faults.plan = {"transfer": "PROC", "check_xfer_state": "PROC"}
    yield
    faults.plan.clear()
    thread._read_timeout_s = patience_s


@pytest.mark.parametrize("error", [BACKEND, UNKNOWN, RuntimeError])
@pytest.mark.parametrize(
    ("call", "row", "rebuilt"),
    [
        ("prep_xfer_dlist", HALF, False),
        ("make_prepped_xfer", ROW, False),
        ("initialize_xfer", (0, 1, 99_999), False),
        ("transfer", ROW, True),
        ("check_xfer_state", ROW, True),
    ],
)
async def test_an_error_at_a_read_fails_it_and_the_next_one_succeeds(
    faulty: tuple[Side, Side],
    faults: Faults,
    *,
    call: str,
    row: Row,
    rebuilt: bool,
    error: type[Exception],
) -> None:
    reader, owner = faulty
    before = reader.transport.memory()
    if call == "check_xfer_state":
        faults.plan["transfer"] = "PROC"
    faults.plan[call] = error("injected")
    assert await cause_of(reader.start(owner, [row])) is TransferCause.READ_FAILED
    assert faults.calls[call] == 1
    after = reader.transport.memory()
    assert (after.metadata != before.metadata) == (rebuilt or error is BACKEND)
    faults.plan.clear()
    await reader.connect(owner)
    await reads_exactly(reader, owner, [row])


@pytest.mark.parametrize("status", ["ERR", "?"])
@pytest.mark.parametrize("call", ["transfer", "check_xfer_state"])
async def test_an_unknown_status_fails_the_read_and_costs_the_agent(
    faulty: tuple[Side, Side], faults: Faults, call: str, status: str
) -> None:
    reader, owner = faulty
    before = reader.transport.memory()
    faults.plan = {"transfer": "PROC", call: status}
    assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED
    assert reader.transport.memory().metadata != before.metadata
    faults.plan.clear()
    await reader.connect(owner)
    await reads_exactly(reader, owner, [ROW])


@pytest.mark.parametrize("call", ["transfer", "check_xfer_state"])
async def test_a_lost_peer_costs_its_reads_and_not_the_agent(
    faulty: tuple[Side, Side], faults: Faults, call: str
) -> None:
    reader, owner = faulty
    before = reader.transport.memory()
    faults.plan = {"transfer": "PROC", call: LOST("injected")}
    assert await cause_of(reader.start(owner, [ROW])) is TransferCause.OWNER_LOST
    assert reader.transport.memory() == before
    faults.plan.clear()
    assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED
    await reader.connect(owner)
    await reads_exactly(reader, owner, [ROW])


@pytest.mark.parametrize("error", [BACKEND, UNKNOWN, RuntimeError])
async def test_an_error_at_contact_refuses_the_peer_and_no_other(
    faulty: tuple[Side, Side], faults: Faults, error: type[Exception]
) -> None:
    reader, owner = faulty
    async with nixl_side(3) as other:
        before = reader.transport.memory()
        faults.plan["add_remote_agent"] = error("injected")
        connecting = asyncio.ensure_future(reader.connect(other))
        assert await cause_of(connecting) is TransferCause.NO_TRANSPORT
        assert reader.transport.memory() == before
        await reads_exactly(reader, owner, [ROW])
        faults.plan.clear()
        await reader.connect(other)
        await reads_exactly(reader, other, [ROW])


@pytest.mark.parametrize("error", [BACKEND, UNKNOWN, RuntimeError])
@pytest.mark.parametrize(
    "call", ["release_xfer_handle", "release_dlist_handle", "remove_remote_agent"]
)
async def test_an_error_at_giving_back_is_logged_and_harms_nobody(
    faulty: tuple[Side, Side],
    faults: Faults,
    call: str,
    error: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    reader, owner = faulty
    before = reader.transport.memory()
    faults.plan[call] = error("injected")
    await reads_exactly(reader, owner, [ROW])
    await soon(reader.transport.disconnect(owner.shard))
    assert f"transfer_call_failed call={call} error=injected" in caplog.text
    faults.plan.clear()
    assert reader.transport.memory() == before
    await reader.connect(owner)
    await reads_exactly(reader, owner, [ROW])


async def test_a_stuck_read_costs_the_agent_and_only_its_peer_must_be_connected_again(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    async with nixl_side(3) as other:
        await reader.connect(other)
        await reads_exactly(reader, other, [ROW])
        before = reader.transport.memory()
        with stuck_reads(reader, faults):
            started_s = time.monotonic()
            slow = reader.start(owner, [ROW])
            await asyncio.sleep(TIMEOUT_S / 2)
            young = reader.start(other, [ROW])
            assert await cause_of(slow) is TransferCause.READ_SLOW
            assert await cause_of(young) is TransferCause.READ_FAILED
        assert TIMEOUT_S < time.monotonic() - started_s < TIMEOUT_S + 3
        assert reader.transport.memory().metadata != before.metadata
        await reads_exactly(reader, other, [ROW])
        with pytest.raises(TransferFailed, match="connect again"):
            await reader.read(owner, [ROW])
        await reader.connect(owner)
        await reads_exactly(reader, owner, [ROW])


async def test_who_reads_from_a_rebuilt_agent_connects_by_its_new_metadata(
    faults: Faults,
) -> None:
    async with nixl_side(1) as one, nixl_side(2) as two:
        await one.connect(two)
        await two.connect(one)
        await reads_exactly(one, two, [ROW])
        await reads_exactly(two, one, [ROW])
        with stuck_reads(one, faults):
            assert await cause_of(one.start(two, [ROW])) is TransferCause.READ_SLOW
        assert await cause_of(two.start(one, [ROW])) is TransferCause.OWNER_LOST
        await two.connect(one)
        await reads_exactly(two, one, [ROW])


async def test_no_read_ends_while_its_agent_lives(
    faulty: tuple[Side, Side], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = faulty
    gate, ended_before = threading.Event(), []
    destroy = Agent.destroy

    def slow_destroy(agent: Agent) -> None:
        gate.wait(BOUND_S)
        ended_before.append(stuck.done())
        destroy(agent)

    monkeypatch.setattr(Agent, "destroy", slow_destroy)
    with stuck_reads(reader, faults):
        stuck = reader.start(owner, [ROW])
        await asyncio.sleep(2 * TIMEOUT_S)
        assert not stuck.done()
        gate.set()
        assert await cause_of(stuck) is TransferCause.READ_SLOW
    assert ended_before == [False]


async def test_a_rebuild_that_fails_fails_the_transport(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    failed = asyncio.ensure_future(reader.transport.failed())
    faults.broken_start = True
    with stuck_reads(reader, faults):
        assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_SLOW
    assert isinstance(await soon(failed), InternalError)
    assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED
    with pytest.raises(TransferFailed):
        await reader.connect(owner)
    await soon(reader.transport.disconnect(owner.shard))


async def test_an_agent_that_cannot_be_destroyed_fails_the_transport_and_keeps_its_reads(
    faulty: tuple[Side, Side], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = faulty
    kept: list[object] = []
    real_post = Agent.post

    def keep(agent: Agent, *arguments: object) -> object:
        kept.append(agent._nixl.agent)
        return real_post(agent, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Agent, "post", keep)
    with stuck_reads(reader, faults):
        stuck = reader.start(owner, [ROW])
        failed = await soon(reader.transport.failed())
    assert "could not be destroyed" in str(failed)
    assert not stuck.done()


async def test_a_bug_that_ends_the_thread_ends_its_reads_and_fails_the_transport(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    faults.plan = {"transfer": "PROC", "check_xfer_state": KeyError("injected")}
    read = reader.start(owner, [ROW])
    assert "injected" in str(await soon(reader.transport.failed()))
    assert await cause_of(read) is TransferCause.READ_FAILED
    assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED


async def test_a_read_given_up_before_its_turn_copies_nothing(
    faulty: tuple[Side, Side], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = faulty
    gate, posting, real_post = threading.Event(), threading.Event(), Agent.post

    def slow_post(agent: Agent, *arguments: object) -> object:
        posting.set()
        gate.wait(BOUND_S)
        return real_post(agent, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Agent, "post", slow_post)
    begun = reader.start(owner, [(0, 0, BLOCK_BYTES)])
    await until(posting.is_set, "the first is posted")
    given_up, wanted = (reader.start(owner, [row]) for row in (ROW, (0, 0, BLOCK_BYTES)))
    reader.data[:] = 0
    for read in (begun, given_up):
        give_up(read)
    gate.set()
    await soon(begun)
    await soon(wanted)
    assert await cause_of(given_up) is TransferCause.READ_FAILED
    _, target, nbytes = ROW
    assert not reader.data[target : target + nbytes].any()
    assert reader.data.any()


async def test_a_call_that_never_returns_fails_the_transport(
    faulty: tuple[Side, Side], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = faulty
    gate = threading.Event()
    monkeypatch.setattr(nixl, "_WATCH_S", 0.05)
    monkeypatch.setattr(nixl, "_STUCK_S", 0.2)
    monkeypatch.setattr(Agent, "post", lambda *_: gate.wait(BOUND_S) and None)
    read = reader.start(owner, [ROW])
    assert "took longer than" in str(await soon(reader.transport.failed()))
    gate.set()
    await soon(read)


async def test_a_start_that_fails_says_why(faults: Faults) -> None:
    faults.broken_start = True
    with pytest.raises(InternalError, match="NIXL did not start: injected"):
        NixlTransport(Arena(LAYOUT, 1), new_incarnation())


async def test_a_peer_is_dropped_only_when_its_last_read_has_ended(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    faults.plan = {"transfer": "PROC", "check_xfer_state": "PROC"}
    read = reader.start(owner, [ROW])
    await soon(reader.transport.disconnect(owner.shard))
    assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED
    assert faults.calls["remove_remote_agent"] == 0
    faults.plan.clear()
    await soon(read)
    await soon(reader.transport.disconnect(owner.shard))
    assert faults.order[-3:] == ["release_dlist_handle"] * 2 + ["remove_remote_agent"]


async def test_a_peer_that_comes_back_while_leaving_stays(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    faults.plan = {"transfer": "PROC", "check_xfer_state": "PROC"}
    read = reader.start(owner, [ROW])
    await soon(reader.transport.disconnect(owner.shard))
    await reader.connect(owner)
    faults.plan.clear()
    await soon(read)
    assert faults.calls["remove_remote_agent"] == 0
    await reads_exactly(reader, owner, [ROW])


async def test_memory_of_a_kind_unknown_here_is_refused(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    for device in ("DISK:0", "DRAM", "VRAM:x"):
        memory = replace(owner.transport.memory(), device=device)
        with pytest.raises(TransferFailed, match="unknown kind") as failure:
            await soon(reader.transport.connect(owner.shard, memory))
        assert failure.value.cause is TransferCause.NO_TRANSPORT
    await reads_exactly(reader, owner, [ROW])


async def test_metadata_that_is_none_is_refused(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    garbage = replace(owner.transport.memory(), metadata=b"not an agent")
    with pytest.raises(TransferFailed) as failure:
        await soon(reader.transport.connect(owner.shard, garbage))
    assert failure.value.cause is TransferCause.NO_TRANSPORT
    await reads_exactly(reader, owner, [ROW])


@pytest.mark.parametrize(
    "row",
    [
        (2**64 - BLOCK_BYTES, 0, 2 * BLOCK_BYTES),
        (0, 2**64 - 1, 2),
        (BLOCK_BYTES, 0, 2**64 - BLOCK_BYTES),
    ],
)
async def test_offsets_that_wrap_around_are_refused(pair: tuple[Side, Side], row: Row) -> None:
    reader, owner = pair
    assert await cause_of(reader.start(owner, [row])) is TransferCause.READ_FAILED
    await reads_exactly(reader, owner, [ROW])


async def test_a_plan_of_nothing_has_ended(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    stats = await reader.read(owner, [])
    assert (stats.nbytes, stats.descriptors) == (0, 0)


# -- caches -------------------------------------------------------------------------------------


async def test_lists_are_prepared_once_for_a_peer_and_again_for_smaller_parts(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    prepared = []
    half = BLOCK_BYTES // 2
    for rows in (
        [ROW],
        [(0, 0, 4 * BLOCK_BYTES), (9 * BLOCK_BYTES, 7 * BLOCK_BYTES, BLOCK_BYTES)],
        [HALF],
        [(half, 3 * half, 7 * half), ROW],
        [ROW],
    ):
        await reads_exactly(reader, owner, rows)
        prepared.append(faults.calls["prep_xfer_dlist"])
    assert prepared == [0, 0, 2, 2, 2]
    assert faults.calls["release_dlist_handle"] == 2
    assert faults.calls["initialize_xfer"] == 0
    await soon(reader.transport.disconnect(owner.shard))
    assert faults.calls["release_dlist_handle"] == 4 + 1, "and that of its seals"
    await reader.connect(owner)
    await reads_exactly(reader, owner, [ROW])
    assert faults.calls["prep_xfer_dlist"] == 4
    assert faults.calls["add_remote_agent"] == 1


async def test_the_handles_of_ended_reads_are_released_when_the_thread_has_nothing_to_do(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    await reads_exactly(reader, owner, [ROW])
    await until(lambda: _agent(reader).spent == 0, "nothing is kept")
    assert faults.calls["release_xfer_handle"] >= 1


async def test_a_thread_that_is_never_idle_keeps_few_handles(
    faulty: tuple[Side, Side], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = faulty
    await until(lambda: _agent(reader).spent == 0, "nothing is kept")
    faults.calls.clear()
    monkeypatch.setattr(nixl_thread, "_TIDY_AFTER_S", 10 * BOUND_S)
    for _ in range(nixl_thread._SPENT_MOST):
        await reader.read(owner, [ROW])
    assert faults.calls["release_xfer_handle"] == 0
    for _ in range(20):
        await reader.read(owner, [ROW])
    await until(lambda: _agent(reader).spent <= nixl_thread._SPENT_MOST, "some are released")
    assert faults.calls["release_xfer_handle"] >= 20


async def test_handles_are_released_before_their_peer_is_dropped(
    faulty: tuple[Side, Side], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = faulty
    await until(lambda: _agent(reader).spent == 0, "nothing is kept")
    monkeypatch.setattr(nixl_thread, "_TIDY_AFTER_S", 10 * BOUND_S)
    await reader.read(owner, [ROW])
    faults.order.clear()
    await soon(reader.transport.disconnect(owner.shard))
    assert faults.order.index("release_xfer_handle") < faults.order.index("remove_remote_agent")


def _agent(reader: Side) -> Agent:
    assert isinstance(reader.transport, NixlTransport)
    return reader.transport._thread._agent


async def test_other_memory_under_a_known_name_replaces_the_peer(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty
    async with nixl_side(3) as other:
        await soon(reader.transport.connect(owner.shard, other.transport.memory()))
        assert faults.calls["remove_remote_agent"] == 1
        expected = other.data[ROW[0] : ROW[0] + ROW[2]].copy()
        await reader.read(owner, [ROW])
        assert np.array_equal(reader.data[ROW[1] : ROW[1] + ROW[2]], expected)


@pytest.mark.parametrize("unit", [1, 24, 64, 4096, BLOCK_BYTES, 3 * BLOCK_BYTES])
async def test_plans_of_any_unit_bring_exactly_their_bytes(
    pair: tuple[Side, Side], unit: int
) -> None:
    reader, owner = pair
    slots = owner.arena.nbytes // unit
    random = np.random.default_rng(unit)
    for length in (1, 2, 7):
        count = min(64, slots // length)
        sources = random.choice(slots // length, count, replace=False) * length * unit
        targets = random.choice(slots // length, count, replace=False) * length * unit
        rows = [(int(a), int(b), length * unit) for a, b in zip(sources, targets, strict=True)]
        await reads_exactly(reader, owner, rows)


# -- the library itself -------------------------------------------------------------------------


async def test_a_backend_error_of_the_library_costs_the_agent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """UCX's older protocols have no reads over TCP: NIXL_ERR_BACKEND when one is posted."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_PROTO_ENABLE", "n")
    async with nixl_side(1) as reader, nixl_side(2) as owner:
        before = reader.transport.memory()
        await reader.connect(owner)
        monkeypatch.delenv("UCX_PROTO_ENABLE")
        assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED
        assert reader.transport.memory().metadata != before.metadata
        assert "transfer_agent_broken" in caplog.text
        assert "NIXL_ERR_BACKEND" in caplog.text
    async with nixl_side(2) as other:
        assert other.transport.memory().transport == "nixl"


@pytest.mark.processes
async def test_after_the_end_of_a_read_from_a_stopped_owner_no_byte_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over TCP the owner sends by itself what was asked of it, as soon as it goes on."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    num_blocks = (64 << 20) // BLOCK_BYTES
    async with (
        owner_processes("nixl", num_blocks, seeds=[2, 3]) as (stopped, well),
        side("nixl", LoopbackHub(), num_blocks=num_blocks, seed=1, read_timeout_s=1.0) as reader,
    ):
        for owner in (stopped, well):
            await soon(reader.transport.connect(owner.shard, owner.memory))
            await soon(reader.transport.start_read(owner.shard, make_plan([ROW])))
        stopped.stop()
        plan = make_plan([(0, 0, 64 << 20)])
        reads = [reader.transport.start_read(stopped.shard, plan) for _ in range(2)]
        causes = [await cause_of(read) for read in reads]
        assert causes[0] is TransferCause.READ_SLOW
        assert causes[1] in (TransferCause.READ_SLOW, TransferCause.READ_FAILED)
        reader.data[:] = 0
        stopped.go_on()
        await asyncio.sleep(0.5)
        assert not reader.data.any()
        await soon(reader.transport.start_read(well.shard, plan))
        assert reader.data.any()


@pytest.mark.processes
async def test_many_reads_at_once_from_a_healthy_owner_are_slow_and_end_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Over TCP one of them takes some 0.1 s, and 16 share the way."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    num_blocks, timeout_s = (64 << 20) // BLOCK_BYTES, 0.3
    async with (
        owner_processes("nixl", num_blocks, seeds=[2]) as (owner,),
        side(
            "nixl", LoopbackHub(), num_blocks=num_blocks, seed=1, read_timeout_s=timeout_s
        ) as reader,
    ):
        await soon(reader.transport.connect(owner.shard, owner.memory))
        whole = make_plan([(0, 0, 64 << 20)])
        reads = [reader.transport.start_read(owner.shard, whole) for _ in range(16)]
        async with asyncio.timeout(3 * BOUND_S):
            ended = await asyncio.gather(*reads)
        assert max(stats.seconds for stats in ended) > timeout_s
        assert "transfer_agent_broken" not in caplog.text


@pytest.mark.processes
async def test_an_owner_killed_before_the_read_is_lost_and_the_agent_lives_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        owner_processes("nixl", 256, seeds=[2, 3]) as (dead, living),
        nixl_side(1) as reader,
    ):
        before = reader.transport.memory()
        for owner in (dead, living):
            await soon(reader.transport.connect(owner.shard, owner.memory))
            await soon(reader.transport.start_read(owner.shard, make_plan([ROW])))
        dead.kill()
        causes = [
            await cause_of(reader.transport.start_read(dead.shard, make_plan([ROW])))
            for _ in range(2)
        ]
        assert causes == [TransferCause.OWNER_LOST, TransferCause.READ_FAILED]
        with pytest.raises(TransferFailed) as failure:
            await soon(reader.transport.connect(dead.shard, dead.memory))
        assert failure.value.cause is TransferCause.NO_TRANSPORT
        await soon(reader.transport.start_read(living.shard, make_plan([ROW])))
        assert reader.transport.memory() == before


@pytest.mark.processes
async def test_an_owner_killed_in_mid_read_over_tcp_is_lost_and_the_agent_lives_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    num_blocks = (64 << 20) // BLOCK_BYTES
    async with (
        owner_processes("nixl", num_blocks, seeds=[2, 3]) as (dead, living),
        side("nixl", LoopbackHub(), num_blocks=num_blocks, seed=1) as reader,
    ):
        before = reader.transport.memory()
        for owner in (dead, living):
            await soon(reader.transport.connect(owner.shard, owner.memory))
            await soon(reader.transport.start_read(owner.shard, make_plan([ROW])))
        whole = make_plan([(0, 0, 64 << 20)])
        reader.data[:] = 0
        read = reader.transport.start_read(dead.shard, whole)
        while not reader.data[::4096].any():
            await asyncio.sleep(0)
        dead.stop()
        assert not read.done()
        dead.kill()
        assert await cause_of(read) is TransferCause.OWNER_LOST
        await soon(reader.transport.start_read(living.shard, whole))
        assert reader.transport.memory() == before


# -- what is left behind ------------------------------------------------------------------------


async def test_a_closed_transport_has_ended_its_thread_and_refuses_work() -> None:
    async with nixl_side(1) as reader, nixl_side(2) as owner:
        await reader.connect(owner)
        threads = threading.active_count()
        await soon(reader.transport.close())
        assert threading.active_count() == threads - 1
        assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED
        await soon(reader.transport.close())


def belongings() -> tuple[int, int, int]:
    """Threads, open files and shared-memory entries of this process."""
    process = psutil.Process()
    return process.num_threads(), process.num_fds(), len(list(Path("/dev/shm").iterdir()))


async def none_was_added(before: tuple[int, int, int]) -> None:
    """What is closed by another thread may take a moment."""
    async with asyncio.timeout(BOUND_S):
        while any(now > then for now, then in zip(belongings(), before, strict=True)):
            await asyncio.sleep(0.01)


async def test_peers_that_come_and_go_leave_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def rounds(count: int) -> None:
        for seed in range(count):
            async with nixl_side(seed) as owner:
                await reader.connect(owner)
                await reader.read(owner, [ROW])
                await soon(reader.transport.disconnect(owner.shard))

    async with nixl_side(1) as reader:
        await rounds(5)
        before = belongings()
        await rounds(15)
        await none_was_added(before)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_agents_that_were_rebuilt_leave_nothing_behind(
    faulty: tuple[Side, Side], faults: Faults
) -> None:
    reader, owner = faulty

    async def rounds(count: int) -> None:
        for _ in range(count):
            faults.plan = {"transfer": BACKEND("injected")}
            assert await cause_of(reader.start(owner, [ROW])) is TransferCause.READ_FAILED
            faults.plan.clear()
            await reader.connect(owner)
            await reader.read(owner, [ROW])

    await rounds(3)
    before = belongings()
    await rounds(10)
    await none_was_added(before)


@pytest.mark.parametrize("runs", [1, 200], ids=["few runs", "many runs"])
async def test_an_arena_of_more_units_than_indices_reach_is_read_by_descriptors(
    pair: tuple[Side, Side], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = pair
    monkeypatch.setattr(agents, "_MOST_UNITS", 1)

    def refused(*_: object) -> None:
        raise AssertionError("read by indices")

    monkeypatch.setattr(Agent, "_make_prepared", refused)
    rows = [(i * BLOCK_BYTES, (255 - i) * BLOCK_BYTES, BLOCK_BYTES) for i in range(runs)]
    await reader.read(owner, rows)
    for there, here, nbytes in rows:
        assert (reader.data[here : here + nbytes] == owner.data[there : there + nbytes]).all()


async def test_no_seal_is_read_while_a_read_before_it_is_under_way(
    pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = pair
    for _ in range(2):  # the first makes contact
        await reader.read(owner, [ROW])
    begin, poll = Agent._begin, Agent.poll
    first: list[int] = []
    ends = False

    def begin_slowly(agent: Agent, handle: agents.Handle) -> int | None:
        number = begin(agent, handle)
        if number is None and not first:
            first.append(agent._posted)
            return agent._posted
        return number

    def poll_slowly(agent: Agent, number: int) -> bool:
        return ends if number in first else poll(agent, number)

    monkeypatch.setattr(Agent, "_begin", begin_slowly)
    monkeypatch.setattr(Agent, "poll", poll_slowly)
    before = reader.start(owner, [ROW])
    seal = owner.seals.set_one()
    assert seal is not None
    last = await reader.read(owner, [ROW], Sealed(seal, (before,)))
    assert not last.sealed
    ends = True
    await soon(before)
    assert (await reader.read(owner, [ROW], Sealed(seal, (before,)))).sealed


async def test_a_seal_that_cannot_be_read_costs_no_read_and_no_agent(
    pair: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, owner = pair
    seal = owner.seals.set_one()
    assert seal is not None
    metadata = reader.transport.memory().metadata

    def broken(*_: object) -> None:
        raise BACKEND

    with monkeypatch.context() as patched:
        patched.setattr(Agent, "_seal_lists", broken)
        assert not (await reader.read(owner, [ROW], Sealed(seal))).sealed
    assert not (await reader.read(owner, [ROW], Sealed(seal))).sealed, "not tried again"
    assert reader.transport.memory().metadata == metadata
