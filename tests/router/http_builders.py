"""What the tests of the HTTP edge are built from: a tokenizer, a scripted generator, a server."""

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from core.clock import SystemClock
from core.ids import ModelId
from core.sampling import FinishReason
from engine.build import ServedModel
from engine.checkpoint import SamplingDefaults
from router import tokenizer as router_tokenizer
from router.app import create_app
from router.config import RouterConfig
from router.metrics import EdgeMetrics
from router.serve import bind_listener, serve
from router.types import (
    Generated,
    GenerateRequest,
    RouteExplainer,
    ServingLimits,
    Timings,
    TokenSink,
    WorkerStatus,
)

MODEL = "tiny"
EOS = "<|end|>"
TEXT = "Once upon a time a fox ran over the hill. Größe, 日本語 und 🎉 sind auch Text. " * 3
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKING_TEMPLATE = (  # the frame of Qwen3's, and its end word for word
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)

Script = Callable[[GenerateRequest], AsyncGenerator[Generated, None]]


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in the loop the router runs in."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(bounded())

    return run


@functools.cache
def byte_level_bpe(*more: str) -> Tokenizer:
    """A small byte-level BPE with two special tokens and an added plain one, trained on `more`
    besides.
    """
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, "<|start|>"],
        show_progress=False,
    )
    built.train_from_iterator([*more, TEXT], trainer)
    built.add_tokens([AddedToken("<think→>", special=False)])
    return built


def model_directory(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """What the router's tokenizer reads of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    config = {"eos_token": EOS, "model_max_length": 64}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def served_model(eos_token_ids: Iterable[int] = (0,), **sampling: float) -> ServedModel:
    """What the checkpoint says of itself; 0 is EOS."""
    return ServedModel(
        model_id=ModelId("tiny-0"),
        eos_token_ids=frozenset(eos_token_ids),
        sampling=SamplingDefaults(**sampling),
    )


@dataclass
class ScriptedGenerator:
    """In place of flow.py: gives what its script yields, and knows what was closed."""

    script: Script
    context_tokens: int = 1000
    ready: bool = True
    views: tuple[WorkerStatus, ...] = ()
    requests: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, request: GenerateRequest, sink: TokenSink) -> None:
        self.requests.append(request)
        self._count(+1)
        try:
            async with aclosing(self.script(request)) as items:
                async for item in items:
                    sink.take(item)
        finally:
            self._count(-1)

    def limits(self) -> ServingLimits:
        return ServingLimits(context_tokens=self.context_tokens, ready=self.ready)

    def workers(self) -> tuple[WorkerStatus, ...]:
        return self.views

    async def until_running(self, count: int) -> None:
        while self.running != count:
            self.changed.clear()
            await self.changed.wait()

    def _count(self, by: int) -> None:
        self.running += by
        self.changed.set()


def saying(
    text: str, *, finish: FinishReason = FinishReason.STOP, cached_tokens: int = 0
) -> Script:
    """A script that says `text` token by token, then ends as `finish` says."""
    tokens = byte_level_bpe().encode(text, add_special_tokens=False).ids
    ending = {"finish": finish, "timings": Timings(prefill_worker="p0", cached_tokens=7)}

    async def script(request: GenerateRequest) -> AsyncGenerator[Generated, None]:
        for token in tokens[:-1] if finish is FinishReason.LENGTH else tokens:
            yield Generated(tokens=(token,), cached_tokens=cached_tokens)
        last = tokens[-1] if finish is FinishReason.LENGTH else 0  # 0 is EOS
        yield Generated(tokens=(last,), cached_tokens=cached_tokens, **ending)

    return script


def failing(error: Exception, *, after: str = "") -> Script:
    """A script that says `after`, then raises."""
    tokens = byte_level_bpe().encode(after, add_special_tokens=False).ids

    async def script(request: GenerateRequest) -> AsyncGenerator[Generated, None]:
        for token in tokens:
            yield Generated(tokens=(token,))
        raise error

    return script


def endless(piece: str = "fox", *, first: int = 10**9) -> Script:
    """A script that says `first` tokens of `piece`, then nothing more, and never ends."""
    token = byte_level_bpe().encode(piece, add_special_tokens=False).ids[0]

    async def script(request: GenerateRequest) -> AsyncGenerator[Generated, None]:
        for i in range(first):
            if i % 64 == 0:
                await asyncio.sleep(0)  # as a real generator waits for its worker
            yield Generated(tokens=(token,))
        await asyncio.Event().wait()

    return script


@dataclass
class Running:
    """A served application."""

    port: int
    metrics: EdgeMetrics
    stop: asyncio.Event
    serving: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=20)

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def running(
    generator: ScriptedGenerator,
    folder: Path,
    *,
    model: ServedModel | None = None,
    grace_s: float = 1.0,
    explainer: RouteExplainer | None = None,
    **settings: object,
) -> AsyncIterator[Running]:
    """The real application on the real server, on a free port."""
    config = RouterConfig(**settings)
    text = router_tokenizer.Tokenizer.load(folder, config.tokenizer_threads)
    metrics, stop = EdgeMetrics(), asyncio.Event()
    app = create_app(
        generator,
        config,
        text,
        model=model or served_model(),
        model_names=[MODEL],
        clock=SystemClock(),
        metrics=metrics,
        explainer=explainer,
    )
    listener = bind_listener(config.host, 0)
    port = listener.getsockname()[1]
    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(
                serve(
                    app,
                    listener,
                    stop=stop,
                    grace_s=grace_s,
                    head_timeout_s=config.head_timeout_s,
                    max_connections=config.max_connections,
                )
            )
            try:
                yield Running(port, metrics, stop, serving)
            finally:
                stop.set()
    finally:
        text.close()


async def raw_connection(port: int, receive_buffer: int = 0) -> socket.socket:
    """A plain socket, for what a well-behaved client does not do."""
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return connection


def raw_post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body
