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
        self.asked: list[tuple[int, WorkerId]] = []
        for i in range(prompts):
            self.queued.add(self.prompt(i))
        self.rebalancer = Rebalancer(self, self.clock, _Steps(self), ttft_s=5.0, enabled=on)  # type: ignore[arg-type]

    def queue_s(self, worker: WorkerId) -> float | None:
        return self.queue_of

    def idle_work_s(self, prompt: QueuedPrompt) -> dict[WorkerId, float]:
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
    ((_, prompts),) = scene.queued.by_worker()
    for prompt in (*prompts, *prompts):
        scene.queued.discard(prompt)
    assert list(scene.queued.by_worker()) == []
    assert scene.asks_after(3.0) == []
