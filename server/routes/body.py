"""Reading a request body: bounded while it streams in, then decoded once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from server import errors
from server.aio import within
from server.config import ServerSettings

_DISCARD_FACTOR = 4
_DISCARD_SECONDS = 5.0


async def read_json(request: Request, settings: ServerSettings, *, any_type: bool = False) -> Any:
    """The decoded body. Raises ApiError 400, 408, 413 or 415; ClientGone on a disconnect.

    The content type is asked for: browsers send other types to any address, from any page, without asking the server.
    `any_type`: only of browsers, which cannot leave out who asks (Ollama's own examples with curl name no type).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (any_type and not _from_a_browser(request)):
        raise errors.unsupported_media_type(kind)
    try:
        body = await within(settings.request_timeout_seconds, _read(request, settings.max_body_bytes))
    except asyncio.TimeoutError:
        raise errors.body_too_late(settings.request_timeout_seconds) from None
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None


def _from_a_browser(request: Request) -> bool:
    return any(name == "origin" or name.startswith("sec-fetch-") for name in request.headers)


async def _read(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    too_large = announced.isdigit() and int(announced) > limit
    if too_large and request.headers.get("expect", "").lower() == "100-continue":
        raise errors.body_too_large(limit)
    body, total, until = bytearray(), 0, time.monotonic() + _DISCARD_SECONDS
    try:
        async for piece in request.stream():
            total += len(piece)
            too_large = too_large or total > limit
            if not too_large:
                body += piece
                continue
            # Most clients read no answer before they have sent all, so some of the rest is read and thrown away.
            body.clear()
            if total > _DISCARD_FACTOR * limit or time.monotonic() > until:
                break
    except ClientDisconnect:
        raise errors.ClientGone from None
    if too_large:
        raise errors.body_too_large(limit)
    return bytes(body)
