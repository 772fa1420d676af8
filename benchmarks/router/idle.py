"""Part `idle`: streams whose answer pauses, as while their worker is slow: memory, and who minds.

Every stream has its first token and waits for the second. Others ask for one token meanwhile, which
needs no decode step.
"""

import statistics
from contextlib import closing

from benchmarks.machine import raise_file_limit
from benchmarks.router.client import Client, chat_body
from benchmarks.router.latency import Pool, Ttft, open_loop
from benchmarks.router.rig import Rig, hosted
from benchmarks.router.tokens import until_spoken
from benchmarks.types import BenchFailed, Finding, Part, ResultTable, Run, Target

STREAMS, QUICK_STREAMS = 10_000, 1_000
MOVED_TARGET_MS = 5.0
_PROMPT_CHARS = 200
WINDOWS = 3
_SETTLE_S = 0.3
_STEP_S = 600.0
_OPENING = 64
_WARM = 300
_SPARE_FILES = 500


def run(run: Run) -> Finding:
    """Open them, look at the router's memory, and ask beside them. Raises BenchFailed."""
    streams = QUICK_STREAMS if run.quick else STREAMS
    files, limit = streams + _WARM + _SPARE_FILES, raise_file_limit()
    if limit < files:
        raise BenchFailed(
            f"{streams} streams need {files} open files, and the hard limit is {limit}: raise it"
            " (ulimit -Hn, or nofile in /etc/security/limits.conf) and try again"
        )
    return hosted(run).run(lambda rig: _measure(run, rig, streams))


async def _measure(run: Run, rig: Rig, streams: int) -> Finding:
    seconds = 0.8 if run.quick else 3.0
    run.progress("opening streams", 0, streams)
    rig.step(_STEP_S)
    warm = await _open(rig, _WARM, run)  # what the first streams allocate stays
    alone = await _others(rig, seconds, seed=10)
    rss_bytes, clients = rig.rss_bytes(), await _open(rig, streams, run)
    per_stream_bytes = (rig.rss_bytes() - rss_bytes) / streams
    beside = await _others(rig, seconds, seed=20)
    alive = sum(client.alive for client in clients)
    for client in clients + warm:
        client.close()
    return _finding(streams, alive, per_stream_bytes, alone, beside)


async def _open(rig: Rig, streams: int, run: Run) -> list[Client]:
    clients: list[Client] = []
    while len(clients) < streams:
        some = [
            await Client.connect(rig.port) for _ in range(min(_OPENING, streams - len(clients)))
        ]
        for i, client in enumerate(some, len(clients)):
            client.ask(chat_body(rig.model, rig.prompt(i, _PROMPT_CHARS), 100))
        await until_spoken(some)
        clients += some
        run.progress("opening streams", len(clients), streams)
    return clients


async def _others(rig: Rig, seconds: float, seed: int) -> list[Ttft]:
    """Windows of one-token answers, at 100 a second."""
    with closing(Pool(rig.port)) as pool:
        await pool.warm(16)

        async def one(number: int) -> float:
            prompt = rig.prompt(seed * 1_000_000 + number, _PROMPT_CHARS)
            return (await pool.ask(chat_body(rig.model, prompt, 1))).ttft_s

        await open_loop(one, seed, _SETTLE_S)
        windows = range(seed, seed + WINDOWS)
        return [Ttft.of(await open_loop(one, number, seconds)) for number in windows]


def _finding(
    streams: int, alive: int, per_stream_bytes: float, alone: list[Ttft], beside: list[Ttft]
) -> Finding:
    rows = [("none", alone), (f"{streams}", beside)]
    moved_ms = _median_p99(beside) - _median_p99(alone)
    return Finding(
        tables=(
            ResultTable(
                title=f"{streams} idle open streams: {per_stream_bytes / 1024:.1f} KiB each",
                columns=("idle streams", "others' TTFT p50 ms", "p99 ms", "p99 of windows"),
                texts=0,
                rows=tuple(
                    (
                        name,
                        f"{statistics.median(ttft.p50 for ttft in ttfts):.2f}",
                        f"{_median_p99(ttfts):.2f}",
                        " ".join(f"{ttft.p99:.1f}" for ttft in ttfts),
                    )
                    for name, ttfts in rows
                ),
            ),
        ),
        targets=(
            Target(
                promise=f"{streams} idle streams stay open and move the others' p99 by less than"
                f" {MOVED_TARGET_MS:g} ms",
                measured=f"{alive} open, {moved_ms:+.2f} ms",
                held=alive == streams and moved_ms < MOVED_TARGET_MS,
            ),
        ),
        keys={
            "idle_streams": streams,
            "idle_bytes_per_stream": round(per_stream_bytes),
            "idle_moves_p99_ms": round(moved_ms, 3),
        },
    )


def _median_p99(ttfts: list[Ttft]) -> float:
    return statistics.median(ttft.p99 for ttft in ttfts)


PART = Part(
    name="idle",
    what="open streams that wait: memory of each, and what others notice",
    keys=("idle_streams", "idle_bytes_per_stream", "idle_moves_p99_ms"),
    run=run,
)
