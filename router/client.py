"""The way to workers: one RouterStream per worker, many legs on it."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Protocol

from core.channel import describe_break, heed_cancel
from core.errors import RequestTooLarge, WorkerLost
from core.ids import ModelId
from core.messages import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    Accepted,
    Cancel,
    DecodeSubmit,
    KvEvents,
    KvSnapshot,
    LegFailed,
    LegTokens,
    LoadReport,
    Moved,
    Offered,
    PrefillSubmit,
    Rejected,
    RouterRefused,
    RouterToWorker,
    SnapshotRequest,
    Withdrawn,
    WorkerHello,
    WorkerToRouter,
)
from core.registry import WorkerRecord
from core.stages import Stage
from core.stream import MessageStream, StreamBroken, dial
from kv_transfer.codec import UnknownMessage
from router.codec import entry_from_wire, from_worker, to_worker
from router.index import PrefixIndex
from router.view import WorkerView
from wire import common_pb2, worker_pb2

log = logging.getLogger(__name__)

LegEvent = Accepted | Rejected | LegTokens | LegFailed | Offered | Moved | Withdrawn

_Stream = MessageStream[worker_pb2.ToRouter]
_ENDS = (StreamBroken, WorkerLost, UnknownMessage, TimeoutError)
_HELLO_TIMEOUT_S = 5.0
_MOST_WARNINGS = 8
"""Of one incarnation, however many ways there are to say why it is not reached."""


class LegListener(Protocol):
    """Hears of one leg, on the event loop; must not wait."""

    def __call__(self, leg: "Leg", event: LegEvent) -> None: ...


class Leg:
    """One submit on one stream. `cancel` may be called at any time, also when it is over.

    While `on_token` is set it hears of single tokens that end nothing, instead of the listener;
    like that it must neither wait nor raise.
    """

    __slots__ = ("link", "listener", "number", "on_token")

    def __init__(self, link: "WorkerLink", number: int, listener: LegListener) -> None:
        self.link = link
        self.number = number
        self.listener = listener
        self.on_token: Callable[[int], None] | None = None

    def cancel(self, reason: str) -> None:
        self.link.cancel(self, reason)


class WorkerLink:
    """The stream to one incarnation of one worker. `run` is its only task.

    `on_change` is called when what `routable` answers, or whose view it is, has changed; `on_load`
    with every load report, of this link. `before` is the link that was tried last; what kept it
    from the worker is not told a second time.
    """

    def __init__(
        self,
        record: WorkerRecord,
        router_id: str,
        model_id: ModelId,
        silence_s: float,
        *,
        index: PrefixIndex,
        on_change: Callable[[], None] = lambda: None,
        on_load: "Callable[[WorkerLink], None]" = lambda link: None,
        before: "WorkerLink | None" = None,
    ) -> None:
        self.record = record
        self.problem: str = "" if before is None else before.problem
        """Why the worker is not connected, as far as that was tried; empty while it is."""
        self._warned: set[str] = set() if before is None else before._warned
        self._index = index
        self._on_change = on_change
        self._on_load = on_load
        self._silence_s = silence_s
        self._heard = 0
        self._router_id = router_id
        self._model_id = model_id
        self._stream: _Stream | None = None
        self._legs: dict[int, Leg] = {}
        self._next_number = 1
        self.view: WorkerView | None = None
        self.was_connected = False

    # -- legs -----------------------------------------------------------------------------------

    @property
    def routable(self) -> WorkerView | None:
        """The view, while the worker is connected, of this model, and takes requests."""
        view = self.view
        if view is None or view.load is None or view.load.draining:
            return None
        return view

    def submit(
        self,
        build: Callable[[int], PrefillSubmit | DecodeSubmit],
        listener: LegListener,
        load_tokens: int,
        prompt_tokens: int,
    ) -> Leg:
        """Open a leg of a sequence whose KV will be `load_tokens` there, of which `prompt_tokens`
        are to be computed.

        Raises WorkerLost when the stream has ended, RequestTooLarge for a submit that no worker
        would read: the other legs of the stream go on.
        """
        if self.view is None or self._stream is None:
            raise WorkerLost(f"worker {self.record.worker_id} is not connected")
        number, self._next_number = self._next_number, self._next_number + 1
        if not self._stream.try_send(to_worker(build(number))):
            raise RequestTooLarge("the request is too large to be sent to a worker")
        leg = self._legs[number] = Leg(self, number, listener)
        self.view.submitted(number, load_tokens, prompt_tokens)
        return leg

    def cancel(self, leg: Leg, reason: str) -> None:
        """Forget a leg and tell the worker, which may hold something for it."""
        if self._legs.pop(leg.number, None) is not None:
            self.send(Cancel(number=leg.number, reason=reason))

    def finish(self, leg: Leg) -> None:
        """Forget a leg that has said its last word and holds nothing."""
        self._legs.pop(leg.number, None)

    def give_up(self, reason: str) -> None:
        """Nothing more will come of its legs: each has failed, and the worker is told."""
        for leg in self._fail_legs(f"worker {self.record.worker_id} is given up: {reason}"):
            self.send(Cancel(number=leg.number, reason=reason))

    def send(self, message: RouterToWorker) -> None:
        """Never waits; a worker that does not read its stream is lost."""
        if self._stream is not None:
            self._stream.send(to_worker(message))

    # -- the stream -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the stream until it ends; then every leg has failed."""
        reason = ""
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(_HELLO_TIMEOUT_S):  # wait_for of 3.11 can lose a cancel
                    dialled = dial(self.record.router_address, worker_pb2.ToRouter.FromString)
                    stream = await stack.enter_async_context(dialled)
                    view = await self._greet(stream)
                await self._serve(stream, view)
        except* _ENDS as errors:
            reason = describe_break(errors)
        finally:
            self._lose(reason)
        heed_cancel()

    async def _greet(self, stream: _Stream) -> WorkerView:
        hello = worker_pb2.RouterHello(
            router_id=self._router_id,
            protocol=common_pb2.Protocol(major=PROTOCOL_MAJOR, minor=PROTOCOL_MINOR),
        )
        stream.send(worker_pb2.ToWorker(hello=hello))
        return await self._read_hello(stream)

    async def _serve(self, stream: _Stream, view: WorkerView) -> None:
        self._stream = stream
        self.view = view
        self.was_connected = True
        self.problem = ""
        self._on_change()
        log.info("worker_connected worker_id=%s role=%s", self.record.worker_id, view.hello.role)
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch())
            while (raw := await stream.read()) is not None:
                self._heard += 1
                self._receive(view, raw)
            watch.cancel()

    async def _watch(self) -> None:
        """A worker that hangs keeps its connection; its heartbeats stop.

        Two looks, so that a pause of this process, after which its messages are still unread, is
        not taken for one of the worker.
        """
        while True:
            heard = self._heard
            for _ in range(2):
                await asyncio.sleep(self._silence_s / 2)
            if heard == self._heard:
                raise WorkerLost(f"it said nothing for {self._silence_s:g} s")

    async def _read_hello(self, stream: _Stream) -> WorkerView:
        raw = await stream.read()
        hello = from_worker(raw) if raw is not None else None
        if isinstance(hello, RouterRefused):
            raise WorkerLost(f"it refuses: {hello.reason}")
        if not isinstance(hello, WorkerHello):
            raise WorkerLost("it said no hello")
        if hello.protocol_major != PROTOCOL_MAJOR:
            raise WorkerLost(f"it speaks protocol {hello.protocol_major}, not {PROTOCOL_MAJOR}")
        if hello.model_id != self._model_id:
            raise WorkerLost(f"it serves model {hello.model_id}, not {self._model_id}")
        if hello.incarnation != self.record.incarnation:
            raise WorkerLost(f"{self.record.router_address} is another worker's now")
        return WorkerView(hello, self._index.join(hello.worker_id))

    def _receive(self, view: WorkerView, raw: worker_pb2.ToRouter) -> None:
        if raw.HasField("tokens"):
            self._receive_tokens(raw.tokens)
            return
        try:
            message = from_worker(raw)
        except UnknownMessage as unknown:
            log.info("worker_message_skipped %s", unknown)
            return
        self._dispatch(view, message)

    def _dispatch(self, view: WorkerView, message: WorkerToRouter) -> None:
        match message:
            case Accepted() | Offered():
                self._tell(message.number, message)
            case Rejected() | LegFailed() | Moved() | Withdrawn():
                view.ended(message.number)
                self._tell(message.number, message)
            case LoadReport():
                was_routable = self.routable is not None
                view.reported(message)
                if was_routable is message.draining:
                    self._on_change()
                self._on_load(self)
            case KvEvents():
                if not view.apply_events(message):
                    self.send(SnapshotRequest())
            case KvSnapshot():
                view.apply_snapshot(message)
            case WorkerHello():
                view.hello = message
                self._on_change()

    def _receive_tokens(self, frame: worker_pb2.TokenFrame) -> None:
        """Nearly all entries are one token of a running answer: no typed value is made of them."""
        legs = self._legs
        for entry in frame.entries:
            leg = legs.get(entry.number)
            if leg is None:
                continue
            tokens = entry.tokens
            if leg.on_token is not None and len(tokens) == 1 and not entry.finish:
                leg.on_token(tokens[0])
            else:
                leg.listener(leg, entry_from_wire(entry))

    def _tell(self, number: int, event: LegEvent) -> None:
        leg = self._legs.get(number)
        if leg is not None:
            leg.listener(leg, event)

    def _lose(self, reason: str) -> None:
        if self.view is None:
            self._note_problem(reason)
        else:
            reason = reason or "its stream ended"
            log.warning("worker_lost worker_id=%s reason=%s", self.record.worker_id, reason)
        self.problem = reason
        self._stream = None
        if self.view is not None:
            self.view.holdings.leave()
            self.view = None
            self._on_change()
        self._fail_legs(f"worker {self.record.worker_id} was lost: {reason}")

    def _fail_legs(self, why: str) -> list[Leg]:
        """Those that were open."""
        legs, self._legs = list(self._legs.values()), {}
        for leg in legs:
            number, code = leg.number, WorkerLost.code
            failed = LegFailed(number=number, code=code, message=why, stage=Stage.ROUTE)
            leg.listener(leg, failed)
        return legs

    def _note_problem(self, reason: str) -> None:
        """It was not connected at all, and will be tried again and again; empty: nor tried."""
        news = bool(reason) and reason not in self._warned and len(self._warned) < _MOST_WARNINGS
        if news:
            self._warned.add(reason)
        level = logging.WARNING if news else logging.DEBUG
        log.log(level, "worker_not_reached worker_id=%s reason=%s", self.record.worker_id, reason)
