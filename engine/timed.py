"""An engine without a model: takes the time a model would, and makes KV that can be verified.

The KV of a position is a function of the tokens up to it, of the layer, and of nothing else; so is
the next token. Before it emits a token the engine checks that the KV in the arena is what these
tokens must have, so a block that was lost, swapped, reused too early or belongs to another prompt
fails the sequence instead of changing its text.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from core.errors import BatonError, ConfigError, KvMismatch
from core.ids import ModelId, SequenceId
from core.kv import KvLayout
from engine.arena import Arena
from engine.config import EngineConfig
from engine.latency.base import LatencyModel, StepShape
from engine.latency.fitted import FittedLatency
from engine.sizing import arena_blocks
from engine.types import EngineInfo, Sampled, SeqStep

U64 = npt.NDArray[np.uint64]

_POWER = np.uint64(0x9E3779B97F4A7C15)
_REMEMBERED_POSITIONS = 4_000_000


@dataclass(slots=True)
class _Known:
    """What the engine remembers of a sequence.

    `states` are those of its first positions, `checked` how far its KV was compared in full.
    """

    states: U64
    checked: int = 0
    steps: int = 0


class TimedEngine:
    """Implements engine.types.Engine; `sleep` takes seconds and blocks the engine thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        layout = timed_layout(config)
        num_blocks = arena_blocks(layout, config)
        self._latency: LatencyModel = FittedLatency.of(config.timed)
        self._sleep = sleep
        self._arena = Arena(layout, num_blocks)
        marked = slice(None, None, config.timed.kv_marked_every_bytes // 8)
        self._words: U64 = self._arena.data.numpy().view(np.uint64)[..., marked]
        self._lanes = _lane_constants(layout)[..., marked]
        self._known: dict[SequenceId, _Known] = {}
        self._positions = 0
        self._info = EngineInfo(
            model_id=timed_model_id(config, vocab_size),
            layout=layout,
            num_blocks=num_blocks,
            context_tokens=config.timed.context_tokens,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            device="timed",
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def arena(self) -> Arena:
        return self._arena

    def step(self, batch: Sequence[SeqStep]) -> list[Sampled | BatonError | None]:
        results = [self._advance(part) for part in batch]
        self._sleep(self._latency.step_s(step_shape(batch)))
        return results

    def close(self) -> None:
        self._known.clear()

    def _advance(self, part: SeqStep) -> Sampled | BatonError | None:
        known = self._known.pop(part.sequence_id, None) or _Known(np.zeros(0, dtype=np.uint64))
        self._positions -= len(known.states)
        known.states = states = extend_states(known.states, part.tokens[: part.end])
        error = self._verify(part, states, known)
        if error is not None:
            return error
        blocks, offsets = self._slots(part, part.start, part.end)
        self._words[blocks, 0, :, :, offsets, :] = self._content(states[part.start : part.end])
        self._remember(part.sequence_id, known)
        return None if part.sample is None else Sampled(token=self._next_token(states[-1]))

    def _verify(self, part: SeqStep, states: U64, known: _Known) -> KvMismatch | None:
        """Compare in full what was not compared yet, and a rotating slice of all the rest."""
        layers = self._info.layout.num_layers
        first = min(known.checked, part.start)
        blocks, offsets = self._slots(part, first, part.start)
        got = self._words[blocks, 0, :, :, offsets, :]
        wrong = np.flatnonzero((got != self._content(states[first : part.start])).any((1, 2, 3)))
        layer, side = known.steps % layers, (known.steps // layers) % 2
        blocks, offsets = self._slots(part, 0, first)
        seen = self._words[blocks, 0, layer, side, offsets, 0]
        stale = np.flatnonzero(seen != _mix(states[:first] ^ self._lanes[layer, side, 0]))
        known.checked, known.steps = part.end, known.steps + 1
        if not wrong.size and not stale.size:
            return None
        position = int(stale[0]) if stale.size else first + int(wrong[0])
        return KvMismatch(
            f"KV of sequence {part.sequence_id} is not that of its tokens at position {position} "
            f"of {part.start}"
        )

    def _slots(self, part: SeqStep, start: int, end: int) -> tuple[U64, U64]:
        table = np.asarray(part.block_table, dtype=np.uint64)
        positions = np.arange(start, end, dtype=np.uint64)
        size = np.uint64(self._info.layout.block_size)
        return table[positions // size], positions % size

    def _content(self, states: U64) -> U64:
        """`[n, num_layers, 2, lanes]` words for `n` prefix states."""
        return _mix(states[:, None, None, None] ^ self._lanes[None])

    def _next_token(self, state: np.uint64) -> int:
        drawn = int(_mix(np.asarray([state ^ np.uint64(0x5851F42D4C957F2D)]))[0])
        token = drawn % self._info.vocab_size
        while token in self._info.eos_token_ids:
            token = (token + 1) % self._info.vocab_size
        return token

    def _remember(self, sequence_id: SequenceId, known: _Known) -> None:
        """Put back what `_advance` took out, as the newest; the oldest are forgotten."""
        self._known[sequence_id] = known
        self._positions += len(known.states)
        while self._positions > _REMEMBERED_POSITIONS and len(self._known) > 1:
            self._positions -= len(self._known.pop(next(iter(self._known))).states)


def step_shape(batch: Sequence[SeqStep]) -> StepShape:
    """What a latency model must know of a batch. One token after others is a decode."""
    decodes = [part.end for part in batch if _is_decode(part)]
    return StepShape(
        prefill=[(part.start, part.end) for part in batch if not _is_decode(part)],
        decode_sequences=len(decodes),
        decode_context_tokens=sum(decodes),
    )


def timed_layout(config: EngineConfig) -> KvLayout:
    """One head of bytes, wide enough for `kv_bytes_per_token` over layers, keys and values."""
    per_row, rest = divmod(config.timed.kv_bytes_per_token, 2 * config.timed.num_layers)
    if rest or per_row % 8:
        raise ConfigError(
            f"engine.timed.kv_bytes_per_token must be a multiple of "
            f"{16 * config.timed.num_layers} (16 x num_layers), "
            f"not {config.timed.kv_bytes_per_token}"
        )
    return KvLayout(
        block_size=config.block_size,
        num_kv_heads=1,
        num_layers=config.timed.num_layers,
        head_dim=per_row,
        dtype="uint8",
    )


def timed_model_id(config: EngineConfig, vocab_size: int) -> ModelId:
    """Equal for equal KV: shape and vocabulary, not speed."""
    timed = config.timed
    text = f"timed-1,{timed.kv_bytes_per_token},{timed.num_layers},{vocab_size}"
    text += f",{timed.kv_marked_every_bytes}"
    return ModelId("timed-" + blake2b(text.encode(), digest_size=8).hexdigest())


def extend_states(states: U64, tokens: Sequence[int]) -> U64:
    """One 64-bit state per position of `tokens`, of which `states` holds the first ones.

    A state is a polynomial (mod 2^64) of all tokens up to its position.
    """
    known = len(states)
    if known >= len(tokens):
        return states[: len(tokens)]
    values = np.asarray(tokens[known:], dtype=np.uint64) + np.uint64(1)
    powers = np.full(len(values), _POWER, dtype=np.uint64)
    powers[0] = np.uint64(pow(int(_POWER), known + 1, 2**64))
    sums = np.cumsum(values * np.cumprod(powers))
    if known:
        sums += states[-1]
    return np.concatenate([states, sums])


def _is_decode(part: SeqStep) -> bool:
    return part.end - part.start == 1 and part.start > 0


def _lane_constants(layout: KvLayout) -> U64:
    """`[num_layers, 2, lanes]` distinct constants."""
    shape = (layout.num_layers, 2, layout.head_dim // 8)
    return _mix(np.arange(1, 1 + int(np.prod(shape)), dtype=np.uint64).reshape(shape))


def _mix(x: U64) -> U64:
    """The finalizer of splitmix64: every bit of the input reaches every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
