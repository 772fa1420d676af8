"""The two generating endpoints as raw ASGI: one request from its body to the end of its answer.

    read body -> parse -> plan (tokenize) -> generate -> SSE chunks, or one JSON body

This is the root of a request's task. Whatever happens below, the client gets an HTTP error, or an
error event once the stream has begun, and the log one line. While a request runs, its connection
is watched: a client that goes away cancels all its choices at once.
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from starlette.types import Receive, Scope, Send

from core import telemetry
from core.clock import Clock
from core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    Unavailable,
)
from core.ids import RequestId
from core.openai import OpenAiRequest
from router.answer import Answer
from router.chunks import AnswerHead, answer_body, error_event
from router.config import RouterConfig
from router.http_body import Intake, parsed
from router.http_errors import ClientGone, ClientTooSlow
from router.http_reply import Line, Reply, line_of
from router.http_stream import collect_answers, stream_answers
from router.metrics import EdgeMetrics
from router.request_context import header, request_id_of
from router.requests import Plan, Planner
from router.tokenizer import Tokenizer
from router.types import Generator

TIMINGS_HEADER = b"x-baton-timings"
_FAREWELL_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """What every request needs."""

    generator: Generator
    tokenizer: Tokenizer
    planner: Planner
    intake: Intake
    settings: RouterConfig
    metrics: EdgeMetrics
    clock: Clock
    fingerprint: str


class GenerateEndpoint:
    """An ASGI app for one path; `request_type` says how its body reads."""

    def __init__(self, edge: Edge, request_type: type[OpenAiRequest], answer_prefix: str) -> None:
        self._edge = edge
        self._request_type = request_type
        self._answer_prefix = answer_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(
            edge=self._edge,
            request_type=self._request_type,
            answer_prefix=self._answer_prefix,
            scope=scope,
            receive=receive,
            reply=Reply(scope, send),
        )
        with self._edge.metrics.in_flight.track_inprogress():
            await exchange.run()


class Exchange:
    """One request and its answer."""

    def __init__(
        self,
        *,
        edge: Edge,
        request_type: type[OpenAiRequest],
        answer_prefix: str,
        scope: Scope,
        receive: Receive,
        reply: Reply,
    ) -> None:
        self._edge = edge
        self._request_type = request_type
        self._answer_prefix = answer_prefix
        self._scope = scope
        self._receive = receive
        self._reply = reply
        self._request_id: RequestId = request_id_of(scope)
        self._started_s = edge.clock.now_s()
        self._plan: Plan | None = None
        self._answers: list[Answer] = []

    async def run(self) -> None:
        """Serve the request; raises nothing."""
        error: BatonError | None = None
        # The generator ends it in time, and knows whom it waited for; this is the backstop.
        limit_s = self._edge.settings.request_timeout_s + _FAREWELL_S
        try:
            async with Attended(line_of(self._scope), limit_s) as group:
                await self._serve(group)
        except BatonError as known:
            error = known
        except asyncio.CancelledError:
            # The server cancels what outlives its graceful stop; the task ends here either way.
            error = Unavailable("the router is shutting down")
        except Exception:  # noqa: BLE001 - the root of the request's task
            _log.exception(telemetry.log_line("request_failed", request_id=self._request_id))
            error = InternalError(f"internal error; the log has it under {self._request_id}")
        if error is not None:
            await self._say_farewell(error)
        self._record(error)

    async def _serve(self, group: "Attended") -> None:
        edge = self._edge
        async with edge.intake.body(self._scope, self._receive) as body:
            group.watch()
            request = await parsed(self._request_type.parse, body)
        ends_s = self._started_s + edge.settings.request_timeout_s
        plan = await edge.planner.plan(request, self._request_id, ends_s)
        self._plan = plan
        self._answers = [self._answer(plan, i) for i in range(len(plan.choices))]
        head = self._head(plan)
        if plan.stream:
            last = await stream_answers(
                edge.generator,
                head,
                self._answers,
                self._reply,
                settings=edge.settings,
                metrics=edge.metrics,
                group=group,
            )
            await self._reply.end(last)
        else:
            texts = await collect_answers(edge.generator, self._answers, group)
            await self._reply.json(200, answer_body(head, self._answers, texts))

    def _answer(self, plan: Plan, index: int) -> Answer:
        planned = plan.choices[index]
        detokenizer = self._edge.tokenizer.detokenizer(planned.after)
        return Answer(planned, detokenizer, plan.stops, self._edge.clock, self._started_s)

    def _head(self, plan: Plan) -> AnswerHead:
        return AnswerHead(
            answer_id=f"{self._answer_prefix}-{self._request_id}",
            created_s=int(self._edge.clock.wall_s()),
            model=plan.model,
            fingerprint=self._edge.fingerprint,
            chat=plan.chat,
            usage_chunk=plan.stream and plan.include_usage,
            running_usage=plan.running_usage,
            timings=header(self._scope, TIMINGS_HEADER) == "1",
        )

    async def _say_farewell(self, error: BatonError) -> None:
        """Tell the client, if it is there and reads; else drop the connection."""
        if isinstance(error, ClientGone):
            return
        if isinstance(error, ClientTooSlow) or not await self._tell(error):
            self._reply.abort()
            # The server must have seen the reset before the task ends: see ABORT_EXTENSION.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL_S):
                    await _wait_for_disconnect(self._receive)

    async def _tell(self, error: BatonError) -> bool:
        try:
            async with asyncio.timeout(_FAREWELL_S):
                if self._reply.started:
                    await self._reply.end(error_event(error))
                else:
                    await self._reply.error(error)
        except TimeoutError:
            return False
        return True

    def _record(self, error: BatonError | None) -> None:
        edge, now_s = self._edge, self._edge.clock.now_s()
        metrics, endpoint = edge.metrics, self._scope["path"]
        status = 200 if error is None else error.http_status
        metrics.requests.labels(endpoint, str(status)).inc()
        metrics.duration_s.labels(endpoint).observe(now_s - self._started_s)
        if isinstance(error, ClientTooSlow):
            metrics.slow_clients.inc()
        spoken = [answer for answer in self._answers if answer.num_tokens]
        for answer in spoken:
            metrics.ttft_s.labels(endpoint).observe(answer.ttft_s)
            if answer.finish is not None and answer.tpot_s is not None:
                metrics.tpot_s.labels(endpoint).observe(answer.tpot_s)
        prompt_tokens = 0 if self._plan is None else self._plan.prompt_tokens
        cached_tokens = sum(a.cached_tokens for a in spoken if a.planned.counts_prompt)
        output_tokens = sum(answer.num_tokens for answer in spoken)
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.cached_tokens.inc(cached_tokens)
        metrics.output_tokens.inc(output_tokens)
        _log.log(
            logging.WARNING if status >= 500 else logging.INFO,
            telemetry.log_line(
                "request_done",
                request_id=self._request_id,
                endpoint=endpoint,
                status=status,
                error=None if error is None else error.code,
                message=None if error is None else error.message,
                stream=None if self._plan is None else self._plan.stream,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                output_tokens=output_tokens,
                ttft_ms=1e3 * min(a.ttft_s for a in spoken) if spoken else None,
                e2e_ms=1e3 * (now_s - self._started_s),
            ),
            extra=None if 400 <= status < 500 else telemetry.KEEP_LINE,
        )


class Attended(asyncio.TaskGroup):
    """A task group that fails with ClientGone when the client goes away, and with DeadlineExceeded
    after `limit_s`.

    Of what its tasks and its body raise, one error comes out by itself. On success it waits for
    its tasks; on any error it cancels them.
    """

    def __init__(self, line: Line, limit_s: float) -> None:
        super().__init__()
        self._line = line
        self._owner = asyncio.current_task()
        self._left: BatonError | None = None
        self._limit = asyncio.get_running_loop().call_later(limit_s, self._late)

    async def __aenter__(self) -> Self:
        self.watch()
        return await super().__aenter__()

    def watch(self) -> None:
        """Again once the body is read: behind a large one the server has stopped reading, and sees
        no end of the connection.
        """
        self._line.attend(self._lost)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failure: BaseException | None = None
        try:
            await super().__aexit__(kind, error, trace)
        except BaseExceptionGroup as errors:
            # A bug before anything else, so that it is logged; then the first error.
            bugs = [error for error in errors.exceptions if not isinstance(error, BatonError)]
            failure = (bugs or errors.exceptions)[0]
        except asyncio.CancelledError as cancelled:
            failure = cancelled
        finally:
            self._limit.cancel()
            self._line.attend(None)
        if self._left is not None and self._owner is not None:
            stopped = self._owner.uncancel() > 0
            if not stopped and (isinstance(failure, asyncio.CancelledError | BatonError)):
                failure = self._left
        if failure is not None:
            raise failure

    def _lost(self) -> None:
        self._leave(ClientGone("the client closed the connection"))

    def _late(self) -> None:
        self._leave(DeadlineExceeded("the request's time is up"))

    def _leave(self, why: BatonError) -> None:
        """The owner waits somewhere within the block."""
        if self._owner is not None and self._left is None:
            self._left = why
            self._owner.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
