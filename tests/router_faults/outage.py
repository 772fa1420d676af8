"""Redis is gone for a while: what streams keeps streaming, what comes is served, and when it is
back, empty, everybody is in it again.
"""

import asyncio
import json
from dataclasses import dataclass

from core import telemetry
from core.clock import SystemClock
from tests.builders import make_prompt
from tests.router_faults.fleet import RunningFleet, RunningRouter
from tests.router_faults.load import expected_text, under_load

STREAMS = 4
_TOKENS_MORE = 1.5
"""A stream is to be longer than the outage, on an idle machine by this factor."""
_LONGEST = 3900
_BACK_S = 60.0


@dataclass
class Stream:
    """One long answer, read as it comes."""

    tokens: int
    text: str = ""

    async def read(
        self, fleet: RunningFleet, router: RunningRouter, prompt: tuple[int, ...]
    ) -> None:
        body: dict[str, object] = {
            "model": fleet.model,
            "prompt": list(prompt),
            "max_tokens": self.tokens,
            "stream": True,
        }
        url = f"{router.url}/v1/completions"
        async with fleet.client.stream("POST", url, json=body) as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    self.text += json.loads(data)["choices"][0]["text"]


async def outlive_redis(fleet: RunningFleet, seconds: float, step_s: float) -> None:
    """Stop it for so long; `step_s` is what a decode step takes without load."""
    prompts = [make_prompt(40, seed=9000 + i) for i in range(STREAMS)]
    tokens = min(_LONGEST, int(_TOKENS_MORE * seconds / step_s))
    streams = [Stream(tokens) for _ in prompts]
    async with asyncio.TaskGroup() as group:
        readers = [
            group.create_task(stream.read(fleet, fleet.routers[i % len(fleet.routers)], prompt))
            for i, (stream, prompt) in enumerate(zip(streams, prompts, strict=True))
        ]
        async with asyncio.timeout(_BACK_S):
            while not all(stream.text for stream in streams):
                await asyncio.sleep(0.01)
        fleet.redis.kill()
        try:
            async with under_load(fleet, clients=2) as load:
                end_s = SystemClock().now_s() + seconds
                while (left_s := end_s - SystemClock().now_s()) > 0:
                    before = [len(stream.text) for stream in streams]
                    answered = load.answered
                    await asyncio.sleep(min(left_s, 5.0))
                    for stream, reader, seen in zip(streams, readers, before, strict=True):
                        assert reader.done() or len(stream.text) > seen, "a stream stands still"
                    if left_s > 1:
                        assert load.answered > answered, "nothing new is answered"
            assert load.wrong == []
            await fleet.connected()
        finally:
            fleet.redis.start()
    for stream, prompt in zip(streams, prompts, strict=True):
        assert stream.text == expected_text(prompt, tokens)
    late = await fleet.start_router()  # it knows nobody but by what workers have written since
    try:
        await fleet.until_router(late, telemetry.WORKERS_CONNECTED, len(fleet.workers))
    finally:
        late.process.kill()
        fleet.routers.remove(late)
    await fleet.clean()
