"""Times of single kernels, summed to a step: LLMServingSim's and aiconfigurator's tables.

LLMServingSim measures the layers of one model within vLLM. aiconfigurator measures matrix products,
attention and all-reduces of many shapes, of which those of a model are taken, or interpolated
between neighbours; norms and sampling are not in it. Neither has what an engine does between its
kernels, so the sum is a lower bound, and `overhead_s` of a step is the caller's to add.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from engine.latency.curve import Curve, Grid
from engine.latency.shapes import ModelShape
from engine.latency.table import TableLatency
from simulator.profiles.rows import Row, read_rows
from simulator.profiles.tables import beyond, prefill_grid
from simulator.profiles.types import BadProfile

_PER_LAYER = {
    "layernorm": 2,
    "qkv_proj": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
_TOKENS = (
    *(1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 768, 1024, 1536, 2048, 3072, 4096),
    *(8192, 16384, 32768),
)

T = TypeVar("T")


# -- LLMServingSim ------------------------------------------------------------------------------


def read_llmservingsim(file: Path, shape: ModelShape, *, overhead_s: float = 0.0) -> TableLatency:
    """From NAME-attention.csv and, beside it, -dense.csv and -per_sequence.csv (times in us).

    Beyond the longest step measured, products grow in proportion.
    """

    def beside(kind: str) -> list[Row]:
        return read_rows(file.with_name(file.name.replace("-attention.", f"-{kind}.")))

    prefill: dict[tuple[int, int], float] = {}
    decode: dict[tuple[int, int], float] = {}
    for row in read_rows(file):
        chunk, history, batch, context, time_us = (
            row.number(name)
            for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
        )
        seconds = shape.layers * time_us / 1e6
        if not batch:
            prefill[int(chunk), int(history)] = seconds
        elif not chunk:
            decode[int(batch), int(context)] = seconds
    if not prefill or not decode:
        raise BadProfile(f"{file} has no steps that only compute prompts, or none that only decode")
    layers = _curves(beside("dense"), "layer", "tokens")
    tokens = sorted({int(x) for curve in layers.values() for x in curve.xs})
    dense = {n: _dense_s(layers, shape, n) + overhead_s for n in tokens}
    dense[2 * tokens[-1]] = 2 * dense[tokens[-1]]
    return TableLatency(
        prefill=Grid.of(prefill),
        decode=Grid.of(decode),
        dense=Curve.of(dense),
        per_sequence=_sum(_curves(beside("per_sequence"), "layer", "sequences").values()),
    )


def _dense_s(layers: Mapping[str, Curve], shape: ModelShape, tokens: int) -> float:
    """All that is computed per token but attention: every layer, then embedding and last norm."""
    seconds = 0.0
    for name, curve in layers.items():
        times = _PER_LAYER.get(name, 0) * shape.layers or 1
        seconds += times * curve.at(tokens)
    return seconds


def _curves(rows: Iterable[Row], name: str, x: str) -> dict[str, Curve]:
    points = defaultdict[str, dict[int, float]](dict)
    for row in rows:
        points[row.text(name)][row.whole(x)] = row.number("time_us") / 1e6
    return {layer: Curve.of(values) for layer, values in points.items()}


def _sum(curves: Iterable[Curve]) -> Curve:
    parts = list(curves)
    return Curve.of({x: sum(part.at(x) for part in parts) for part in parts for x in part.xs})


# -- aiconfigurator -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernels:
    """Seconds by shape; 16-bit, without a window."""

    gemm: Mapping[tuple[int, int], Curve]
    """By outputs and inputs, over tokens."""
    context: Mapping[tuple[int, int], Curve]
    """By query heads and KV heads of a rank, over tokens of one prompt."""
    generation: Mapping[tuple[int, int], Grid]
    """By the same, over sequences and context."""
    all_reduce: Curve
    """Over values."""


def read_aiconfigurator(
    prefix: Path, shape: ModelShape, tp: int, *, overhead_s: float = 0.0
) -> TableLatency:
    """From PREFIX-gemm_perf.csv.gz and its siblings (times in ms). Raises BadProfile."""
    if shape.experts:
        raise BadProfile("the tables of matrix products say nothing of experts")
    kernels = _read_kernels(prefix, shape.head_dim, tp)
    queries = shape.heads * shape.head_dim // tp
    keys_values = 2 * max(1, shape.kv_heads // tp) * shape.head_dim
    up = (2 if shape.gated else 1) * shape.ffn // tp
    products = (
        (queries + keys_values, shape.hidden),
        (shape.hidden, queries),
        (up, shape.hidden),
        (shape.hidden, shape.ffn // tp),
    )

    def dense_s(tokens: int) -> float:
        layer_s = sum(_gemm_s(kernels.gemm, n, k, tokens) for n, k in products)
        if tp > 1:
            layer_s += 2 * kernels.all_reduce.at(tokens * shape.hidden)
        return shape.layers * layer_s + overhead_s

    heads, kv_heads = shape.heads // tp, max(1, shape.kv_heads // tp)
    context, context_scale = _nearest(kernels.context, heads, kv_heads)
    generation, scale = _nearest(kernels.generation, heads, kv_heads)
    scale *= shape.layers
    whole = _beyond(context, context_scale * shape.layers)
    return TableLatency(
        prefill=prefill_grid(whole, whole.ys[0]),
        decode=Grid(
            generation.xs,
            tuple(Curve(c.xs, tuple(scale * y for y in c.ys)) for c in generation.curves),
        ),
        dense=Curve.of({tokens: dense_s(tokens) for tokens in _TOKENS}),
        per_sequence=Curve.of(
            {n: _gemm_s(kernels.gemm, shape.vocab // tp, shape.hidden, n) for n in _TOKENS}
        ),
    )


def _read_kernels(prefix: Path, head_dim: int, tp: int) -> _Kernels:
    def rows(kind: str, wanted: Callable[[Row], bool]) -> list[Row]:
        file = prefix.with_name(f"{prefix.name}-{kind}_perf.csv.gz")
        found = [row for row in read_rows(file) if wanted(row)]
        if not found:
            raise BadProfile(f"{file} has no 16-bit kernels for {head_dim} wide heads")
        return found

    def attention(row: Row) -> bool:
        return (
            row.whole("head_dim") == head_dim
            and row.text("kv_cache_dtype") == row.text("attn_dtype") == "bfloat16"
            and not (row.cells.get("window_size") and row.whole("window_size"))
        )

    gemm = defaultdict[tuple[int, int], dict[int, float]](dict)
    for row in rows("gemm", lambda row: row.text("gemm_dtype") == "bfloat16"):
        gemm[row.whole("n"), row.whole("k")][row.whole("m")] = row.number("latency") / 1e3
    context = defaultdict[tuple[int, int], dict[int, float]](dict)
    for row in rows(
        "context_attention", lambda row: attention(row) and row.text("batch_size") == "1"
    ):
        heads = row.whole("num_heads"), row.whole("num_key_value_heads")
        context[heads][row.whole("isl")] = row.number("latency") / 1e3
    generation = defaultdict[tuple[int, int], dict[tuple[int, int], float]](dict)
    for row in rows("generation_attention", attention):
        heads = row.whole("num_heads"), row.whole("num_key_value_heads")
        place = row.whole("batch_size"), row.whole("step") + row.whole("isl")
        generation[heads][place] = row.number("latency") / 1e3
    reduce = {0: 0.0}
    if tp > 1:
        for row in rows("custom_allreduce", lambda row: row.text("num_gpus") == str(tp)):
            if row.text("backend").endswith("graph"):
                reduce[row.whole("message_size")] = row.number("latency") / 1e3
    return _Kernels(
        gemm={key: Curve.of(points) for key, points in gemm.items()},
        context={key: Curve.of(points) for key, points in context.items()},
        generation={key: Grid.of(points) for key, points in generation.items()},
        all_reduce=Curve.of(reduce),
    )


def _gemm_s(gemm: Mapping[tuple[int, int], Curve], outputs: int, inputs: int, m: int) -> float:
    """Between the nearest measured numbers of outputs and of inputs, by straight lines."""
    if (outputs, inputs) in gemm:
        return gemm[outputs, inputs].at(m)
    by_inputs: dict[int, float] = {}
    for k in _neighbours({k for _, k in gemm}, inputs):
        wide = {n: gemm[n, k].at(m) for n in _neighbours({n for n, kk in gemm if kk == k}, outputs)}
        by_inputs[k] = _through(wide, outputs)
    return _through(by_inputs, inputs)


def _neighbours(known: set[int], wanted: int) -> list[int]:
    below = [x for x in known if x <= wanted]
    above = [x for x in known if x >= wanted]
    if not above:
        return sorted(known)[-2:]
    return sorted({max(below, default=min(above)), min(above)})


def _through(points: Mapping[int, float], x: int) -> float:
    """The line through one or two points; one alone is scaled."""
    if len(points) == 1:
        ((x0, y0),) = points.items()
        return y0 * max(1.0, x / x0)
    (x0, y0), (x1, y1) = sorted(points.items())
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _nearest(tables: Mapping[tuple[int, int], T], heads: int, kv_heads: int) -> tuple[T, float]:
    """The table of the nearest shape, and by how much its times are to be scaled."""
    if (heads, kv_heads) in tables:
        return tables[heads, kv_heads], 1.0
    key = min(tables, key=lambda key: (abs(key[1] - kv_heads), abs(key[0] - heads)))
    return tables[key], heads / key[0]


def _beyond(curve: Curve, scale: float) -> Curve:
    """The curve scaled; beyond its last point attention grows as the square."""
    points = {int(x): scale * y for x, y in zip(curve.xs, curve.ys, strict=True)}
    longest = max(points)
    longest_s = points[longest]
    for tokens in beyond(longest):
        points[tokens] = longest_s * (tokens / longest) ** 2
    return Curve.of(points)
