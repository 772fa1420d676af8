"""`baton up`: one cluster in the foreground, until a signal."""

import asyncio
import os
import sys

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.controller import Parts, StopRequest, run_cluster
from cluster.display import TerminalDisplay, json_lines
from cluster.events import Report

FORCED_STATUS = 130


def run_up(config: ClusterConfig, *, as_json: bool, parts: Parts | None = None) -> None:
    """Run until stopped. Raises BatonError; a forced stop ends the process with status 130."""
    if as_json:
        forced = asyncio.run(_run(config, json_lines(sys.stdout), parts))
    else:
        with TerminalDisplay(Console(file=sys.stdout)).shown() as report:
            forced = asyncio.run(_run(config, report, parts))
    if forced:
        # All processes and files of the run are gone; a thread stuck in Ray must not hold us.
        sys.stdout.flush()
        os._exit(FORCED_STATUS)


async def _run(config: ClusterConfig, report: Report, parts: Parts | None) -> bool:
    stop = StopRequest()
    with stop.on_signals():
        await run_cluster(config, stop, report, parts)
    return stop.forced.is_set()
