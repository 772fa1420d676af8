"""What the router adds to the time to first token: an open loop, and the same worker without it."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from benchmarks.router.client import Client, Seen, chat_body
from benchmarks.router.direct import direct_to
from benchmarks.router.rig import MODEL, STEP_S, Rig
from core.estimate import percentile
from core.ids import Role

RATE_PER_S = 100.0
ANSWER_TOKENS = 16
"""At 20 ms per token, about 32 are in flight."""
LONG_TOKENS = 60_000
_PROMPT_CHARS = 1024
_LONG_EVERY_S = 1.0
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ttft:
    """Times to first token, in ms, of one run."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Ttft":
        return cls(p50=1e3 * percentile(seconds, 0.5), p99=1e3 * percentile(seconds, 0.99))


class Pool:
    """Connections that are opened when none is free, and kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[Client] = []
        self._all: list[Client] = []

    async def ask(self, body: bytes) -> Seen:
        client = self._free.pop() if self._free else await self._more()
        seen = await client.ask(body)
        self._free.append(client)
        return seen

    async def warm(self, connections: int) -> None:
        self._free += [await self._more() for _ in range(connections)]

    async def _more(self) -> Client:
        client = await Client.connect(self._port)
        self._all.append(client)
        return client

    def close(self) -> None:
        for client in self._all:
            client.close()


async def routed(rig: Rig, seed: int, seconds: float, *, long_prompts: bool = False) -> Ttft:
    """Of short prompts; with `long_prompts` one of 60,000 tokens comes among them every second."""
    rig.step(STEP_S)
    first = time.monotonic_ns()
    with closing(Pool(rig.port)) as pool:
        await pool.warm(64)

        async def short(number: int) -> float:
            prompt = rig.prompt(first + number, _PROMPT_CHARS)
            return (await pool.ask(chat_body(rig.model, prompt, ANSWER_TOKENS))).ttft_s

        async def long() -> None:
            chars = round(LONG_TOKENS * rig.chars_per_token)
            body = chat_body(rig.model, rig.prompt(first, chars), ANSWER_TOKENS)
            while True:
                await pool.ask(body)
                await asyncio.sleep(_LONG_EVERY_S)

        others = asyncio.create_task(long()) if long_prompts else None
        try:
            return Ttft.of(await open_loop(short, seed, seconds))
        finally:
            if others is not None:
                others.cancel()
                await asyncio.wait([others])


async def direct(rig: Rig, seed: int, seconds: float) -> Ttft:
    """The prefill worker alone: tokenized before the clock starts."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts = [tuple(tokenizer.encode(rig.prompt(i, _PROMPT_CHARS)).ids) for i in range(32)]
    async with direct_to(rig.worker(Role.PREFILL).router_address) as worker:
        return Ttft.of(
            await open_loop(lambda i: worker.ttft_s(prompts[i % len(prompts)]), seed, seconds)
        )


async def open_loop(
    ask: Callable[[int], Coroutine[None, None, float]], seed: int, seconds: float
) -> list[float]:
    """Ask at the times of a Poisson process, whatever the answers take; what each answered."""
    random = Random(seed)
    loop = asyncio.get_running_loop()
    at_s = ends_s = loop.time()
    ends_s += seconds
    asked: list[asyncio.Task[float]] = []

    async with asyncio.timeout(_TIMEOUT_S), asyncio.TaskGroup() as group:
        while (at_s := at_s + random.expovariate(RATE_PER_S)) < ends_s:
            await asyncio.sleep(at_s - loop.time())
            asked.append(group.create_task(ask(len(asked))))
    return [task.result() for task in asked]
