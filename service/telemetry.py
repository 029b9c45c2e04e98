"""Traces of requests by OpenTelemetry, where `telemetry_endpoint` is set. Spans name routes and tenants, never keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .. import __version__


class Telemetry:
    """Sends a span for each request.

    Parameters
    ----------
    endpoint : OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`; None for no traces.

    Raises
    ------
    ImportError : an endpoint is given, and OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._provider: Any = None
        self._tracer: Any = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as exc:
            raise ImportError("telemetry needs OpenTelemetry: pip install 'kvloom[telemetry]'") from exc
        resource = Resource.create({"service.name": "kvloom", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("kvloom.service")

    @contextmanager
    def request(self, method: str, headers: Mapping[bytes, bytes]) -> Iterator[dict[str, Any]]:
        """A span for the block, a child of the caller's `traceparent`, with what is put into the dictionary."""
        told: dict[str, Any] = {}
        if self._tracer is None:
            yield told
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        parent = extract({name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()})
        with self._tracer.start_as_current_span(method, context=parent, kind=SpanKind.SERVER) as span:
            yield told
            span.update_name(f"{method} {told.get('http.route', '')}".strip())
            span.set_attributes({"http.request.method": method, **told})
            if told.get("http.response.status_code", 0) >= 500:
                span.set_status(Status(StatusCode.ERROR))

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()
