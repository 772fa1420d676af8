"""Part `decision`: what one placement costs, with a million blocks indexed, hashing left out.

Timed is all the router does between the block hashes and the submit: the query, the policy's
choice, noting it, and finding who else holds the prefix. Prompts are those of the first trace, or
drawn like one, cut into 16-token blocks, whole ones; some of them are cached on the workers they
were dealt to, and chains of no prompt fill the index up to its million.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING

import psutil

from benchmarks.numbers import Samples, percentile
from benchmarks.routing.synthetic import BLOCK_TOKENS, synthetic_prompts
from benchmarks.routing.traces import Prompt, finer, load_trace
from benchmarks.types import Finding, Part, ResultTable, Run, Target
from core.blocks import chain_hashes
from core.ids import BlockHash, Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LoadReport, WorkerHello
from router.curves import Curves
from router.index import PrefixIndex
from router.place import Knowledge, PrefillPoolQuery
from router.policies.baton import Baton
from router.policies.build import DEFAULT_SLO
from router.pool import Pool
from router.view import WorkerView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCK = 16
_BLOCKS = 1_000_000
_PROMPTS = 1000
_CHAIN = 800
_FLEETS = (64, 1024)
_P99_US = 200.0
_RATIO = 1.5
_WHOLE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one fleet."""

    workers: int
    decisions: Samples
    bytes_per_block: float | None
    """None after the first fleet, whose memory the process keeps and uses again."""
    bound_bytes_per_block: float

    def us(self, share: float) -> float:
        return percentile(self.decisions.seconds, share) * 1e6


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
                promise=f"a decision among 64 workers takes under {_P99_US:g} us (p99)",
                measured=f"{few.us(0.99):.0f} us",
                held=few.us(0.99) < _P99_US,
            ),
            Target(
                promise=f"among 1,024 workers at most {_RATIO}x that",
                measured=f"{ratio:.2f}x",
                held=ratio <= _RATIO,
            ),
        ),
        keys={
            "decision_us_p50_64": round(few.us(0.5), 1),
            "decision_us_p99_64": round(few.us(0.99), 1),
            "decision_us_p99_1024": round(many.us(0.99), 1),
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
    parts = max(1, block // _BLOCK)
    return [Prompt(p.at_s, p.tokens, finer(p.hashes, parts)) for p in coarse]


def _source(run: Run) -> str:
    return run.traces[0].name if run.traces else "synthetic, drawn like Mooncake's conversations"


def _measure(run: Run, workers: int, prompts: Sequence[Prompt], decisions: int) -> Cost:
    random = Random(0)
    known = Knowledge(index=PrefixIndex(), curves=Curves(), slo=DEFAULT_SLO, random=random)
    before = _resident_bytes()
    views = [_view(known, i, random) for i in range(workers)]
    _fill(known.index, views, prompts, random)
    grown_bytes = _resident_bytes() - before
    pool, policy = Pool({view.hello.worker_id: view for view in views}), Baton(0.1)
    policy.choose(_query(pool, known, prompts[0], 0.0))  # builds the rings
    gc.collect()
    gc.freeze()  # the heap of the bench itself is no part of a decision
    seconds: list[float] = []
    for i in range(decisions):
        prompt, now_s = prompts[i % len(prompts)], i / 100
        began_s = time.perf_counter()
        query = _query(pool, known, prompt, now_s)
        decision = policy.choose(query)
        policy.placed(query, decision)
        query.source(decision.worker_id, pool, ())
        seconds.append(time.perf_counter() - began_s)
        if i % 500 == 0:
            run.progress(f"{workers} workers", i, decisions)
    gc.unfreeze()
    return Cost(
        workers=workers,
        decisions=Samples(tuple(seconds)),
        bytes_per_block=grown_bytes / known.index.blocks if workers == _FLEETS[0] else None,
        bound_bytes_per_block=known.index.bytes_per_block,
    )


def _query(pool: Pool, known: Knowledge, prompt: Prompt, now_s: float) -> PrefillPoolQuery:
    return PrefillPoolQuery(pool, known, now_s, tokens=prompt.tokens, hashes=prompt.hashes)


def _view(known: Knowledge, i: int, random: Random) -> WorkerView:
    name = f"w{i:04d}"
    hello = WorkerHello(
        worker_id=WorkerId(name),
        incarnation=Incarnation(name),
        role=Role.PREFILL,
        epoch=1,
        model_id=ModelId("bench"),
        layout=KvLayout(
            block_size=_BLOCK, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16"
        ),
        num_blocks=_BLOCKS,
        context_tokens=_BLOCK * _BLOCKS,
        peer_address=f"{name}:1",
    )
    view = WorkerView(hello, known.index.join(hello.worker_id))
    view.apply_snapshot(KvSnapshot(next_number=1))
    view.reported(
        LoadReport(
            last_submit=0,
            queued_tokens=random.randrange(20_000),
            waiting=random.randrange(8),
            running=1,
            context_tokens=0,
            free_blocks=_BLOCKS,
            total_blocks=_BLOCKS,
        )
    )
    return view


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
        chain_hashes(tokens, _BLOCK, prompt.hashes[0])
        seconds.append(time.perf_counter() - began_s)
    return Samples(tuple(seconds))


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _table(costs: Sequence[Cost], hashing: Samples) -> ResultTable:
    rows = tuple(
        (
            f"{cost.workers:,} workers",
            f"{cost.us(0.5):.0f}",
            f"{cost.us(0.99):.0f}",
            "" if cost.bytes_per_block is None else f"{cost.bytes_per_block:.0f}",
            f"{cost.bound_bytes_per_block:.0f}",
        )
        for cost in costs
    )
    hashed = f"{hashing.median_s * 1e6:.0f}", f"{percentile(hashing.seconds, 0.99) * 1e6:.0f}"
    return ResultTable(
        title=f"One decision, {_BLOCKS:,} blocks indexed",
        columns=("", "p50 us", "p99 us", "bytes per block", "counted by the bound"),
        texts=1,
        rows=(*rows, ("hashing, not included", *hashed, "", "")),
    )


def _draw(axes: Axes, costs: Sequence[Cost]) -> None:
    for cost in costs:
        ordered = sorted(cost.decisions.seconds)
        axes.plot(
            [s * 1e6 for s in ordered],
            [i / len(ordered) for i in range(len(ordered))],
            label=f"{cost.workers:,} workers",
        )
    axes.set_xlim(0, 2 * _P99_US)
    axes.set_xlabel("us per decision")
    axes.set_ylabel("share")
    axes.set_title("One decision, a million blocks indexed")
    axes.legend()


PART = Part(
    name="decision",
    what="what one placement costs",
    keys=(
        "decision_us_p50_64",
        "decision_us_p99_64",
        "decision_us_p99_1024",
        "index_bytes_per_block",
        "decision_prompts",
    ),
    run=run,
)
