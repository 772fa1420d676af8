"""From what was recorded to a workload: jitter, rate, length, sessions and block hashes.

The seed draws what a recording leaves open, so two systems that are given the same seed are asked
the same: where in a bucket of equal time stamps a request came, and when sessions begin.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from random import Random
from statistics import median

from core.blocks import HASH_BYTES
from core.ids import BlockHash
from simulator.workload.records import BadTrace, Record, Recorded
from simulator.workload.types import SimRequest, Workload

_BUCKETED = 0.5
_NEIGHBOURS = 1.5
"""Mooncake's stamps are 2.997 to 3.003 s apart."""
_SESSION_RATE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """How a recording is replayed.

    All gaps between arrivals are divided by `rate_scale`, so bursts keep their shape; of sessions,
    only their starts. `requests` takes the first of them, or repeats the recording, each time with
    blocks of its own; `skip` begins after so many, in a recording without sessions, and `sessions`
    takes so many of those, whole, and not `requests`. Longer prompts are cut to
    `max_prompt_tokens`. `recorded_tpot_s` is what a token of an answer took where sessions were
    recorded. `start_s` and `rate_rps` are for client windows alone: which part of their days, and
    the rate of all clients together.
    """

    seed: int = 0
    rate_scale: float = 1.0
    requests: int | None = None
    skip: int = 0
    sessions: int | None = None
    max_prompt_tokens: int | None = None
    recorded_tpot_s: float = 0.02
    start_s: float | None = None
    rate_rps: float | None = None


def build_workload(name: str, recorded: Recorded, shaping: Shaping) -> Workload:
    """Raises BadTrace when there is no request to replay, or no rate to replay it at."""
    if not recorded.records:
        raise BadTrace(f"{name} holds no requests")
    if shaping.rate_scale <= 0 or not math.isfinite(shaping.rate_scale):
        raise BadTrace(f"a rate scale must be above 0, not {shaping.rate_scale:g}")
    random = Random(shaping.seed)
    sessions = bool(recorded.records[0].session)
    arrivals = _sessions if sessions else _open
    requests = arrivals(recorded, shaping, random)
    if shaping.max_prompt_tokens is not None:
        requests = [_cut(one, shaping.max_prompt_tokens, recorded.block_size) for one in requests]
    requests.sort(key=lambda request: request.at_s)
    first_s = requests[0].at_s
    requests = [replace(one, at_s=one.at_s - first_s) for one in requests]
    return Workload(
        name=name,
        block_size=recorded.block_size,
        requests=tuple(requests),
        horizon_s=requests[-1].at_s,
    )


def check_rate(trace: str, requests: Sequence[SimRequest]) -> None:
    """Raises BadTrace where all `requests`, in order, come at once: whatever their gaps are divided
    by, no rate comes of it.
    """
    if requests[-1].at_s == requests[0].at_s:
        raise BadTrace(
            f"{trace}: all requests come at once, which is no rate to search from; give them"
            " arrival times, or take a generator, such as poisson:rate=4"
        )


def bucket_s(times_s: Sequence[float]) -> float:
    """The width of the buckets that time stamps were rounded to; 0 where most are distinct. Most
    buckets may be empty, but two that are neighbours are as far apart as one is wide.
    """
    distinct = sorted(set(times_s))
    if len(distinct) < 2 or len(distinct) > _BUCKETED * len(times_s):
        return 0.0
    gaps_s = [b - a for a, b in pairwise(distinct)]
    near_s = _NEIGHBOURS * min(gaps_s)
    return median(gap_s for gap_s in gaps_s if gap_s < near_s)


# -- arrivals -----------------------------------------------------------------------------------


def _open(recorded: Recorded, shaping: Shaping, random: Random) -> list[SimRequest]:
    """Requests come when they came, whatever becomes of those before them."""
    records = sorted(recorded.records, key=lambda record: record.at_s)
    count = shaping.requests or len(records)
    width_s = bucket_s([record.at_s for record in records])
    span_s = records[-1].at_s - records[0].at_s
    repeat_s = span_s + (span_s / max(1, len(records) - 1) if width_s == 0 else width_s)
    hashes, requests = _Hashes(recorded.block_size), list[SimRequest]()
    skip = shaping.skip % len(records)
    for i in range(skip, skip + count):
        copy, place = divmod(i, len(records))
        record = records[place]
        at_s = record.at_s + copy * repeat_s + random.random() * width_s
        requests.append(_request(record, at_s / shaping.rate_scale, hashes, copy))
    return requests


