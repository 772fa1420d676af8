"""Part `decision`: what placing one request costs, with a million blocks indexed, hashing left out.

Timed is all the router does between the block hashes and the submits: the prefill policy's choice,
the look for one worker that serves the prompt alone, admission's outlooks, noting the choice and
what is on its way, finding who else holds the prefix, and the choice of the decode worker. Beside
it the prefill policy alone. It is CPU time of the one thread that decides: nothing here waits, and
what else runs on the machine is no part of it.

Prompts are those of the first trace, or drawn like one, cut into 16-token blocks, whole ones; some
of them are cached on the workers they were dealt to, and chains of no prompt fill the index up to
its million.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING

import psutil

from benchmarks.numbers import Samples
from benchmarks.routing.standing import (
    ANSWER_TOKENS,
    ARENA_BLOCKS,
    BLOCK,
    StandingFleet,
    taught_chooser,
)
from benchmarks.routing.synthetic import BLOCK_TOKENS, synthetic_prompts
from benchmarks.routing.traces import Prompt, finer, load_trace
from benchmarks.types import Finding, Part, ResultTable, Run, Target
from core.blocks import chain_hashes
from core.clock import FakeClock
from core.estimate import percentile
from core.ids import BlockHash, Role
from router.admission import Longs, judge
from router.config import RouterConfig
from router.curves import Curves
from router.index import PrefixIndex
from router.place import Knowledge, PrefillPoolQuery
from router.policies.build import DEFAULT_SLO, build_policies
from router.queued import QueuedPrompt
from router.view import WorkerView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCKS = ARENA_BLOCKS
_PROMPTS = 1000
_CHAIN = 800
_FLEETS = (64, 1024)
_P99_US = 200.0
_RATIO = 1.5
_WHOLE = 1 << 20
_ON_WAY = 4
"""Prompts per prefill worker that have no first token yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one fleet."""

    workers: int
    """Of either role."""
    decisions: Samples
    policy: Samples
    """Of these, the prefill policy's part, measured by itself."""
    alone: float
    """Share of the prompts that one worker serves."""
    bytes_per_block: float | None
    """None after the first fleet, whose memory the process keeps and uses again."""
    bound_bytes_per_block: float

    def us(self, share: float) -> float:
        return percentile(self.decisions.seconds, share) * 1e6

    def policy_us(self, share: float) -> float:
        return percentile(self.policy.seconds, share) * 1e6


def run(run: Run) -> Finding:
    """Of prompts of the first trace, or of drawn ones. Raises BenchFailed for what is no trace."""
    prompts = fine_prompts(run)
    decisions = 2000 if run.quick else 20_000
    costs = [_measure(run, workers, prompts, decisions) for workers in _FLEETS]
    few, many = costs
    ratio = many.us(0.99) / few.us(0.99)
    return Finding(
        tables=(_table(costs, _hashing(prompts)),),
        targets=(
            Target(
                promise=f"placing a request among 64 + 64 workers takes under {_P99_US:g} us (p99)",
                measured=f"{few.us(0.99):.0f} us",
                held=few.us(0.99) < _P99_US,
            ),
            Target(
                promise=f"among 1,024 + 1,024 at most {_RATIO}x that",
                measured=f"{ratio:.2f}x",
                held=ratio <= _RATIO,
            ),
        ),
        keys={
            "decision_us_p50_64": round(few.us(0.5), 1),
            "decision_us_p99_64": round(few.us(0.99), 1),
            "decision_us_p99_1024": round(many.us(0.99), 1),
            "policy_us_p50_64": round(few.policy_us(0.5), 1),
            "policy_us_p99_64": round(few.policy_us(0.99), 1),
            "policy_us_p99_1024": round(many.policy_us(0.99), 1),
            "index_bytes_per_block": round(few.bytes_per_block or 0.0, 1),
            "decision_prompts": _source(run),
        },
        notes=(f"Prompts: {_source(run)}.",),
        draw=lambda axes: _draw(axes, costs),
    )


