"""How many KV blocks the memory given holds, and what that means for users."""

from core.errors import ConfigError
from core.kv import KvLayout
from engine.config import EngineConfig

MIB = 1 << 20


def arena_blocks(layout: KvLayout, config: EngineConfig) -> int:
    """Blocks that fit into `kv_memory_mb`, rounded down; ConfigError when none does."""
    blocks = int(config.kv_memory_mb * MIB) // layout.block_bytes
    if blocks < 1:
        needed_mb = layout.block_bytes / MIB
        raise ConfigError(
            f"engine.kv_memory_mb {config.kv_memory_mb:g} holds no KV block of this model; "
            f"give at least {needed_mb:.3g}, which is one block of {layout.block_size} tokens"
        )
    return blocks


def describe_arena(num_blocks: int, layout: KvLayout, context_tokens: int) -> str:
    """The line a worker prints at start. The longest context is the model's, or all the blocks."""
    tokens = num_blocks * layout.block_size
    return f"{num_blocks} blocks = {tokens} tokens, longest context {min(tokens, context_tokens)}"
