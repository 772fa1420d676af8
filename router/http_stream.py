"""The streaming path: tokens of a request's choices to SSE events to the client.

    worker's stream -> flow -> Voice (one a choice) -> Outflow -> the connection

All of this happens in the task that reads the worker's stream: no token wakes a task of its
request, and none waits for the client. While the connection is full events are held, in bounds, and
leave together when it has room. Each token's text is one event.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

from core.errors import BatonError, InternalError
from core.sampling import FinishReason
from router.answer import Answer
from router.chunks import DONE, AnswerHead, ChunkEncoder, chunk_encoder, usage_event
from router.config import RouterConfig
from router.http_errors import ClientTooSlow
from router.http_reply import Line, Reply
from router.metrics import EdgeMetrics
from router.types import Enough, Generated, Generator, TokenSink

T = TypeVar("T")

Spawn = Callable[[Coroutine[None, None, bytes]], Awaitable[bytes]]

MAX_HELD_BYTES = 16 * 1024 * 1024
"""Of one answer's events, whatever the time: a worker could say much within the grace."""
STARTED_A_TURN = 8
"""Choices of one request."""


class Outflow:
    """Events of all choices, in order, to the one connection. The first takes the response's head
    with it, at once; those that find the connection full are held until it has room.

    When `max_events` are held, the client has `grace_s` to take them: a burst of tokens is no slow
    client. `spawn` starts a task of the request, for when that wait begins before `rest` is called.
    """

    __slots__ = (
        *("_error", "_grace_s", "_held", "_held_bytes", "_limit", "_line", "_max_events", "_open"),
        *("_ready", "_reply", "_runs", "_spawn", "_starting", "_wake", "events", "writes"),
    )

    def __init__(
        self, reply: Reply, spawn: Spawn, *, max_events: int, grace_s: float, producers: int
    ) -> None:
        self._reply = reply
        self._spawn = spawn
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._ready = False
        """What is held need not wait for a `close`."""
        self._max_events = max_events
        self._grace_s = grace_s
        self._open = producers
        self._error: BatonError | None = None
        self._line: Line | None = None
        self._starting = False
        """The head waits for the client."""
        self._runs: Awaitable[bytes] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._limit: asyncio.Timeout | None = None
        self.events = 0
        self.writes = 0

    def put(self, event: bytes) -> None:
        """Take an event; never waits."""
        self.events += 1
        line = self._line
        if line is None and not self._starting and not self._reply.paused:
            self._add(event)
            line = self._line = self._reply.start_stream_now()
            self._release(line)
        elif line is None or self._held or line.paused:
            self._hold(event)
        else:
            self.writes += 1
            line.put(event)

    def put_last(self, event: bytes) -> None:
        """Take an event of those that end a producer's answer; they leave together with `close`,
        and those of the last producer with what ends the response.
        """
        self.events += 1
        self._add(event)

    def close(self) -> None:
        """One producer has put its last event."""
        self._open -= 1
        self._ready = bool(self._held)
        self._wake_up()

    def fail(self, error: BatonError) -> None:
        """The answer cannot be completed: `rest` raises `error` after the events so far."""
        if self._error is None:
            self._error = error
        self._wake_up()

    async def rest(self) -> bytes:
        """Wait until all producers have closed; what is still held then.

        An error before any event is raised with nothing sent. Raises ClientTooSlow.
        """
        if self._runs is None:
            self._runs = self._run()
        return await self._runs

    async def _run(self) -> bytes:
        await self._something()
        line = self._line
        if line is None:
            if self._error is not None and not self._held:
                raise self._error
            self._starting = True
            start = self._reply.start_stream()
            line = await (self._bounded(start) if self._reply.paused else start)
        while True:
            if line.paused:
                await self._bounded(line.drain())
            if self._open == 0:
                self.writes += bool(self._held)
                return b"".join(self._held)
            self._line = line
            if self._held:
                self._release(line)
            if self._error is not None:
                raise self._error
            await self._something()

    async def _something(self) -> None:
        """Wait until events are to leave, all producers have closed, or one has failed."""
        while self._open and not self._ready and self._error is None:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake

    async def _bounded(self, client: Coroutine[object, object, T]) -> T:
        """Wait for the client, but not for ever once too much is held."""
        try:
            async with asyncio.timeout(None) as self._limit:
                self._bound()
                return await client
        except TimeoutError:
            raise ClientTooSlow(f"the client is {len(self._held)} events behind") from None
        finally:
            self._limit = None

    def _bound(self) -> None:
        """A wait for the client that is under way gets an end when too much is held."""
        if self._limit is None or self._limit.expired():
            return
        now_s = asyncio.get_running_loop().time()
        if self._held_bytes > MAX_HELD_BYTES:
            self._limit.reschedule(now_s)
        elif len(self._held) >= self._max_events and self._limit.when() is None:
            self._limit.reschedule(now_s + self._grace_s)

    def _hold(self, event: bytes) -> None:
        self._add(event)
        self._ready = True
        self._bound()
        if self._runs is None:
            self._runs = self._spawn(self._run())
        self._wake_up()

    def _add(self, event: bytes) -> None:
        self._held.append(event)
        self._held_bytes += len(event)

    def _release(self, line: Line) -> None:
        self.writes += 1
        line.put(b"".join(self._held))
        self._held.clear()
        self._held_bytes = 0
        self._ready = False

    def _wake_up(self) -> None:
        if self._wake is not None:
            if not self._wake.done():
                self._wake.set_result(None)
            self._wake = None


