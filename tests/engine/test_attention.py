"""Paged attention against attention written out, over random arenas, tables and batches."""

import random
from collections.abc import Sequence

import pytest
import torch

from core.ids import BlockId, RequestId, SequenceId
from core.kv import KvLayout
from engine.arena import Arena
from engine.attention import paged_attention
from engine.packing import PackedStep
from engine.types import SeqStep

LAYOUT = KvLayout(block_size=4, num_kv_heads=2, num_layers=3, head_dim=8, dtype="float32")
HEADS = 6
LAYER = 1


class Layer(torch.nn.Module):
    """What the attention asks of the module that calls it."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


def make_entries(spans: Sequence[tuple[int, int]], num_blocks: int = 200) -> list[SeqStep]:
    """An entry per (start, end), with disjoint random tables."""
    blocks = list(range(num_blocks))
    random.Random(0).shuffle(blocks)
    entries = []
    for i, (start, end) in enumerate(spans):
        needed = LAYOUT.num_blocks(end) + 1
        table, blocks = blocks[:needed], blocks[needed:]
        entries.append(
            SeqStep(
                sequence_id=SequenceId(RequestId(f"r{i}")),
                tokens=[7] * end,
                start=start,
                end=end,
                block_table=[BlockId(b) for b in table],
                sample=None,
            )
        )
    return entries


class Scene:
    """A step of random queries, keys and values; earlier positions already lie in the arena."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.entries = make_entries(spans)
        self.arena = Arena(LAYOUT, 200)
        self.arena.data.fill_(float("nan"))
        # Per entry: keys and values of the whole context, queries of what is fed.
        self.keys = [noise(e.end, LAYOUT.num_kv_heads, LAYOUT.head_dim) for e in self.entries]
        self.values = [noise(e.end, LAYOUT.num_kv_heads, LAYOUT.head_dim) for e in self.entries]
        self.queries = [noise(e.end - e.start, HEADS, LAYOUT.head_dim) for e in self.entries]
        for entry, keys, values in zip(self.entries, self.keys, self.values, strict=True):
            for position in range(entry.start):
                block, offset = entry.block_table[position // 4], position % 4
                self.arena.data[block, :, LAYER, 0, offset] = keys[position]
                self.arena.data[block, :, LAYER, 1, offset] = values[position]
            if entry.start % 4:
                # The step that entered this block cleared the rest of it.
                self.arena.data[
                    entry.block_table[entry.start // 4], :, LAYER, :, entry.start % 4 :
                ] = 0

    def attend(
        self, *, window: int | None = None, softcap: float | None = None, scale: float = 0.3
    ) -> list[torch.Tensor]:
        """The paged answer, `[queries, heads, head_dim]` per entry."""
        step = PackedStep(self.entries, self.arena)
        if step.fresh_blocks is not None:
            self.arena.data.index_fill_(0, step.fresh_blocks, 0)

        def packed(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([parts[i] for i in step.order]).transpose(0, 1)[None]

        fed = [slice(e.start, e.end) for e in self.entries]
        output, _ = paged_attention(
            Layer(LAYER),
            packed(self.queries),
            packed([k[s] for k, s in zip(self.keys, fed, strict=True)]),
            packed([v[s] for v, s in zip(self.values, fed, strict=True)]),
            None,
            packed=step,
            scaling=scale,
            sliding_window=window,
            softcap=softcap,
        )
        answers: dict[int, torch.Tensor] = {}
        row = 0
        for index in step.order:
            count = self.entries[index].end - self.entries[index].start
            answers[index] = output[0, row : row + count]
            row += count
        assert output.shape == (1, row, HEADS, LAYOUT.head_dim)
        return [answers[i] for i in range(len(self.entries))]

    def truth(
        self, *, window: int | None = None, softcap: float | None = None, scale: float = 0.3
    ) -> list[torch.Tensor]:
        answers = []
        for entry, q, k, v in zip(self.entries, self.queries, self.keys, self.values, strict=True):
            shared = HEADS // LAYOUT.num_kv_heads
            keys, values = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            position = torch.arange(entry.start, entry.end)[:, None]
            key = torch.arange(entry.end)[None]
            seen = key <= position
            if window is not None:
                seen &= key > position - window
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            answers.append(torch.einsum("hqk,khd->qhd", weights, values))
        return answers


BATCHES = {
    "one decode": [(9, 10)],
    "first token": [(0, 1)],
    "decodes of one length": [(11, 12)] * 4,
    "decodes at block edges": [(2, 3), (3, 4), (4, 5), (15, 16), (16, 17)],
    "decodes of very different lengths": [
        (199, 200),
        (90, 91),
        (5, 6),
        (66, 67),
        (0, 1),
        (120, 121),
    ],
    "one whole prompt": [(0, 23)],
    "a later chunk": [(13, 29)],
    "chunks and decodes": [(0, 8), (30, 31), (5, 21), (3, 4), (12, 19), (60, 61), (0, 1)],
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 7, 1000])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_attention_written_out(
    batch: str, window: int | None, softcap: float | None
) -> None:
    scene = Scene(BATCHES[batch])
    answers = scene.attend(window=window, softcap=softcap)
    truth = scene.truth(window=window, softcap=softcap)
    for answer, wanted in zip(answers, truth, strict=True):
        torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=0)


def test_writes_fed_positions_and_nothing_else() -> None:
    scene = Scene([(3, 9), (6, 7)])
    before = scene.arena.data.clone()
    scene.attend()
    written = torch.zeros_like(before, dtype=torch.bool)
    for entry, keys, values in zip(scene.entries, scene.keys, scene.values, strict=True):
        for position in range(entry.start, entry.end):
            place = (entry.block_table[position // 4], slice(None), LAYER)
            assert torch.equal(scene.arena.data[*place, 0, position % 4], keys[position])
            assert torch.equal(scene.arena.data[*place, 1, position % 4], values[position])
            written[*place, :, position % 4] = True
    fresh = scene.entries[0].block_table[2]
    written[fresh] = True
    same = (scene.arena.data == before) | (scene.arena.data.isnan() & before.isnan())
    assert bool((same | written).all())


def test_default_scale_is_by_head_size() -> None:
    scene = Scene([(0, 5)])
    step = PackedStep(scene.entries, scene.arena)
    scene.arena.data.zero_()
    q, k, v = (x[0].transpose(0, 1)[None] for x in (scene.queries, scene.keys, scene.values))
    output, _ = paged_attention(Layer(LAYER), q, k, v, None, packed=step)
    (wanted,) = scene.truth(scale=LAYOUT.head_dim**-0.5)
    torch.testing.assert_close(output[0], wanted, atol=1e-5, rtol=0)
