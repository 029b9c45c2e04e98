"""Traces of `kvloom serve` to a receiver of OTLP over HTTP, and its log as JSON lines."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra telemetry is not installed"
)

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kvloom.testing.chunks import make_blob, make_key

from ..serving import service_process

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Receives spans."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies:
            told = ExportTraceServiceRequest.FromString(body)
            found += [span for of in told.resource_spans for scope in of.scope_spans for span in scope.spans]
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join(10)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_spans_and_json_logs(
    tmp_path: Path, collector: Collector, capfd: pytest.CaptureFixture[str], workers: str
) -> None:
    options = [f"telemetry_endpoint={collector.url}", "log_format=json", "log_level=debug", f"workers={workers}"]
    with service_process(tmp_path / "kv", *(part for each in options for part in ("--set", each))) as service:
        key = make_key(1)
        with service.client(shared_memory=False) as client:
            client.put(key, make_blob(1))
            assert client.get(key) is not None
        parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert service.ask("GET", f"/v1/chunks/{make_key(2).hex()}", headers=parent).status == 404
        assert service.ask("GET", "/v1/stats", token=None).status == 401
        assert service.stop() == 0  # sends what is left
    spans = {(span.name, value_of(span, "http.response.status_code")): span for span in collector.spans()}
    assert {
        ("PUT /v1/chunks/{key}", 201),
        ("GET /v1/chunks/{key}", 200),
        ("GET /v1/chunks/{key}", 404),
        ("GET unknown", 401),
    } <= spans.keys(), sorted(spans)
    child = spans["GET /v1/chunks/{key}", 404]
    assert child.trace_id.hex() == TRACE and child.parent_span_id.hex() == PARENT
    assert value_of(child, "kvloom.tenant") == "default"
    assert value_of(spans["GET unknown", 401], "kvloom.tenant") is None
    assert value_of(spans["PUT /v1/chunks/{key}", 201], "http.request.body.size") > 0
    sent = b"".join(collector.bodies)
    for secret in (service.token.encode(), key.hex().encode(), make_key(2).hex().encode(), bytes(key)):
        assert secret not in sent

    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines()]  # every line is an object
    assert logged and all({"at", "level", "logger", "message", "process"} <= line.keys() for line in logged)
    assert not any(service.token in json.dumps(line) for line in logged)


def value_of(span: Any, name: str) -> Any:
    for each in span.attributes:
        if each.key == name:
            return getattr(each.value, each.value.WhichOneof("value"))
    return None
