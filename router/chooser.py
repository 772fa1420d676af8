"""Which of the fleet's workers an attempt goes to: candidates from what is connected now."""

from collections.abc import Sequence
from random import Random

from core.blocks import chain_hashes, root_hash
from core.errors import NoWorkers
from core.ids import BlockHash, Incarnation, Role, WorkerId
from router.client import WorkerLink
from router.fleet import Fleet
from router.place import Placement, place_decode, place_prefill
from router.policies.base import DecodePolicy, PrefillPolicy


class Chooser:
    """`failed` are those a request has failed on: chosen again only if there is no other."""

    def __init__(
        self, fleet: Fleet, prefill: PrefillPolicy, decode: DecodePolicy, random: Random
    ) -> None:
        self._fleet = fleet
        self._prefill = prefill
        self._decode = decode
        self._random = random

    def for_prefill(
        self, tokens: Sequence[int], cache_salt: str, failed: set[Incarnation]
    ) -> Placement:
        """A prefill worker for a prompt. Raises NoWorkers."""
        return place_prefill(
            self._candidates(Role.PREFILL, failed),
            len(tokens),
            self._hashes(tokens, cache_salt),
            self._prefill,
            self._random,
            holders=[link for link in self._fleet.links() if link.record.incarnation not in failed],
        )

    def for_decode(self, total_tokens: int, failed: set[Incarnation]) -> Placement:
        """A decode worker for a sequence that may grow to `total_tokens`. Raises NoWorkers."""
        links = self._candidates(Role.DECODE, failed)
        return place_decode(links, total_tokens, self._decode, self._random)

    def for_move(self, total_tokens: int, source: Incarnation, to: WorkerId | None) -> Placement:
        """Another decode worker than `source`, `to` or any. Raises NoWorkers."""
        links = [
            link
            for link in self._fleet.routable(Role.DECODE, excluding={source})
            if to in (None, link.record.worker_id)
        ]
        if not links:
            raise NoWorkers(f"no other decode worker {to or ''} is ready".replace("  ", " "))
        return place_decode(links, total_tokens, self._decode, self._random)

    def has_decode(self, excluding: set[Incarnation]) -> bool:
        """Whether a decode worker is routable beside these."""
        return bool(self._fleet.routable(Role.DECODE, excluding=excluding))

    def _candidates(self, role: Role, failed: set[Incarnation]) -> list[WorkerLink]:
        links = self._fleet.routable(role, excluding=failed)
        links = links or self._fleet.routable(role)
        if not links:
            raise NoWorkers(f"no {role} worker is ready; try again, or see `baton status`")
        return links

    def _hashes(self, tokens: Sequence[int], cache_salt: str) -> list[BlockHash]:
        """Block hashes of a prompt, in the block size all workers of the model share."""
        views = [link.view for link in self._fleet.links() if link.view is not None]
        if not views:
            return []
        hello = views[0].hello
        root = root_hash(hello.model_id, cache_salt)
        return chain_hashes(tokens, hello.layout.block_size, root)
