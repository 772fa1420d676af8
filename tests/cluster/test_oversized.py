"""A message too large for the stream to its router costs the leg it is about, and no other."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.worker.outlet import RouterOutlet
from core.errors import BatonError, RequestTooLarge
from core.ids import BlockHash
from core.messages import KvEvents, KvRemoved, LegFailed, LegTokens, TokenFrame
from core.stages import Stage
from core.stream import MessageStream
from engine.timed import TimedEngine
from engine.types import Sampled, SeqStep
from router.codec import from_worker
from router.types import Generated, GenerateRequest
from tests.builders import (
    Cluster,
    expected_tokens,
    make_prompt,
    make_request,
    running_cluster,
    until,
    until_idle,
)
from wire import worker_pb2

MAX_BYTES = 4000
LOGITS = {"small": 500, "large": MAX_BYTES + 1}
"""Bytes that ride on every token of requests of these names."""


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gives logits to those requests; streams carry MAX_BYTES."""
    step = TimedEngine.step

    def with_logits(
        self: TimedEngine, batch: Sequence[SeqStep]
    ) -> list[Sampled | BatonError | None]:
        sizes = [LOGITS.get(part.sequence_id.request_id.partition("-")[0], 0) for part in batch]
        return [
            replace(result, logits=bytes(size)) if isinstance(result, Sampled) else result
            for result, size in zip(step(self, batch), sizes, strict=True)
        ]

    monkeypatch.setattr(TimedEngine, "step", with_logits)
    monkeypatch.setattr("core.stream._MAX_MESSAGE_BYTES", MAX_BYTES)


async def answer(cluster: Cluster, request: GenerateRequest) -> list[Generated]:
    async with asyncio.timeout(20):
        return [item async for item in cluster.flow.generate(request)]


def with_logits(prompt: Sequence[int], name: str, max_tokens: int) -> GenerateRequest:
    request = make_request(prompt, name=name, max_tokens=max_tokens)
    return replace(request, sampling=replace(request.sampling, return_logits=True))


@pytest.mark.usefixtures("logits")
@pytest.mark.parametrize("max_tokens", [1, 8], ids=["prefill", "decode"])
async def test_a_token_too_large_fails_its_request_and_no_other(max_tokens: int) -> None:
    prompts = [make_prompt(22, seed=i) for i in range(3)]
    async with running_cluster(prefill=1, decode=1, gated_prefill=True) as cluster:
        views = [link.view for link in cluster.fleet.links()]
        asked = [
            asyncio.create_task(answer(cluster, with_logits(prompt, name, max_tokens)))
            for prompt, name in zip(prompts, ("plain", "large", "other"), strict=True)
        ]
        await until(lambda: cluster.prefill[0].worker.open_legs == 3, "all three in one step")
        cluster.prefill[0].gate.open()
        plain, large, other = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(large, RequestTooLarge)
        for prompt, items in ((prompts[0], plain), (prompts[2], other)):
            assert isinstance(items, list)
            assert [t for item in items for t in item.tokens] == expected_tokens(prompt, max_tokens)
            assert items[-1].timings is not None
            assert items[-1].timings.attempts == 1
        assert [link.view for link in cluster.fleet.links()] == views, "no stream was lost"
        await until_idle(*cluster.workers)


@pytest.mark.usefixtures("logits")
async def test_a_step_whose_tokens_are_too_large_together_is_told_in_parts() -> None:
    prompts = [make_prompt(22, seed=i) for i in range(12)]
    async with running_cluster(prefill=1, decode=1, gated_prefill=True) as cluster:
        asked = [
            asyncio.create_task(answer(cluster, with_logits(prompt, f"small-{i}", 8)))
            for i, prompt in enumerate(prompts)
        ]
        await until(lambda: cluster.prefill[0].worker.open_legs == 12, "all in one step")
        cluster.prefill[0].gate.open()
        for prompt, items in zip(prompts, await asyncio.gather(*asked), strict=True):
            assert [t for item in items for t in item.tokens] == expected_tokens(prompt, 8)
            assert all(len(item.logits) == LOGITS["small"] for item in items)
            assert items[-1].timings is not None
            assert items[-1].timings.attempts == 1
        await until_idle(*cluster.workers)


async def test_cache_events_too_large_together_are_told_in_parts_and_one_alone_is_a_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[KvEvents] = []
    send = MessageStream._hold

    def noted(self: MessageStream[worker_pb2.ToWorker], body: bytes) -> bool:
        fits = send(self, body)
        message = worker_pb2.ToRouter.FromString(body)
        if fits and message.HasField("kv_events"):
            sent.append(from_worker(message))  # type: ignore[arg-type]
        return fits

    async with running_cluster(prefill=1, decode=1) as cluster:
        (outlet,) = cluster.prefill[0].worker._outlets
        hashes = [BlockHash(i.to_bytes(16, "big")) for i in range(400)]
        small = [KvRemoved(hashes=(block_hash,)) for block_hash in hashes]
        monkeypatch.setattr(MessageStream, "_hold", noted)
        monkeypatch.setattr("core.stream._MAX_MESSAGE_BYTES", MAX_BYTES)
        large = KvRemoved(hashes=tuple(hashes))
        outlet.send(KvEvents(first_number=1, events=(*small, large, small[0])))
        told = [number for m in sent for number, _ in enumerate(m.events, m.first_number)]
        assert told == [*range(1, 401), 402]
        assert [e for m in sent for e in m.events] == [*small, small[0]]
        view = next(link.view for link in cluster.fleet.links() if link.record.worker_id[0] == "p")
        assert view is not None
        await until(lambda: not view._asked and view._next_event == 1, "a snapshot after the gap")


def test_the_frame_is_empty_before_it_is_said() -> None:
    """What saying it leads to may be said through the same outlet."""
    said: list[object] = []

    def say(message: object) -> None:
        said.append(message)
        if isinstance(message, TokenFrame) and len(said) < 3:
            outlet.send(LegFailed(number=1, code="c", message="", stage=Stage.DECODE))

    outlet = RouterOutlet(say)
    outlet.tokens(LegTokens(number=1, tokens=(1,)))
    outlet.flush()
    assert [type(message) for message in said] == [TokenFrame, LegFailed]
