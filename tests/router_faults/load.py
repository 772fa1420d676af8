"""Clients that go round the routers, and know what every answer must be."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import httpx

from core.clock import SystemClock
from core.ids import RequestId
from core.sampling import SamplingParams
from router.types import GenerateRequest
from tests.builders import VOCAB_SIZE, make_prompt
from tests.faults.oracle import Oracle
from tests.router_faults.fleet import RunningFleet, RunningRouter

CLIENTS = 8
_FAMILIES = 5
_SHARED_TOKENS = 96


@dataclass(slots=True)
class Load:
    """What the clients saw. `wrong` holds one line per answer that was not as it must be."""

    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    prefilled_by: Counter[str] = field(default_factory=Counter)
    decoded_by: Counter[str] = field(default_factory=Counter)
    stopping: bool = False
    seed: int = field(default_factory=count(1).__next__)
    """No two loads ask the same, so that no answer is in a cache beforehand."""


class Client:
    """Asks one request after the other, of every router in turn, or of one only."""

    def __init__(self, fleet: RunningFleet, load: Load, only: RunningRouter | None = None) -> None:
        self._fleet = fleet
        self._only = only
        self._load = load

    async def run(self, number: int) -> None:
        """Until the load stops."""
        for i in count(number):
            if self._load.stopping:
                return
            asked = self._fleet.routers if self._only is None else [self._only]
            routers = [r for r in asked if not r.process.ended]
            await self.ask(routers[i % len(routers)], number, i)

    async def ask(self, router: RunningRouter, number: int, i: int) -> None:
        """One request, streamed or whole, and a look at its answer."""
        load, began_s = self._load, SystemClock().now_s()
        shared = make_prompt(_SHARED_TOKENS, seed=100 * load.seed + i % _FAMILIES)
        prompt = (*shared, *make_prompt(16 + i % 64, seed=1000 * number + i))
        tokens = 8 + i % 24
        body: dict[str, object] = {
            "model": self._fleet.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "stream": bool(i % 2),
        }
        try:
            text, timings = await self._answer(router, body)
        except (httpx.HTTPError, AssertionError) as error:
            if not router.process.ended:
                load.wrong.append(f"{router.url} after {_since(began_s):.1f} s: {error!r}")
            return
        load.answered += 1
        load.slowest_s = max(load.slowest_s, _since(began_s))
        load.prefilled_by[str(timings["prefill_worker"])] += 1
        load.decoded_by[str(timings["decode_worker"])] += 1
        expected = expected_text(prompt, tokens)
        if text != expected:
            load.wrong.append(f"{text} instead of {expected}, of {timings}")

    async def _answer(
        self, router: RunningRouter, body: dict[str, object]
    ) -> tuple[str, dict[str, object]]:
        async with self._fleet.client.stream(
            "POST", f"{router.url}/v1/completions", json=body, headers={"x-baton-timings": "1"}
        ) as reply:
            raw = (await reply.aread()).decode()
        assert reply.status_code == 200, f"{reply.status_code}: {raw}"
        if not body["stream"]:
            whole = json.loads(raw)
            return whole["choices"][0]["text"], whole["baton"]
        *events, done = re.findall(r"^data: (.*)$", raw, re.MULTILINE)
        assert done == "[DONE]", raw[-300:]
        chunks = [json.loads(event) for event in events]
        text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
        return text, next(c["baton"] for c in chunks if "baton" in c)


@asynccontextmanager
async def under_load(
    fleet: RunningFleet, clients: int = CLIENTS, only: RunningRouter | None = None
) -> AsyncIterator[Load]:
    """Clients ask inside the block; on the way out they end what they have begun."""
    load = Load()
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(Client(fleet, load, only).run(number))
        try:
            yield load
        finally:
            load.stopping = True


def _since(began_s: float) -> float:
    return SystemClock().now_s() - began_s


def expected_text(prompt: tuple[int, ...], tokens: int) -> str:
    """The answer of so many tokens."""
    request = GenerateRequest(
        request_id=RequestId(f"{prompt}"),  # the oracle's engine knows sequences by it
        choice=0,
        prompt_tokens=prompt,
        sampling=SamplingParams(max_tokens=tokens),
        deadline_s=1.0,
    )
    return "".join(f"word{token}" for token in _oracle().answer(request))


@cache
def _oracle() -> Oracle:
    return Oracle(VOCAB_SIZE)
