"""Chained block hashes: the one identity of cached KV, used by router and workers alike.

A block's hash covers all tokens up to its end, so equal hashes mean equal KV:

    hash[i] = blake2b-128(hash[i-1] || tokens of block i as little-endian u32)
    hash[-1] = blake2b-128("baton-kv" || model_id || 0 || tenant's cache salt)

Only full blocks have a hash. 128 bits and a cryptographic function, because a collision, made
by chance or by a tenant on purpose, would serve one prompt's KV to another.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from sys import byteorder
from typing import overload

from core.ids import BlockHash, ModelId

HASH_BYTES = 16


def root_hash(model_id: ModelId, cache_salt: str = "") -> BlockHash:
    """The parent of every first block under this model and tenant."""
    seed = b"baton-kv" + model_id.encode() + b"\0" + cache_salt.encode()
    return BlockHash(hashlib.blake2b(seed, digest_size=HASH_BYTES).digest())


def chain_hashes(tokens: Sequence[int], block_size: int, parent: BlockHash) -> list[BlockHash]:
    """Hashes of all full blocks of `tokens` below `parent`; a partial last block has none."""
    data, step = pack_tokens(tokens), 4 * block_size
    hashes: list[BlockHash] = []
    for start in range(0, len(data) - step + 1, step):
        digest = hashlib.blake2b(parent + data[start : start + step], digest_size=HASH_BYTES)
        parent = BlockHash(digest.digest())
        hashes.append(parent)
    return hashes


class PackedTokens(Sequence[int]):
    """Token ids kept as they are hashed and as they travel. Those of a prompt are counted, hashed
    and sent on, and as good as never looked at one by one.
    """

    __slots__ = ("packed",)

    def __init__(self, packed: bytes) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed) // 4

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[int, ...]: ...

    def __getitem__(self, place: int | slice) -> int | tuple[int, ...]:
        if isinstance(place, slice):
            return tuple(self._ids()[place])
        return self._ids()[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedTokens):
            return self.packed == other.packed
        return tuple(self) == other

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"PackedTokens({tuple(self)})"

    def _ids(self) -> "memoryview[int]":
        return memoryview(self.packed).cast("I")


def join_tokens(first: Sequence[int], then: Sequence[int]) -> Sequence[int]:
    """One after the other."""
    return PackedTokens(pack_tokens(first) + pack_tokens(then)) if then else first


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32, as they are hashed and as they travel."""
    return tokens.packed if isinstance(tokens, PackedTokens) else _u32(tokens).tobytes()


def unpack_tokens(packed: bytes) -> tuple[int, ...]:
    """Raises ValueError for what `pack_tokens` cannot have made."""
    return tuple(_u32(packed))


def _u32(values: Sequence[int]) -> "array[int]":
    packed = array("I", values)
    if packed.itemsize != 4 or byteorder != "little":
        raise RuntimeError("array('I') is not little-endian u32 on this platform")
    return packed
