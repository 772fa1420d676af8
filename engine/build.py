"""From settings and a checkpoint directory to an engine, or to what others must know of it."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from core.ids import ModelId
from core.sampling import SamplingDefaults
from engine.config import EngineConfig
from engine.timed import TimedEngine, timed_model_id
from engine.types import Engine
from engine.weights import check_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a router needs of the model; reading it loads no weights."""

    model_id: ModelId
    eos_token_ids: frozenset[int]
    sampling: SamplingDefaults


def describe_model(directory: Path, config: EngineConfig) -> ServedModel:
    """Check the directory; ConfigError with one sentence if it cannot be served."""
    if config.kind == "timed":
        vocab = _read_vocab(directory)
        return ServedModel(
            model_id=timed_model_id(config, vocab.size),
            eos_token_ids=vocab.special_ids,
            sampling=SamplingDefaults(),
        )
    from engine.checkpoint import read_checkpoint  # noqa: PLC0415 - see build_engine

    info = read_checkpoint(directory, config)
    return ServedModel(
        model_id=info.model_id, eos_token_ids=info.eos_token_ids, sampling=info.sampling
    )


def build_engine(directory: Path, config: EngineConfig) -> Engine:
    """Load the model, or its timed stand-in, which needs only the tokenizer."""
    if config.kind == "timed":
        vocab = _read_vocab(directory)
        return TimedEngine(config, vocab_size=vocab.size, eos_token_ids=vocab.special_ids)
    from engine.model import load_engine  # noqa: PLC0415 - the timed engine needs no transformers

    return load_engine(directory, config)


@dataclass(frozen=True, slots=True)
class _Vocab:
    size: int
    special_ids: frozenset[int]


def _read_vocab(directory: Path) -> _Vocab:
    tokenizer = Tokenizer.from_file(str(check_tokenizer(directory)))
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return _Vocab(tokenizer.get_vocab_size(), frozenset(special))
