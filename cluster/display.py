"""What `baton up` shows of a cluster's life: for people on a terminal, or as JSON lines."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner

from cluster.events import (
    ClusterReady,
    Event,
    Report,
    RouterDied,
    RunSwept,
    Starting,
    Stopping,
    WorkerDied,
    WorkerReady,
)


def json_lines(stream: TextIO) -> Report:
    """Each event as one line: its name under `event`, then its fields."""

    def report(event: Event) -> None:
        fields = {"event": type(event).__name__, **asdict(event)}
        try:
            print(json.dumps(fields, default=str), file=stream, flush=True)
        except OSError:
            return  # whoever read is gone; the cluster goes on

    return report


class TerminalDisplay:
    """Lines that stay, and below them what is being waited for."""

    def __init__(self, console: Console) -> None:
        """`console` must own its file: while a cluster runs, sys.stdout goes to a log."""
        self._console = console
        self._waiting = Spinner("dots")
        self._live = Live(
            self._waiting,
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._gone = False

    @contextmanager
    def shown(self) -> Iterator[Report]:
        """Inside the block events are shown; the display is cleared at its end."""
        try:
            yield self._report
        finally:
            self._quietly(self._live.stop)

    def _report(self, event: Event) -> None:
        self._quietly(lambda: self._show(event))

    def _show(self, event: Event) -> None:
        match event:
            case Starting(step=step):
                self._wait_for(f"starting: {step}")
            case RunSwept(run_id=run_id):
                self._say(f"[dim]removed what run {run_id} had left behind[/]")
            case WorkerReady():
                self._say(
                    f"[green]ready[/]  {event.worker_id}"
                    f"  [dim]pid {event.pid}, {event.startup_s:.1f} s[/]"
                )
            case WorkerDied() | RouterDied():
                who = event.worker_id if isinstance(event, WorkerDied) else "the router"
                after = f" in {event.restart_in_s:g} s" if event.restart_in_s else ""
                self._say(f"[red]died[/]   {who} [dim](pid {event.pid})[/]: {escape(event.reason)}")
                self._say(f"       log: {event.log}")
                self._say(f"       another process takes its place{after}")
            case ClusterReady():
                self._live.stop()
                self._say(
                    f"\n[bold]{escape(event.model)}[/] is served at [bold]{event.url}/v1[/]"
                    f"  [dim]run {event.run_id}, up in {event.startup_s:.1f} s; Ctrl-C stops[/]\n"
                )
            case Stopping():
                self._say(f"stopping after {escape(event.reason)}; once more stops at once")
                self._wait_for("stopping")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _wait_for(self, text: str) -> None:
        if not self._console.is_terminal:
            self._say(text)
            return
        self._waiting.update(text=text)
        self._live.start()

    def _quietly(self, show: Callable[[], None]) -> None:
        """A terminal that was closed must not keep the cluster from stopping in order."""
        if self._gone:
            return
        try:
            show()
        except OSError:
            self._gone = True
