"""Draws tokens so that any worker draws the same: noise is a function, not a stream.

For each candidate token the noise depends on (seed, choice index, absolute output position, token
id) and nothing else: not on the batch, the worker or earlier draws. Gumbel noise added to
logits / temperature makes the argmax a sample of the softmax, so a draw needs no running state.

    key    = mix(mix(mix(seed) + choice) + position)              64 bits, once per row
    u(id)  = (upper 52 bits of mix(mix(key + (id + 1) * GOLDEN)) + 0.5) / 2^52      in (0, 1)
    token  = argmax over kept ids of logits / temperature - log(-log(u(id)))

`mix` is the finalizer of splitmix64, in int64 arithmetic that wraps alike on CPU and CUDA.
Everything after the model's logits is float64, so ties do not occur and rounding does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.errors import InternalError
from core.sampling import SamplingParams

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31

CHUNK_VALUES = 4 << 20
"""Logits handled at once, at most: bounds the float64 scratch memory to some 32 MiB a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What one row of logits is drawn by."""

    params: SamplingParams
    choice: int
    output_position: int


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int | InternalError]:
    """One token per row of `logits` (`[rows, vocab]`, float32), or that row's error.

    Order as users know it: temperature, then top-k, then top-p over what top-k left.
    """
    best, tokens = torch.max(logits, dim=-1)
    # max is NaN if any logit is, and infinite if no finite one is left to choose.
    valid: list[bool] = torch.isfinite(best).tolist()
    answers: list[int] = tokens.tolist()
    for filtered in (False, True):
        rows = [
            row
            for row, draw in enumerate(draws)
            if valid[row] and not draw.params.greedy and _is_filtered(draw.params) == filtered
        ]
        step = max(1, CHUNK_VALUES // logits.shape[1])
        for first in range(0, len(rows), step):
            chunk = rows[first : first + step]
            drawn = _draw(logits[chunk], [draws[row] for row in chunk], filtered)
            for row, token in zip(chunk, drawn, strict=True):
                answers[row] = token
    return [
        token if ok else InternalError("the model gave no valid logits for this sequence")
        for token, ok in zip(answers, valid, strict=True)
    ]


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _draw(logits: torch.Tensor, draws: Sequence[Draw], filtered: bool) -> list[int]:
    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scores = logits.double()
    scores -= scores.amax(dim=-1, keepdim=True)
    scores /= column([draw.params.temperature for draw in draws])
    if filtered:
        # Stable, so equal logits keep the order of their ids on every device.
        scores, ids = scores.sort(dim=-1, descending=True, stable=True)
        hidden = _outside_top_k(scores, draws)
        scores = scores.masked_fill_(hidden, float("-inf"))
        mass = scores.exp().cumsum(dim=-1)
        limit = column([draw.params.top_p for draw in draws]) * mass[:, -1:]
        before = torch.zeros_like(mass)
        before[:, 1:] = mass[:, :-1]
        hidden = before >= limit
        hidden[:, 0] = False
        scores = scores.masked_fill_(hidden, float("-inf"))
    else:
        ids = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    scores += _gumbel([_row_key(draw) for draw in draws], ids)
    chosen = scores.argmax(dim=-1, keepdim=True)
    tokens: list[int] = ids.gather(1, chosen)[:, 0].tolist()
    return tokens


def _outside_top_k(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    vocab = scores.shape[1]
    limits = torch.tensor([draw.params.top_k or vocab for draw in draws], device=scores.device)
    return torch.arange(vocab, device=scores.device) >= limits[:, None]


def _row_key(draw: Draw) -> int:
    key = _mix_int(draw.params.seed & MASK64)
    key = _mix_int(key + draw.choice)
    return _mix_int(key + draw.output_position)


def _mix_int(value: int) -> int:
    value = (value + GOLDEN) & MASK64
    for shift, factor in MIX_STEPS:
        value = ((value ^ (value >> shift)) * factor) & MASK64
    return value ^ (value >> LAST_SHIFT)


def _gumbel(keys: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
    """Noise `[rows, vocab]` in float64 for these keys and token ids."""
    key = torch.tensor([_signed(k) for k in keys], dtype=torch.int64, device=ids.device)
    state = (ids + 1) * _signed(GOLDEN) + key[:, None]
    state = _mix(_mix(state))
    # 52 bits and a half are exact in float64, so u is never 0 or 1.
    uniform = (_shift(state, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _mix(state: torch.Tensor) -> torch.Tensor:
    for shift, factor in MIX_STEPS:
        state = (state ^ _shift(state, shift)) * _signed(factor)
    return state ^ _shift(state, LAST_SHIFT)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's own copies the sign bit."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
