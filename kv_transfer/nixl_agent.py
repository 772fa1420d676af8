"""One life of a NIXL agent: this worker's arena registered with it, the peers it knows, its reads.

Used by the transfer thread alone. Peers, the registered arena and the prepared descriptor lists are
kept as long as the agent, or until the peer is dropped. Prepared lists are strided: an arena is one
entry, (address, unit, device, unit, count), whatever its size, so a peer costs a few hundred bytes;
a read names units by index and NIXL joins neighbours again. The unit begins as this worker's block
and shrinks to what a peer's plans need, as a reshard plan may move parts of blocks.

Why prepared lists (two processes, same run, medians; make = descriptors to handle, over shared
memory): 4 MB in 64 pieces 0.009 ms against 0.044 ms with descriptors given, of 0.48 ms in all;
64 MB in 1,024 pieces 0.058 against 0.186, in one run 0.023 against 0.126. Posting and copying cost
the same. A plan with so many units that their indices would weigh more than its descriptors is
posted with the descriptors.
"""

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from nixl import _bindings
from nixl._api import nixl_agent, nixl_agent_config

from core.errors import InternalError
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.plan import ReadPlan, Rows, Run
from kv_transfer.seals import Seals

log = logging.getLogger(__name__)

_PROGRESS_DELAY_US = 10_000
_INDICES_PER_ROW = 8
_WORD_BYTES = 8
_WORDS = 1024
"""Seals that are read at once; with more, one finds another's word, which is not its own."""
_INDICES_ALWAYS = 8192
_MOST_UNITS = 2**31
_Indices = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]

# The bindings' errors share no base but Exception; everything they can raise, and what their Python
# side raises itself.
_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    TypeError,
    *(
        error
        for name in dir(_bindings)
        if name.startswith("nixl") and name.endswith("Error")
        for error in [getattr(_bindings, name)]
    ),
)
_LOST: type[Exception] = _bindings.nixlRemoteDisconnectError
_BACKEND: type[Exception] = _bindings.nixlBackendError


class ReadRefused(Exception):
    """Nothing was posted, and the agent is well."""


class PeerLost(Exception):
    """The connection to the peer is gone; none of its reads brings bytes any more."""


class AgentBroken(Exception):
    """The agent cannot be trusted: reads may go on that it calls ended. Only `destroy` is left."""


class Handle(Protocol):
    """NIXL's opaque handle, of a transfer or of a prepared list."""

    def release(self) -> None: ...


@dataclass(slots=True, eq=False)
class Remote:
    """A peer's arena, as this agent knows it."""

    agent_name: str
    memory: Memory
    unit: int
    lists: tuple[Handle, Handle] | None = None
    """Prepared for `unit`: of the arena here, of the arena there."""
    seals: Handle | None = None
    """Prepared, of its owner's seals."""


