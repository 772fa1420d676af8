"""Groups of two: how a process joins one, and by what the two find each other."""

import os
import struct
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Store
from torch.distributed import is_nccl_available

from engine.arena import Arena

GLOO, NCCL = "gloo", "nccl"
OWNER, READER = 0, 1  # ranks

_ENTRY = struct.Struct("!HI")  # bytes of a key and of its value; then both. Two zeros: no more
_MAX_VALUE_BYTES = 1 << 20


class Work(Protocol):
    """A running send or receive."""

    def wait(self, timeout: timedelta) -> bool: ...


class Group(Protocol):
    """What is used of a torch.distributed ProcessGroup of two."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work: ...

    def abort(self) -> None: ...


class Gate:
    """How this process joins groups: its Gloo device, made once, and its GPU if it has one."""

    def __init__(self, arena: Arena, host: str) -> None:
        self.device = arena.data.device
        self.gpu = ""
        if arena.data.is_cuda and is_nccl_available():
            self.gpu = str(torch.cuda.get_device_properties(self.device).uuid)
            # Torch's defaults end the process when a communicator fails: a lost peer is no reason
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        self._gloo: ProcessGroupGloo.Device | None = ProcessGroupGloo.create_device(hostname=host)

    def close(self) -> None:
        """No more groups; the device ends with the last one that uses it."""
        self._gloo = None

    def backend(self, peer_gpu: str) -> str:
        """NCCL joins two GPUs that are not one and the same."""
        return NCCL if self.gpu and peer_gpu and self.gpu != peer_gpu else GLOO

    def stream(self) -> AbstractContextManager[object]:
        """A pair's thread runs inside: its copies do not queue behind the engine's kernels."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def join(self, backend: str, store: Store, rank: int, timeout_s: float) -> Group:
        """Both ends call it at once. Raises RuntimeError."""
        timeout = timedelta(seconds=timeout_s)
        if backend == GLOO:
            if self._gloo is None:
                raise RuntimeError("this worker is stopping")
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices, options._threads, options._timeout = [self._gloo], 1, timeout
            return cast(Group, ProcessGroupGloo(store, rank, 2, options))
        from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415 - not in a CPU build

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return cast(Group, ProcessGroupNCCL(store, rank, 2, nccl))


class Wire(Protocol):
    """The control connection, as far as a store needs it."""

    def send_raw(self, raw: bytes, until_s: float) -> None: ...

    def receive_raw(self, nbytes: int, until_s: float) -> bytes: ...


class ControlStore(Store):
    """What a group needs to find itself, over the control connection of its pair.

    Torch's own TCPStore would listen on one more port, and asks the DNS for the name of each
    address it connects to: a slow name server would hold up every first contact.
    """

    def __init__(self, wire: Wire, until_s: float) -> None:
        super().__init__()
        self._wire: Wire | None = wire
        self._until_s = until_s
        self._entries: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self._entries[key] = raw
        if self._wire is not None:
            name = key.encode()
            self._wire.send_raw(_ENTRY.pack(len(name), len(raw)) + name + raw, self._until_s)

    def get(self, key: str) -> bytes:
        while key not in self._entries:
            if not self._hear():
                raise EOFError(f"the other side did not set {key}")
        return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._entries for key in keys)

    def seal(self) -> None:
        """The group is complete on this side; on return it is on the other."""
        if self._wire is not None:
            self._wire.send_raw(_ENTRY.pack(0, 0), self._until_s)
        while self._hear():
            pass

    def _hear(self) -> bool:
        """Take in one entry; False where none follows."""
        if self._wire is None:
            return False
        key_bytes, value_bytes = _ENTRY.unpack(self._wire.receive_raw(_ENTRY.size, self._until_s))
        if value_bytes > _MAX_VALUE_BYTES:
            raise ValueError(f"a value of {value_bytes} bytes")
        if key_bytes == 0:
            self._wire = None
            return False
        key = self._wire.receive_raw(key_bytes, self._until_s).decode()
        self._entries[key] = self._wire.receive_raw(value_bytes, self._until_s)
        return True
