"""Which queued prompts are asked to move, when, and that none is asked twice."""

from collections.abc import Sequence

from core.clock import FakeClock
from core.ids import WorkerId
from router.coming import Coming
from router.queued import QueuedPrompt, QueuedPrompts
from router.rebalancer import Rebalancer
from router.watcher import Requeue, Unwatched

SLOW, SLOWER, IDLE = WorkerId("slow"), WorkerId("slower"), WorkerId("idle")


class Scene:
    """In place of router.chooser.Chooser: `queue_of` seconds wait at SLOW, `idle` are the others
    without a queue; work takes a second anywhere.
    """

    def __init__(
        self, prompts: int, *, queue_s: float, idle: Sequence[WorkerId] = (IDLE,), on: bool = True
    ) -> None:
        self.queued = QueuedPrompts(Coming())
        self.queue_of = queue_s
        self.idle = idle
        self.clock = FakeClock()
        self.steps: list[Requeue] = []
        self.looked_at: list[QueuedPrompt] = []
        self.asked: list[tuple[int, WorkerId]] = []
        for i in range(prompts):
            self.queued.add(self.prompt(i))
        self.rebalancer = Rebalancer(self, self.clock, _Steps(self), ttft_s=5.0, enabled=on)  # type: ignore[arg-type]

    def queue_s(self, worker: WorkerId) -> float | None:
        return self.queue_of

    def idle_work_s(self, prompt: QueuedPrompt) -> dict[WorkerId, float]:
        self.looked_at.append(prompt)
        return dict.fromkeys(self.idle, 1.0)

    def asks_after(self, seconds: float) -> list[int]:
        """Who is asked to move so much later."""
        self.clock.advance(seconds)
        self.asked.clear()
        self.rebalancer.look()
        return [number for number, _ in self.asked]

    def prompt(self, number: int, worker: WorkerId = SLOW) -> QueuedPrompt:
        return QueuedPrompt(
            worker_id=worker,
            tokens=10,
            hashes=(),
            block_size=16,
            candidates=(worker, IDLE),
            queue_s=float(number),
            work_s=1.0,
            submitted_at_s=self.clock.now_s(),
            arrived_at_s=self.clock.now_s(),
            move=lambda to: self.asked.append((number, to)),
        )


class _Steps(Unwatched):
    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def requeued(self, step: Requeue) -> None:
        self._scene.steps.append(step)


def test_a_queue_on_time_is_left_alone() -> None:
    scene = Scene(3, queue_s=3.0)
    assert scene.asks_after(1.0) == []


def test_prompts_of_a_worker_that_stands_still_move_while_they_can_still_keep_the_target() -> None:
    scene = Scene(3, queue_s=3.0)
    # The first should have been there after 1 s: 2 s late, with 3 s before the last one's token.
    assert 2 in scene.asks_after(3.0)
    assert scene.steps == [Requeue.ASKED] * len(scene.asked)


def test_who_was_asked_is_not_asked_again() -> None:
    scene = Scene(3, queue_s=3.0)
    first = scene.asks_after(3.0)
    assert first
    assert not set(first) & set(scene.asks_after(0.5))


def test_two_queues_do_not_fill_the_same_idle_worker() -> None:
    scene = Scene(3, queue_s=3.0)
    for i in range(3):
        scene.queued.add(scene.prompt(10 + i, SLOWER))
    # After 3 of the target's 5 s there is room for two seconds of work.
    assert len(scene.asks_after(3.0)) == 2


def test_too_late_for_the_target_elsewhere_is_not_worth_a_move() -> None:
    assert Scene(3, queue_s=3.0).asks_after(4.5) == []


def test_nobody_moves_while_no_other_candidate_is_idle() -> None:
    assert Scene(3, queue_s=3.0, idle=()).asks_after(3.0) == []


def test_nobody_moves_where_it_is_switched_off() -> None:
    assert Scene(3, queue_s=3.0, on=False).asks_after(3.0) == []


def test_a_prompt_that_has_its_first_token_is_gone_from_the_queue() -> None:
    scene = Scene(2, queue_s=3.0)
    prompts = scene.queued.at(SLOW)
    for prompt in (*prompts, *prompts):
        scene.queued.discard(prompt)
    assert scene.queued.workers() == []
    assert scene.asks_after(3.0) == []


def passes(scene: Scene, count: int) -> set[QueuedPrompt]:
    """What is looked at in so many passes, each of which has its bound."""
    seen: set[QueuedPrompt] = set()
    for _ in range(count):
        scene.looked_at.clear()
        scene.asks_after(0.1)
        assert len(scene.looked_at) <= 128
        seen.update(scene.looked_at)
    return seen


def test_a_pass_looks_at_so_many_prompts_of_a_long_queue_and_the_next_ones_at_the_others() -> None:
    scene = Scene(500, queue_s=500.0, idle=())
    assert len(passes(scene, 1)) == 64
    assert passes(scene, 7) == set(scene.queued.at(SLOW)) - set(scene.queued.at(SLOW)[-64:])
    assert passes(scene, 1) == set(scene.queued.at(SLOW)[-64:]), "a new round"


def test_no_queue_starves_behind_longer_ones() -> None:
    scene = Scene(500, queue_s=500.0, idle=())
    for name in ("a", "z"):
        for i in range(500):
            scene.queued.add(scene.prompt(i, WorkerId(name)))
    looked_at = {prompt.worker_id for prompt in passes(scene, 2)}
    assert looked_at == {"a", SLOW, "z"}


def test_queues_on_time_are_looked_at_in_turn_as_well() -> None:
    scene = Scene(0, queue_s=0.0)
    asked: list[WorkerId] = []
    scene.queue_s = lambda worker: asked.append(worker) or 0.0  # type: ignore[method-assign, func-returns-value]
    workers = [WorkerId(f"w{i:03}") for i in range(300)]
    for worker in workers:
        scene.queued.add(scene.prompt(0, worker))
    for _ in range(3):
        scene.asks_after(0.1)
    assert len(asked) == 3 * 128
    assert set(asked) == set(workers)


def test_a_prompt_deep_in_a_queue_moves_although_the_last_ones_cannot() -> None:
    scene = Scene(0, queue_s=500.0)
    for i in range(200):
        prompt = scene.prompt(i)
        prompt.move = prompt.move if i == 3 else None
        scene.queued.add(prompt)
    asked = [number for _ in range(4) for number in scene.asks_after(0.1)]
    assert asked == [3]


def test_who_stands_behind_the_part_looked_at_is_no_reason_to_move() -> None:
    """The first of the queue, looked at last, is sooner where it is."""
    scene = Scene(0, queue_s=100.0)
    scene.queued.add(first := scene.prompt(0))
    for i in range(1, 100):
        prompt = scene.prompt(i)
        prompt.move = None
        scene.queued.add(prompt)
    assert first in passes(scene, 2)
    assert scene.asked == []
    assert first.move is not None
