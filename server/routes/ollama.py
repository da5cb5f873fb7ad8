"""/api: the Ollama API, as far as it is about using models. Which models there are is the configuration's affair."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.background import BackgroundTask

from server import errors, schemas, sse
from server.answers.ollama import Ollama, error_line, now
from server.auth import caller_of
from server.documents import body, ollama_failures, ollama_streamed
from server.figures import setting_info
from server.gateway import Gateway, unless_gone
from server.routes.body import read_json
from server.routes.openai import visible
from server.routes.ops import installed_version
from server.scheduler.slots import Slot
from server.schemas.ollama import OllamaChatRequest, OllamaGenerateRequest, ShowRequest

router = APIRouter(prefix="/api", tags=["Ollama"])
_GENERATES = ollama_streamed()
_NAMES = {"thinking": "think", "stop": "options.stop"}
_REFUSED = {
    "pull": "models are listed in the server's configuration; add it there",
    "push": "this server gives no models away",
    "create": "models are listed in the server's configuration; add it there",
    "copy": "give the model an alias in the server's configuration",
    "embed": "the models here write text; there are no embeddings",
    "embeddings": "the models here write text; there are no embeddings",
}


@router.post("/chat", openapi_extra=body(OllamaChatRequest), responses=_GENERATES)
async def chat(request: Request) -> Response:
    """A chat, as lines of JSON unless `stream` is false."""
    return await _answer(request, OllamaChatRequest)


@router.post("/generate", openapi_extra=body(OllamaGenerateRequest), responses=_GENERATES)
async def generate(request: Request) -> Response:
    """An answer to one prompt, as lines of JSON unless `stream` is false."""
    return await _answer(request, OllamaGenerateRequest)


@router.get("/tags", responses=ollama_failures())
async def tags(request: Request) -> Response:
    """The configured models."""
    state = request.app.state
    slots = visible(state.scheduler, caller_of(request.scope))
    since = datetime.fromtimestamp(state.started, timezone.utc).isoformat().replace("+00:00", "Z")
    return JSONResponse({"models": [{**_card(slot), "modified_at": since} for slot in slots]})


@router.get("/ps", responses=ollama_failures())
async def running(request: Request) -> Response:
    """The models that are hot. They stay until their memory is needed: the time until which is far away."""
    slots = visible(request.app.state.scheduler, caller_of(request.scope))
    return JSONResponse({"models": [_running(slot) for slot in slots if slot.ready is not None]})


@router.post("/show", openapi_extra=body(ShowRequest), responses=ollama_failures(400, 404, 408, 413, 415))
async def show(request: Request) -> Response:
    """What is known of a model; most of it while it is hot."""
    gateway: Gateway = request.app.state.gateway
    data = await read_json(request, gateway.scheduler.settings.server, any_type=True)
    if isinstance(data, dict) and "model" not in data and "name" in data:
        data = {**{key: value for key, value in data.items() if key != "name"}, "model": data["name"]}
    asked = schemas.parse(ShowRequest, data)
    return JSONResponse(_shown(gateway.slot(_resolve(gateway, asked.model), caller_of(request.scope))))


@router.get("/version", responses=ollama_failures())
async def version() -> Response:
    """The version of this server."""
    return JSONResponse({"version": installed_version()})


@router.api_route("/{action}", methods=["POST", "DELETE"], include_in_schema=False)
async def refused(action: str, request: Request) -> Response:
    """What Ollama has and this server does not."""
    if action == "delete":
        raise errors.bad_request("models are listed in the server's configuration; remove it there", code="unsupported")
    why = _REFUSED.get(action)
    if why is None:
        raise errors.ApiError(404, f"there is no {errors.shorten(request.url.path)} here", code="not_found")
    raise errors.bad_request(f"/api/{action} is not supported: {why}", code="unsupported")


async def _answer(request: Request, schema: type[OllamaChatRequest] | type[OllamaGenerateRequest]) -> Response:
    gateway: Gateway = request.app.state.gateway
    asked = schemas.parse(schema, await read_json(request, gateway.scheduler.settings.server, any_type=True))
    named = asked.model_copy(update={"model": _resolve(gateway, asked.model)})
    if asked.loads_only:
        return await _load(request, gateway, asked.model, named)
    held = asked.tool_use is not None and asked.tool_use.grammar is not None
    generation = await gateway.open(named, request, {"grammar": "tools" if held else "format", **_NAMES})
    answer = Ollama(generation, asked)
    slot = gateway.scheduler.slot(named.model)

    async def end() -> None:
        await generation.close()
        if asked.keep_alive == 0:
            await _let_go(gateway, slot)

    if asked.stream:
        return sse.EventStream(
            answer.lines(),
            end,
            generation.headers,
            ping_s=None,
            media_type="application/x-ndjson",
            on_error=error_line,
        )
    try:
        whole = await unless_gone(request, answer.whole())
    finally:
        await generation.close()
    return JSONResponse(whole, headers=generation.headers, background=BackgroundTask(end))


async def _let_go(gateway: Gateway, slot: Slot) -> None:
    """keep_alive: 0. A model that is pinned, or that others use or wait for, stays."""
    if slot.state == "hot" and not slot.pinned and not slot.streams and not slot.waiting:
        await gateway.scheduler.unload(slot, 0.0, "keep_alive: 0")


async def _load(request: Request, gateway: Gateway, name: str, asked: Any) -> Response:
    """Without a prompt the model is only loaded, or with keep_alive: 0 let go."""
    slot = gateway.slot(asked.model, caller_of(request.scope))
    leaves = asked.keep_alive == 0
    work = _let_go(gateway, slot) if leaves else gateway.scheduler.ensure(slot, asked.keep_alive)
    await unless_gone(request, work)
    nothing = {"role": "assistant", "content": ""}
    empty = {"message": nothing} if isinstance(asked, OllamaChatRequest) else {"response": ""}
    end = {"done": True, "done_reason": "unload" if leaves else "load"}
    return JSONResponse({"model": name, "created_at": now(), **empty, **end})


def _resolve(gateway: Gateway, name: str) -> str:
    """Ollama's clients call a model without a tag `name:latest`."""
    if gateway.scheduler.settings.find(name) is None and name.endswith(":latest"):
        return name.removesuffix(":latest")
    return name


