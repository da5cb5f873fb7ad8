"""/generate and /generate_stream: plain text in, plain text out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server import errors, schemas, sse
from server.answers.completion import plain_text
from server.documents import body, failures, streamed
from server.gateway import Gateway, Generation, unless_gone
from server.routes.body import read_json
from server.worker import messages

router = APIRouter(tags=["Native"])


@router.post(
    "/generate",
    openapi_extra=body(schemas.GenerateRequest),
    responses=failures(400, 404, 408, 413, 415, 429, 500, 503, 504),
)
async def generate(request: Request) -> Response:
    """The whole continuation: {"text", "finish_reason", "usage", "spectral"}."""
    generation = await _open(request, stream_allowed=False)
    try:
        text = await unless_gone(request, plain_text(generation))
    finally:
        await generation.close()
    answer: dict[str, Any] = {"model": generation.model, "text": text, "finish_reason": generation.finish_reasons[0]}
    answer |= {"usage": generation.usage, "spectral": generation.spectral}
    return JSONResponse(answer, headers=generation.headers)


@router.post("/generate_stream", openapi_extra=body(schemas.GenerateRequest), responses=streamed())
async def generate_stream(request: Request) -> Response:
    """Events {"text"}, a last one with finish_reason, usage and spectral, then [DONE]."""
    generation = await _open(request, stream_allowed=True)
    ping_s = request.app.state.gateway.scheduler.settings.server.ping_seconds
    return sse.EventStream(_events(generation), generation.close, generation.headers, ping_s=ping_s)


async def _open(request: Request, *, stream_allowed: bool) -> Generation:
    gateway: Gateway = request.app.state.gateway
    data = await read_json(request, gateway.scheduler.settings.server)
    asked = schemas.parse(schemas.GenerateRequest, data)
    if asked.stream and not stream_allowed:
        raise errors.unsupported("stream", "POST to /generate_stream for a stream")
    names = {"max_kl": "kv_quality.max_kl", "setting": "kv_quality.setting", "grammar": asked.grammar_field}
    return await gateway.open(asked, request, names)


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    async for item in generation.items():
        if isinstance(item, messages.Delta) and item.text:
            yield sse.event({"text": item.text})
    end: dict[str, Any] = {"text": "", "finish_reason": generation.finish_reasons[0]}
    yield sse.event({**end, "usage": generation.usage, "spectral": generation.spectral})
    yield sse.DONE
