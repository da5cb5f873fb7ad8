"""/admin/plan: what the scheduler decided, and what it would decide."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from server import errors
from server.config import ModelSettings
from server.documents import ADMIN
from server.routes.admin_guard import require_admin
from server.scheduler.loop import Scheduler

router = APIRouter(prefix="/admin", tags=["Administration"], responses=ADMIN)
Actor = Annotated[str, Depends(require_admin)]


@router.get("/plan")
async def plan(
    request: Request,
    actor: Actor,
    dry_run: Annotated[bool, Query()] = False,
    model: Annotated[str | None, Query(alias="with", max_length=200)] = None,
    context: Annotated[int | None, Query(ge=1, le=10_000_000)] = None,
) -> Response:
    """The plan in force. With dry_run: what would be decided now, with one more model asked for (`with`: a configured
    name, a folder or a hub name), or with `context` tokens of cache for every model. Nothing is changed."""
    scheduler: Scheduler = request.app.state.scheduler
    memory = scheduler.memory
    if not dry_run:
        if model is not None or context is not None:
            raise errors.bad_request("with and context ask what would be: send dry_run=1 as well", "dry_run")
        last = memory.steward.last
        body: dict[str, Any] = {"dry_run": False, "plan": None if last is None else last.as_dict()}
        return JSONResponse(body)
    extra = None
    if model is not None:
        extra = scheduler.settings.find(model)
        try:
            extra = extra or ModelSettings(name=model, path=model)
        except ValidationError as error:
            raise errors.bad_request(f"with: {error.errors()[0]['msg']}", "with") from None
    found = await memory.plan(extra, context)
    return JSONResponse({"dry_run": True, "plan": found.as_dict()})
