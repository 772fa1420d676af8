"""Both pools of workers as named Ray actors, one WorkerKeeper each."""

import asyncio

from cluster.config import ClusterConfig
from cluster.deaths import DeathBook
from cluster.events import Event, Report, WorkerDied, WorkerReady
from cluster.ray_runtime import RayRuntime
from cluster.run_dir import RunDir
from cluster.worker_keeper import WorkerKeeper
from cluster.worker_spec import WorkerSpec
from core.clock import SystemClock
from core.ids import Role, WorkerId

REAL_HOST = "cluster.worker_host:host_worker"


class RayPools:
    """The workers of one cluster. `supervise` is its only task; `stop` comes once that has ended.

    `host` names the WorkerHost of all workers, as `module:function`.
    """

    def __init__(
        self,
        config: ClusterConfig,
        run: RunDir,
        ray: RayRuntime,
        *,
        registry_address: str,
        report: Report,
        host: str = REAL_HOST,
    ) -> None:
        self._report = report
        self._deaths = DeathBook(run, SystemClock())
        self._waiting_for = set(worker_ids(config))
        self._all_ready = asyncio.Event()
        self._keepers = [
            WorkerKeeper(
                WorkerSpec(
                    worker_id=worker_id,
                    role=role,
                    config=config,
                    registry_address=registry_address,
                    run_dir=run.path,
                    log=run.log_path(worker_id),
                ),
                ray,
                host=host,
                report=self._heard,
            )
            for worker_id, role in worker_ids(config).items()
        ]

    async def supervise(self) -> None:
        """Start all workers and keep them running, for ever. Raises WorkerFailed."""
        async with asyncio.TaskGroup() as group:
            for keeper in self._keepers:
                group.create_task(keeper.keep())

    async def wait_ready(self) -> None:
        """Return when every worker has served at least once; bounded by the caller."""
        await self._all_ready.wait()

    def missing(self) -> list[WorkerId]:
        """Workers that have not served yet."""
        return sorted(self._waiting_for)

    async def stop(self, timeout_s: float) -> None:
        """Ask every worker to stop and wait for those that serve."""
        async with asyncio.TaskGroup() as group:
            for keeper in self._keepers:
                group.create_task(keeper.stop(timeout_s))

    def _heard(self, event: Event) -> None:
        if isinstance(event, WorkerReady):
            self._waiting_for.discard(event.worker_id)
            if not self._waiting_for:
                self._all_ready.set()
        if isinstance(event, WorkerDied):
            self._deaths.note(event)
        self._report(event)


def worker_ids(config: ClusterConfig) -> dict[WorkerId, Role]:
    """The ids of a cluster's workers and the roles they start in."""
    counts = {Role.PREFILL: config.prefill.workers, Role.DECODE: config.decode.workers}
    return {
        WorkerId(f"{role}-{number}"): role
        for role, count in counts.items()
        for number in range(count)
    }
