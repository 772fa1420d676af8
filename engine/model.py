"""The engine that runs a Hugging Face checkpoint: transformers' model, our paged attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from core.errors import BatonError, ConfigError, InternalError, InvalidRequest
from engine.architecture import REMEDY
from engine.arena import TORCH_DTYPE, Arena
from engine.attention import PAGED, register_attention, run_packed
from engine.checkpoint import CheckpointInfo, Device, read_checkpoint, read_config
from engine.config import EngineConfig
from engine.packing import PackedStep
from engine.sampler import Draw, sample
from engine.self_check import check_model
from engine.sizing import arena_blocks
from engine.types import EngineInfo, Sampled, SeqStep

LOAD_FAULTS = (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError)
"""What transformers raises while loading a checkpoint that does not fit its config."""


def load_engine(checkpoint_dir: Path, config: EngineConfig) -> "HfEngine":
    """Check the directory, load the weights, prove the attention exact, allocate the arena.

    Raises ConfigError with one sentence for whatever is wrong with the set-up.
    """
    info = read_checkpoint(checkpoint_dir, config)
    num_blocks = arena_blocks(info.layout, config)
    torch.set_num_threads(config.threads)
    model = _load_model(info)
    with torch.inference_mode():
        check_model(model, info.layout)
    try:
        arena = Arena(info.layout, num_blocks, info.device)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"no memory for {num_blocks} KV blocks of {info.layout.block_bytes} bytes; "
            "lower engine.kv_memory_mb"
        ) from error
    return HfEngine(model, arena, info)


class HfEngine:
    """An Engine (see engine/types.py) over a loaded model.

    Text depends on a sequence's own tokens only: rows of other sequences share matrix products, so
    logits differ by rounding from batch to batch, and by nothing else.
    """

    def __init__(self, model: PreTrainedModel, arena: Arena, checkpoint: CheckpointInfo) -> None:
        self._model: PreTrainedModel | None = model
        self._arena = arena
        self._info = EngineInfo(
            model_id=checkpoint.model_id,
            layout=checkpoint.layout,
            num_blocks=arena.num_blocks,
            context_tokens=checkpoint.context_tokens,
            vocab_size=checkpoint.vocab_size,
            eos_token_ids=checkpoint.eos_token_ids,
            device=_name_of(checkpoint.device),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def arena(self) -> Arena:
        return self._arena

    def step(self, batch: Sequence[SeqStep]) -> list[Sampled | BatonError | None]:
        """One forward pass of the whole batch; a faulty entry is left out and answered alone."""
        answers: list[Sampled | BatonError | None] = [self._fault(entry) for entry in batch]
        runnable = [i for i, fault in enumerate(answers) if fault is None]
        if not runnable:
            return answers
        with torch.inference_mode():
            for i, answer in self._run([batch[i] for i in runnable]):
                answers[runnable[i]] = answer
        return answers

    def close(self) -> None:
        self._model = None

    def _run(self, batch: Sequence[SeqStep]) -> list[tuple[int, Sampled | BatonError]]:
        """Answers of the entries that sample, each with its index in `batch`."""
        if self._model is None:
            raise InternalError("step was called on a closed engine")
        packed = PackedStep(batch, self._arena)
        if packed.fresh_blocks is not None:
            self._arena.data.index_fill_(0, packed.fresh_blocks, 0)
        sampled = [
            _SampledRow(index=i, row=int(row), draw=draw)
            for i, row in zip(packed.order, packed.last_rows, strict=True)
            if (draw := _draw_of(batch[i])) is not None
        ]
        rows = torch.tensor([s.row for s in sampled], dtype=torch.int64)
        logits = run_packed(self._model, packed, rows.to(self._arena.data.device))
        if not sampled:
            self._wait_for_device()
            return []
        logits = logits.float()
        tokens = sample(logits, [s.draw for s in sampled])
        return [
            (
                s.index,
                token
                if isinstance(token, BatonError)
                else Sampled(token=token, logits=_logit_bytes(row, s.draw)),
            )
            for s, token, row in zip(sampled, tokens, logits, strict=True)
        ]

    def _wait_for_device(self) -> None:
        """A token fetched to the host says that its step is over. Of a step without one, the blocks
        would be announced, and read by another worker, before the GPU has written them.
        """
        if self._arena.data.is_cuda:
            torch.cuda.current_stream(self._arena.data.device).synchronize()

    def _fault(self, entry: SeqStep) -> BatonError | None:
        """What makes this entry impossible to run, found before it can harm the others."""
        start, end = entry.start, entry.end
        if not 0 <= start < end <= len(entry.tokens):
            return InternalError(f"cannot feed positions [{start}, {end}) of {len(entry.tokens)}")
        if entry.sample is not None and end != len(entry.tokens):
            return InternalError(f"cannot sample after position {end} of {len(entry.tokens)}")
        if end > self._info.context_tokens:
            return InvalidRequest(
                f"{end} tokens do not fit the model's context of {self._info.context_tokens}"
            )
        if len(entry.block_table) < self._info.layout.num_blocks(end):
            return InternalError(
                f"{len(entry.block_table)} blocks do not hold {end} tokens of the sequence"
            )
        fed = entry.tokens[start:end]
        if not 0 <= min(fed) <= max(fed) < self._info.vocab_size:
            return InvalidRequest(
                f"a token id is outside of the model's vocabulary of {self._info.vocab_size}"
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _SampledRow:
    index: int
    row: int
    draw: Draw


def _draw_of(entry: SeqStep) -> Draw | None:
    if entry.sample is None:
        return None
    return Draw(
        params=entry.sample,
        choice=entry.sequence_id.choice,
        output_position=entry.output_position,
    )


def _logit_bytes(row: torch.Tensor, draw: Draw) -> bytes:
    if not draw.params.return_logits:
        return b""
    return row.cpu().numpy().astype(np.dtype("<f4"), copy=False).tobytes()


def _name_of(device: Device) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _load_model(info: CheckpointInfo) -> PreTrainedModel:
    register_attention()
    transformers_logging.disable_progress_bar()
    config = read_config(info.directory)
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_attention_backend:
        raise ConfigError(
            f"layer 0 of model_type {info.model_type!r} has an attention of its own, which is not "
            f"served yet; {REMEDY}"
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(info.directory),
            config=config,
            dtype=TORCH_DTYPE[info.layout.dtype],
            attn_implementation=PAGED,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model = model.to(info.device).eval()
    except LOAD_FAULTS as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"transformers cannot load the weights in {info.directory} ({detail}); "
            "check that they belong to its config.json and fit into memory"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise ConfigError(
            f"the weights in {info.directory} lack {len(missing)} parameters of the model, the "
            f"first being {missing[0]}; copy the checkpoint again"
        )
    loaded: PreTrainedModel = model
    return loaded
