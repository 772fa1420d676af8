"""`baton status`: gathers what the processes of a run say, and shows it as tables or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config import ClusterConfig
from cluster.deaths import Deaths, read_deaths
from cluster.probe import RouterView, SeenWorker, answers_ready, view_of_router
from cluster.registries import connect_registry
from cluster.run_dir import RunDir
from cluster.status import WorkerControl, WorkerStats, WorkerStatus, collect
from cluster.tables import new_table, print_table
from core.errors import Unavailable
from core.registry import WorkerRecord
from kv_transfer.leases import worker_of
from kv_transfer.metrics import LeaseEnd

_EJECTED = {
    "failures": "requests failed on it",
    "slow": "it was far slower than its peers",
    "hung": "its engine is in a step that does not end",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """One running cluster."""

    run_id: str
    pid: int
    """Of the controller, `baton up`."""
    model: str
    url: str
    ready: bool
    """The router answers requests: a prefill and a decode worker are routable."""
    logs: str
    workers: tuple[WorkerStatus, ...]
    ejected: dict[str, str] = field(default_factory=dict)
    """Workers the router leaves out of placement for a while, and why: failures or slow."""
    unreached: dict[str, str] = field(default_factory=dict)
    """Workers the router has no stream to, and why: refused, by them or by it, or not there."""
    deaths: dict[str, Deaths] = field(default_factory=dict)
    """Workers that died in this run, each time to be started again; not those that never did."""
    registry_problem: str = ""
    """Why the registry does not answer: then `workers` are those that the router knows."""


async def read_status(run: RunDir, control: WorkerControl) -> ClusterStatus:
    """Ask router, registry and workers. Raises Unavailable when the run is still starting.

    Where the registry does not answer the workers are those that the router knows.
    """
    try:
        info = run.info()
        config = ClusterConfig.model_validate_json((run.path / "config.json").read_text())
        deaths = read_deaths(run)
    except OSError as error:
        raise Unavailable(f"cluster {run.run_id} is starting or ending; try again") from error
    except ValueError as error:
        raise Unavailable(
            f"cluster {run.run_id} was started by another version of baton; ask that one, or stop"
            " the cluster with `baton down`"
        ) from error
    known: Sequence[WorkerRecord | SeenWorker] = ()
    registry_problem = ""
    try:
        async with connect_registry(config.registry, info.registry_address) as registry:
            known = await registry.workers()
    except Unavailable as error:
        registry_problem = error.message
    embedded = config.registry.url is None
    view = RouterView()
    if not (registry_problem and embedded):  # which comes and goes with the cluster
        view = await view_of_router(info.router_url, next(iter(config.router.api_keys), None))
    if registry_problem:
        known = view.workers
        if not known:
            raise Unavailable(
                f"neither the registry nor the router of cluster {run.run_id} answers; it may be"
                f" starting or ending: {registry_problem}"
            )
    return ClusterStatus(
        run_id=info.run_id,
        pid=info.pid,
        model=info.model,
        url=info.router_url,
        ready=await answers_ready(info.router_url),
        logs=str(run.logs),
        workers=await collect(config, known, control),
        ejected=dict(view.ejected),
        unreached=dict(view.unreached),
        deaths=deaths,
        registry_problem=registry_problem,
    )


def status_json(status: ClusterStatus) -> str:
    """The whole status, leases included, as one JSON object."""
    return json.dumps(asdict(status))


def show_status(
    status: ClusterStatus, console: Console, *, leases: bool, transfers: bool = False
) -> None:
    """Print it for people."""
    state = "[green]ready[/]" if status.ready else "[red]not ready[/]"
    console.print(
        f"[bold]{escape(status.model)}[/] at {status.url}/v1  {state}"
        f"  [dim]run {status.run_id}, pid {status.pid}, logs in {escape(status.logs)}[/]",
        soft_wrap=True,
        highlight=False,
    )
    print_table(console, _worker_table(status))
    if status.registry_problem:
        _say(
            console,
            "[red]the registry[/]",
            f"{status.registry_problem}; shown are the workers that the router knows: they serve"
            " on, but none that starts now is found until the registry is back",
        )
    for worker_id, reason in sorted(status.ejected.items()):
        text = f"the router sends it nothing for now: {_EJECTED.get(reason, reason)}"
        _say(console, f"[yellow]{escape(worker_id)}[/]", text)
    for worker_id, reason in sorted(status.unreached.items()):
        text = f"the router sends it nothing, as they are not connected: {reason}"
        _say(console, f"[yellow]{escape(worker_id)}[/]", text)
    for worker in status.workers:
        problem = worker.problem or (worker.stats.pool_error if worker.stats is not None else "")
        if problem:
            _say(console, f"[red]{escape(worker.worker_id)}[/]", problem)
    for worker_id, deaths in sorted(status.deaths.items()):
        _say(console, f"[dim]{escape(worker_id)}[/]", _deaths_text(deaths))
    if leases:
        print_table(console, _lease_table(status.workers))
    if transfers:
        print_table(console, _transfer_table(status.workers))
        print_table(console, _ended_table(status.workers))


def _deaths_text(deaths: Deaths) -> str:
    at = datetime.fromtimestamp(deaths.last_s, UTC).astimezone().isoformat(" ", "seconds")
    times = "once" if deaths.count == 1 else f"{deaths.count} times, last"
    return f"died {times} at {at} (pid {deaths.last_pid}): {deaths.last_reason}"


def _say(console: Console, who: str, text: str) -> None:
    console.print(f"{who}: {escape(text)}", highlight=False, soft_wrap=True)


def _worker_table(status: ClusterStatus) -> Table:
    table = new_table(
        ["worker", "role", "state"],
        ["waiting", "running", "queued tokens", "KV blocks", "cached", "held", "KV read", "pid"],
    )
    for worker in status.workers:
        stats = worker.stats
        if stats is None:
            table.add_row(escape(worker.worker_id), worker.role, "[red]absent[/]")
            continue
        blocks = stats.blocks
        used = blocks.in_use + blocks.receiving + blocks.quarantined
        table.add_row(
            escape(worker.worker_id),
            worker.role,
            _state_of(worker.worker_id, stats, status),
            str(stats.waiting),
            str(stats.running),
            str(stats.queued_tokens),
            f"{used} of {blocks.total}",
            str(blocks.cached),
            str(blocks.held),
            f"{stats.transfer_bytes / 2**20:.1f} MiB",
            str(stats.pid),
        )
    return table


def _state_of(worker_id: str, stats: WorkerStats, status: ClusterStatus) -> str:
    if stats.draining:
        return "draining"
    if worker_id in status.unreached:
        return "[yellow]not connected[/]"
    ejected = status.ejected.get(worker_id)
    return f"[yellow]ejected: {ejected}[/]" if ejected is not None else "serving"


def _lease_table(workers: Sequence[WorkerStatus]) -> Table:
    table = new_table(
        ["owner", "lease", "sequence", "reader"],
        ["blocks", "held for", "expires in"],
        title="leases",
    )
    for worker in workers:
        for lease in worker.stats.leases if worker.stats else ():
            expires = "-" if lease.expires_in_s is None else f"{lease.expires_in_s:.1f} s"
            table.add_row(
                escape(worker.worker_id),
                str(lease.lease_id),
                escape(lease.sequence_id),
                escape(worker_of(lease.reader)) or "nobody yet",
                str(lease.blocks),
                f"{lease.age_s:.1f} s",
                expires,
            )
    if not table.row_count:
        table.add_row("none")
    return table


def _transfer_table(workers: Sequence[WorkerStatus]) -> Table:
    table = new_table(
        ["reader", "owner", "by"],
        ["hand-offs", "sealed", "KV read", "descriptors", "GB/s", "hidden", "failures"],
        title="KV transfers",
    )
    for worker in workers:
        for peer in worker.stats.peers if worker.stats else ():
            busy = peer.seconds > 0
            failures = ", ".join(f"{n} {cause}" for cause, n in sorted(peer.failures.items()))
            table.add_row(
                escape(worker.worker_id),
                escape(peer.owner_id),
                peer.transport or "-",
                str(peer.handoffs),
                str(peer.sealed),
                f"{peer.nbytes / 2**20:.1f} MiB",
                str(peer.descriptors),
                f"{peer.nbytes / peer.seconds / 1e9:.2f}" if busy else "-",
                f"{100 * peer.hidden_s / peer.seconds:.0f} %" if busy else "-",
                failures or "0",
            )
    if not table.row_count:
        table.add_row("none")
    return table


def _ended_table(workers: Sequence[WorkerStatus]) -> Table:
    table = new_table(["owner", "reader"], list(LeaseEnd), title="KV leases that ended")
    for worker in workers:
        for reader in worker.stats.readers if worker.stats else ():
            counts = (str(reader.leases.get(how, 0)) for how in LeaseEnd)
            table.add_row(escape(worker.worker_id), escape(reader.reader_id) or "nobody", *counts)
    if not table.row_count:
        table.add_row("none")
    return table
