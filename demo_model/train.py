"""Train the demo chat model from scratch on a CPU and write it as a Hugging Face checkpoint.

`python demo_model/train.py` repeats the committed checkpoint; `--minutes 3` makes a worse one.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from corpus import Conversations, Entry, Message, load_entries
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
# An earlier turn renders to the same tokens in every later prompt: prefix caches rely on that.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 3072
CONTEXT = 4096
TOKENS_PER_STEP = 4096
ROW_TOKENS = 512
LONG_CHAT_EVERY = 10
IGNORED_LABEL = -100
OPENING_ROWS_SHARE = 0.3
OPENING_TOKENS = 20
TIMED_STEPS = 30
SEED = 20
DEFAULT_STEPS = 600
DEFAULT_OUT = Path(__file__).parent / "checkpoint"

Batch = tuple[torch.Tensor, torch.Tensor]


def main() -> int:
    options = parse_options()
    refuse_foreign_directory(options.out)
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    entries = load_entries()
    tokenizer = train_tokenizer(entries)
    rows = Rows(tokenizer, entries, SEED)
    model = LlamaForCausalLM(model_config(tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(entries)} subjects, {parameters / 1e6:.2f} M parameters", flush=True)
    try:
        train(model, rows, options.steps, options.minutes)
    except KeyboardInterrupt:
        print(f"\nStopped; {options.out} is as it was.", file=sys.stderr)
        return 130
    model.to(torch.bfloat16)
    loss = recall_loss(model, Rows(tokenizer, entries, SEED + 1))
    save(model, tokenizer, options.out)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"final loss {loss:.3f}; {size / 1e6:.2f} MB in {options.out}")
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="checkpoint directory")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help="fit the steps to this time instead")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


def refuse_foreign_directory(out: Path) -> None:
    if out.exists() and not (out / "config.json").exists():
        sys.exit(f"{out} exists and is not a checkpoint: choose another --out")


def train_tokenizer(entries: list[Entry]) -> PreTrainedTokenizerFast:
    chats = Conversations(entries, SEED)
    texts = [message["content"] for _ in range(2000) for message in chats.draw(2)]
    texts += [answer for entry in entries for answer in entry.answers]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass
class Rows:
    """Endless batches of packed chats, in which only the assistant's words have labels."""

    tokenizer: PreTrainedTokenizerFast
    entries: list[Entry]
    seed: int

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.chats = Conversations(self.entries, self.seed)
        self.encode = lru_cache(maxsize=None)(self._encode)
        sample = self.chats.draw(3)
        rendered = str(self.tokenizer.apply_chat_template(sample, tokenize=False))
        assert self.encode(rendered) == self.chat_tokens(sample)[0], "not what the template gives"

    def batches(self) -> Iterator[Batch]:
        for step in range(sys.maxsize):
            # Now and then one chat as long as the context, so that all positions are met.
            width = CONTEXT if step % LONG_CHAT_EVERY == LONG_CHAT_EVERY - 1 else ROW_TOKENS
            rows = [self.row(width) for _ in range(TOKENS_PER_STEP // width)]
            tokens, labels = zip(*rows, strict=True)
            yield torch.tensor(tokens), torch.tensor(labels)

    def row(self, width: int) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        labels: list[int] = []
        only_openings = width < CONTEXT and self.random.random() < OPENING_ROWS_SHARE
        while len(tokens) < width:
            if only_openings:
                more = self.opening_tokens()
            elif width == CONTEXT:
                more = self.chat_tokens(self.chats.draw(60))
            elif self.random.random() < 0.06:
                more = self.prose_tokens()
            else:
                more = self.chat_tokens(self.chats.draw(self.random.choice([1, 1, 2, 3, 4, 5])))
            tokens += more[0]
            labels += more[1]
        return tokens[:width], labels[:width]

    def chat_tokens(self, chat: list[Message]) -> tuple[list[int], list[int]]:
        tokens = self.encode(BOS)
        labels = [IGNORED_LABEL]
        for message in chat:
            head = self.encode(f"<|{message['role']}|>")
            body = self.encode(message["content"]) + self.encode(END)
            spoken = message["role"] == "assistant"
            tokens = tokens + head + body
            labels += [IGNORED_LABEL] + (body if spoken else [IGNORED_LABEL] * len(body))
        return tokens, labels

    def opening_tokens(self) -> tuple[list[int], list[int]]:
        """A question and how its answer begins: finding the subject is the hard part to learn."""
        question, answer = self.chats.draw_opening()
        head, _ = self.chat_tokens([question])
        body = (self.encode("<|assistant|>") + self.encode(answer))[: OPENING_TOKENS + 1]
        return head + body, [IGNORED_LABEL] * (len(head) + 1) + body[1:]

    def prose_tokens(self) -> tuple[list[int], list[int]]:
        tokens = self.encode(BOS + self.chats.draw_prose() + END)
        return tokens, tokens

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def train(model: LlamaForCausalLM, rows: Rows, steps: int, minutes: float | None) -> None:
    model.train()
    optimizers = make_optimizers(model)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    started = time.monotonic()
    average = math.log(VOCABULARY)
    for step, batch in enumerate(rows.batches()):
        if minutes and step == TIMED_STEPS:
            steps = max(steps_within(minutes, time.monotonic() - started), TIMED_STEPS)
        if step >= steps:
            break
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_share(step, steps)
        loss = batch_loss(model, batch)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average += (loss.item() - average) * max(0.05, 1 / (step + 1))
        show_progress(step + 1, steps, average, time.monotonic() - started)


def steps_within(minutes: float, timed_steps_took: float) -> int:
    return int(minutes * 60 / timed_steps_took * TIMED_STEPS)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within the layers: it needs far fewer steps than AdamW alone."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_share(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / 20)
    return warm_up * min(1.0, (1 - step / steps) / 0.6)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    tokens, labels = batch
    loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
    assert isinstance(loss, torch.Tensor)
    return loss


def show_progress(step: int, steps: int, loss: float, elapsed: float) -> None:
    left = elapsed / step * (steps - step)
    line = f"step {step}/{steps}  loss {loss:.3f}  {elapsed / 60:.1f} min, {left / 60:.1f} min left"
    if sys.stdout.isatty():
        print(f"\r{line}  ", end="\n" if step == steps else "", flush=True)
    elif step % 25 == 0 or step == steps:
        print(line, flush=True)


def recall_loss(model: LlamaForCausalLM, rows: Rows) -> float:
    """The loss as stored, on newly drawn chats about the same text: how well it is recalled."""
    model.eval()
    batches = rows.batches()
    with torch.inference_mode():
        losses = [batch_loss(model, next(batches)).item() for _ in range(4)]
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write beside `out`, then swap, so that `out` never holds half a checkpoint."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".checkpoint-") as scratch:
        written = Path(scratch) / "new"
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        make_portable(written)
        if out.exists():
            out.rename(Path(scratch) / "old")
        written.rename(out)


def make_portable(checkpoint: Path) -> None:
    # The class name that every transformers release knows, and files that anyone may read.
    config = checkpoint / "tokenizer_config.json"
    written = config.read_text(encoding="utf-8")
    config.write_text(written.replace("TokenizersBackend", "PreTrainedTokenizerFast"), "utf-8")
    for path in checkpoint.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    sys.exit(main())
