"""Closed loops: so many clients, each asking again at once; workers that take no time."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.router.client import Seen, closed_loop
from benchmarks.types import BenchFailed
from core.estimate import percentile

PROMPT_CHARS = 1024
STALL_CLIENTS, STALL_TOKENS, STALL_STEP_S = 4, 16, 0.005
STALL_S = 0.038
"""Linux delays an ACK by 40 ms; a server that waits for it pauses for about that long."""
_TIMEOUT_S = 60.0

Bodies = Callable[[int], bytes]


class Front(Protocol):
    """A router that listens on 127.0.0.1, and its workers. CPU is what the OS counts."""

    @property
    def port(self) -> int: ...

    def cpu_s(self) -> float:
        """Of the processes of the router."""
        ...

    def workers_cpu_s(self) -> float: ...

    def step(self, step_s: float) -> None:
        """The time of a decode step from now on, where the workers have one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """One closed loop, or medians of several. `stalls` are gaps within an answer of the length of a
    delayed ACK; a token that shares its SSE event, or an event its packet, is less than one each.
    """

    clients: int
    answer_tokens: int
    answers: int
    answers_per_s: float
    cpu_us_per_answer: float
    workers_us_per_answer: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    events_per_answer: float
    coalesced_share: float
    stalls: int

    @property
    def answers_per_cpu_s(self) -> float:
        return 1e6 / self.cpu_us_per_answer

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.answer_tokens * self.answers_per_cpu_s

    @property
    def answers_per_cpu_s_with_workers(self) -> float:
        return 1e6 / (self.cpu_us_per_answer + self.workers_us_per_answer)


async def warm(front: Front, body: Bodies, *, clients: int) -> None:
    """What a first short loop allocates and connects does not count."""
    front.step(0.0)
    await _closed(front, body, clients, 0.3)


async def measure_loop(
    front: Front,
    body: Bodies,
    *,
    clients: int,
    answer_tokens: int,
    seconds: float,
    step_s: float = 0.0,
    quick_acks: bool = False,
) -> Loop:
    """Clients stop asking after `seconds`; what they have asked is answered and counts.

    `body` makes requests for `answer_tokens` tokens. Raises BenchFailed.
    """
    front.step(step_s)
    began_s, cpu_s, workers_s = time.monotonic(), front.cpu_s(), front.workers_cpu_s()
    answers = await _closed(front, body, clients, seconds, quick_acks=quick_acks)
    cpu_s, took_s = front.cpu_s() - cpu_s, time.monotonic() - began_s
    workers_s = front.workers_cpu_s() - workers_s
    events = sum(seen.events for seen in answers)
    ttfts_s = [seen.ttft_s for seen in answers]
    return Loop(
        clients=clients,
        answer_tokens=answer_tokens,
        answers=len(answers),
        answers_per_s=len(answers) / took_s,
        cpu_us_per_answer=cpu_s / len(answers) * 1e6,
        workers_us_per_answer=workers_s / len(answers) * 1e6,
        ttft_ms_p50=1e3 * percentile(ttfts_s, 0.5),
        ttft_ms_p99=1e3 * percentile(ttfts_s, 0.99),
        events_per_answer=events / len(answers),
        coalesced_share=1 - sum(seen.reads for seen in answers) / events,
        stalls=sum(gap_s >= STALL_S for seen in answers for gap_s in seen.gaps_s),
    )


async def measure_stalls(
    front: Front, body: Bodies, seconds: float, *, quick_acks: bool = False
) -> Loop:
    """Few clients and slow steps, so that little but the network can pause an answer.

    Pauses that are still there with `quick_acks` have another cause than delayed ACKs of clients.
    """
    return await measure_loop(
        front,
        body,
        clients=STALL_CLIENTS,
        answer_tokens=STALL_TOKENS,
        seconds=seconds,
        step_s=STALL_STEP_S,
        quick_acks=quick_acks,
    )


def median_loop(loops: Sequence[Loop]) -> Loop:
    """The median of each number; answers and stalls of all together."""

    def median(number: Callable[[Loop], float]) -> float:
        return statistics.median(map(number, loops))

    return Loop(
        clients=loops[0].clients,
        answer_tokens=loops[0].answer_tokens,
        answers=sum(loop.answers for loop in loops),
        answers_per_s=median(lambda loop: loop.answers_per_s),
        cpu_us_per_answer=median(lambda loop: loop.cpu_us_per_answer),
        workers_us_per_answer=median(lambda loop: loop.workers_us_per_answer),
        ttft_ms_p50=median(lambda loop: loop.ttft_ms_p50),
        ttft_ms_p99=median(lambda loop: loop.ttft_ms_p99),
        events_per_answer=median(lambda loop: loop.events_per_answer),
        coalesced_share=median(lambda loop: loop.coalesced_share),
        stalls=sum(loop.stalls for loop in loops),
    )


async def _closed(
    front: Front, body: Bodies, clients: int, seconds: float, *, quick_acks: bool = False
) -> list[Seen]:
    try:
        async with asyncio.timeout(seconds + _TIMEOUT_S):
            return await closed_loop(
                front.port, body, streams=clients, seconds=seconds, quick_acks=quick_acks
            )
    except TimeoutError:
        raise BenchFailed(f"answers did not end within {_TIMEOUT_S:g} s") from None
    except ExceptionGroup as group:
        raise BenchFailed(str(group.exceptions[0])) from group
