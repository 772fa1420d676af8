"""A table of steps from measured points, so that a simulation interpolates instead of fitting.

A chunk of a prompt takes what the whole takes longer than the part before it, and a base:
T(end) - T(start) + a, with a the intercept of the fitted curve, so chunks of a prompt sum to the
whole and a base each. Beyond the longest prompt the fitted curve goes on.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from engine.latency.base import StepShape
from engine.latency.curve import Curve, Grid
from engine.latency.fitted import DecodeCurve, FittedLatency
from engine.latency.table import TableLatency
from simulator.profiles.fit import fit_decode, fit_prefill
from simulator.profiles.types import BadProfile, DecodePoint, Measured, PrefillPoint

_LONGEST = 1 << 18
_CHUNKS = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def table_of(measured: Measured) -> TableLatency:
    """Interpolates the points. Raises BadProfile with too few of them."""
    return TableLatency(
        prefill=prefill_grid(_whole_prompts(measured.prefill), _base_s(measured.prefill)),
        decode=_decode_grid(measured.decode),
    )


def prefill_grid(whole: Curve, base_s: float) -> Grid:
    """Seconds of a chunk over its tokens and its history, from those of whole prompts."""
    starts = sorted({0, *_CHUNKS, *(int(x) for x in whole.xs)})
    return Grid.of(
        {
            (tokens, start): max(base_s, whole.at(start + tokens) - whole.at(start) + base_s)
            if start
            else whole.at(tokens)
            for tokens in sorted({*_CHUNKS, *(int(x) for x in whole.xs)})
            for start in starts
        }
    )


def _base_s(points: Sequence[PrefillPoint]) -> float:
    return fit_prefill(points).base_s


def _whole_prompts(points: Sequence[PrefillPoint]) -> Curve:
    """T(n) of the points without a history, and beyond them the fit's growth."""
    whole = {point.end: point.seconds for point in points if point.start == 0}
    if not whole:
        raise BadProfile("no prefill step begins at 0, so nothing is known of whole prompts")
    longest = max(whole)
    fitted = FittedLatency(prefill=fit_prefill(points), decode=(DecodeCurve(),))

    def fitted_s(tokens: int) -> float:
        return fitted.step_s(StepShape([(0, tokens)]))

    last_s = whole[longest]
    for tokens in beyond(longest):
        whole[tokens] = last_s + fitted_s(tokens) - fitted_s(longest)
    return Curve.of(whole)


def beyond(longest: int) -> Iterator[int]:
    """Lengths at which a curve that bends is drawn on, each a fifth longer than the last."""
    tokens = longest
    while tokens < 2 * _LONGEST:
        tokens = max(tokens + 1, round(1.2 * tokens))
        yield tokens


def _decode_grid(points: Sequence[DecodePoint]) -> Grid:
    """Over sequences and their mean context. Each context measured has a curve of its own over
    sequences; one with a single point follows the fit.
    """
    fit = fit_decode(points)
    rows = defaultdict[int, dict[int, float]](dict)
    for point in points:
        rows[round(point.context_tokens / point.sequences)][point.sequences] = point.seconds
    merged = _merge_near(rows)
    curves = {context: _over_batches(row, context, fit) for context, row in merged.items()}
    if len(curves) == 1:
        ((context, curve),) = curves.items()
        curves[2 * context] = Curve(
            curve.xs,
            tuple(
                y + fit.per_context_token_s * x * context
                for x, y in zip(curve.xs, curve.ys, strict=True)
            ),
        )
    batches = sorted({*_BATCHES, *(point.sequences for point in points)})
    return Grid.of(
        {
            (batch, context): curve.at(batch)
            for context, curve in curves.items()
            for batch in batches
        }
    )


def _merge_near(rows: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
    """Contexts within 2 % are one: rounding made them two."""
    merged: dict[int, dict[int, float]] = {}
    last = 0
    for context, row in sorted(rows.items()):
        if last and context <= 1.02 * last:
            merged[last].update(row)
        else:
            merged[context] = dict(row)
            last = context
    return merged


def _over_batches(row: Mapping[int, float], context: int, fit: DecodeCurve) -> Curve:
    """A curve over sequences; a step of more sequences never takes less."""
    if len(row) == 1:
        ((sequences, seconds),) = row.items()
        slope = fit.per_sequence_s + fit.per_context_token_s * context
        more = 2 * sequences
        return Curve.of({sequences: seconds, more: seconds + slope * (more - sequences)})
    ordered = sorted(row.items())
    rising = {ordered[0][0]: ordered[0][1]}
    for (_, _), (sequences, seconds) in pairwise(ordered):
        rising[sequences] = max(seconds, *rising.values())
    return Curve.of(rising)
