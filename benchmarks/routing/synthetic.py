"""Prompts like those of Mooncake's conversation trace, for whoever has not got the file.

Measured on that trace: lengths are about log-normal (median 6,900 tokens, sigma 1.2, the longest
126,000), all prompts begin with the same block, and about every fourth repeats a good part of an
earlier one. What the prompts are made of is drawn; nothing of the trace is in here.
"""

from hashlib import blake2b
from random import Random

from benchmarks.routing.traces import Prompt
from core.ids import BlockHash

BLOCK_TOKENS = 512
_MEDIAN_TOKENS, _SIGMA = 6_900, 1.2
_LEAST_TOKENS, _MOST_TOKENS = 900, 126_000
_REPEATED = 0.3
_RATE_PER_S = 3.0


def synthetic_prompts(count: int, seed: int) -> list[Prompt]:
    """By arrival, in blocks of 512 tokens; a last block that is not full has no hash."""
    random = Random(seed)
    first = BlockHash(blake2b(b"first", digest_size=16).digest())
    prompts: list[Prompt] = []
    at_s = 0.0
    for number in range(count):
        at_s += random.expovariate(_RATE_PER_S)
        drawn = round(random.lognormvariate(0.0, _SIGMA) * _MEDIAN_TOKENS)
        tokens = min(_MOST_TOKENS, max(_LEAST_TOKENS, drawn))
        blocks = tokens // BLOCK_TOKENS
        known: tuple[BlockHash, ...] = (first,)
        if prompts and random.random() < _REPEATED:
            earlier = random.choice(prompts).hashes
            known = earlier[: max(1, round(random.random() * len(earlier)))]
        own = [_hash(number, i) for i in range(len(known), blocks)]
        prompts.append(Prompt(at_s, tokens, (*known[:blocks], *own)))
    return prompts


def _hash(number: int, block: int) -> BlockHash:
    return BlockHash(blake2b(f"{number}/{block}".encode(), digest_size=16).digest())
