"""Client windows of ServeGen (Alibaba, 2505.09999): a workload composed of clients.

Two files: NAME-arrivals.csv has for each client and window of ten minutes the rate, the CV of gaps
and the distribution that fits them; NAME-lengths.csv the percentiles of prompts and answers. A
client's gaps keep its distribution at every rate. A client without lengths borrows those of
another, chosen by its share of the rate.

Thousands of requests per second are recorded, so as many as are asked for would be over at once,
which is no rate: clients are slowed down alike until that many fill a window.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Self

from simulator.workload.records import BadTrace, Line, Record, Recorded, check_count, read_lines

WINDOW_S = 600.0
_GOLDEN = 0.618
"""Of all windows, from one seed's to the next one's: any few seeds are then far apart."""
_SHARES = {"p1": 0.01, "p5": 0.05, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75}
_SHARES |= {"p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class _Window:
    client: str
    start_s: float
    rate_rps: float
    weibull: bool
    shape: float

    def gap_s(self, rate_rps: float, random: Random) -> float:
        """One gap, of mean 1 / rate."""
        if self.weibull:
            return random.weibullvariate(1 / math.gamma(1 + 1 / self.shape), self.shape) / rate_rps
        return random.gammavariate(self.shape, 1 / self.shape) / rate_rps


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Inverse of a distribution: straight lines between percentiles, and beyond the last one a
    power of the share, so that the mean is the recorded one.
    """

    points: tuple[tuple[float, float], ...]
    tail_power: float

    @classmethod
    def of(cls, points: tuple[tuple[float, float], ...], mean: float) -> Self:
        below = points[0][0] * points[0][1]
        for (share0, value0), (share1, value1) in pairwise(points[:-1]):
            below += (share1 - share0) * (value0 + value1) / 2
        (share0, value0), (share1, value1) = points[-2:]
        above = (mean - below) / (share1 - share0) - value0
        return cls(points, max(0.0, (value1 - value0) / max(1e-9, above) - 1))

    def draw(self, random: Random) -> int:
        share, before = random.random(), (0.0, self.points[0][1])
        for point in self.points:
            if share <= point[0]:
                part = (share - before[0]) / (point[0] - before[0])
                if point is self.points[-1]:
                    part **= self.tail_power
                return max(1, round(before[1] + part * (point[1] - before[1])))
            before = point
        return max(1, round(self.points[-1][1]))


Field = dict[tuple[str, str], dict[float, _Lengths]]
"""By client and field: the lengths of each window."""


def is_servegen(header: str) -> bool:
    """Whether a first line is that of client windows."""
    return header.startswith("client,window_start_s,rate_rps")


def compose(
    lines: Iterator[Line],
    file: Path,
    *,
    seed: int,
    requests: int | None,
    start_s: float | None = None,
    rate_rps: float | None = None,
) -> Recorded:
    """All clients from `start_s` on, by default from the seed's window, until there are as many
    requests as asked, by default those of one window. `rate_rps` scales every client alike to that
    rate in the first window, by default to the recorded one, or to one at which the requests asked
    for take a window. Raises BadTrace.
    """
    windows = list(_windows(lines))
    if not windows:
        raise BadTrace(f"{file} holds no windows, only a header")
    by_start = defaultdict[float, list[_Window]](list)
    for window in windows:
        by_start[window.start_s].append(window)
    first_s = _start_s(by_start, seed) if start_s is None else start_s // WINDOW_S * WINDOW_S
    total_rps = _rate_rps(by_start.get(first_s, ()))
    if not total_rps:
        raise BadTrace(f"{file} has no clients at {start_s:g} s")
    if rate_rps is None:
        rate_rps = total_rps if requests is None else min(total_rps, requests / WINDOW_S)
    scale = rate_rps / total_rps
    count = requests or int(rate_rps * WINDOW_S) + 1
    check_count(file.name, count)
    lengths, skipped = _read_lengths(file), Counter[str]()
    random, records = Random(seed), list[Record]()
    at_s = first_s
    while len(records) < count and at_s in by_start:
        here = _window_records(by_start[at_s], scale, lengths, skipped, random)
        records += islice(here, count - len(records))
        at_s += WINDOW_S
    return Recorded(kind="servegen", records=tuple(records), block_size=512, skipped=skipped)


