"""Workloads that nobody recorded, named by a line of text.

    poisson:rate=4,prompt=1000,output=200
    gamma:rate=4,cv=3               gaps more irregular than Poisson's
    ramp:from=1,to=8,duration=300   also with cv
    sine:rate=4,amplitude=3,period=600
    step:rate=2,to=8,at=120

Lengths are fixed, or with `spread` lognormal with that standard deviation of their logarithm around
the same median. `requests` says how many; `shared` tokens of each prompt are the same in all, in
whole blocks of 512, rounded down: what is shared beyond the last one is not found in any cache.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random

from simulator.workload.arrivals import Constant, Ramp, Rate, Sine, Step, draw_arrivals
from simulator.workload.records import BadTrace, Record, Recorded, check_count

BLOCK_SIZE = 512
_ALWAYS = {"prompt": 1000.0, "output": 200.0, "spread": 0.0, "shared": 0.0, "requests": 1000.0}

_MOST_TOKENS = 1e7
_MOST = {
    **dict.fromkeys(("rate", "from", "to"), 1e6),
    **dict.fromkeys(("prompt", "output", "shared"), _MOST_TOKENS),
    "spread": 10.0,
}
"""A run takes as long as its requests, whatever its clock says: beyond these it would not end."""

Numbers = Mapping[str, float]


def _sine(given: Numbers) -> Rate:
    if given["amplitude"] > given["rate"]:
        raise BadTrace("the amplitude of a sine must not exceed its rate")
    return Sine(given["rate"], given["amplitude"], given["period"])


_KINDS: dict[str, tuple[Numbers, Callable[[Numbers], Rate]]] = {
    "poisson": ({"rate": 1.0}, lambda given: Constant(given["rate"])),
    "gamma": ({"rate": 1.0, "cv": 2.0}, lambda given: Constant(given["rate"])),
    "ramp": (
        {"from": 1.0, "to": 4.0, "duration": 300.0, "cv": 1.0},
        lambda given: Ramp(given["from"], given["to"], given["duration"]),
    ),
    "sine": ({"rate": 2.0, "amplitude": 1.0, "period": 600.0, "cv": 1.0}, _sine),
    "step": (
        {"rate": 1.0, "to": 4.0, "at": 60.0, "cv": 1.0},
        lambda given: Step(given["rate"], given["to"], given["at"]),
    ),
}


def is_generated(source: str) -> bool:
    """Whether a name is that of a generator, not of a file."""
    return source.partition(":")[0] in _KINDS


def generators() -> str:
    """Their names, for a message."""
    return ", ".join(_KINDS)


def generate(source: str, *, seed: int, requests: int | None = None) -> Recorded:
    """The requests that `source` describes. Raises BadTrace naming the key that is wrong."""
    kind, _, rest = source.partition(":")
    defaults, make_rate = _KINDS[kind]
    given = {**defaults, **_ALWAYS, **_parse(kind, rest, {*defaults, *_ALWAYS})}
    random = Random(seed)
    count = requests or int(given["requests"])
    check_count(kind, count)
    times_s = draw_arrivals(make_rate(given), count, random, cv=given.get("cv", 1.0))
    shared = tuple(range(-(int(given["shared"]) // BLOCK_SIZE), 0))
    records, block = list[Record](), 0
    for at_s in times_s:
        prompt = _length(given["prompt"], given["spread"], random)
        own = max(0, prompt // BLOCK_SIZE - len(shared))
        records.append(
            Record(
                at_s=at_s,
                prompt_tokens=prompt,
                output_tokens=_length(given["output"], given["spread"], random),
                ids=(shared + tuple(range(block, block + own)))[: prompt // BLOCK_SIZE],
            )
        )
        block += own
    return Recorded(kind=kind, records=tuple(records), block_size=BLOCK_SIZE, skipped=Counter())


def _parse(kind: str, text: str, known: set[str]) -> dict[str, float]:
    given = dict[str, float]()
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise BadTrace(f"{kind} has no {key!r}; it has: {', '.join(sorted(known))}")
        try:
            given[key] = float(value)
        except ValueError:
            raise BadTrace(f"{key} of {kind} is {value!r}, not a number") from None
        lowest = 0.0 if key in {"spread", "shared", "amplitude", "cv"} else 1e-9
        if not lowest <= given[key] < math.inf:
            raise BadTrace(f"{key} of {kind} cannot be {value}")
        if given[key] > (most := _MOST.get(key, math.inf)):
            raise BadTrace(f"{key} of {kind} is {value}, but at most {most:g} is simulated")
    return given


def _length(median: float, spread: float, random: Random) -> int:
    drawn = median * math.exp(random.gauss(0.0, spread)) if spread else median
    if drawn > _MOST_TOKENS:
        raise BadTrace(
            f"a spread of {spread:g} around {median:g} tokens draws more than {_MOST_TOKENS:g}"
        )
    return max(1, round(drawn))
