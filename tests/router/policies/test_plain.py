"""A decision is what a plain reading of the pool gives: every worker's cache walked block by block.

The same seed, so the same draws; what is quick about the real query must change no decision.
"""

from collections.abc import Sequence
from random import Random

import pytest

from core.ids import BlockHash, WorkerId
from router.coming import steps_of
from router.curves import PrefillCurve
from router.place import PrefillPoolQuery
from router.policies.baton import Baton
from tests.router.views import BLOCK, Workers

_STEP_BLOCKS = 512 // BLOCK
"""Blocks between two notes of a prompt on its way."""


class PlainQuery(PrefillPoolQuery):
    def _depth(self, worker: WorkerId) -> int:
        index, bit = self._known.index, self._views[worker].holdings.bit
        depth = 0
        while depth < len(self.hashes) and index.holders(self.hashes[depth]) & bit:
            depth += 1
        return depth

    def holders(self, limit: int) -> list[WorkerId]:
        slots = {w: self._views[w].holdings.bit.bit_length() - 1 for w in self.pool}
        start = int(
            self.random.random() * (1 + max(slots[w] for w in self.pool if self.is_open(w)))
        )
        holders = [w for w in self.pool if self.is_open(w) and self._depth(w)]
        return sorted(holders, key=lambda w: (-self._depth(w), slots[w] < start, slots[w]))[:limit]

    def cached_tokens(self, worker: WorkerId) -> int:
        return min(self._depth(worker) * self.block_size, self.tokens - 1)

    def expected_s(self, worker: WorkerId) -> tuple[float, float]:
        view, coming = self._views[worker], self._known.coming
        noted = coming.steps_at(worker, steps_of(self.hashes, self.block_size)) * _STEP_BLOCKS
        cached = max(self._depth(worker), noted) * self.block_size
        speed = self._known.curves.of(view.kind)
        load_tokens = view.load.queued_tokens if view.load is not None else 0
        work_s = speed.prefill.seconds(min(cached, self.tokens - 1), self.tokens)
        return (load_tokens + view.unseen_prompt_tokens) * speed.prefill.queue_token_s(), work_s


def _chain(random: Random, blocks: int) -> list[BlockHash]:
    return [BlockHash(random.randbytes(16)) for _ in range(blocks)]


def _prompts(random: Random) -> list[list[BlockHash]]:
    """Some begin as others do, some as all."""
    start, prompts = _chain(random, 8), list[list[BlockHash]]()
    for _ in range(60):
        before: Sequence[BlockHash] = random.choice(prompts) if prompts else ()
        shared = before[: random.randrange(len(before) + 1)] if before else start
        prompts.append([*shared, *_chain(random, random.randrange(1, 600))])
    return prompts


def _fleet(prompts: Sequence[Sequence[BlockHash]], seed: int) -> Workers:
    """Most hold the beginnings of some prompts, some have queues; what a few are sent is noted."""
    random, workers = Random(seed), Workers(seed=seed)
    for i in range(24):
        held = {
            h: None
            for prompt in random.sample(prompts, 6 if i % 5 else 0)
            for h in prompt[: random.randrange(len(prompt) + 1)]
        }
        queued = random.randrange(20_000) if i % 3 else 0
        view = workers.add(f"w{i:02}", cached=tuple(held), queued=queued)
        view.submitted(1, 4000, random.randrange(4000))
        workers.known.curves.set_prefill(view.kind, PrefillCurve(0.003, 1e-4, 1e-9))
        noted = random.choice(prompts)
        workers.known.coming.add(view.hello.worker_id, steps_of(noted, BLOCK))
    return workers


@pytest.mark.parametrize("seed", range(4))
def test_decisions_are_those_of_a_plain_reading(seed: int) -> None:
    random = Random(seed)
    prompts = _prompts(random)
    quick, plain = _fleet(prompts, seed), _fleet(prompts, seed)
    policies = Baton(0.1), Baton(0.1)
    for i in range(150):
        hashes = random.choice(prompts)
        tokens = len(hashes) * BLOCK + random.randrange(2)
        closed = frozenset(map(WorkerId, random.sample([f"w{n:02}" for n in range(24)], i % 3)))
        answers = []
        for workers, policy, kind in zip(
            (quick, plain), policies, (PrefillPoolQuery, PlainQuery), strict=True
        ):
            query = kind(
                workers.pool, workers.known, i / 10, tokens=tokens, hashes=hashes, closed=closed
            )
            decision = policy.choose(query)
            policy.placed(query, decision)
            answers.append((decision, query.source(decision.worker_id, workers.pool, ())))
        assert answers[0] == answers[1]