class Agent:
    """Raises AgentBroken where NIXL says so, or says what it never should.

    It alone holds NIXL's handles: each of them keeps the agent inside NIXL alive.
    """

    def __init__(self, name: str, arena: Arena, seals: Seals | None = None) -> None:
        use_our_log()
        self.device = f"VRAM:{arena.data.get_device()}" if arena.data.is_cuda else "DRAM:0"
        self._arena = arena
        self._remotes: set[Remote] = set()
        self._handles: dict[int, Handle] = {}
        self._spent: list[Handle] = []
        self._posted = 0
        self._words = np.zeros(_WORDS, dtype=np.uint64)
        self._next_word = 0
        self._words_list: Handle | None = None
        try:
            self._nixl = start_agent(name)
            self._inside = weakref.ref(self._nixl.agent)
            kind, index = _split(self.device)
            self._nixl.register_memory([(arena.address, arena.nbytes, index, "")], kind)
            for words in (self._words, seals.words) if seals is not None else (self._words,):
                self._nixl.register_memory([(words.ctypes.data, words.nbytes, 0, "")], "DRAM")
            self.metadata: bytes = self._nixl.get_agent_metadata()
        except _ERRORS as error:
            raise AgentBroken(f"NIXL did not start: {_text(error)}") from None

    # -- peers ----------------------------------------------------------------------------------

    def add(self, memory: Memory) -> Remote:
        """Make contact. Raises ReadRefused: the metadata is none, or nobody listens there."""
        kind, _, index = memory.device.partition(":")
        if kind not in ("DRAM", "VRAM") or not index.isdecimal():
            raise ReadRefused(f"the peer's memory is of an unknown kind: {memory.device}")
        try:
            name = self._nixl.add_remote_agent(memory.metadata)
        except _ERRORS as error:
            raise ReadRefused(f"NIXL cannot reach the peer: {_text(error)}") from None
        text = name.decode() if isinstance(name, bytes) else str(name)
        remote = Remote(text, memory, self._arena.layout.block_bytes)
        self._remotes.add(remote)
        return remote

    def drop(self, remote: Remote) -> None:
        """Forget a peer. Not while a read from it is under way: it would go on, unseen."""
        self.tidy()
        self._remotes.discard(remote)
        self._release_lists(remote)
        self._release_seals(remote)
        self._quietly("remove_remote_agent", self._nixl.remove_remote_agent, remote.agent_name)

    # -- reads ----------------------------------------------------------------------------------

    def post(self, remote: Remote, plan: ReadPlan) -> int | None:
        """Begin a read, never of nothing. Answers a number to poll it by, or None: it has ended,
        as over shared memory, where the copy happens in this call.

        Raises ReadRefused or PeerLost.
        """
        self._check(remote, plan)
        try:
            handle = self._make(remote, plan)
        except _LOST as error:
            raise PeerLost(_text(error)) from None
        except _BACKEND as error:
            raise AgentBroken(f"making a read: {_text(error)}") from None
        except _ERRORS as error:
            raise ReadRefused(f"NIXL refused the read: {_text(error)}") from None
        return self._begin(handle)

    def poll(self, number: int) -> bool:
        """Whether the read has ended well. Raises PeerLost: it has ended badly."""
        return self._ended(number, self._nixl.check_xfer_state, "polling")

    def post_seal(self, remote: Remote, slot: int) -> tuple[int | None, int]:
        """Begin to read a seal. Answers a number as `post` does, and the place to find its word at
        when that read has ended, see `word`.

        Raises ReadRefused, that peer has no such slot, or PeerLost.
        """
        if slot >= remote.memory.seal_slots:
            raise ReadRefused("the peer has no such seal")
        place, self._next_word = self._next_word, (self._next_word + 1) % _WORDS
        self._words[place] = 0
        try:
            lists = self._seal_lists(remote)
            indices = np.array([slot], np.int32), np.array([place], np.int32)
            handle = self._make_prepared(lists, indices)
        except _LOST as error:
            raise PeerLost(_text(error)) from None
        except _ERRORS as error:  # nothing was posted, and the closing question is left
            remote.memory = replace(remote.memory, seal_slots=0)
            raise ReadRefused(f"NIXL refused to read a seal: {_text(error)}") from None
        return self._begin(handle), place

    def word(self, place: int) -> int:
        """What a read of a seal has brought."""
        return int(self._words[place])

    @property
    def spent(self) -> int:
        """Handles of reads that have ended well, until `tidy`."""
        return len(self._spent)

    def tidy(self, most: int | None = None) -> None:
        """Release them, or `most` of them. It takes NIXL 0.1 to 0.3 ms each, for which neither the
        end of a read nor the next one shall wait.
        """
        spent = len(self._spent)
        for _ in range(spent if most is None else min(most, spent)):
            self._release(self._spent.pop())

    def destroy(self) -> None:
        """End everything. On return no byte of any read can arrive, whatever its peer does.

        Proven over TCP with an owner stopped in mid-read: this returns within 0.2 s, and after the
        owner went on nothing more was written. Releasing the handle or removing the peer does not
        do that: both answer well, and the rest of the read arrives all the same.
        """
        if self._nixl is not None:
            self.tidy()
            while self._handles:
                self._release(self._handles.popitem()[1])
            for remote in self._remotes:
                self._release_lists(remote)
                self._release_seals(remote)
            self._release_list(self._words_list)
            self._words_list = None
            self._nixl = None
        if self._inside() is not None:
            gc.collect()
        if self._inside() is not None:
            raise InternalError("the NIXL agent is still in use: it could not be destroyed")

    # -- inside ---------------------------------------------------------------------------------

    def _begin(self, handle: Handle) -> int | None:
        self._posted += 1
        self._handles[self._posted] = handle
        ended = self._ended(self._posted, self._nixl.transfer, "posting")
        return None if ended else self._posted

    def _ended(self, number: int, ask: Callable[[Handle], str], what: str) -> bool:
        try:
            status = ask(self._handles[number])
        except _LOST as error:
            self._release(self._handles.pop(number))
            raise PeerLost(_text(error)) from None
        except _ERRORS as error:
            raise AgentBroken(f"{what} a read: {_text(error)}") from None
        if status == "PROC":
            return False
        if status != "DONE":
            raise AgentBroken(f"{what} a read: status {status}")
        self._spent.append(self._handles.pop(number))
        return True

    def _release(self, handle: Handle) -> None:
        self._quietly("release_xfer_handle", self._nixl.release_xfer_handle, handle)

    def _check(self, remote: Remote, plan: ReadPlan) -> None:
        """Offsets come from the peer's messages: nothing outside the two arenas is touched."""
        few = plan.few
        if few is not None:
            there, here = (max(run[i] + run[2] for run in few) for i in (0, 1))
            wrapped = False
        else:
            rows = plan.rows
            ends = rows[:, :2] + rows[:, 2:]
            wrapped = bool((ends < rows[:, :2]).any())
            there, here = ends.max(axis=0).tolist()
        if wrapped or there > remote.memory.nbytes or here > self._arena.nbytes:
            whose = "this worker's" if here > self._arena.nbytes else "the peer's"
            raise ReadRefused(f"the plan goes past {whose} arena")

    def _make(self, remote: Remote, plan: ReadPlan) -> Handle:
        few = plan.few if self._can_index(remote, remote.unit) else None
        indices = _few_indices(few, remote.unit) if few is not None else None
        if indices is not None and remote.lists is not None:
            return self._make_prepared(remote.lists, indices)
        unit, rows = remote.unit, plan.rows
        units, rest = np.divmod(rows, np.uint64(unit))
        if rest.any():
            unit = int(np.gcd.reduce(rows, axis=None, initial=np.uint64(unit)))
            units = rows // np.uint64(unit)
        limit = max(_INDICES_ALWAYS, _INDICES_PER_ROW * len(rows))
        if int(units[:, 2].sum()) > limit or not self._can_index(remote, unit):
            return self._make_described(remote, rows)
        if unit != remote.unit or remote.lists is None:
            self._prepare(remote, unit)
        assert remote.lists is not None
        return self._make_prepared(remote.lists, _indices(units))

    def _can_index(self, remote: Remote, unit: int) -> bool:
        """NIXL takes indices of 32 bits."""
        return max(self._arena.nbytes, remote.memory.nbytes) // unit <= _MOST_UNITS

    def _make_prepared(self, lists: tuple[Handle, Handle], indices: _Indices) -> Handle:
        (here, there), (remote_units, local_units) = lists, indices
        handle: Handle = self._nixl.make_prepped_xfer(
            "READ", here, local_units, there, remote_units
        )
        return handle

    def _prepare(self, remote: Remote, unit: int) -> None:
        """Reads under way keep what they need of the old lists."""
        self._release_lists(remote)
        here = self._nixl.prep_xfer_dlist(
            "NIXL_INIT_AGENT",
            _strided(self._arena.address, self._arena.nbytes, self.device, unit),
            _split(self.device)[0],
        )
        memory = remote.memory
        there = self._nixl.prep_xfer_dlist(
            remote.agent_name,
            _strided(memory.address, memory.nbytes, memory.device, unit),
            _split(memory.device)[0],
        )
        remote.lists, remote.unit = (here, there), unit

    def _seal_lists(self, remote: Remote) -> tuple[Handle, Handle]:
        """Of the words here, of the seals there."""
        if self._words_list is None:
            words = _strided(self._words.ctypes.data, self._words.nbytes, "DRAM:0", _WORD_BYTES)
            self._words_list = self._nixl.prep_xfer_dlist("NIXL_INIT_AGENT", words, "DRAM")
        if remote.seals is None:
            memory = remote.memory
            nbytes = memory.seal_slots * _WORD_BYTES
            seals = _strided(memory.seal_address, nbytes, "DRAM:0", _WORD_BYTES)
            remote.seals = self._nixl.prep_xfer_dlist(remote.agent_name, seals, "DRAM")
        return self._words_list, remote.seals

    def _make_described(self, remote: Remote, rows: Rows) -> Handle:
        memory = remote.memory
        here = self._described(self._arena.address, rows[:, 1], rows[:, 2], self.device)
        there = self._described(memory.address, rows[:, 0], rows[:, 2], memory.device)
        handle: Handle = self._nixl.initialize_xfer("READ", here, there, remote.agent_name)
        return handle

    def _described(self, base: int, offsets: Rows, lengths: Rows, device: str) -> object:
        kind, index = _split(device)
        descriptors = np.empty((len(offsets), 3), dtype=np.uint64)
        descriptors[:, 0] = offsets + np.uint64(base)
        descriptors[:, 1], descriptors[:, 2] = lengths, index
        return self._nixl.get_xfer_descs(descriptors, kind)

    def _release_lists(self, remote: Remote) -> None:
        for prepared in remote.lists or ():
            self._release_list(prepared)
        remote.lists = None

    def _release_seals(self, remote: Remote) -> None:
        prepared, remote.seals = remote.seals, None
        self._release_list(prepared)

    def _release_list(self, prepared: Handle | None) -> None:
        if prepared is not None:
            self._quietly("release_dlist_handle", self._nixl.release_dlist_handle, prepared)

    def _quietly(self, what: str, call: Callable[..., object], *arguments: object) -> None:
        """Nothing depends on how this ends but memory inside NIXL, which goes with the agent."""
        try:
            call(*arguments)
        except _ERRORS as error:
            log.warning("transfer_call_failed call=%s error=%s", what, _text(error))


