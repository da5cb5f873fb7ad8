"""/admin: models, configuration, memory, events, the audit trail and jobs. Profiles: admin_profiles.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from server import sse, state_tables
from server.admin import Admin
from server.documents import ADMIN, answers, optional_body
from server.jobs import OVER, Job
from server.routes import admin_schemas
from server.routes.admin_guard import require_admin
from server.routes.body import read_json
from server.routes.nodes import nodes_of
from server.routes.ops import slot_info

router = APIRouter(prefix="/admin", tags=["Administration"], responses=ADMIN)
EMPTY = optional_body(admin_schemas.Empty)
Actor = Annotated[str, Depends(require_admin)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Before = Annotated[int | None, Query(ge=0, le=2**62)]
Word = Annotated[str | None, Query(max_length=200)]


def admin_of(request: Request) -> Admin:
    """The application's Admin."""
    admin: Admin = request.app.state.admin
    return admin


async def body_of(request: Request, schema: type[admin_schemas.S]) -> admin_schemas.S:
    """The checked body; none at all counts as an empty one."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return admin_schemas.parse(schema, {})
    return admin_schemas.parse(schema, await read_json(request, admin_of(request).scheduler.settings.server))


@router.get("/status")
async def status(request: Request, actor: Actor) -> Response:
    """Everything at a glance: models, devices, jobs that are not over, whether the state is durable, sessions in files,
    and a cluster's nodes."""
    admin = admin_of(request)
    models = {}
    for name, slot in admin.scheduler.slots.items():
        chosen = {"pinned": slot.pinned, "chosen_setting": slot.setting, "aliases": list(slot.settings.aliases)}
        models[name] = {**slot_info(slot), **chosen}
    jobs = [job for job in await admin.jobs.rows() if job["state"] not in OVER]
    body = {"actor": actor, "durable": admin.state.durable, "models": models, "jobs": jobs}
    body["saved_sessions"] = await admin.scheduler.saved.view()
    return JSONResponse({**body, **await admin.memory(), "nodes": nodes_of(admin.scheduler)})


@router.get("/vram")
async def vram(request: Request, actor: Actor) -> Response:
    """Who holds which bytes on which device: segments by kind and model, foreign and free bytes; `leases` of hot
    models, and `notes` on what cannot be known here."""
    return JSONResponse(await admin_of(request).memory())


# ---------------------------------------------------------------------------------------------- models


@router.post("/models/{name:path}/load", openapi_extra=EMPTY, responses=answers(202))
async def load(name: str, request: Request, actor: Actor) -> Response:
    """Begin to load; 202 with the state. GET /ready shows how far it is."""
    return await _bring(request, actor, name, "load")


async def _bring(request: Request, actor: str, name: str, action: str) -> Response:
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    await body_of(request, admin_schemas.Empty)
    async with admin.audited(actor, action, slot.name):
        admin.load(slot)
    return JSONResponse({"model": slot.name, "state": slot.state}, status_code=202)


@router.post("/models/{name:path}/unload", openapi_extra=optional_body(admin_schemas.Unload))
async def unload(name: str, request: Request, actor: Actor) -> Response:
    """End the model's worker; answers when it has ended."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    body = await body_of(request, admin_schemas.Unload)
    drain = body.drain_seconds
    drain = admin.scheduler.settings.server.drain_seconds if drain is None else drain
    async with admin.audited(actor, "unload", slot.name, drain_seconds=drain, force=body.force):
        await admin.unload(slot, drain, body.force)
    return JSONResponse({"model": slot.name, "state": slot.state})


@router.post("/models/{name:path}/sleep", openapi_extra=EMPTY)
async def sleep(name: str, request: Request, actor: Actor) -> Response:
    """Move the weights of a model without requests to host memory. From then on the planner decides again: the next
    request wakes it, and it is let go of where a load costs no more than what it holds."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    await body_of(request, admin_schemas.Empty)
    async with admin.audited(actor, "sleep", slot.name):
        await admin.sleep(slot)
    return JSONResponse({"model": slot.name, "slept": True})


@router.post("/models/{name:path}/wake", openapi_extra=EMPTY, responses=answers(202))
async def wake(name: str, request: Request, actor: Actor) -> Response:
    """Begin to wake a model, as its next request would; 202 with the state."""
    return await _bring(request, actor, name, "wake")


@router.post("/models/{name:path}/pin", openapi_extra=EMPTY)
async def pin(name: str, request: Request, actor: Actor) -> Response:
    """Keep the model where it is."""
    return await _pin(request, actor, name, pinned=True)


