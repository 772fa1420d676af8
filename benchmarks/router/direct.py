"""The prefill worker reached without the router: the same frames over a RouterStream of our own."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.ids import RequestId, SequenceId
from core.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR, PrefillSubmit
from core.sampling import SamplingParams
from kv_transfer.stream import MessageStream, dial
from router.codec import parse_to_router, to_worker
from wire import common_pb2, worker_pb2

_Stream = MessageStream[worker_pb2.ToRouter]


class Direct:
    """A router that does nothing. `ttft_s` may be asked many at once."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._waiting: dict[int, asyncio.Future[float]] = {}
        self._number = 0

    async def ttft_s(self, tokens: tuple[int, ...]) -> float:
        """Seconds from a submit of these prompt tokens to the first token."""
        self._number += 1
        number = self._number
        submit = PrefillSubmit(
            number=number,
            sequence_id=SequenceId(RequestId(f"direct-{number}")),
            tokens=tokens,
            output_position=0,
            sampling=SamplingParams(max_tokens=2),
            deadline_s=60.0,
        )
        first = self._waiting[number] = asyncio.get_running_loop().create_future()
        began_s = time.monotonic()
        self._stream.send(to_worker(submit))
        heard_s: float = await first
        return heard_s - began_s

    async def listen(self) -> None:
        """Hear the worker until cancelled."""
        while (raw := await self._stream.read()) is not None:
            for entry in raw.tokens.entries:
                waiting = self._waiting.pop(entry.number, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(time.monotonic())


@asynccontextmanager
async def direct_to(address: str) -> AsyncIterator[Direct]:
    """A stream of our own to one worker."""
    async with dial(address, parse_to_router) as stream:
        protocol = common_pb2.Protocol(major=PROTOCOL_MAJOR, minor=PROTOCOL_MINOR)
        hello = worker_pb2.RouterHello(router_id="bench", protocol=protocol)
        stream.send(worker_pb2.ToWorker(hello=hello))
        direct = Direct(stream)
        listening = asyncio.create_task(direct.listen())
        try:
            yield direct
        finally:
            listening.cancel()
            await asyncio.wait([listening])
