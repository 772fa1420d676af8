"""The checkpoints that other tests rely on."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.models import FAMILIES, SPECIALS, VOCAB_SIZE, write_checkpoint, write_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_arguments_write_the_same_small_checkpoint(tmp_path: Path, family: str) -> None:
    first = write_checkpoint(tmp_path / "first", family)
    again = write_checkpoint(tmp_path / "again", family)
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert sum(path.stat().st_size for path in first.iterdir()) < 4 << 20


def test_another_seed_writes_other_weights(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", "llama") / "model.safetensors"
    other = write_checkpoint(tmp_path / "other", "llama", seed=1) / "model.safetensors"
    assert first.read_bytes() != other.read_bytes()


def test_the_tokenizer_speaks_every_text_and_chat(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(write_tokenizer(tmp_path)))
    assert len(tokenizer) == VOCAB_SIZE
    text = "The cat's naïve café — 猫 🐈\n\tend"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>hello\n<|assistant|>"
    ids = tokenizer.encode(prompt)
    assert ids[0] == SPECIALS.index("<|user|>")
    assert ids[-1] == SPECIALS.index("<|assistant|>")
