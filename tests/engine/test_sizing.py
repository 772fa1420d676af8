"""How many blocks the KV memory holds."""

import pytest

from core.errors import ConfigError
from core.kv import KvLayout
from engine.config import EngineConfig
from engine.sizing import arena_blocks, describe_arena

LLAMA_8B = KvLayout(block_size=16, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16")


@pytest.mark.parametrize(("memory_mb", "blocks"), [(2, 1), (3.9, 1), (4, 2), (1024, 512)])
def test_memory_holds_whole_blocks_only(memory_mb: float, blocks: int) -> None:
    assert arena_blocks(LLAMA_8B, EngineConfig(kv_memory_mb=memory_mb)) == blocks


def test_memory_for_no_block_is_refused_naming_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"kv_memory_mb 1\.9 holds no KV block .* at least 2,"):
        arena_blocks(LLAMA_8B, EngineConfig(kv_memory_mb=1.9))


def test_the_start_line_counts_blocks_tokens_and_context() -> None:
    line = "512 blocks = 8192 tokens, longest context "
    assert describe_arena(512, LLAMA_8B, 4096) == line + "4096"
    assert describe_arena(512, LLAMA_8B, 131072) == line + "8192"
