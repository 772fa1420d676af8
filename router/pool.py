"""The routable workers of one role, as decisions see them: built anew when one comes or goes."""

from collections import defaultdict
from collections.abc import Collection, Mapping

from core.ids import Incarnation, WorkerId
from router.index import PrefixIndex
from router.view import WorkerView, domain_of


class Pool:
    """Fixed in its members; their views go on changing. `workers` is in order of id."""

    def __init__(self, views: Mapping[WorkerId, WorkerView]) -> None:
        self.views = dict(sorted(views.items()))
        self.workers = tuple(self.views)
        self._incarnations = {view.hello.incarnation: w for w, view in self.views.items()}
        self.incarnations = tuple(self._incarnations)
        """Of `workers`, in their order."""
        self.kinds = frozenset(view.kind for view in self.views.values())
        separate = frozenset(w for w, view in self.views.items() if not view.is_colocated)
        self.separate = separate if len(separate) < len(self.views) else frozenset[WorkerId]()
        """Members that hand their answers over; empty where all do."""
        self._domains: dict[str, list[WorkerId]] = defaultdict(list)
        for worker_id, view in self.views.items():
            self._domains[view.domain].append(worker_id)
        self._domain_at = {view.hello.peer_address: view.domain for view in self.views.values()}
        self._mask = 0
        self._mask_of = -1

    def mask(self, index: PrefixIndex) -> int:
        """The members' slots in the one index their views write to."""
        if self._mask_of != index.version:
            self._mask_of, self._mask = index.version, 0
            for view in self.views.values():
                self._mask |= view.holdings.bit
        return self._mask

    def named(self, incarnations: Collection[Incarnation]) -> frozenset[WorkerId]:
        """The members among these."""
        known = self._incarnations
        return frozenset(known[i] for i in incarnations if i in known)

    def domain_at(self, address: str) -> str:
        """The network domain of the member with this address for peers, or of the address."""
        return self._domain_at.get(address) or domain_of(address)

    def near(self, domain: str) -> tuple[WorkerId, ...]:
        """Members in this network domain; empty if all are or none is."""
        members = self._domains.get(domain, ())
        return () if len(members) == len(self.workers) else tuple(members)
