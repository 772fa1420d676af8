"""Prompts of a trace file, as the router sees them: arrival, tokens, block hashes.

A line is a JSON object with `timestamp` (ms), `input_length` and `hash_ids`, an id per block of the
prompt (Mooncake's format: equal ids, equal prefix). With `session_id` the file holds sessions whose
timestamps count from their own start: they begin at random here, and more of them than recorded are
made by copies that share only what the recorded sessions share with each other.
"""

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random

from benchmarks.types import BenchFailed
from core.errors import plain
from core.ids import BlockHash

CUT_TOKENS = 20_480
"""Prompts of replays are cut to this length, as in DualMap's evaluation."""
_JITTER_S = 3.0
"""Mooncake's timestamps are multiples of about 3 s; arrivals are spread within."""
_SESSIONS_AT_ONCE = 20


@dataclass(frozen=True, slots=True)
class Prompt:
    """`at_s` at the trace's own rate."""

    at_s: float
    tokens: int
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    at_s: float
    tokens: int
    ids: tuple[int, ...]
    session: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A file, read."""

    name: str
    block_size: int
    lines: tuple[_Line, ...]

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """The first `count` prompts by arrival; the seed draws what the file leaves open."""
        random, known = Random(seed), _Hashes(frozenset())
        if self.lines[0].session is not None:
            return self._sessions(count, random)
        prompts = [
            Prompt(line.at_s + random.random() * _JITTER_S, line.tokens, known.of(line.ids, 0))
            for line in self.lines[:count]
        ]
        return sorted(prompts, key=_arrival)

    def _sessions(self, count: int, random: Random) -> list[Prompt]:
        sessions: dict[int, list[_Line]] = defaultdict(list)
        owners: dict[int, set[int]] = defaultdict(set)
        for line in self.lines:
            sessions[line.session or 0].append(line)
            for block in line.ids:
                owners[block].add(line.session or 0)
        known = _Hashes({block for block, seen in owners.items() if len(seen) > 1})
        mean_s = sum(lines[-1].at_s for lines in sessions.values()) / len(sessions)
        copies, start_s, prompts = math.ceil(count / len(self.lines)), 0.0, list[Prompt]()
        runs = [(copy, lines) for copy in range(copies) for lines in sessions.values()]
        random.shuffle(runs)
        for copy, lines in runs:
            start_s += random.expovariate(_SESSIONS_AT_ONCE / max(1.0, mean_s))
            for line in lines:
                hashes = known.of(line.ids, copy)
                prompts.append(Prompt(start_s + line.at_s, line.tokens, hashes))
        return sorted(prompts, key=_arrival)[:count]


def load_trace(path: Path, max_tokens: int = CUT_TOKENS) -> Trace:
    """Prompts are cut to `max_tokens`. Raises BenchFailed when the file is not a trace."""
    try:
        lines = tuple(_lines(path))
    except OSError as error:
        raise BenchFailed(f"cannot read {path}: {plain(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchFailed(f"{path} is not a trace of prompts: {error!r}") from error
    if not lines:
        raise BenchFailed(f"{path} holds no prompts")
    longest = max(lines, key=lambda line: line.tokens)
    per_block = longest.tokens / max(1, len(longest.ids))
    block_size = 1 << round(math.log2(per_block))
    cut = max_tokens // block_size
    cut_lines = tuple(
        _Line(
            at_s=line.at_s,
            tokens=min(line.tokens, max_tokens),
            ids=line.ids[: min(cut, line.tokens // block_size)],
            session=line.session,
        )
        for line in lines
    )
    return Trace(name=path.name.split(".")[0], block_size=block_size, lines=cut_lines)


def _lines(path: Path) -> Iterator[_Line]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for text in file:
            row = json.loads(text)
            session = row.get("session_id")
            yield _Line(
                at_s=float(row["timestamp"]) / 1e3,
                tokens=int(row["input_length"]),
                ids=tuple(int(block) for block in row["hash_ids"]),
                session=None if session is None else int(session),
            )


def finer(hashes: Sequence[BlockHash], parts: int) -> tuple[BlockHash, ...]:
    """Each block cut into `parts`: the prompt in smaller blocks, equal where it was equal."""
    return tuple(
        BlockHash(blake2b(block + bytes([part]), digest_size=16).digest())
        for block in hashes
        for part in range(parts)
    )


class _Hashes:
    """One object per block of each copy of the sessions; `shared` blocks are of all copies."""

    def __init__(self, shared: Collection[int]) -> None:
        self._shared = shared
        self._known: dict[tuple[int, int], BlockHash] = {}

    def of(self, ids: Sequence[int], copy: int) -> tuple[BlockHash, ...]:
        keys = [(0 if block in self._shared else copy, block) for block in ids]
        return tuple(self._known.get(key) or self._make(key) for key in keys)

    def _make(self, key: tuple[int, int]) -> BlockHash:
        digest = blake2b(f"{key[0]}/{key[1]}".encode(), digest_size=16).digest()
        self._known[key] = BlockHash(digest)
        return self._known[key]


def _arrival(prompt: Prompt) -> float:
    return prompt.at_s
