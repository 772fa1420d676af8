"""A worker that costs next to nothing, so that two cores can drive the router to its limit.

It speaks the real RouterStream, with the real codec: hello, load reports, a snapshot,
KV events of every prompt, and one frame per step that holds one token of each of its sequences. It
runs no model and moves no KV; a decode leg begins as soon as its prefill could have sent it.

    python -m benchmarks.router.standin ROLE MODEL_ID VOCAB_FILE

prints its registry record, then reads `step SECONDS` lines: the time of a decode step. A prompt is
computed at once, by a decode worker too where the router gives it one without a hand-off. A step of
0 seconds is one turn of the event loop.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

from core.blocks import chain_hashes, root_hash
from core.ids import Incarnation, LeaseId, ModelId, Role, WorkerId, new_incarnation
from core.kv import KvLayout
from core.messages import (
    HEARTBEAT_S,
    Accepted,
    Cancel,
    DecodeSubmit,
    KvEvents,
    KvSnapshot,
    KvStored,
    LegTimes,
    LegTokens,
    LoadReport,
    PrefillSubmit,
    SnapshotRequest,
    TokenFrame,
    WorkerHello,
    WorkerToRouter,
)
from core.registry import WorkerRecord
from core.sampling import FinishReason
from core.stream import MessageStream, StreamBroken, accepting, address_of, listen
from router.codec import from_router, to_router
from wire import worker_pb2

BLOCK_SIZE = 16
CONTEXT_TOKENS = 131_072
_NUM_BLOCKS = 1_000_000
_LEASE_S = 60.0


@dataclass(slots=True)
class Leg:
    """A sequence that decodes: what it has said of what it may say."""

    position: int
    left: int
    spoken: bool = False


@dataclass(slots=True)
class StandIn:
    """What all streams of this worker share."""

    who: WorkerHello
    text: list[int]
    """Tokens of a real text, said over and over, so that detokenizing has something to do."""
    step_s: float = 0.02
    next_event: int = 1


@dataclass(slots=True)
class Stream:
    """One router's stream."""

    worker: StandIn
    wire: MessageStream[worker_pb2.ToWorker]
    legs: dict[int, Leg] = field(default_factory=dict)
    last_submit: int = 0
    busy: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, message: object) -> None:
        match message:
            case PrefillSubmit():
                self._prefill(message)
            case DecodeSubmit():
                self._decode(message)
            case Cancel():
                self.legs.pop(message.number, None)
            case SnapshotRequest():
                self.snapshot()

    def snapshot(self) -> None:
        self._say(KvSnapshot(next_number=self.worker.next_event))

    def load(self) -> None:
        context_tokens = sum(leg.position for leg in self.legs.values())
        self._say(
            LoadReport(
                last_submit=self.last_submit,
                queued_tokens=0,
                waiting=0,
                running=len(self.legs),
                context_tokens=context_tokens,
                decoding=len(self.legs),
                decoding_tokens=context_tokens,
                free_blocks=_NUM_BLOCKS,
                total_blocks=_NUM_BLOCKS,
            )
        )

    def step(self) -> None:
        """One token of every sequence, in one frame."""
        entries = []
        text = self.worker.text
        for number, leg in list(self.legs.items()):
            leg.left -= 1
            entries.append(
                LegTokens(
                    number=number,
                    tokens=(text[leg.position % len(text)],),
                    finish=FinishReason.LENGTH if leg.left <= 0 else None,
                    times=None if leg.spoken else LegTimes(transfer_s=0.001),
                )
            )
            leg.position += 1
            leg.spoken = True
            if leg.left <= 0:
                del self.legs[number]
        self._say(TokenFrame(entries=tuple(entries)))

    def _prefill(self, message: PrefillSubmit) -> None:
        number = self.last_submit = message.number
        self._say(Accepted(number=number, lease_id=LeaseId(number), lease_s=_LEASE_S))
        self._compute(message)

    def _decode(self, message: DecodeSubmit) -> None:
        number = self.last_submit = message.number
        self._say(Accepted(number=number))
        computed_here = message.handoff is None
        if computed_here:
            self._compute(message)
        left = message.sampling.max_tokens - message.output_position - 1
        if left > 0:
            self.legs[number] = Leg(message.output_position + 1, left, spoken=computed_here)
            self.busy.set()

    def _compute(self, message: PrefillSubmit | DecodeSubmit) -> None:
        """The prompt, its first token and its KV, at once."""
        worker = self.worker
        ends = message.output_position + 1 >= message.sampling.max_tokens
        token = LegTokens(
            number=message.number,
            tokens=(worker.text[message.output_position % len(worker.text)],),
            finish=FinishReason.LENGTH if ends else None,
            times=LegTimes(prefill_s=0.001),
        )
        self._say(TokenFrame(entries=(token,)))
        root = root_hash(worker.who.model_id, message.cache_salt)
        hashes = tuple(chain_hashes(message.tokens, BLOCK_SIZE, root))
        if hashes:
            stored = KvStored(parent=root, hashes=hashes)
            self._say(KvEvents(first_number=worker.next_event, events=(stored,)))
            worker.next_event += 1
        self.load()

    def _say(self, message: WorkerToRouter) -> None:
        self.wire.send(to_router(message))