@router.post("/models/{name:path}/unpin", openapi_extra=EMPTY)
async def unpin(name: str, request: Request, actor: Actor) -> Response:
    """Let go of it."""
    return await _pin(request, actor, name, pinned=False)


async def _pin(request: Request, actor: str, name: str, *, pinned: bool) -> Response:
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    await body_of(request, admin_schemas.Empty)
    async with admin.audited(actor, "pin" if pinned else "unpin", slot.name):
        await admin.pin(slot, pinned)
    return JSONResponse({"model": slot.name, "pinned": slot.pinned})


@router.post("/models/{name:path}/setting", openapi_extra=optional_body(admin_schemas.ChooseSetting))
async def setting(name: str, request: Request, actor: Actor) -> Response:
    """Another row of the ladder for new requests, with `live` also for running ones; "auto": the configured one."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    body = await body_of(request, admin_schemas.ChooseSetting)
    async with admin.audited(actor, "setting", slot.name, **body.model_dump()):
        await admin.choose_setting(slot, body.setting, body.live)
    return JSONResponse({"model": slot.name, **slot_info(slot), "chosen_setting": slot.setting})


# ---------------------------------------------------------------------------------------------- the server


@router.post("/config/reload", openapi_extra=EMPTY)
async def reload_config(request: Request, actor: Actor) -> Response:
    """Read the configuration file again; a faulty one changes nothing and is explained."""
    admin = admin_of(request)
    await body_of(request, admin_schemas.Empty)
    async with admin.audited(actor, "config_reload", str(admin.config_file or "")):
        return JSONResponse(await admin.reload())


@router.get("/audit")
async def audit(request: Request, actor: Actor, limit: Limit = 100, before: Before = None) -> Response:
    """Actions of administrators, newest first; `before` an id to page on."""
    rows = await admin_of(request).state.run(lambda db: state_tables.audit(db, limit, before))
    return JSONResponse({"actions": rows})


@router.get("/events")
async def events(
    request: Request, actor: Actor, limit: Limit = 100, before: Before = None, kind: Word = None, model: Word = None
) -> Response:
    """What happened and why, newest first."""
    admin = admin_of(request)
    await admin.events.flush()
    rows = await admin.state.run(lambda db: state_tables.events(db, limit, before=before, kind=kind, model=model))
    return JSONResponse({"events": rows})


@router.get("/events/stream")
async def event_stream(request: Request, actor: Actor, after: Annotated[int, Query(ge=0, le=2**62)] = 0) -> Response:
    """Events as they happen (SSE), beginning with those of the last 1,000 whose id is above `after`."""
    admin = admin_of(request)

    async def follow() -> AsyncIterator[bytes]:
        async with admin.events.watch() as queue:
            for event in admin.events.recent(after):
                yield sse.event(event)
            while True:
                yield sse.event(await queue.get())

    return _stream(request, follow())


def _stream(request: Request, events: AsyncIterator[bytes]) -> Response:
    async def nothing() -> None:
        return None

    ping = admin_of(request).scheduler.settings.server.ping_seconds
    return sse.EventStream(events, nothing, {}, ping_s=ping)


# ---------------------------------------------------------------------------------------------- jobs


@router.get("/jobs")
async def jobs(request: Request, actor: Actor) -> Response:
    """Profiling jobs, newest first, those of earlier runs included."""
    return JSONResponse({"jobs": await admin_of(request).jobs.rows()})


@router.get("/jobs/{ident}")
async def job(ident: str, request: Request, actor: Actor) -> Response:
    """One job."""
    return JSONResponse(admin_of(request).jobs.find(ident).view())


@router.get("/jobs/{ident}/events")
async def job_events(ident: str, request: Request, actor: Actor) -> Response:
    """Its progress (SSE) until it is over."""
    found = admin_of(request).jobs.find(ident)

    async def follow(job: Job) -> AsyncIterator[bytes]:
        while True:
            changed = job.changed
            yield sse.event(job.view())
            if job.state in OVER:
                yield sse.DONE
                return
            await changed.wait()

    return _stream(request, follow(found))


@router.post("/jobs/{ident}/cancel", openapi_extra=EMPTY)
async def cancel_job(ident: str, request: Request, actor: Actor) -> Response:
    """End a job; its checkpoint is kept, so that a build with the same options goes on from there."""
    admin = admin_of(request)
    await body_of(request, admin_schemas.Empty)
    async with admin.audited(actor, "cancel_job", ident):
        found: dict[str, Any] = (await admin.jobs.cancel(ident)).view()
    return JSONResponse(found)
