"""/admin/profiles: upload, list, look at, activate, roll back, compare, delete and build profiles of models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from server import errors
from server.admin import Admin
from server.aio import within
from server.documents import ADMIN, answers, bytes_body, failures, optional_body
from server.profiles import SHIPPED, configured_profile, differences, summary
from server.routes import admin_schemas
from server.routes.admin import EMPTY, Actor, admin_of, body_of
from server.scheduler.slots import Slot

router = APIRouter(prefix="/admin/profiles", tags=["Administration"], responses=ADMIN)
_MEDIA = ("application/octet-stream", "application/x-safetensors")
Given = Annotated[str, Query(min_length=7, max_length=64)]


@router.get("")
async def everything(request: Request, actor: Actor) -> Response:
    """The profiles of every model."""
    admin = admin_of(request)
    models = {name: await _listing(admin, slot) for name, slot in admin.scheduler.slots.items()}
    return JSONResponse({"models": models})


@router.post("/{name:path}/activate", openapi_extra=optional_body(admin_schemas.Activate))
async def activate(name: str, request: Request, actor: Actor) -> Response:
    """Use a profile; a hot model takes it for new requests at once, a cold one when it is loaded."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    body = await body_of(request, admin_schemas.Activate)
    async with admin.audited(actor, "activate_profile", slot.name, profile=body.profile):
        sha256 = None if body.profile == SHIPPED else await admin.store.find(slot.name, body.profile)
        await admin.activate(slot, sha256, "activated")
    return JSONResponse(await _listing(admin, slot))


@router.post("/{name:path}/rollback", openapi_extra=EMPTY)
async def rollback(name: str, request: Request, actor: Actor) -> Response:
    """Undo the last switch that is in force."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    await body_of(request, admin_schemas.Empty)
    async with admin.audited(actor, "rollback_profile", slot.name):
        await admin.roll_back(slot)
    return JSONResponse(await _listing(admin, slot))


@router.post("/{name:path}/build", openapi_extra=optional_body(admin_schemas.Build), responses=answers(202))
async def build(name: str, request: Request, actor: Actor) -> Response:
    """Calibrate the model on this machine, in a process of its own; 202 with the job."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    body = await body_of(request, admin_schemas.Build)
    async with admin.audited(actor, "build_profile", slot.name, **body.model_dump()):
        job = await admin.jobs.submit(slot.settings, body.model_dump())
    return JSONResponse(job.view(), status_code=202)


@router.get("/{name:path}/diff")
async def diff(name: str, request: Request, actor: Actor, a: Given, b: Given) -> Response:
    """What differs between two profiles (hashes, or "shipped"), field by field."""
    admin = admin_of(request)
    settings = admin.scheduler.slot(name).settings
    old, new = await admin.store.facts(settings, a), await admin.store.facts(settings, b)
    return JSONResponse({"a": old["content_hash"], "b": new["content_hash"], "differences": differences(old, new)})


@router.get("/{name:path}/versions/{profile}")
async def version(name: str, profile: str, request: Request, actor: Actor) -> Response:
    """What a profile holds but its tensors: provenance, ladder, spectra. `profile`: a hash, or "shipped"."""
    admin = admin_of(request)
    return JSONResponse(await admin.store.facts(admin.scheduler.slot(name).settings, profile))


@router.delete("/{name:path}/versions/{profile}")
async def delete(name: str, profile: str, request: Request, actor: Actor) -> Response:
    """Delete a profile that is not in use."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    async with admin.audited(actor, "delete_profile", slot.name, profile=profile):
        sha256 = await admin.store.delete(slot.name, profile)
    return JSONResponse({"model": slot.name, "deleted": sha256})


@router.put("/{name:path}", openapi_extra=bytes_body(_MEDIA), responses={**answers(201), **failures(422)})
async def upload(name: str, request: Request, actor: Actor, activate: bool = False) -> Response:
    """Upload a profile as the body's bytes; with `activate=true` it is used at once. 201, or 200 if it was there."""
    admin = admin_of(request)
    slot = admin.scheduler.slot(name)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _MEDIA:
        message = f"Content-Type {errors.shorten(kind)!r} is not understood; send the file as application/octet-stream"
        raise errors.ApiError(415, message, code="unsupported_media_type")
    limit, announced = admin.scheduler.settings.server.max_profile_bytes, request.headers.get("content-length", "")
    size = int(announced) if announced.isdigit() else None
    async with admin.audited(actor, "upload_profile", slot.name, announced_bytes=size, activate=activate):
        if size is not None and size > limit:
            raise errors.body_too_large(limit)
        stored = await _receive(admin, slot, request)
        if activate:
            await admin.activate(slot, stored["sha256"], "uploaded and activated")
    return JSONResponse(stored, status_code=201 if stored["new"] else 200)


async def _receive(admin: Admin, slot: Slot, request: Request) -> dict[str, Any]:
    seconds = admin.scheduler.settings.server.request_timeout_seconds
    fingerprint = await admin.fingerprint(slot)

    async def pieces() -> AsyncIterator[bytes]:
        try:
            async for piece in request.stream():
                yield piece
        except ClientDisconnect:
            raise errors.ClientGone from None

    try:
        return await within(seconds, admin.store.receive(slot.name, pieces(), fingerprint))
    except asyncio.TimeoutError:
        raise errors.body_too_late(seconds) from None


@router.get("/{name:path}")
async def one(name: str, request: Request, actor: Actor) -> Response:
    """A model's profiles: uploaded and built ones, the shipped one, the one in force and every switch."""
    admin = admin_of(request)
    return JSONResponse(await _listing(admin, admin.scheduler.slot(name)))


async def _listing(admin: Admin, slot: Slot) -> dict[str, Any]:
    shipped = None
    if configured_profile(slot.settings) is not None:
        facts = await admin.store.facts(slot.settings, SHIPPED)
        shipped = {"sha256": facts["content_hash"], **summary(facts)}
    rows = [{k: v for k, v in row.items() if k != "model"} for row in await admin.store.rows(slot.name)]
    running = slot.ready.profile_id if slot.ready is not None else None
    listing = {"model": slot.name, "active": await admin.store.active(slot.name), "running": running}
    return {**listing, "shipped": shipped, "profiles": rows, "history": await admin.store.history(slot.name)}
