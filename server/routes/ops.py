"""/health, /ready, /version, /metrics."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.figures import setting_info
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot

router = APIRouter()
DISTRIBUTION = "spectral-serve"


@router.get("/health")
async def health() -> Response:
    """200 while the gateway lives."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", responses={503: {"description": "A startup model is not hot yet."}})
async def ready(request: Request) -> Response:
    """200 when every startup model is hot, else 503; what each model does."""
    scheduler: Scheduler = request.app.state.scheduler
    ok = scheduler.all_startup_hot
    body = {"ready": ok, "models": {name: slot_info(slot) for name, slot in scheduler.slots.items()}}
    return JSONResponse(body, status_code=200 if ok else 503, headers=None if ok else {"Retry-After": "2"})


@router.get("/version")
async def version() -> Response:
    """Versions of Spectral and Python."""
    return JSONResponse({"version": installed_version(), "python": platform.python_version()})


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def installed_version() -> str:
    """The distribution's version; "0+source" where it runs from a folder without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


def slot_info(slot: Slot) -> dict[str, Any]:
    """A model's state, its progress or error, its setting, its use of the cache (bytes, tokens)."""
    info: dict[str, Any] = {"state": slot.state, "load": slot.settings.load, "restarts": slot.restarts}
    if slot.state == "loading":
        info |= {"stage": slot.stage, "fraction": slot.fraction}
    if slot.error:
        info["error"] = slot.error
    if slot.worker is not None:
        info["pid"] = slot.worker.pid
    if slot.ready is not None:
        stats = slot.stats
        info |= {"context_length": slot.ready.context_length, "weights_bytes": slot.ready.weights_bytes}
        info |= {"device": slot.ready.device, "dtype": slot.ready.dtype, "quantization": slot.ready.quantization}
        info["setting"] = setting_info(slot.ready)
        info["ladder"] = [
            {"name": row.name, "bits_per_element": row.bits_per_element, "kl_mean": row.kl_mean, "ratio": row.ratio}
            for row in slot.ready.ladder
        ]
        info |= {"running": stats.running, "queued": stats.queued, "kv_tokens": stats.kv_tokens}
        info |= {"kv_bytes_allocated": stats.kv_bytes_allocated, "kv_bytes_used": stats.kv_bytes_used}
    return info
