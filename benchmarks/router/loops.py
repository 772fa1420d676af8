"""Closed loops: so many clients, each asking again at once; workers that take no time."""

import asyncio
import statistics
import time
from dataclasses import dataclass

from benchmarks.numbers import percentile
from benchmarks.router.client import chat_body, closed_loop
from benchmarks.router.rig import Rig

PROMPT_CHARS = 1024
_WARM_S = 0.3
_PAUSE_S = 0.1
STALL_S = 0.038
"""Linux delays an ACK by 40 ms; a server that waits for it pauses for about that long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """One closed loop. `stalls` are gaps within an answer of the length of a delayed ACK."""

    clients: int
    answer_tokens: int
    answers_per_s: float
    cpu_us_per_answer: float
    tokens_per_cpu_s: float
    ttft_ms_p50: float
    coalesced_share: float
    stalls: int

    @property
    def answers_per_cpu_s(self) -> float:
        return 1e6 / self.cpu_us_per_answer


async def measure_loop(
    rig: Rig, *, clients: int, answer_tokens: int, seconds: float, step_s: float = 0.0
) -> Loop:
    """Prompts of 1 KB, each different from its first words on."""
    rig.step(step_s)
    start = time.monotonic_ns()

    def body(number: int) -> bytes:
        return chat_body(rig.model, rig.prompt(start + number, PROMPT_CHARS), answer_tokens)

    await closed_loop(rig.port, body, streams=clients, seconds=_WARM_S)
    began_s, cpu_s = time.monotonic(), rig.cpu_s()
    answers = await closed_loop(rig.port, body, streams=clients, seconds=seconds)
    cpu_s, took_s = rig.cpu_s() - cpu_s, time.monotonic() - began_s
    await asyncio.sleep(_PAUSE_S)
    events = sum(seen.events for seen in answers)
    return Loop(
        clients=clients,
        answer_tokens=answer_tokens,
        answers_per_s=len(answers) / took_s,
        cpu_us_per_answer=cpu_s / len(answers) * 1e6,
        tokens_per_cpu_s=len(answers) * answer_tokens / cpu_s,
        ttft_ms_p50=1e3 * percentile([seen.ttft_s for seen in answers], 0.5),
        coalesced_share=1 - sum(seen.reads for seen in answers) / events,
        stalls=sum(gap_s >= STALL_S for seen in answers for gap_s in seen.gaps_s),
    )


def median_loop(loops: list[Loop]) -> Loop:
    """The one whose CPU per answer is the median; stalls of all."""
    middle = statistics.median_low(loop.cpu_us_per_answer for loop in loops)
    chosen = next(loop for loop in loops if loop.cpu_us_per_answer == middle)
    return Loop(
        clients=chosen.clients,
        answer_tokens=chosen.answer_tokens,
        answers_per_s=chosen.answers_per_s,
        cpu_us_per_answer=chosen.cpu_us_per_answer,
        tokens_per_cpu_s=chosen.tokens_per_cpu_s,
        ttft_ms_p50=chosen.ttft_ms_p50,
        coalesced_share=chosen.coalesced_share,
        stalls=sum(loop.stalls for loop in loops),
    )
