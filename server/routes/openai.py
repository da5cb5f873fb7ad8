"""/v1: the OpenAI API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server import errors, schemas, sse
from server.answers.chat import Chat
from server.answers.completion import Completions
from server.answers.responses import Responses
from server.auth import Caller, caller_of
from server.documents import body, failures, streamed
from server.figures import setting_info
from server.gateway import Gateway, Generation, unless_gone
from server.routes.body import read_json
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot

router = APIRouter(prefix="/v1", tags=["OpenAI"])

_COMPLETION_NAMES = {"max_kl": "kv_quality.max_kl", "setting": "kv_quality.setting"}
_CHAT_NAMES = {**_COMPLETION_NAMES, "thinking": "reasoning_effort"}
_RESPONSES_NAMES = {**_COMPLETION_NAMES, "messages": "input", "thinking": "reasoning"}
_RESPONSES_NAMES["max_tokens"] = "max_output_tokens"


@router.post("/chat/completions", openapi_extra=body(schemas.ChatRequest), responses=streamed())
async def chat_completions(request: Request) -> Response:
    """Chat, streamed or whole."""
    return await _answer(request, schemas.ChatRequest, Chat, _CHAT_NAMES)


@router.post("/completions", openapi_extra=body(schemas.CompletionRequest), responses=streamed())
async def completions(request: Request) -> Response:
    """Text completion of one prompt or several, streamed or whole."""
    gateway: Gateway = request.app.state.gateway
    server = gateway.scheduler.settings.server
    asked = schemas.parse(schemas.CompletionRequest, await read_json(request, server))
    generations: list[Generation] = []
    try:
        for one in asked.split():
            names = {**_COMPLETION_NAMES, "grammar": one.grammar_field}
            generations.append(await gateway.open(one, request, names))
    except BaseException:  # also a cancellation: the prompts before it must not go on for nobody
        for generation in generations:
            await generation.close()
        raise
    answer = Completions(generations, asked)
    if asked.stream:
        return sse.EventStream(answer.events(), answer.close, answer.headers, ping_s=server.ping_seconds)
    try:
        whole = await unless_gone(request, answer.whole())
    finally:
        await answer.close()
    return JSONResponse(whole, headers=answer.headers)


@router.post("/responses", openapi_extra=body(schemas.ResponsesRequest), responses=streamed())
async def responses(request: Request) -> Response:
    """A response, streamed or whole. Nothing is stored: the whole conversation comes with each request."""
    return await _answer(request, schemas.ResponsesRequest, Responses, _RESPONSES_NAMES)


@router.post("/embeddings", status_code=400, responses=failures(400))
async def embeddings(request: Request) -> Response:
    """Always refused: models here write text."""
    raise errors.no_embeddings()


@router.get("/models", responses=failures())
async def models(request: Request) -> Response:
    """The configured models, as far as the caller's key may use them."""
    scheduler: Scheduler = request.app.state.scheduler
    started: int = request.app.state.started
    cards = [model_card(slot, started) for slot in visible(scheduler, caller_of(request.scope))]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/models/{name:path}", responses=failures(404))
async def model(name: str, request: Request) -> Response:
    """One model, by name or alias."""
    gateway: Gateway = request.app.state.gateway
    slot = gateway.slot(name, caller_of(request.scope))
    return JSONResponse(model_card(slot, request.app.state.started))


def visible(scheduler: Scheduler, caller: Caller) -> list[Slot]:
    """The models that a caller may use."""
    return [slot for slot in scheduler.slots.values() if caller.may_use(slot.name, *slot.settings.aliases)]


def model_card(slot: Slot, created: int) -> dict[str, Any]:
    """A model as /v1/models lists it; while it is hot with its setting and context length (tokens)."""
    info: dict[str, Any] = {"state": slot.state, "aliases": list(slot.settings.aliases)}
    if slot.ready is not None:
        info |= {"context_length": slot.ready.context_length, **setting_info(slot.ready)}
        info |= {"tools": bool(slot.ready.tool_format), "thoughts": bool(slot.ready.thought_format)}
    return {"id": slot.name, "object": "model", "created": created, "owned_by": "spectral", "spectral": info}


async def _answer(
    request: Request,
    schema: type[schemas.ChatRequest] | type[schemas.ResponsesRequest],
    shape: type[Any],
    names: dict[str, str],
) -> Response:
    gateway: Gateway = request.app.state.gateway
    server = gateway.scheduler.settings.server
    asked = schemas.parse(schema, await read_json(request, server))
    generation = await gateway.open(asked, request, {**names, "grammar": asked.grammar_field})
    answer = shape(generation, asked)
    if asked.stream:
        return sse.EventStream(answer.events(), generation.close, generation.headers, ping_s=server.ping_seconds)
    try:
        whole = await unless_gone(request, answer.whole())
    finally:
        await generation.close()
    return JSONResponse(whole, headers=generation.headers)