def _sessions(recorded: Recorded, shaping: Shaping, random: Random) -> list[SimRequest]:
    """Sessions begin at random, about one per second at a rate scale of 1; copies of them share
    only the blocks that recorded sessions share with each other.
    """
    turns = defaultdict[str, list[Record]](list)
    for record in recorded.records:
        turns[record.session].append(record)
    count = shaping.requests or len(recorded.records)
    shared = _shared_blocks(turns)
    hashes = _Hashes(recorded.block_size, shared)
    rate = shaping.rate_scale * _SESSION_RATE
    start_s, copy, requests = 0.0, 0, list[SimRequest]()
    begun = 0
    while len(requests) < count if shaping.sessions is None else begun < shaping.sessions:
        names = list(turns)
        random.shuffle(names)
        for name in names[: None if shaping.sessions is None else shaping.sessions - begun]:
            start_s += random.expovariate(rate)
            requests += _session(turns[name], start_s, copy, hashes, shaping)
            begun += 1
        copy += 1
    requests.sort(key=lambda request: request.at_s)
    return requests if shaping.sessions is not None else requests[:count]


def _session(
    turns: Sequence[Record], start_s: float, copy: int, hashes: "_Hashes", shaping: Shaping
) -> list[SimRequest]:
    """Recorded gaps hold an answer and then thought. Of an answer's length only the tokens are
    known; they are taken to have come at `recorded_tpot_s`.
    """
    requests = list[SimRequest]()
    before: Record | None = None
    at_s = start_s
    for turn in turns:
        think_s = None
        if before is not None:
            gap_s = max(0.0, turn.at_s - before.at_s)
            think_s = max(0.0, gap_s - before.output_tokens * shaping.recorded_tpot_s)
            at_s += max(gap_s, think_s + before.output_tokens * shaping.recorded_tpot_s)
        request = _request(turn, at_s, hashes, copy)
        requests.append(replace(request, session=f"{turn.session}.{copy}", think_s=think_s))
        before = turn
    return requests


def _request(record: Record, at_s: float, hashes: "_Hashes", copy: int) -> SimRequest:
    return SimRequest(
        at_s=at_s,
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.output_tokens,
        hashes=hashes.of(record, copy),
    )


def _cut(request: SimRequest, most: int, block_size: int) -> SimRequest:
    if request.prompt_tokens <= most:
        return request
    return replace(request, prompt_tokens=most, hashes=request.hashes[: most // block_size])


# -- blocks -------------------------------------------------------------------------------------


def _shared_blocks(turns: Mapping[str, Sequence[Record]]) -> frozenset[int]:
    owners = defaultdict[int, set[str]](set)
    for name, records in turns.items():
        for record in records:
            for block in record.ids:
                owners[block].add(name)
    return frozenset(block for block, names in owners.items() if len(names) > 1)


class _Hashes:
    """A chained hash for every block of every copy; `shared` blocks are one in all copies."""

    def __init__(self, block_size: int, shared: Collection[int] = frozenset()) -> None:
        self._block_size = block_size
        self._shared = shared
        self._known: dict[tuple[BlockHash, int, int], BlockHash] = {}
        self._last: tuple[int, tuple[int, ...], list[BlockHash]] = 0, (), []

    def of(self, record: Record, copy: int) -> tuple[BlockHash, ...]:
        ids = record.ids[: record.prompt_tokens // self._block_size]
        last_copy, last_ids, last_chain = self._last
        # A turn mostly repeats the one before it.
        goes_on = copy == last_copy and ids[: len(last_ids)] == last_ids
        chain = list(last_chain) if goes_on else []
        parent = chain[-1] if chain else BlockHash(b"")
        for block in ids[len(chain) :]:
            key = parent, 0 if block in self._shared else copy, block
            known = self._known.get(key)
            if known is None:
                text = parent + f"{key[1]}/{block}".encode()
                known = BlockHash(blake2b(text, digest_size=HASH_BYTES).digest())
                self._known[key] = known
            chain.append(known)
            parent = known
        self._last = copy, ids, chain
        return tuple(chain)