def _card(slot: Slot) -> dict[str, Any]:
    ready = slot.ready
    facts = msgspec.json.encode(slot.settings.load_message())
    return {
        "name": slot.name,
        "model": slot.name,
        "size": ready.weights_bytes if ready is not None else 0,
        "digest": hashlib.sha256(facts).hexdigest(),
        "details": _details(slot),
    }


def _details(slot: Slot) -> dict[str, Any]:
    ready = slot.ready
    parameters = ready.parameters if ready is not None else 0
    size = "" if not parameters else f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
    level = "" if ready is None else ready.dtype if ready.quantization == "none" else ready.quantization
    details = {"parent_model": "", "format": "safetensors", "family": "", "families": []}
    return {**details, "parameter_size": size, "quantization_level": level}


def _running(slot: Slot) -> dict[str, Any]:
    ready = slot.ready
    assert ready is not None
    held = ready.weights_bytes + slot.stats.kv_bytes_allocated
    return {
        **_card(slot),
        "size": held,
        "size_vram": held if ready.device.startswith("cuda") else 0,
        "context_length": ready.context_length,
        "expires_at": "9999-12-31T23:59:59Z",
        "spectral": setting_info(ready),
    }


def _shown(slot: Slot) -> dict[str, Any]:
    ready = slot.ready
    info: dict[str, Any] = {"general.architecture": "spectral", "general.basename": slot.name}
    capabilities = ["completion"]
    if ready is not None:
        info |= {"general.parameter_count": ready.parameters, "spectral.context_length": ready.context_length}
        info |= {f"spectral.{name}": value for name, value in setting_info(ready).items()}
        capabilities += ["tools"] if ready.tool_format else []
        capabilities += ["thinking"] if ready.thought_format else []
    shown = {"modelfile": "", "parameters": "", "template": "", "license": ""}
    return {**shown, "details": _details(slot), "model_info": info, "capabilities": capabilities}
