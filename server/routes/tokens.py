"""/tokenize and /detokenize, also under /v1: texts to token ids and back, with a model's own tokenizer."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server import schemas
from server.documents import body, failures
from server.gateway import Gateway
from server.routes.body import read_json
from server.worker import messages

router = APIRouter(tags=["Native"])
_FAILURES = failures(400, 404, 408, 413, 415, 429, 503, 504)


@router.post("/tokenize", openapi_extra=body(schemas.TokenizeRequest), responses=_FAILURES)
@router.post("/v1/tokenize", openapi_extra=body(schemas.TokenizeRequest), responses=_FAILURES)
async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of a conversation as the chat template writes it: {"count", "tokens", "text"}."""
    asked, answer = await _ask(request, schemas.TokenizeRequest)
    found = {"model": asked.model, "count": len(answer.tokens), "tokens": answer.tokens, "text": answer.text}
    return JSONResponse(found)


@router.post("/detokenize", openapi_extra=body(schemas.DetokenizeRequest), responses=_FAILURES)
@router.post("/v1/detokenize", openapi_extra=body(schemas.DetokenizeRequest), responses=_FAILURES)
async def detokenize(request: Request) -> Response:
    """The text of token ids: {"text"}. Special tokens are shown."""
    asked, answer = await _ask(request, schemas.DetokenizeRequest)
    return JSONResponse({"model": asked.model, "text": answer.text})


async def _ask(request: Request, schema: type[Any]) -> tuple[Any, messages.Tokenized]:
    gateway: Gateway = request.app.state.gateway
    asked = schemas.parse(schema, await read_json(request, gateway.scheduler.settings.server))
    names = {"prompt": "tokens"} if schema is schemas.DetokenizeRequest else {}
    return asked, await gateway.tokenize(asked.model, asked.message(uuid.uuid4().hex), request, names)
