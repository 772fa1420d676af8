"""What a choice asks of the pools as they are now, and who is left out of it."""

from collections.abc import Collection, Sequence
from typing import Generic

from core.blocks import chain_hashes, root_hash
from core.clock import Clock
from core.errors import NoWorkers
from core.ids import BlockHash, Incarnation, Role, WorkerId
from router.members import L, Members
from router.outliers import Outliers
from router.place import DecodePoolQuery, Knowledge, PrefillPoolQuery
from router.pool import Pool


class Queries(Generic[L]):
    """Of one router's fleet."""

    def __init__(
        self, fleet: Members[L], known: Knowledge, outliers: Outliers, clock: Clock
    ) -> None:
        self.fleet = fleet
        self.known = known
        self.outliers = outliers
        self.clock = clock

    def prefill(
        self, tokens: int, failed: Collection[Incarnation], hashes: Sequence[BlockHash]
    ) -> PrefillPoolQuery:
        """Raises NoWorkers."""
        pool = self.pool(Role.PREFILL)
        useless = frozenset[WorkerId]()
        if pool.separate and not self.fleet.pool(Role.DECODE).workers:
            useless = pool.separate  # nobody is there to take their answers
        return PrefillPoolQuery(
            pool,
            self.known,
            self.clock.now_s(),
            tokens=tokens,
            hashes=hashes,
            closed=self.closed(pool, failed, useless),
        )

    def decode(
        self,
        pool: Pool,
        context_tokens: int,
        total_tokens: int,
        *,
        kv_address: str = "",
        closed: frozenset[WorkerId] = frozenset(),
    ) -> DecodePoolQuery:
        """Of a sequence of so many tokens that may grow to `total_tokens`."""
        return DecodePoolQuery(
            pool,
            self.known,
            self.clock.now_s(),
            tokens=context_tokens,
            max_tokens=total_tokens,
            kv_domain=self.fleet.everyone.domain_at(kv_address) if kv_address else "",
            closed=closed,
        )

    def hashes_of(self, tokens: Sequence[int], cache_salt: str) -> list[BlockHash]:
        """Of a prompt, in the block size all workers of the model share. Raises NoWorkers."""
        pool = self.pool(Role.PREFILL)
        hello = pool.views[pool.workers[0]].hello
        return chain_hashes(tokens, hello.layout.block_size, root_hash(hello.model_id, cache_salt))

    def closed(
        self,
        pool: Pool,
        failed: Collection[Incarnation] = (),
        useless: frozenset[WorkerId] = frozenset(),
    ) -> frozenset[WorkerId]:
        """The failed and the ejected ones; when that is everybody, the failed ones; when that is,
        too, nobody. The `useless`, who are never everybody, in any case.
        """
        shut = self.outliers.shut(self.clock.now_s())
        if not failed and not shut:
            return useless
        known = pool.named(failed) | useless
        for closed in (known | pool.named(shut), known):
            if len(closed) < len(pool.workers):
                return closed
        return useless

    def placed(self, role: Role, worker: WorkerId, now_s: float) -> None:
        """It may be the probe of an ejected worker."""
        self.outliers.placed(self.fleet.pool(role).views[worker].hello.incarnation, now_s)

    def pool(self, role: Role) -> Pool:
        """Raises NoWorkers."""
        pool = self.fleet.pool(role)
        if not pool.workers:
            raise NoWorkers(f"no {role} worker is ready; try again, or see `baton status`")
        return pool