class Voice:
    """Implements router.types.TokenSink: one choice's tokens as events."""

    __slots__ = ("_answer", "_encoder", "_first", "_outflow")

    def __init__(self, answer: Answer, encoder: ChunkEncoder, outflow: Outflow) -> None:
        self._answer = answer
        self._encoder = encoder
        self._outflow = outflow
        self._first = encoder.first()

    def token(self, token: int) -> None:
        answer = self._answer
        piece = answer.push(token)
        if piece:
            self._outflow.put(self._encoder.text(piece))
        if answer.finish is not None:
            self._finish(answer.finish)
            raise Enough("a stop string matched")

    def take(self, item: Generated) -> None:
        answer, outflow = self._answer, self._outflow
        pieces = answer.feed(item)
        put = outflow.put if answer.finish is None else outflow.put_last
        if self._first:
            (outflow.put_last if pieces else put)(self._first)  # it leaves with what follows
            self._first = b""
        for piece in pieces:
            put(self._encoder.text(piece))
        if answer.finish is not None:
            self._finish(answer.finish)
            if item.finish is None:
                raise Enough("a stop string matched")

    def _finish(self, reason: FinishReason) -> None:
        self._outflow.put_last(self._encoder.finish(reason, self._answer.timings))


class Text:
    """Implements router.types.TokenSink: the whole text of one answer."""

    __slots__ = ("_answer", "pieces")

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.pieces: list[str] = []

    def token(self, token: int) -> None:
        self.pieces.append(self._answer.push(token))
        if self._answer.finish is not None:
            raise Enough("a stop string matched")

    def take(self, item: Generated) -> None:
        self.pieces.extend(self._answer.feed(item))
        if self._answer.finish is not None and item.finish is None:
            raise Enough("a stop string matched")


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
    nothing sent. A single choice runs in the caller's task, several in `group`.
    """
    outflow = Outflow(
        reply,
        group.create_task,
        max_events=settings.stream_buffer_events,
        grace_s=settings.slow_client_grace_s,
        producers=len(answers),
    )

    def speak(answer: Answer) -> Coroutine[None, None, None]:
        return _speak(generator, answer, chunk_encoder(head, answer), outflow)

    try:
        if len(answers) == 1:
            await speak(answers[0])
        else:
            await _start_all(speak, answers, group)
        rest = await outflow.rest()
    finally:
        metrics.stream_events.inc(outflow.events)
        metrics.coalesced_events.inc(outflow.events - outflow.writes)
    return rest + (usage_event(head, answers) + DONE if head.usage_chunk else DONE)


async def _speak(
    generator: Generator, answer: Answer, encoder: ChunkEncoder, outflow: Outflow
) -> None:
    try:
        await _to_the_end(generator, answer, Voice(answer, encoder, outflow))
    except BatonError as error:
        outflow.fail(error)
    else:
        outflow.close()


async def collect_answers(
    generator: Generator, answers: Sequence[Answer], group: asyncio.TaskGroup
) -> list[str]:
    """The whole text of each, for a request that does not stream."""
    if len(answers) == 1:
        return [await _collect(generator, answers[0])]
    tasks = await _start_all(lambda answer: _collect(generator, answer), answers, group)
    return [await task for task in tasks]


async def _start_all(
    run: Callable[[Answer], Coroutine[None, None, T]],
    answers: Sequence[Answer],
    group: asyncio.TaskGroup,
) -> list[asyncio.Task[T]]:
    """A few in each turn of the loop: to place a sequence takes a fraction of a millisecond."""
    tasks = []
    for i, answer in enumerate(answers):
        if i and i % STARTED_A_TURN == 0:
            await asyncio.sleep(0)
        tasks.append(group.create_task(run(answer)))
    return tasks


async def _collect(generator: Generator, answer: Answer) -> str:
    text = Text(answer)
    await _to_the_end(generator, answer, text)
    return "".join(text.pieces)


async def _to_the_end(generator: Generator, answer: Answer, sink: TokenSink) -> None:
    try:
        await generator.run(answer.planned.request, sink)
    except Enough:
        return
    if answer.finish is None:
        raise InternalError("the generator ended without a finish")