def _start_s(by_start: Mapping[float, Sequence[_Window]], seed: int) -> float:
    """The busiest window for seed 0; those of other seeds are spread over the recording."""
    starts_s = sorted(by_start)
    busiest = max(range(len(starts_s)), key=lambda i: _rate_rps(by_start[starts_s[i]]))
    return starts_s[(busiest + round(seed * _GOLDEN * len(starts_s))) % len(starts_s)]


def _rate_rps(windows: Sequence[_Window]) -> float:
    return sum(window.rate_rps for window in windows)


def _window_records(
    windows: Sequence[_Window], scale: float, lengths: Field, skipped: Counter[str], random: Random
) -> Iterator[Record]:
    known = [window for window in windows if (window.client, "input_tokens") in lengths]
    lenders = [window.client for window in known] or sorted({client for client, _ in lengths})
    weights = [window.rate_rps for window in known] or None
    streams = []
    for window in windows:
        client = window.client
        if (client, "input_tokens") not in lengths:
            skipped["borrowed lengths"] += 1
            client = random.choices(lenders, weights)[0]
        prompts = _nearest(lengths[client, "input_tokens"], window.start_s)
        answers = _nearest(lengths[client, "output_tokens"], window.start_s)
        own = Random(random.getrandbits(64))
        streams.append(_client_records(window, window.rate_rps * scale, prompts, answers, own))
    return merge(*streams, key=lambda record: record.at_s)


def _client_records(
    window: _Window, rate_rps: float, prompts: _Lengths, answers: _Lengths, random: Random
) -> Iterator[Record]:
    at_s = random.random() / rate_rps
    while at_s < WINDOW_S:
        yield Record(window.start_s + at_s, prompts.draw(random), answers.draw(random))
        at_s += window.gap_s(rate_rps, random)


def _nearest(windows: dict[float, _Lengths], start_s: float) -> _Lengths:
    return windows[min(windows, key=lambda at_s: abs(at_s - start_s))]


# -- files --------------------------------------------------------------------------------------


def _windows(lines: Iterator[Line]) -> Iterator[_Window]:
    header = next(lines).text.split(",")
    for line in lines:
        row = dict(zip(header, line.text.split(","), strict=False))
        try:
            rate_rps, shape = float(row["rate_rps"]), float(row["param1"] or 1.0)
            if not rate_rps > 0 or not shape > 0:
                raise ValueError("a rate or a shape that is not above 0")
            yield _Window(
                client=row["client"],
                start_s=float(row["window_start_s"]),
                rate_rps=rate_rps,
                weibull=row["dist"].lower() == "weibull",
                shape=shape,
            )
        except (KeyError, ValueError) as error:
            raise line.bad(str(error)) from error


def _read_lengths(arrivals: Path) -> Field:
    file = arrivals.with_name(arrivals.name.replace("arrivals", "lengths"))
    if file == arrivals or not file.is_file():
        raise BadTrace(f"the lengths of {arrivals} are not beside it: there is no {file}")
    lines = read_lines(file)
    first = next(lines, None)
    if first is None:
        raise BadTrace(f"{file} is empty")
    header = first.text.split(",")
    found = defaultdict[tuple[str, str], dict[float, _Lengths]](dict)
    for line in lines:
        row = dict(zip(header, line.text.split(","), strict=False))
        try:
            points = tuple((share, float(row[name])) for name, share in _SHARES.items())
            found[row["client"], row["field"]][float(row["window_start_s"])] = _Lengths.of(
                points, float(row["mean"])
            )
        except (KeyError, ValueError) as error:
            raise line.bad(str(error)) from error
    if not found:
        raise BadTrace(f"{file} holds no lengths")
    for client in {client for client, _ in found}:
        for field in ("input_tokens", "output_tokens"):
            if (client, field) not in found:
                raise BadTrace(f"{file} has no {field} of client {client}")
    return dict(found)
