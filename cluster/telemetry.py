"""Logs and spans of one process, set up once at its entry point.

A log line is one event with fields:

    2026-01-31T12:00:00.123Z INFO decode-0 kv_transfer.reader kv_pull_done request_id=... bytes=...
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from cluster.config import TelemetryConfig
from core import telemetry
from core.errors import ConfigError

_FLUSH_MS = 5_000
_LINES_AT_ONCE = 200
_LINES_PER_S = 10
_MOST_KINDS = 1_000


def setup_logging(process: str, config: TelemetryConfig, stream: TextIO) -> None:
    """Send this process's logs to `stream`; `process` is its worker_id, `router`, `controller`.

    Libraries speak from warning up only. Of one kind of event no more than 200 lines come at once
    and 10 per second after that; the next one says how many were left out. The line `request_done`
    of a request that was served, or that failed for want of it (5xx), is always there, and says so
    of those of refused requests and of clients that left.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines(process))
    handler.addFilter(LineLimit(time.monotonic))
    # What no line shows is not looked up: it takes half of a line's time.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    vars(logging)["_srcfile"] = None
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in _ROOMS:
        logging.getLogger(room).setLevel(config.log_level.upper())


_ROOMS = (
    "core",
    "engine",
    "kv_transfer",
    "prefill_worker",
    "decode_worker",
    "router",
    "cluster",
)


class LineLimit(logging.Filter):
    """Bounds what strangers at a port, requests that are refused, or a worker that ends with all
    its sequences make a process write.

    An event's kind is its logger, its level and its first word. `now_s` is a monotonic clock.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        super().__init__()
        self._now_s = now_s
        self._kinds = dict[tuple[str, int, str], _Kind]()

    def filter(self, record: logging.LogRecord) -> bool:
        kept = any(hasattr(record, name) for name in telemetry.KEEP_LINE)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, LookupError):
            return True  # a line that cannot be written; the handler says so, and raises nothing
        event = text.partition(" ")[0]
        key, now_s = (record.name, record.levelno, event), self._now_s()
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            kind = self._kinds[key] = _Kind(now_s)
        kind.room = min(_LINES_AT_ONCE, kind.room + (now_s - kind.at_s) * _LINES_PER_S)
        kind.at_s = now_s
        if not kept:
            if kind.room < 1:
                kind.left_out += 1
                return False
            kind.room -= 1
        if kind.left_out:
            record.msg, record.args = f"{text} lines_left_out={kind.left_out}", None
            kind.left_out = 0
        return True


class _Kind:
    __slots__ = ("at_s", "left_out", "room")

    def __init__(self, now_s: float) -> None:
        self.room = float(_LINES_AT_ONCE)
        self.at_s = now_s
        self.left_out = 0


class _Lines(logging.Formatter):
    """The line above. A request has one, so the date is made once a second."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._second = -1
        self._date = ""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        second, ms = int(record.created), int(record.msecs)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        head = f"{self._date}.{ms:03d}Z {record.levelname} {self._process} {record.name}"
        return f"{head} {record.message}"


@contextmanager
def tracing(process: str, config: TelemetryConfig) -> Iterator[None]:
    """Inside the block spans go to the config's file; where it names none, nowhere.

    What is left is written at the end. Raises ConfigError when the file cannot be opened. Once per
    process: OpenTelemetry keeps one tracer provider for the life of the process.
    """
    if config.spans_file is None:
        yield
        return
    provider = TracerProvider(resource=Resource({"service.name": f"baton-{process}"}))
    provider.add_span_processor(BatchSpanProcessor(JsonLinesExporter(config.spans_file)))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.force_flush(_FLUSH_MS)
        provider.shutdown()


class JsonLinesExporter(SpanExporter):
    """Appends each span as one JSON object on one line; several processes may share the file."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"telemetry.spans_file {path} cannot be written: {error.strerror};"
                " name a file in a folder of yours"
            ) from error

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = "".join(span.to_json(indent=None) + "\n" for span in spans)
        try:
            self._file.write(lines.encode())
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()
