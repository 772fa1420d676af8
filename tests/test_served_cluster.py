"""`baton up` as a user starts it: Ray, two pools, the router, and the official openai client.

The workers run the timed engine, which verifies the KV it received before every token.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.config import TimedConfig
from engine.latency.base import StepShape
from engine.latency.fitted import FittedLatency
from simulator.profiles.load import load_profile
from tests.processes import write_config

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

BATON = [sys.executable, "-c", "from cluster.cli import main; main()"]
CHECKPOINT = Path(__file__).parent.parent / "demo_model" / "checkpoint"
START_S = 120.0


@dataclass(frozen=True)
class Served:
    """A running cluster, its endpoint and the environment its commands run in."""

    url: str
    env: dict[str, str]
    process: subprocess.Popen[str]

    @property
    def folder(self) -> Path:
        return Path(self.env["TMPDIR"])

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=120, **options
        )

    def status(self) -> list[dict[str, Any]]:
        """The workers as `baton status --json` tells them."""
        workers: list[dict[str, Any]] = self.whole_status()["workers"]
        return workers

    def whole_status(self) -> dict[str, Any]:
        done = subprocess.run(
            [*BATON, "status", "--json", "--leases"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        status: dict[str, Any] = json.loads(done.stdout)
        return status


@contextmanager
def serving(**settings: Any) -> Iterator[Served]:
    # Short, because the sockets of Ray lie inside.
    folder = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    config = write_config(
        folder,
        {
            "model": {"path": str(CHECKPOINT), "served_name": "timed"},
            "engine": {"kind": "timed", "kv_memory_mb": 16},
            "router": {"port": 0, "admission": "off"},  # a crowd, all of it to be answered
            **settings,
        },
    )
    env = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [*BATON, "up", "--config", str(config), "--json"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Served(_endpoint(process), env, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not list(folder.glob("baton-*"))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def _endpoint(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "ClusterReady":
            return str(event["url"])
    raise AssertionError(f"the cluster did not start: {process.stderr.read()}")


async def assert_nothing_held(served: Served) -> None:
    """Within 5 s no lease is open, no block referenced, and every pool adds up."""
    for _ in range(10):
        stats = [worker["stats"] for worker in await asyncio.to_thread(served.status)]
        blocks = [stat["blocks"] for stat in stats]
        if all(b["held"] == b["in_use"] == b["receiving"] == 0 for b in blocks):
            break
        await asyncio.sleep(0.5)
    assert all(b["held"] == b["in_use"] == b["receiving"] == 0 for b in blocks)
    assert all(stat["pool_error"] == "" and not stat["leases"] for stat in stats)


async def assert_replaced(served: Served, victim: dict[str, Any]) -> None:
    """It comes back under its name, as another process."""
    for _ in range(60):
        now = {w["worker_id"]: w for w in await asyncio.to_thread(served.status)}
        stats = now.get(victim["worker_id"], {}).get("stats")
        if stats and stats["pid"] != victim["stats"]["pid"]:
            assert stats["incarnation"] != victim["stats"]["incarnation"]
            return
        await asyncio.sleep(0.5)
    raise AssertionError(f"{victim['worker_id']} did not come back")


def ids(i: int) -> list[int]:
    """A prompt of token ids; half of it is shared with every fifth."""
    length = (5, 50, 200, 500, 1500)[i % 5]
    shared = [6 + (i % 5 * 11 + j) % 3000 for j in range(length // 2)]
    return shared + [6 + (i * 37 + j * j) % 3000 for j in range(length - length // 2)]


async def stream_text(
    client: openai.AsyncOpenAI, i: int, max_tokens: int, begun: asyncio.Event | None = None
) -> str:
    stream = await client.completions.create(
        model="timed", prompt=ids(i), max_tokens=max_tokens, stream=True
    )
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].text if chunk.choices else ""
        if begun is not None:
            begun.set()
    return text


async def plain_text(client: openai.AsyncOpenAI, i: int, max_tokens: int) -> str:
    answer = await client.completions.create(model="timed", prompt=ids(i), max_tokens=max_tokens)
    return answer.choices[0].text


async def test_five_hundred_concurrent_clients_streaming_and_not(served: Served) -> None:
    async with served.client(
        http_client=httpx.AsyncClient(limits=httpx.Limits(max_connections=None))
    ) as client:
        jobs = [
            (stream_text if i % 2 else plain_text)(client, i, (1, 2, 8, 48)[i % 4])
            for i in range(500)
        ]
        texts = await asyncio.gather(*jobs)
        again = await stream_text(client, 3, 48)
    assert all(texts)
    assert texts[3] == again
    await assert_nothing_held(served)


async def test_kill_minus_nine_in_mid_stream_changes_no_text(served: Served) -> None:
    async with served.client() as client:
        before = await asyncio.gather(*(stream_text(client, i, 200) for i in range(20)))
        running = asyncio.gather(*(stream_text(client, i, 200) for i in range(20)))
        victim = (await asyncio.to_thread(served.status))[0]
        os.kill(int(victim["stats"]["pid"]), signal.SIGKILL)
        assert await running == before
        await assert_replaced(served, victim)
    await assert_nothing_held(served)


BAD = {
    "malformed JSON": b'{"model": "timed", "messages": [',
    "unknown model": b'{"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]}',
    "empty messages": b'{"model": "timed", "messages": []}',
    "max_tokens 0": b'{"model": "timed", "prompt": "x", "max_tokens": 0}',
    "max_tokens negative": b'{"model": "timed", "prompt": "x", "max_tokens": -3}',
    "NaN temperature": b'{"model": "timed", "prompt": "x", "temperature": NaN}',
    "wrong type": b'{"model": "timed", "prompt": {"a": 1}}',
    "longer than the context": json.dumps({"model": "timed", "prompt": [7] * 40_000}).encode(),
    "answer past the context": b'{"model": "timed", "prompt": "x", "max_tokens": 99999999}',
    "20 MB": b'{"model": "timed", "prompt": "' + b"x" * 20_000_000 + b'"}',
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_is_a_clear_4xx_and_leaks_nothing(served: Served, case: str) -> None:
    path = "chat/completions" if b"messages" in BAD[case] else "completions"
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        answer = await client.post(f"{served.url}/v1/{path}", content=BAD[case])
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


async def test_nothing_is_left_after_bad_input(served: Served) -> None:
    await assert_nothing_held(served)
    async with served.client() as client:
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-9", prompt="x")
        with pytest.raises(openai.BadRequestError, match="context"):
            await client.completions.create(model="timed", prompt=[7] * 40_000)


def test_a_profile_of_it_takes_no_less_than_the_model_it_sleeps_by(
    served: Served, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    sizes = ["--prompt", "64", "--prompt", "256", "--prompt", "480"]
    sizes += ["--batch", "1", "--batch", "4", "--context", "64", "--context", "256"]
    command = ["profile", "--url", served.url, "--out", str(file), "--repeats", "2", "--json"]
    subprocess.run(
        [*BATON, *command, *sizes], env=served.env, check=True, timeout=90, capture_output=True
    )
    profile = load_profile(str(file))
    model = FittedLatency.of(TimedConfig())
    assert profile.measured is not None
    for prompt in profile.measured.prefill:
        assert prompt.seconds >= model.step_s(StepShape([(0, prompt.end)]))
    for step in profile.measured.decode:
        assert step.seconds >= model.step_s(StepShape([], 1, 64))
    assert profile.latency.step_s(StepShape([(0, 480)])) > 0


async def test_a_stopped_worker_is_replaced_and_one_in_a_long_step_is_not() -> None:
    hang_s, timed = 2.0, {"prefill_per_token_ms": 6.0}
    assert FittedLatency.of(TimedConfig(**timed)).step_s(StepShape([(0, 500)])) > hang_s
    engine = {"kind": "timed", "kv_memory_mb": 16, "timed": timed}
    with serving(engine=engine, hang_timeout_s=hang_s) as served:
        async with served.client() as client:
            assert await plain_text(client, 3, 2)  # its prompt of 500 tokens is one step
            before = await asyncio.gather(*(stream_text(client, i, 300) for i in (0, 5, 10, 15)))
            workers = await asyncio.to_thread(served.status)
            (controller_log,) = served.folder.glob("baton-*/*/logs/controller.log")
            assert "worker_hangs" not in controller_log.read_text()

            victim = workers[0]
            begun = asyncio.Event()
            running = [
                asyncio.ensure_future(stream_text(client, i, 300, begun)) for i in (0, 5, 10, 15)
            ]
            await begun.wait()
            os.kill(victim["stats"]["pid"], signal.SIGSTOP)
            assert await asyncio.gather(*running) == before
            await assert_replaced(served, victim)
            assert await stream_text(client, 0, 300) == before[0]
        log = controller_log.read_text()
        line = f"worker_hangs worker_id={victim['worker_id']} pid={victim['stats']['pid']} "
        assert log.count(line) == log.count("worker_hangs") == 1
        status = await asyncio.to_thread(served.whole_status)
        (deaths,) = status["deaths"].values()
        assert (deaths["count"], deaths["last_pid"]) == (1, victim["stats"]["pid"])
        assert deaths["last_reason"].startswith("it hung")
        now = {w["worker_id"]: w["stats"] for w in status["workers"]}
        for worker in workers[1:]:
            assert now[worker["worker_id"]]["pid"] == worker["stats"]["pid"]
        await assert_nothing_held(served)