class Door:
    """Says hello, then takes submits; steps and heartbeats have tasks of their own."""

    def __init__(self, worker: StandIn) -> None:
        self._worker = worker

    async def serve(self, wire: MessageStream[worker_pb2.ToWorker]) -> None:
        stream = Stream(self._worker, wire)
        wire.send(to_router(self._worker.who))
        stream.load()
        stream.snapshot()
        try:
            await wire.read()  # the router's hello
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(_step(stream)), group.create_task(_beat(stream))]
                while (raw := await wire.read()) is not None:
                    stream.hear(from_router(raw))
                for task in others:
                    task.cancel()
        except* StreamBroken:
            pass  # the router has gone


async def _step(stream: Stream) -> None:
    """Steps at their own pace, as an engine makes them, whatever the writer does."""
    loop = asyncio.get_running_loop()
    next_at_s = loop.time()
    while True:
        if not stream.legs:
            stream.busy.clear()
            await stream.busy.wait()
            next_at_s = loop.time()
        next_at_s = max(next_at_s + stream.worker.step_s, loop.time())
        await asyncio.sleep(next_at_s - loop.time())
        running = len(stream.legs)
        stream.step()
        if len(stream.legs) != running:
            stream.load()


async def _beat(stream: Stream) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S / 2)
        stream.load()


async def _listen(worker: StandIn) -> None:
    """Obey the bench until it closes its end."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        word, _, value = line.decode().partition(" ")
        if word == "step":
            worker.step_s = float(value)


async def serve(role: Role, model_id: ModelId, text: list[int]) -> None:
    """Serve until standard input ends."""
    incarnation = new_incarnation()
    listener = listen("127.0.0.1", 0)
    address = address_of(listener)
    who = _hello(role, model_id, incarnation, address)
    worker = StandIn(who=who, text=text)
    record = WorkerRecord(
        worker_id=who.worker_id,
        incarnation=incarnation,
        role=role,
        epoch=1,
        address="",
        router_address=address,
        model_id=model_id,
        pid=os.getpid(),
    )
    async with accepting(listener, worker_pb2.ToWorker.FromString, Door(worker).serve):
        print(json.dumps(asdict(record)), flush=True)
        await _listen(worker)


def _hello(role: Role, model_id: ModelId, incarnation: Incarnation, address: str) -> WorkerHello:
    return WorkerHello(
        worker_id=WorkerId(f"{role}-{incarnation}"),
        incarnation=incarnation,
        role=role,
        epoch=1,
        model_id=model_id,
        layout=KvLayout(
            block_size=BLOCK_SIZE, num_kv_heads=1, num_layers=1, head_dim=8, dtype="uint8"
        ),
        num_blocks=_NUM_BLOCKS,
        context_tokens=CONTEXT_TOKENS,
        peer_address=address,
    )


def main() -> None:
    role, model_id, text = Role(sys.argv[1]), ModelId(sys.argv[2]), Path(sys.argv[3])
    uvloop.run(serve(role, model_id, json.loads(text.read_text())))


if __name__ == "__main__":
    main()
