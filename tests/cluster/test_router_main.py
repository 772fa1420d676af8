"""The router process' inside, over real workers in this process: a model directory to answers."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.config import ClusterConfig, ModelConfig, TelemetryConfig
from cluster.router_main import run_router
from cluster.telemetry import JsonLinesExporter
from core import telemetry
from core.clock import SystemClock
from core.errors import ConfigError
from core.ids import Role
from core.registry import MemoryRegistry
from kv_transfer.loopback import LoopbackHub
from router.config import RouterConfig
from router.serve import bind_listener
from tests.builders import VOCAB_SIZE, make_config, served_worker

MODEL = "bare"
PROMPT = "word1 word2 word3 word4 word5"


def bare_directory(folder: Path) -> Path:
    """A tokenizer.json alone, with the vocabulary of the builders' workers."""
    words = {f"word{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    directory = folder / MODEL
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def config_of(directory: Path, spans_file: Path | None = None) -> ClusterConfig:
    return ClusterConfig(
        model=ModelConfig(path=directory),
        router=RouterConfig(tokenizer_threads=1),
        engine=make_config(),
        telemetry=TelemetryConfig(spans_file=spans_file),
        drain_timeout_s=1.0,
    )


@asynccontextmanager
async def running_router(
    config: ClusterConfig, *, ready: bool = True
) -> AsyncIterator[httpx.AsyncClient]:
    """The router with a prefill and a decode worker, and a client of it; with `ready` that waits
    until it is.
    """
    registry, hub, stop = MemoryRegistry(SystemClock()), LoopbackHub(), asyncio.Event()
    listener = bind_listener("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(30))
        for role in Role:
            served = await stack.enter_async_context(served_worker(f"{role}-0", role, hub))
            await registry.register(served.record, 3600.0)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        group.create_task(run_router(config, registry, listener, stop))
        stack.callback(stop.set)
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20))
        while ready and (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        yield client


async def test_a_timed_cluster_serves_texts_from_a_bare_tokenizer(tmp_path: Path) -> None:
    async with running_router(config_of(bare_directory(tmp_path))) as client:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
        answer = (await client.post("/v1/completions", json=body)).json()
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "word1"}]}
        refused = await client.post("/v1/chat/completions", json=chat)
        metrics = (await client.get("/metrics")).text
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"
    assert refused.status_code == 400
    assert "no chat template" in refused.json()["error"]["message"]
    assert 'baton_attempts_total{outcome="ok"} 1.0' in metrics
    assert 'baton_workers_connected{role="prefill"} 1.0' in metrics
    assert 'baton_workers_connected{role="decode"} 1.0' in metrics
    assert "baton_kv_transfer_seconds_count 1.0" in metrics


async def test_who_waited_for_a_router_to_start_is_served_at_once(tmp_path: Path) -> None:
    async with running_router(config_of(bare_directory(tmp_path)), ready=False) as client:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
        assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_spans_go_to_the_file_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans_file = tmp_path / "spans.jsonl"
    provider = TracerProvider(shutdown_on_exit=False)
    exporter = JsonLinesExporter(spans_file)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    async with running_router(config_of(bare_directory(tmp_path), spans_file)) as client:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
        await client.post("/v1/completions", json=body)
    exporter.shutdown()
    names = [json.loads(line)["name"] for line in spans_file.read_text().splitlines()]
    assert names == [*telemetry.STAGE_SPANS.values(), telemetry.SPAN_REQUEST]


async def test_a_bad_model_directory_ends_it_before_it_serves(tmp_path: Path) -> None:
    with bind_listener("127.0.0.1", 0) as listener:
        with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
            await run_router(
                config_of(tmp_path), MemoryRegistry(SystemClock()), listener, asyncio.Event()
            )
        assert listener.fileno() == -1
