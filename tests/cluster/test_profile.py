"""`baton profile`: what it makes of answers' times, and whom it cannot measure."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cluster import profile
from cluster.cli import app
from cluster.profile import decode_row, prefill_row
from cluster.profile_client import Answer, parse_url
from core.errors import ConfigError
from simulator.profiles.own import read_own
from simulator.profiles.types import BadProfile, Measured


def answer(first_s: float, step_s: float, tokens: int) -> Answer:
    return Answer(10.0, tuple(first_s + step_s * i for i in range(tokens)))


def test_a_prompts_row_is_the_median_time_to_its_first_token() -> None:
    answers = [answer(10.0 + ttft_s, 0.1, 1) for ttft_s in (0.5, 0.3, 9.0)]
    row = prefill_row(700, answers)
    assert (row.start, row.end) == (0, 700)
    assert row.seconds == pytest.approx(0.5)


def test_a_batchs_row_has_the_gaps_while_all_decode_and_their_context() -> None:
    early = Answer(0.0, (1.0, 1.5, 2.0, 2.1, 2.2, 2.3, 2.4))
    late = Answer(0.0, (2.0, 2.1, 2.2, 2.3, 2.4, 2.9, 3.4))
    row = decode_row(2, 100, [early, late])
    assert row.seconds == pytest.approx(0.1)
    assert row.context_tokens == 2 * 100 + round(2 * (4.5 + 2.5) / 2)


def test_answers_that_hardly_overlap_are_no_batch() -> None:
    with pytest.raises(ConfigError, match="hardly decoded together"):
        decode_row(2, 100, [answer(1.0, 0.1, 8), answer(5.0, 0.1, 8)])


@pytest.mark.parametrize(
    ("url", "place"),
    [("http://127.0.0.1:8000", ("127.0.0.1", 8000)), ("localhost:81/v1", ("localhost", 81))],
)
def test_a_router_is_named_by_its_url(url: str, place: tuple[str, int]) -> None:
    assert parse_url(url) == place


@pytest.mark.parametrize("url", ["", "https://x", "http://x:port"])
def test_what_is_no_url_of_a_router_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_url(url)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    out = tmp_path / "none" / "p.json"
    nobody = "http://127.0.0.1:9"  # measuring would fail there, with another sentence
    done = CliRunner().invoke(app, ["profile", "--url", nobody, "--out", str(out)])
    assert done.exit_code == 1
    assert done.stderr == f"error: --out: there is no folder {out.parent}\n"


WORKERS = [
    {"role": "prefill", "total_blocks": 7},
    {"role": "decode", "total_blocks": 300},
    {"role": "decode", "total_blocks": 200},
    {"role": "decode", "total_blocks": 0},
]
SIZES = [*("--prompt", "8", "--prompt", "16", "--prompt", "32", "--repeats", "1")]
SIZES += [*("--batch", "1", "--batch", "2", "--context", "8", "--context", "16")]


class Router:
    """Answers each prompt with a token per millisecond; from prompt `refuses_from` on with 429.

    Once `key` is set, whoever does not send it gets 401.
    """

    key = b""

    def __init__(self, refuses_from: int, workers: object) -> None:
        self._refuses_from = refuses_from
        self._workers = workers
        self.asked = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if self.key and b"authorization: bearer " + self.key not in head.lower():
            writer.write(b'HTTP/1.1 401 No\r\n\r\n{"error": {"message": "wrong API key"}}')
        elif head.startswith(b"GET"):
            models = {"data": [{"id": "fake"}]}
            body = self._workers if b"/control/workers" in head else models
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(body).encode())
        else:
            await self._answer(head, reader, writer)
        writer.close()

    async def _answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        size = int(head.lower().partition(b"content-length:")[2].split()[0])
        asked = json.loads(await reader.readexactly(size))
        self.asked += 1
        if self.asked >= self._refuses_from:
            writer.write(b'HTTP/1.1 429 Too Many\r\n\r\n{"error": {"message": "busy"}}')
            return
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(asked["max_tokens"]):
            await asyncio.sleep(0.001)
            writer.write(b"data: {}\n\n")
        writer.write(b"data: [DONE]\n\n")


@contextmanager
def router(refuses_from: int = 10_000, workers: object = WORKERS) -> Iterator[tuple[str, Router]]:
    """Its URL; it lives on a thread, as the command line has a loop of its own."""
    one, loop = Router(refuses_from, workers), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(one.serve, "127.0.0.1", 0, limit=1 << 20))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", one
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.close()


def measure(url: str, out: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["profile", "--url", url, "--out", str(out), *SIZES, *more])


def test_a_profile_has_the_room_of_the_smallest_decode_worker(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    with router() as (url, _):
        done = measure(url, out, "--block-size", "32")
    assert done.exit_code == 0, done.output
    assert read_own(out).kv_tokens == json.loads(done.stdout.splitlines()[-1])["kv_tokens"] == 6400


@pytest.mark.parametrize("workers", [{"detail": "Not Found"}, [], "no list"])
def test_a_server_that_does_not_tell_its_room_leaves_it_open(
    workers: object, tmp_path: Path
) -> None:
    out = tmp_path / "p.json"
    with router(workers=workers) as (url, _):
        done = measure(url, out)
    assert done.exit_code == 0, done.output
    assert read_own(out).kv_tokens is None
    assert "set simulation.kv_tokens" in done.stdout


@pytest.mark.parametrize("refuses_from", [2, 6])
def test_a_refusal_is_a_sentence_alone_or_in_a_batch(refuses_from: int, tmp_path: Path) -> None:
    with router(refuses_from) as (url, _):
        done = measure(url, tmp_path / "p.json")
    assert done.exit_code == 1
    assert done.stderr == "error: the router refused a prompt: busy\n"


def test_a_router_with_keys_is_measured_with_one_of_them(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    with router() as (url, one):
        one.key = b"secret"
        without, wrong = measure(url, out), measure(url, out, "--api-key", "guess")
        done = measure(url, out, "--api-key", "secret")
    for refused in (without, wrong):
        assert refused.stderr == "error: the router refuses /v1/models: wrong API key\n"
    assert done.exit_code == 0, done.output
    assert read_own(out).kv_tokens == 3200


def test_nobody_at_the_url_is_said_without_python(tmp_path: Path) -> None:
    done = measure("http://127.0.0.1:9", tmp_path / "p.json")
    assert done.stderr == "error: no router answers at 127.0.0.1:9: Connection refused\n"
    with server_that_says(b"HTTP/1.1 200 OK\r\n\r\n<html>") as url:
        done = measure(url, tmp_path / "p.json")
    assert done.exit_code == 1
    assert done.stderr.endswith("names no model: is it a router?\n")


@contextmanager
def server_that_says(answer: bytes) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (["--prompt", "8", "--prompt", "8", "--prompt", "16"], "--prompt: a profile needs 3"),
        (["--batch", "2", "--context", "8", "--context", "16"], "--batch, --context: a profile"),
    ],
)
def test_too_few_lengths_are_refused_before_anything_is_measured(
    sizes: list[str], said: str, tmp_path: Path
) -> None:
    with router() as (url, asked):
        args = ["profile", "--url", url, "--out", str(tmp_path / "p.json"), *sizes]
        done = CliRunner().invoke(app, args)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {said}")
    assert asked.asked == 0


def test_what_was_measured_is_written_before_it_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_fit(_: Measured) -> None:
        raise BadProfile("a step of a profile takes no time")

    monkeypatch.setattr(profile, "fit_latency", no_fit)
    out = tmp_path / "p.json"
    with router() as (url, _):
        done = measure(url, out)
    assert done.exit_code == 1
    assert [row.end for row in read_own(out).prefill] == [8, 16, 32]


def test_an_interrupt_ends_the_measuring_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "_measure", interrupted)
    done = measure("http://127.0.0.1:9", tmp_path / "p.json")
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "interrupted: the measuring was given up, no profile is written\n"
