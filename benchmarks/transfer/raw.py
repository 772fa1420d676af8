"""NIXL without us: the same fragments read by a bare agent, polled as the transport polls.

The agents are started as the transport starts its own. `prepared` means what NIXL means by it: both
descriptor lists are built beforehand and a read only names their entries.
"""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.types import BenchFailed
from engine.arena import Arena
from kv_transfer.nixl_agent import start_agent
from kv_transfer.plan import ReadPlan

U64 = npt.NDArray[np.uint64]

_READ_TIMEOUT_S = 60.0
_POLL_SHARE, _POLL_MIN_S, _POLL_MAX_S = 1 / 8, 0.00005, 0.001


class _Opaque(Protocol):
    """NIXL's handles and lists."""


@dataclass(frozen=True, slots=True)
class RawMemory:
    """Owner to reader: how to read its arena."""

    metadata: bytes
    address: int
    kind: str
    device: int


class RawAgent:
    """One bare agent over one arena, on the thread that made it."""

    def __init__(self, arena: Arena, name: str) -> None:
        self._agent = start_agent(name)
        self._registered = self._agent.register_memory([arena.data.view(-1)])
        on_gpu = arena.data.is_cuda
        self.memory = RawMemory(
            metadata=self._agent.get_agent_metadata(),
            address=arena.address,
            kind="VRAM" if on_gpu else "DRAM",
            device=arena.data.get_device() if on_gpu else 0,
        )

    def connect(self, peer: RawMemory) -> None:
        """Reads will be from this one."""
        name = self._agent.add_remote_agent(peer.metadata)
        self._peer_name = name.decode() if isinstance(name, bytes) else str(name)
        self._peer = peer

    def close(self) -> None:
        self._agent.deregister_memory(self._registered)

    def unprepared_s(self, plan: ReadPlan) -> float:
        """Seconds of one read; its descriptors are made within them."""
        local, remote = self._descriptors(plan)
        started_s = time.perf_counter()
        handle = self._agent.initialize_xfer(
            "READ",
            self._agent.get_xfer_descs(local, self.memory.kind),
            self._agent.get_xfer_descs(remote, self._peer.kind),
            self._peer_name,
        )
        return self._run(handle, started_s)

    def prepared_s(self, plan: ReadPlan) -> float:
        """Seconds of one read; its descriptors were made before."""
        local, remote = self._descriptors(plan)
        local_list = self._agent.prep_xfer_dlist("", local, self.memory.kind)
        remote_list = self._agent.prep_xfer_dlist(self._peer_name, remote, self._peer.kind)
        indices = np.arange(plan.descriptors, dtype=np.int32)
        started_s = time.perf_counter()
        handle = self._agent.make_prepped_xfer("READ", local_list, indices, remote_list, indices)
        taken_s = self._run(handle, started_s)
        self._agent.release_dlist_handle(local_list)
        self._agent.release_dlist_handle(remote_list)
        return taken_s

    def _descriptors(self, plan: ReadPlan) -> tuple[U64, U64]:
        rows = plan.rows
        local = _rows(rows[:, 1], rows[:, 2], self.memory)
        return local, _rows(rows[:, 0], rows[:, 2], self._peer)

    def _run(self, handle: _Opaque, started_s: float) -> float:
        status = self._agent.transfer(handle)
        taken_s = time.perf_counter() - started_s
        while status == "PROC" and taken_s < _READ_TIMEOUT_S:
            time.sleep(min(max(taken_s * _POLL_SHARE, _POLL_MIN_S), _POLL_MAX_S))
            status = self._agent.check_xfer_state(handle)
            taken_s = time.perf_counter() - started_s
        self._agent.release_xfer_handle(handle)
        if status != "DONE":
            raise BenchFailed(f"a raw NIXL read ended with {status} after {taken_s:.1f} s")
        return taken_s


def _rows(offsets: U64, lengths: U64, memory: RawMemory) -> U64:
    """`[n, 3]` address, bytes, device."""
    rows = np.empty((len(offsets), 3), dtype=np.uint64)
    rows[:, 0] = offsets + np.uint64(memory.address)
    rows[:, 1], rows[:, 2] = lengths, memory.device
    return rows
