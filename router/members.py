"""What choosing needs of the connected workers: the fleet's streams, or the simulator's."""

from typing import Protocol

from typing_extensions import TypeVar

from core.ids import Role, WorkerId
from core.registry import WorkerRecord
from router.client import WorkerLink
from router.index import PrefixIndex
from router.pool import Pool
from router.view import WorkerView


class Link(Protocol):
    """The way to one worker; `view` is None while it is not connected."""

    @property
    def record(self) -> WorkerRecord: ...

    @property
    def view(self) -> WorkerView | None: ...


L = TypeVar("L", bound=Link, default=WorkerLink)
L_co = TypeVar("L_co", bound=Link, covariant=True)


class Members(Protocol[L_co]):
    """See router.fleet.Fleet, which is one."""

    @property
    def index(self) -> PrefixIndex: ...

    @property
    def everyone(self) -> Pool: ...

    def pool(self, role: Role) -> Pool: ...

    def link(self, role: Role, worker_id: WorkerId) -> L_co: ...
