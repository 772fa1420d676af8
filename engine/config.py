"""Settings of the engine: which one, in what precision, with how much memory."""

from typing import Literal

from pydantic import Field

from core.config import Settings


class TimedConfig(Settings):
    """Latency model of the engine without a model, and the KV it pretends to compute.

    A step takes `prefill + decode` milliseconds, each term only when the step has such work:
    prefill = a + b*n + c*n^2 + h*pairs for n prompt tokens, decode = a + b*B + c*sum(ctx) for B
    sequences. See engine/latency/fitted.py.
    The defaults are Llama-3-8B at TP1 on an H100 (sum of measured kernels, a lower bound).
    """

    prefill_base_ms: float = Field(3.91, ge=0)
    prefill_per_token_ms: float = Field(0.01424, ge=0)
    prefill_per_token2_ms: float = Field(7.56e-7, ge=0)
    prefill_per_pair_ms: float = Field(0.0, ge=0)
    """Per pair of a new token and a token that it attends to: what a long history costs a chunk."""
    decode_base_ms: float = Field(6.12, ge=0)
    decode_per_sequence_ms: float = Field(0.0091, ge=0)
    decode_per_context_token_ms: float = Field(4.21e-5, ge=0)
    kv_bytes_per_token: int = Field(256, ge=16, multiple_of=16)
    """KV bytes each token pretends to have; the real model's is 131,072."""
    kv_marked_every_bytes: int = Field(8, ge=8, multiple_of=8)
    """Of each so many KV bytes one 8-byte word is written and verified. More makes large KV cheap
    to compute, and damage smaller than that can go unseen."""
    num_layers: int = Field(2, ge=1)
    context_tokens: int = Field(32_768, ge=16)


class EngineConfig(Settings):
    """One engine per worker process."""

    kind: Literal["transformers", "timed"] = "transformers"
    """`timed` needs no weights: it sleeps by a latency model and makes verifiable KV bytes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` takes the checkpoint's own, but float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    block_size: int = Field(16, ge=1, le=256)
    """Tokens per KV block: the unit of caching, hashing and transfer."""
    kv_memory_mb: float = Field(256.0, gt=0)
    """Memory of the KV arena of one worker, in MiB."""
    threads: int = Field(1, ge=1)
    """CPU threads of torch in one worker."""
    step_tokens: int = Field(2048, ge=1)
    """Token budget of one engine step: decodes first, then a prefill chunk, then prompts that end
    with the step."""
    chunk_tokens: int = Field(1024, ge=1)
    """Of one prompt in a step, at most; step_tokens bounds it as well."""
    max_batch: int = Field(256, ge=1)
    """Sequences in one engine step, at most."""
    step_timeout_s: float = Field(120.0, gt=0)
    """A step that takes longer means a stuck engine; the worker then ends and is replaced."""
    timed: TimedConfig = TimedConfig()
