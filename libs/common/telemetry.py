"""Traces, metrics and logs: OpenTelemetry throughout, Prometheus at /metrics, JSON lines with trace and object ids.

Spans go to an OTLP collector when the standard variable OTEL_EXPORTER_OTLP_ENDPOINT names one, and to a file of
JSON lines when the settings name a folder, so that a single machine has traces without a collector.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from opentelemetry import context, metrics, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

# Each keeps its first group. What is blanked holds no quote, so that a JSON line stays one.
_SECRETS = (
    re.compile(r"(nbl[a-z]*_)[A-Za-z0-9_-]{8,}"),
    re.compile(r"(\bBearer\s+)[A-Za-z0-9._~+/=-]+", re.IGNORECASE),
    # The password of a URL, the signature of a presigned one, the seed of an nkey.
    re.compile(r"(\w://[^\s:/@\"]*:)[^\s/@\"]+(?=@)"),
    re.compile(r"(X-Amz-Signature=)[0-9a-f]+", re.IGNORECASE),
    re.compile(r"\b(S[A-Z])[A-Z2-7]{56}\b"),
)
# A file of traces, and one older: some hundred thousand spans.
TRACE_BYTES = 64 << 20
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(service: str, *, log_level: str = "INFO", traces_folder: Path | None = None) -> None:
    """Installs providers and the log format for this process. Called once, by the process that runs a service."""
    _set_up_logging(service, log_level)
    set_up_traces(service, traces_folder)
    _set_up_metrics(_resource(service))


def _resource(service: str) -> Resource:
    return Resource.create({"service.name": f"nabla-{service}"})


def set_up_traces(service: str, traces_folder: Path | None) -> None:
    """Only the traces, for a process whose logs and metrics are another's."""
    provider = TracerProvider(resource=_resource(service))
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    if traces_folder:
        traces_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        exporter = TraceFile(traces_folder / f"{service}.jsonl")
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    trace.set_tracer_provider(provider)


class TraceFile(SpanExporter):
    """Appends spans as JSON lines. A full file becomes `<service>.1.jsonl`, in the place of the one before it.

    What a kill or a full disk has cut short stays a line of its own, so that it spoils no other.
    """

    def __init__(self, path: Path, most_bytes: int = TRACE_BYTES) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._torn = False
        self._open()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        text = "".join(_span_line(span) for span in spans).encode()
        try:
            if os.fstat(self._file).st_size >= self._most_bytes:
                self._turn()
            start = b"\n" if self._torn else b""
            self._torn = True
            self._torn = os.write(self._file, start + text) < len(start + text)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.FAILURE if self._torn else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        os.close(self._file)

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def _turn(self) -> None:
        # Another process of this service may have turned it already: then only ours is the old one.
        if self._path.exists() and os.path.samestat(os.fstat(self._file), self._path.stat()):
            self._path.replace(self._path.with_suffix(".1.jsonl"))
        old = self._file
        self._open()
        os.close(old)


def _set_up_metrics(resource: Resource) -> None:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader

    metrics.set_meter_provider(MeterProvider(metric_readers=[PrometheusMetricReader()], resource=resource))


def _span_line(span: ReadableSpan) -> str:
    return json.dumps(json.loads(span.to_json(indent=None)), separators=(",", ":")) + "\n"


def tracer() -> trace.Tracer:
    return trace.get_tracer("nabla")


def meter() -> metrics.Meter:
    return metrics.get_meter("nabla")


def current_traceparent() -> str:
    """The W3C traceparent of the active span, or an empty string."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def span(name: str, traceparent: str = "", **attributes: str | int) -> Iterator[trace.Span]:
    """A span that continues the trace of `traceparent`, or of the active span when there is none."""
    parent = propagate.extract({"traceparent": traceparent}) if traceparent else context.get_current()
    tagged = {f"nabla.{key}": value for key, value in attributes.items() if value != ""}
    with tracer().start_as_current_span(name, context=parent, attributes=tagged) as active:
        yield active


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the active trace, the `extra` fields, and secrets blanked."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        active = trace.get_current_span().get_span_context()
        if active.is_valid:
            line["trace_id"] = format(active.trace_id, "032x")
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str, ensure_ascii=False))


def redact(text: str) -> str:
    """Blanks our tokens, bearer credentials, passwords and signatures in URLs, and NATS seeds."""
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text


def _set_up_logging(service: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio", "faststream", "alembic", "urllib3", "aiosqlite"):
        logging.getLogger(noisy).setLevel("WARNING")
