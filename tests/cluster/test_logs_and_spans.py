"""Log lines and exported spans, each in a process of its own: both are set up once per process."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from cluster.telemetry import LineLimit
from core.telemetry import KEEP_LINE

LOGGING = """
import logging, sys
from cluster.config import TelemetryConfig
from cluster.telemetry import setup_logging
setup_logging("decode-0", TelemetryConfig(log_level="info"), sys.stdout)
logging.getLogger("router.flow").info("kv_pull_done request_id=%s bytes=%d", "req-1", 7)
logging.getLogger("router.flow").debug("too fine")
logging.getLogger("transformers").info("chatter of a library")
logging.getLogger("transformers").warning("a library warns")
"""

TRACING = """
import sys
from pathlib import Path
from opentelemetry import trace
from cluster.config import TelemetryConfig
from cluster.telemetry import tracing
file = Path(sys.argv[1]) if len(sys.argv) > 1 else None
with tracing("router", TelemetryConfig(spans_file=file)):
    tracer = trace.get_tracer("test")
    for name in ("request", "decode"):
        tracer.start_span(name, attributes={"baton.request_id": "req-1"}).end()
"""


def run(script: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout


def test_a_log_line_is_one_event_with_its_process_and_fields() -> None:
    lines = run(LOGGING).splitlines()
    time, level, process, logger, *event = lines[0].split()
    assert time.endswith("Z")
    assert (level, process, logger) == ("INFO", "decode-0", "router.flow")
    assert event == ["kv_pull_done", "request_id=req-1", "bytes=7"]


def test_libraries_speak_from_warning_up_only() -> None:
    assert [line.split()[3] for line in run(LOGGING).splitlines()] == [
        "router.flow",
        "transformers",
    ]


def test_of_one_kind_of_event_not_all_lines_are_written_and_how_many_is_said() -> None:
    now_s = 0.0
    limit = LineLimit(lambda: now_s)

    def says(text: str, level: int = logging.INFO, name: str = "cluster.door") -> str | None:
        record = logging.LogRecord(name, level, "", 0, "%s", (text,), None)
        return record.getMessage() if limit.filter(record) else None

    written = [says(f"stream_ended number={i}") for i in range(1000)]
    assert [text for text in written if text] == [f"stream_ended number={i}" for i in range(200)]
    assert says("stream_ended", logging.WARNING) is not None
    assert says("stream_ended", name="router") is not None
    assert says("another") is not None
    now_s = 0.1
    assert says("stream_ended number=1000") == "stream_ended number=1000 lines_left_out=800"
    assert says("stream_ended number=1001") is None
    now_s = 60.0
    assert says("stream_ended number=1002") == "stream_ended number=1002 lines_left_out=1"
    assert says("stream_ended number=1003") == "stream_ended number=1003"


def test_a_line_that_cannot_be_written_raises_nothing_where_it_is_said() -> None:
    told: list[logging.LogRecord] = []

    class Told(logging.StreamHandler[TextIO]):
        def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
            told.append(record)

    handler, log = Told(io.StringIO()), logging.Logger("a library")
    handler.addFilter(LineLimit(lambda: 0.0))
    log.addHandler(handler)
    log.warning("number %d", "one")
    assert len(told) == 1


def test_a_line_to_be_kept_is_kept() -> None:
    limit = LineLimit(lambda: 0.0)
    line = logging.LogRecord("router", logging.INFO, "", 0, "request_done id=1", None, None)
    assert sum(limit.filter(line) for _ in range(1000)) == 200
    vars(line).update(KEEP_LINE)
    assert all(limit.filter(line) for _ in range(1000))


def test_a_line_to_be_kept_says_how_many_of_its_kind_were_left_out() -> None:
    limit = LineLimit(lambda: 0.0)

    def says(text: str, **more: object) -> str | None:
        line = logging.LogRecord("router", logging.INFO, "", 0, text, None, None)
        vars(line).update(more)
        return line.getMessage() if limit.filter(line) else None

    left = [says("request_done status=499") for _ in range(300)]
    assert left.count(None) == 100
    served = [says("request_done status=200", **KEEP_LINE) for _ in range(2)]
    assert served == ["request_done status=200 lines_left_out=100", "request_done status=200"]


def test_spans_are_one_json_object_per_line_appended_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "spans.jsonl"
    run(TRACING, str(file))
    run(TRACING, str(file))
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    assert [span["name"] for span in spans] == ["request", "decode"] * 2
    assert spans[0]["attributes"] == {"baton.request_id": "req-1"}
    assert spans[0]["resource"]["attributes"]["service.name"] == "baton-router"


def test_without_a_file_nothing_is_exported(tmp_path: Path) -> None:
    assert run(TRACING) == ""