def fine_prompts(run: Run) -> list[Prompt]:
    """In blocks of 16 tokens."""
    if run.traces:
        trace = load_trace(run.traces[0], _WHOLE)
        coarse, block = trace.prompts(_PROMPTS, 0), trace.block_size
    else:
        coarse, block = synthetic_prompts(_PROMPTS, 0), BLOCK_TOKENS
    parts = max(1, block // BLOCK)
    return [Prompt(p.at_s, p.tokens, finer(p.hashes, parts)) for p in coarse]


def _source(run: Run) -> str:
    return run.traces[0].name if run.traces else "synthetic, drawn like Mooncake's conversations"


def _measure(run: Run, workers: int, prompts: Sequence[Prompt], decisions: int) -> Cost:
    random, clock = Random(0), FakeClock()
    before = _resident_bytes()
    fleet = StandingFleet(workers, random)
    _fill(fleet.index, fleet.views, prompts, random)
    grown_bytes = _resident_bytes() - before
    placing = _Placing(fleet, clock, random)
    placing.place(prompts[0])  # builds the rings
    gc.collect()
    gc.freeze()  # the heap of the bench itself is no part of a decision
    whole: list[float] = []
    policy: list[float] = []
    for i in range(decisions):
        clock.advance(0.01)
        # Others, so that neither finds what the other has just looked up.
        whole.append(placing.place(prompts[i % len(prompts)]))
        policy.append(placing.choose(prompts[(i + _PROMPTS // 2) % len(prompts)]))
        if i % 500 == 0:
            run.progress(f"{workers} workers", i, decisions)
    gc.unfreeze()
    return Cost(
        workers=workers,
        decisions=Samples(tuple(whole)),
        policy=Samples(tuple(policy)),
        alone=placing.alone / (decisions + 1),
        bytes_per_block=grown_bytes / fleet.index.blocks if workers == _FLEETS[0] else None,
        bound_bytes_per_block=fleet.index.bytes_per_block,
    )


class _Placing:
    """The calls of router/admission_line.py and router/attempt.py, in their order."""

    def __init__(self, fleet: StandingFleet, clock: FakeClock, random: Random) -> None:
        self._clock = clock
        self._chooser = taught_chooser(fleet, clock, random)
        self._longs = Longs()
        self._on_way: deque[QueuedPrompt] = deque()
        self._most_on_way = _ON_WAY * len(fleet.pool(Role.PREFILL).workers)
        self._fleet = fleet
        self._known = Knowledge(
            index=fleet.index, curves=Curves(), slo=DEFAULT_SLO, random=Random(1)
        )
        self._policy = build_policies(RouterConfig()).prefill
        self.alone = 0
        """Prompts that one worker serves."""

    def place(self, prompt: Prompt) -> float:
        """Seconds it took."""
        began_s = time.thread_time()
        queued = self._place(prompt)
        took_s = time.thread_time() - began_s
        if queued is None:
            self.alone += 1
        else:
            self._on_way.append(queued)
        if len(self._on_way) > self._most_on_way:
            self._chooser.queued.discard(self._on_way.popleft())
        return took_s

    def _place(self, prompt: Prompt) -> QueuedPrompt | None:
        chooser, now_s = self._chooser, self._clock.now_s()
        tokens, total = prompt.tokens, prompt.tokens + ANSWER_TOKENS
        considered = chooser.consider(range(tokens), "", hashes=prompt.hashes, local_total=total)
        self._longs.saw(considered, DEFAULT_SLO)
        judge(now_s, now_s, considered, DEFAULT_SLO, (), give_way=self._longs.give_way)
        alone = chooser.place_locally(considered)
        if alone is not None:
            return None
        placed = chooser.place(considered)
        if placed.queued is not None:
            chooser.queued.add(placed.queued)
        address = placed.link.view.hello.peer_address
        chooser.for_decode(tokens, total, set(), kv_address=address)
        return placed.queued

    def choose(self, prompt: Prompt) -> float:
        """Seconds that the prefill policy took."""
        pool, now_s = self._fleet.pool(Role.PREFILL), self._clock.now_s()
        began_s = time.thread_time()
        query = PrefillPoolQuery(
            pool, self._known, now_s, tokens=prompt.tokens, hashes=prompt.hashes
        )
        decision = self._policy.choose(query)
        took_s = time.thread_time() - began_s
        self._policy.placed(query, decision)
        return took_s


def _fill(
    index: PrefixIndex, views: Sequence[WorkerView], prompts: Sequence[Prompt], random: Random
) -> None:
    for prompt in prompts:
        # Copies: hashes come off the wire as objects of their own.
        random.choice(views).holdings.stored(
            [BlockHash(bytes(bytearray(h))) for h in prompt.hashes]
        )
    while index.blocks < _BLOCKS:
        seed = random.randbytes(12)
        random.choice(views).holdings.stored(
            [
                BlockHash(blake2b(seed + i.to_bytes(4), digest_size=16).digest())
                for i in range(min(_CHAIN, _BLOCKS - index.blocks))
            ]
        )


def _hashing(prompts: Sequence[Prompt]) -> Samples:
    """Seconds to hash each of some prompts' tokens."""
    seconds: list[float] = []
    for prompt in prompts[:200]:
        tokens = list(range(prompt.tokens))
        began_s = time.perf_counter()
        chain_hashes(tokens, BLOCK, prompt.hashes[0])
        seconds.append(time.perf_counter() - began_s)
    return Samples(tuple(seconds))


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _table(costs: Sequence[Cost], hashing: Samples) -> ResultTable:
    rows = tuple(
        (
            f"{cost.workers:,} of each role",
            f"{cost.us(0.5):.0f}",
            f"{cost.us(0.99):.0f}",
            f"{cost.policy_us(0.5):.0f}",
            f"{cost.policy_us(0.99):.0f}",
            f"{cost.alone:.0%}",
            "" if cost.bytes_per_block is None else f"{cost.bytes_per_block:.0f}",
            f"{cost.bound_bytes_per_block:.0f}",
        )
        for cost in costs
    )
    hashed = f"{hashing.median_s * 1e6:.0f}", f"{percentile(hashing.seconds, 0.99) * 1e6:.0f}"
    return ResultTable(
        title=f"Placing one request, {_BLOCKS:,} blocks indexed",
        columns=(
            "",
            "p50 us",
            "p99 us",
            "policy p50",
            "policy p99",
            "one worker",
            "bytes per block",
            "counted by the bound",
        ),
        texts=1,
        rows=(*rows, ("hashing, not included", *hashed, "", "", "", "", "")),
    )


def _draw(axes: Axes, costs: Sequence[Cost]) -> None:
    for cost in costs:
        ordered = sorted(cost.decisions.seconds)
        axes.plot(
            [s * 1e6 for s in ordered],
            [i / len(ordered) for i in range(len(ordered))],
            label=f"{cost.workers:,} of each role",
        )
    axes.set_xlim(0, 2 * _P99_US)
    axes.set_xlabel("us per request")
    axes.set_ylabel("share")
    axes.set_title("Placing one request, a million blocks indexed")
    axes.legend()


PART = Part(
    name="decision",
    what="what placing a request costs",
    keys=(
        "decision_us_p50_64",
        "decision_us_p99_64",
        "decision_us_p99_1024",
        "policy_us_p50_64",
        "policy_us_p99_64",
        "policy_us_p99_1024",
        "index_bytes_per_block",
        "decision_prompts",
    ),
    run=run,
)
