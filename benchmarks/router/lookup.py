"""Part `lookup`: how the prefix lookup and hashing grow with a prompt's length.

A lookup bisects the prompt's blocks, so sixteen times the blocks cost a few probes more; hashing
has to look at every token once, and is printed beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from benchmarks.numbers import Samples
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from core.blocks import chain_hashes, root_hash
from core.ids import BlockHash, ModelId, WorkerId
from router.index import PrefixIndex

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCK = 16
_LENGTHS = (64, 256, 1024, 4096, 8192)
"""Blocks per prompt; the last is 131,072 tokens."""
_PROMPTS = 16
_WORKERS = 64
_ENOUGH = 8
_LOOKUPS, _QUICK_LOOKUPS = 2000, 400
_SUBLINEAR = 0.5
_VOCABULARY = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of prompts of one length."""

    blocks: int
    lookup: Samples
    hashing: Samples


def run(run: Run) -> Finding:
    """Prompts of which random shares are cached on random workers."""
    lookups = _QUICK_LOOKUPS if run.quick else _LOOKUPS
    costs: list[Cost] = []
    for i, blocks in enumerate(_LENGTHS):
        run.progress(f"{blocks} blocks", i, len(_LENGTHS))
        costs.append(measure(blocks, lookups))
    return _finding(costs)


def measure(blocks: int, lookups: int) -> Cost:
    """Times `levels`, the question a placement asks, each time of another prompt."""
    random, root = Random(blocks), root_hash(ModelId("bench"), "")
    index = PrefixIndex()
    holdings = [index.join(WorkerId(f"w{i}")) for i in range(_WORKERS)]
    for one in holdings:
        one.gather(())
        one.swap()
    prompts: list[Sequence[BlockHash]] = []
    hashing_s: list[float] = []
    for _ in range(_PROMPTS):
        tokens = [random.randrange(_VOCABULARY) for _ in range(blocks * _BLOCK)]
        began_s = time.perf_counter()
        hashes = tuple(chain_hashes(tokens, _BLOCK, root))
        hashing_s.append(time.perf_counter() - began_s)
        prompts.append(hashes)
        for one in random.sample(holdings, _ENOUGH):
            one.stored(hashes[: random.randrange(1, blocks + 1)])
    lookup_s: list[float] = []
    for i in range(lookups):
        asked = prompts[i % _PROMPTS]
        began_s = time.perf_counter()
        index.levels(asked, index.live, _ENOUGH)
        lookup_s.append(time.perf_counter() - began_s)
    return Cost(blocks=blocks, lookup=Samples(tuple(lookup_s)), hashing=Samples(tuple(hashing_s)))


def _finding(costs: Sequence[Cost]) -> Finding:
    power = growth([cost.blocks for cost in costs], [cost.lookup.median_s for cost in costs])
    lookup_us: dict[str, Json] = {str(c.blocks): round(c.lookup.median_s * 1e6, 2) for c in costs}
    hash_us: dict[str, Json] = {str(c.blocks): round(c.hashing.median_s * 1e6, 1) for c in costs}
    return Finding(
        tables=(_table(costs),),
        targets=(
            Target(
                promise=f"a lookup grows with at most the power {_SUBLINEAR:g} of the blocks",
                measured=f"power {power:.2f} from {costs[0].blocks} to {costs[-1].blocks} blocks",
                held=power <= _SUBLINEAR,
            ),
        ),
        keys={"lookup_us": lookup_us, "hash_us": hash_us, "lookup_power": round(power, 3)},
        draw=lambda axes: _draw(axes, costs),
    )


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The power p of seconds ~ size^p: the slope of a least squares line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(s) for s in seconds]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def _table(costs: Sequence[Cost]) -> ResultTable:
    return ResultTable(
        title=f"prefix lookup among {_WORKERS} workers, by length of the prompt",
        columns=("blocks", "tokens", "lookup us", "p90 us", "hashing us"),
        texts=0,
        rows=tuple(
            (
                f"{cost.blocks}",
                f"{cost.blocks * _BLOCK}",
                f"{cost.lookup.median_s * 1e6:.1f}",
                f"{cost.lookup.p90_s * 1e6:.1f}",
                f"{cost.hashing.median_s * 1e6:.0f}",
            )
            for cost in costs
        ),
    )


def _draw(axes: Axes, costs: Sequence[Cost]) -> None:
    blocks = [cost.blocks for cost in costs]
    axes.loglog(blocks, [cost.lookup.median_s * 1e6 for cost in costs], marker="o", label="lookup")
    axes.loglog(blocks, [c.hashing.median_s * 1e6 for c in costs], marker="o", label="hashing")
    axes.set(xlabel="blocks of 16 tokens", ylabel="us")
    axes.legend()
    axes.set_title("a prompt's lookup and hashing")


PART = Part(
    name="lookup",
    what="prefix lookup and hashing by length of the prompt",
    keys=("lookup_us", "hash_us", "lookup_power"),
    run=run,
)
