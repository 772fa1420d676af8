"""The worker that jumps over equal steps and the one that takes each as the scheduler plans it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest

from core.ids import BlockHash, WorkerId
from core.messages import LoadReport
from engine.config import TimedConfig
from engine.latency.fitted import FittedLatency
from simulator.events import Events
from simulator.sequence import SimSequence
from simulator.worker import SimWorker, WorkerSpec

LATENCY = FittedLatency.of(TimedConfig())


@dataclass
class Diary:
    """A Leg that notes when it hears what."""

    events: Events
    keeps: bool = True
    heard: list[tuple[str, float, int]] = field(default_factory=list)

    def _note(self, what: str, tokens: int) -> None:
        self.heard.append((what, self.events.now_s(), tokens))

    def computed(self, sequence: SimSequence) -> None:
        self._note("computed", sequence.computed)

    def first_token(self, sequence: SimSequence) -> bool:
        self._note("first", sequence.cached_tokens)
        return self.keeps

    def ended(self, sequence: SimSequence) -> None:
        self._note("ended", sequence.known_tokens)


@dataclass(frozen=True)
class Ask:
    at_s: float
    prompt: int
    output: int
    family: int
    ready: bool = False
    keeps: bool = True
    cancel_s: float | None = None


def hashes_of(family: int, count: int) -> list[BlockHash]:
    """Prompts of one family share all blocks of the shorter one."""
    return [BlockHash(bytes([family + 1, i % 256, i // 256]) + bytes(13)) for i in range(count)]


def play(
    asks: list[Ask],
    spec: WorkerSpec,
    *,
    stepwise: bool = False,
    step_s: float | None = None,
    look_at_s: Sequence[float] = (),
    look: Callable[[LoadReport], None] = lambda load: None,
) -> tuple[list[Diary], SimWorker]:
    """`look` hears the worker's load at the times of `look_at_s`."""
    events = Events()
    worker = SimWorker(WorkerId("w"), spec, events, stepwise=stepwise, step_s=step_s)
    diaries: list[Diary] = []
    size = spec.block_size

    def begin(ask: Ask) -> None:
        diary = Diary(events, ask.keeps)
        diaries.append(diary)
        sequence = SimSequence(
            diary,
            context_tokens=ask.prompt,
            outputs_left=ask.output,
            hashes=hashes_of(ask.family, ask.prompt // size),
            arrived_at_s=ask.at_s,
        )
        if ask.cancel_s is not None:
            events.at(ask.cancel_s, worker.cancel, sequence)
        if not ask.ready:
            worker.compute(sequence)
            return
        reserved = worker.reserve([], -(-ask.prompt // size))
        diary.heard.append(("reserved", events.now_s(), int(reserved is not None)))
        if reserved is not None:
            worker.pool.received(reserved[1])
            sequence.blocks = reserved[1]
            sequence.computed = ask.prompt
            sequence.append()
            sequence.publish(worker.pool, size)
            worker.join(sequence)

    for ask in asks:
        events.at(ask.at_s, begin, ask)
    for at_s in look_at_s:
        events.at(at_s, lambda at: look(worker.load()), at_s)
    events.run()
    return diaries, worker


def random_case(seed: int) -> tuple[list[Ask], WorkerSpec]:
    random = Random(seed)
    size = random.choice([4, 16])
    spec = WorkerSpec(
        latency=LATENCY,
        kv_blocks=random.choice([24, 40, 400]),
        block_size=size,
        step_tokens=random.choice([16, 64, 256]),
        chunk_tokens=random.choice([None, 16, 64]),
        max_batch=random.choice([2, 4, 64]),
    )
    longest = spec.kv_blocks * size // 2
    asks = []
    for _ in range(random.randint(2, 14)):
        at_s = random.random() * random.choice([0.05, 0.5, 2.0])
        prompt = random.randint(1, min(200, longest))
        asks.append(
            Ask(
                at_s,
                prompt,
                random.randint(2, min(120, longest)),
                random.randrange(3),
                ready=random.random() < 0.3,
                keeps=random.random() < 0.8,
                cancel_s=at_s + random.random() if random.random() < 0.1 else None,
            )
        )
    return sorted(asks, key=lambda ask: ask.at_s), spec


def rounded(diaries: list[Diary]) -> list[list[tuple[str, float, int]]]:
    return [[(what, round(at, 7), n) for what, at, n in diary.heard] for diary in diaries]


def test_jumping_and_stepping_give_the_same_times_and_decisions() -> None:
    preempted = 0
    for seed in range(120):
        asks, spec = random_case(seed)
        step_s = [None, 0.008, 0.012][seed % 3]
        jumped, worker = play(asks, spec, step_s=step_s)
        stepped, oracle = play(asks, spec, step_s=step_s, stepwise=True)
        assert rounded(jumped) == rounded(stepped), f"seed {seed}"
        assert worker.scheduler.preemptions == oracle.scheduler.preemptions
        assert worker.pool.hashes() == oracle.pool.hashes()
        assert worker.load() == oracle.load()
        assert worker.busy_s == pytest.approx(oracle.busy_s)
        worker.pool.check()
        worker.pool.check_idle()
        preempted += oracle.scheduler.preemptions
    assert preempted > 30


def test_short_prompts_share_the_step_of_a_long_one_however_long_it_is() -> None:
    spec = WorkerSpec(
        latency=LATENCY, kv_blocks=400, block_size=16, step_tokens=64, chunk_tokens=16
    )
    asks = [Ask(0.0, prompt, 2, family) for family, prompt in enumerate((500, 10, 12, 14, 8))]
    jumped, worker = play(asks, spec)
    stepped, oracle = play(asks, spec, stepwise=True)
    assert rounded(jumped) == rounded(stepped)
    assert worker.busy_s == pytest.approx(oracle.busy_s)
    long, *short = ({what: at for what, at, _ in diary.heard} for diary in jumped)
    assert all(one["ended"] < long["first"] / 4 for one in short)


def test_in_the_middle_of_steps_jumping_and_stepping_report_the_same_load() -> None:
    busy = 0
    for seed in range(60):
        asks, spec = random_case(seed)
        random = Random(seed)
        times = [random.uniform(0.0, 1.5) for _ in range(40)]
        jumped: list[LoadReport] = []
        stepped: list[LoadReport] = []
        play(asks, spec, look_at_s=times, look=jumped.append)
        play(asks, spec, look_at_s=times, look=stepped.append, stepwise=True)
        for ours, theirs in zip(jumped, stepped, strict=True):
            assert (ours.running, ours.waiting) == (theirs.running, theirs.waiting)
            assert ours.decoding == theirs.decoding
            assert abs(ours.decoding_tokens - theirs.decoding_tokens) <= ours.decoding
            # Within a jump the steps done are those of its share of the time: one more or less.
            assert abs(ours.context_tokens - theirs.context_tokens) <= ours.running
            busy += theirs.context_tokens > 0
    assert busy > 600


def slowest_step_s(step_s: float | None) -> float:
    """Of a long answer, while prompts are computed beside it: between two `computed` of a chunk."""
    spec = WorkerSpec(latency=LATENCY, kv_blocks=4000, block_size=16, max_batch=64)
    asks = [Ask(0.0, 16, 400, 0)]
    asks += [Ask(0.5 + i / 10, 2000, 2, 1 + i) for i in range(20)]
    diaries, worker = play(asks, spec, step_s=step_s)
    gaps: list[float] = []
    for diary in diaries[11:]:  # the first ones teach
        times = [at for what, at, _ in diary.heard if what == "computed"]
        gaps += [b - a for a, b in pairwise(times)]
    assert worker.scheduler.idle
    return max(gaps)


def test_a_chunk_beside_an_answer_is_as_long_as_the_target_of_a_step_allows() -> None:
    assert slowest_step_s(None) > 0.015
    assert slowest_step_s(0.0125) == pytest.approx(0.0125, rel=0.05)