def start_agent(name: str) -> nixl_agent:
    """An agent over UCX whose progress thread sleeps until something happens.

    The package's own constructor leaves that thread's delay at 0, with which it polls without a
    pause: each idle agent takes a core (64 MB over TCP on two cores: 331 ms, with a delay 127).
    """
    agent = nixl_agent(name, nixl_agent_config(backends=[]))
    config = _bindings.nixlAgentConfig()
    config.useProgThread = True
    config.syncMode = _bindings.NIXL_THREAD_SYNC_NONE
    config.pthrDelay = _PROGRESS_DELAY_US
    agent.agent = _bindings.nixlAgent(name, config)
    agent.create_backend("UCX")
    return agent


def _few_indices(rows: list[Run], unit: int) -> _Indices | None:
    """What `_indices` makes of few rows; None where they are not whole units, or of many."""
    if sum(row[2] for row in rows) > _INDICES_ALWAYS * unit:
        return None
    there: list[int] = []
    here: list[int] = []
    for source, target, nbytes in rows:
        if source % unit or target % unit or nbytes % unit:
            return None
        there.extend(range(source // unit, (source + nbytes) // unit))
        here.extend(range(target // unit, (target + nbytes) // unit))
    return np.array(there, np.int32), np.array(here, np.int32)


def _indices(units: Rows) -> _Indices:
    """Rows in units instead of bytes, as one index per unit: in the arena there, and here."""
    there, here, counts = units.astype(np.int32).T
    if len(units) < (total := int(counts.sum())):
        within = np.arange(total, dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
        there, here = np.repeat(there, counts) + within, np.repeat(here, counts) + within
    return np.ascontiguousarray(there, np.int32), np.ascontiguousarray(here, np.int32)


def _strided(address: int, nbytes: int, device: str, unit: int) -> Rows:
    """A whole arena as one entry: address, unit, device, stride, count."""
    return np.array([[address, unit, _split(device)[1], unit, nbytes // unit]], dtype=np.uint64)


def _split(device: str) -> tuple[str, int]:
    """A device as Memory names it, "DRAM:0": kind and index."""
    kind, _, index = device.partition(":")
    return kind, int(index)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def use_our_log() -> None:
    """NIXL's package prints to standard output, which belongs to the process, not to it."""
    theirs = logging.getLogger("nixl")
    theirs.handlers.clear()
    theirs.propagate = True
    theirs.setLevel(logging.WARNING)
