"""Whether the service lives, whether it can serve, and what Prometheus wants to know."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from ...connectors.serving.metrics import StoreCollector
from ..context import Admin, Context, ServiceContext

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: str


@router.get("/healthz", summary="Whether the process answers")
async def healthz() -> Health:
    """200 for as long as the process can answer at all: restart it otherwise."""
    return Health(status="ok")


@router.get(
    "/readyz",
    summary="Whether requests may be sent here",
    responses={503: {"model": Health, "description": "Starting, draining, or without a tier that answers."}},
)
async def readyz(context: Context) -> Response:
    """503 while the service drains, a self-check fails, or no worker accepts connections."""
    return JSONResponse({"status": context.readiness}, 200 if context.readiness == "ok" else 503)


@router.get(
    "/metrics",
    summary="Counters for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(context: Context, caller: Admin) -> Response:
    """Of the whole service, so for operators only."""
    del caller
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StoreCollector(context.store))
    registry.register(_ServiceCollector(context))
    text = await context.run(lambda: generate_latest(registry))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


class _ServiceCollector(Collector):
    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        requests = HistogramMetricFamily(
            "kvloom_service_request_seconds", "Requests, by route.", labels=["method", "route", "status"]
        )
        for (method, route, status), buckets, total_s in self._context.latencies.histograms():
            requests.add_metric([method, route, str(status)], buckets, total_s)
        yield requests
        yield GaugeMetricFamily(
            "kvloom_service_open_requests", "Requests under way.", value=self._context.limits.open_requests
        )
        yield GaugeMetricFamily(
            "kvloom_service_upload_bytes", "Bodies on their way in.", value=self._context.uploads.used_bytes
        )
        workers = self._context.workers
        yield GaugeMetricFamily(
            "kvloom_service_workers", "Worker processes that accept connections.", value=workers.alive
        )
        yield GaugeMetricFamily(
            "kvloom_service_workers_configured", "Worker processes that there should be.", value=workers.configured
        )
        yield CounterMetricFamily(
            "kvloom_service_worker_restarts", "Worker processes that were started again.", value=workers.restarts
        )
        yield GaugeMetricFamily(
            "kvloom_service_ready", "1 if the service takes requests.",
            value=self._context.readiness == "ok",
        )  # fmt: skip
