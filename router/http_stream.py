"""The streaming path: tokens of a request's choices to SSE events to the client.

    generator --- pump (one a choice) ---> EventBuffer ---> writer ---> send

The pump never waits for the client, so other requests do not either; the buffer between them is
bounded. Each token's text is one event; events that wait together leave in one write.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from core.errors import BatonError, InternalError
from router.answer import Answer
from router.chunks import DONE, AnswerHead, ChunkEncoder, usage_event
from router.config import RouterConfig
from router.http_errors import ClientTooSlow
from router.http_reply import Reply
from router.metrics import EdgeMetrics
from router.types import Generator


class EventBuffer:
    """Events of all choices, in order, between their pumps and the one writer.

    A full buffer has `grace_s` to be taken by the writer: a burst of tokens is no slow client.
    """

    __slots__ = ("_error", "_events", "_grace_s", "_max_events", "_open", "_taken", "_wake")

    def __init__(self, *, max_events: int, grace_s: float, producers: int) -> None:
        self._events: list[bytes] = []
        self._max_events = max_events
        self._grace_s = grace_s
        self._open = producers
        self._error: BatonError | None = None
        self._wake: asyncio.Future[None] | None = None
        self._taken = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self._events) >= self._max_events

    def put(self, event: bytes) -> None:
        self._events.append(event)
        self._wake_writer()

    def close(self) -> None:
        """One producer has put its last event."""
        self._open -= 1
        self._wake_writer()

    def fail(self, error: BatonError) -> None:
        """The answer cannot be completed: the writer sees `error` after the events so far."""
        if self._error is None:
            self._error = error
        self._wake_writer()

    async def room(self) -> None:
        """Wait until the writer has taken what is here. Raises ClientTooSlow."""
        self._taken.clear()
        try:
            async with asyncio.timeout(self._grace_s):
                await self._taken.wait()
        except TimeoutError:
            lag = len(self._events)
            raise ClientTooSlow(f"the client is {lag} events behind") from None

    async def take(self) -> list[bytes]:
        """All waiting events; none when all producers have closed. Raises what was failed with."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._open == 0:
                return []
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        events, self._events = self._events, []
        self._taken.set()
        return events

    def _wake_writer(self) -> None:
        if self._wake is not None:
            if not self._wake.done():
                self._wake.set_result(None)
            self._wake = None


async def stream_answers(
    generator: Generator,
    head: AnswerHead,
    answers: Sequence[Answer],
    reply: Reply,
    *,
    settings: RouterConfig,
    metrics: EdgeMetrics,
    group: asyncio.TaskGroup,
) -> bytes:
    """Send all but the last bytes, which are returned: the caller ends the response with them.

    The response starts with the first item of any choice; an error before that is raised with
    nothing sent. Pumps run in `group`; a client that is too slow fails the group with
    ClientTooSlow, as the writer may be stuck in a write then.
    """
    buffer = EventBuffer(
        max_events=settings.stream_buffer_events,
        grace_s=settings.slow_client_grace_s,
        producers=len(answers),
    )
    for answer in answers:
        group.create_task(_pump(generator, answer, ChunkEncoder(head, answer.index), buffer))
    events = await buffer.take()
    await reply.start_stream()
    sent = writes = 0
    try:
        while events:
            sent += len(events)
            writes += 1
            await reply.write(b"".join(events))
            events = await buffer.take()
    finally:
        metrics.stream_events.inc(sent)
        metrics.coalesced_events.inc(sent - writes)
    return usage_event(head, answers) + DONE if head.usage_chunk else DONE


async def _pump(
    generator: Generator, answer: Answer, encoder: ChunkEncoder, buffer: EventBuffer
) -> None:
    try:
        async with aclosing(generator.generate(answer.planned.request)) as items:
            first = encoder.first()
            async for item in items:
                if first:
                    buffer.put(first)
                    first = b""
                for piece in answer.feed(item):
                    buffer.put(encoder.text(piece))
                if answer.finish is not None:
                    buffer.put(encoder.finish(answer.finish, answer.timings))
                    break
                if buffer.full:
                    await buffer.room()
    except ClientTooSlow:
        raise
    except BatonError as error:
        buffer.fail(error)
        return
    if answer.finish is None:
        buffer.fail(InternalError("the generator ended without a finish"))
    buffer.close()


async def collect_answer(generator: Generator, answer: Answer) -> str:
    """The whole text of one answer, for a request that does not stream."""
    pieces: list[str] = []
    async with aclosing(generator.generate(answer.planned.request)) as items:
        async for item in items:
            pieces.extend(answer.feed(item))
            if answer.finish is not None:
                break
    if answer.finish is None:
        raise InternalError("the generator ended without a finish")
    return "".join(pieces)
