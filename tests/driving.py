"""Drives an engine the way workers do, and asks transformers for the truth."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from core.ids import BlockId, RequestId, SequenceId
from core.sampling import SamplingParams
from engine.types import Engine, Sampled, SeqStep
from tests.models import SPECIALS, VOCAB_SIZE

GREEDY = SamplingParams(max_tokens=1, temperature=0.0, return_logits=True)


@dataclass(slots=True)
class Driven:
    """One sequence's way through the engine. `logits` holds one fp32 row per output token."""

    tokens: list[int]
    prompt_tokens: int
    table: list[BlockId]
    sequence_id: SequenceId
    params: SamplingParams = GREEDY
    fed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    def next_step(self, chunk: int) -> SeqStep:
        end = min(len(self.tokens), self.fed + chunk)
        done = end == len(self.tokens)
        return SeqStep(
            sequence_id=self.sequence_id,
            tokens=self.tokens,
            start=self.fed,
            end=end,
            block_table=self.table,
            sample=self.params if done else None,
            output_position=len(self.output),
        )

    def take(self, step: SeqStep, answer: object) -> None:
        self.fed = step.end
        if step.sample is None:
            assert answer is None
            return
        assert isinstance(answer, Sampled), answer
        self.tokens.append(answer.token)
        self.logits.append(torch.from_numpy(np.frombuffer(answer.logits, dtype="<f4").copy()))


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids that are no specials."""
    rng = random.Random(f"{seed}/{num_tokens}")
    return [rng.randrange(len(SPECIALS), VOCAB_SIZE) for _ in range(num_tokens)]


def start_sequences(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    params: SamplingParams = GREEDY,
    seed: int = 0,
) -> list[Driven]:
    """Sequences with disjoint block tables drawn at random from the engine's arena."""
    blocks = list(range(engine.info.num_blocks))
    random.Random(seed).shuffle(blocks)
    sequences = []
    for i, prompt in enumerate(prompts):
        needed = engine.info.layout.num_blocks(len(prompt) + max_tokens)
        assert needed <= len(blocks), "the arena is too small for this test"
        table, blocks = blocks[:needed], blocks[needed:]
        sequences.append(
            Driven(
                tokens=list(prompt),
                prompt_tokens=len(prompt),
                table=[BlockId(b) for b in table],
                sequence_id=SequenceId(RequestId(f"r{i}")),
                params=params,
            )
        )
    return sequences


def run_mixed(
    engine: Engine,
    sequences: Sequence[Driven],
    *,
    max_tokens: int,
    chunk: int = 64,
    stagger: int = 1,
    seed: int = 0,
) -> None:
    """Run all to `max_tokens` outputs in packed steps that mix chunks and decodes.

    Sequence i joins at step i * stagger, and the batch's order is shuffled anew at every step.
    """
    rng = random.Random(seed)
    step = 0
    while True:
        active = [
            s for i, s in enumerate(sequences) if i * stagger <= step and len(s.output) < max_tokens
        ]
        if not active and step >= len(sequences) * stagger:
            return
        rng.shuffle(active)
        batch = [s.next_step(chunk) for s in active]
        for sequence, entry, answer in zip(active, batch, engine.step(batch), strict=True):
            sequence.take(entry, answer)
        step += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What `generate` answers: token ids, and the logits `[tokens, vocab]` they came from."""

    tokens: list[int]
    logits: torch.Tensor


class Reference:
    """A checkpoint in transformers, with its own attention."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()

    def generate(self, prompt: Sequence[int], max_tokens: int) -> Truth:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            answer = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return Truth(
            tokens=answer.sequences[0, len(prompt) :].tolist(),
            logits=torch.cat(answer.logits).float(),
        )
