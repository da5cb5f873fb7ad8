"""/admin/nodes: the machines of a cluster."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server import errors
from server.cluster import wire
from server.cluster.gateway import ClusterScheduler
from server.routes.admin_guard import require_admin
from server.scheduler.loop import Scheduler

router = APIRouter(prefix="/admin/nodes")
Actor = Annotated[str, Depends(require_admin)]


def nodes_of(scheduler: Scheduler) -> list[dict[str, Any]]:
    """Every node with its devices and replicas; a machine alone has none."""
    return scheduler.memory.nodes() if isinstance(scheduler, ClusterScheduler) else []


@router.get("")
async def nodes(request: Request, actor: Actor) -> Response:
    """Every node with its devices and replicas, and the plan in force. A machine alone has none."""
    scheduler = request.app.state.scheduler
    cluster = isinstance(scheduler, ClusterScheduler)
    plan = scheduler.agents.table.plan if cluster else {}
    return JSONResponse({"cluster": cluster, "nodes": nodes_of(scheduler), "plan": plan})


@router.post("/{node}/drain")
async def drain(request: Request, node: str, actor: Actor) -> Response:
    """Serve a node's models elsewhere, let its streams end, and give it nothing more."""
    return await _drain(request, node, actor, True)


@router.post("/{node}/undrain")
async def undrain(request: Request, node: str, actor: Actor) -> Response:
    """Use a drained node again."""
    return await _drain(request, node, actor, False)


async def _drain(request: Request, node: str, actor: str, on: bool) -> Response:
    scheduler = request.app.state.scheduler
    if not isinstance(scheduler, ClusterScheduler):
        raise errors.ApiError(409, "this server is no cluster; start it with --cluster ray", code="not_here")
    async with request.app.state.admin.audited(actor, "drain" if on else "undrain", node):
        answer = await scheduler.client.command(wire.Drain(scheduler.full_name(node), on))
        if answer.error:
            raise errors.ApiError(404, answer.error, code="node_not_found", param="node")
    return JSONResponse({"node": node, "draining": on})
