"""What `baton up` prints."""

import io
import json
from pathlib import Path

from rich.console import Console

from cluster.display import TerminalDisplay, json_lines
from cluster.events import ClusterReady, Starting, Stopping, WorkerDied, WorkerReady
from cluster.tables import new_table, print_table
from core.ids import Role, WorkerId

DIED = WorkerDied(
    worker_id=WorkerId("decode-1"),
    pid=7,
    reason="it crashed: [Segmentation fault]",
    log=Path("/tmp/x/decode-1.log"),
    restart_in_s=2.0,
)


def shown(*, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80)
    with TerminalDisplay(console).shown() as report:
        report(Starting(step="Ray"))
        report(WorkerReady(worker_id=WorkerId("decode-1"), role=Role.DECODE, pid=7, startup_s=1.0))
        report(ClusterReady(run_id="r", url="http://127.0.0.1:1", model="tiny", startup_s=3.0))
        report(DIED)
        report(Stopping(reason="SIGINT", drain_s=1.0))
    return stream.getvalue()


def test_a_death_is_shown_with_its_reason_and_log_as_written() -> None:
    text = shown(terminal=False)
    assert "died   decode-1 (pid 7): it crashed: [Segmentation fault]\n" in text
    assert "log: /tmp/x/decode-1.log\n" in text
    assert "takes its place in 2 s\n" in text


def test_without_a_terminal_there_are_only_plain_lines() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert "starting: Ray\n" in text
    assert "tiny is served at http://127.0.0.1:1/v1" in text


def test_a_terminal_gets_its_cursor_back() -> None:
    text = shown(terminal=True)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > -1


def test_json_events_are_one_object_per_line() -> None:
    stream = io.StringIO()
    json_lines(stream)(DIED)
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["event"], event["pid"], event["log"]) == ("WorkerDied", 7, "/tmp/x/decode-1.log")


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_went_away_raises_nothing() -> None:
    json_lines(Closed())(DIED)
    display = TerminalDisplay(Console(file=Closed(), force_terminal=True))
    with display.shown() as report:
        report(Starting(step="Ray"))
        report(DIED)


def test_a_table_wider_than_the_terminal_keeps_every_number() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=20)
    table = new_table(["worker"], ["a long heading", "another one"])
    table.add_row("prefill-0", "1234567", "7654321")
    print_table(console, table)
    assert stream.getvalue().split()[-3:] == ["prefill-0", "1234567", "7654321"]
    assert console.width == 20
