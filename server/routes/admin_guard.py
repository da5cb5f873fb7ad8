"""Who may use the administrator's routes."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import Request

from server import errors
from server.admin_key import is_loopback, named_host
from server.auth import ADMIN_NAME, caller_of

_FORBIDDEN = 403


async def require_admin(request: Request) -> str:
    """The actor's name for the audit trail. Raises ApiError 403.

    Where there is an administrator's key, or API keys, server/auth.py has asked for one and compared it. Without any
    only programs on this machine may: the connection must be a loopback one, and neither the name the client asked for
    nor the page that asks may be another machine's (a browser sends requests of any page to 127.0.0.1).
    """
    record = caller_of(request.scope).record
    client = request.client.host if request.client is not None else ""
    if record is not None and record.role == "admin":
        return f"admin key from {client}" if record.name == ADMIN_NAME else f"key {record.name} from {client}"
    if not is_loopback(client):
        message = "without server.admin_key only this machine may do that; set a key in the configuration"
        raise errors.ApiError(_FORBIDDEN, message, code="admin_forbidden")
    for header in ("host", "origin"):
        named = request.headers.get(header)
        if named and not is_loopback(named_host(named)):
            shown = errors.shorten(named)
            message = f"the {header} {shown!r} is another machine; use 127.0.0.1, or set server.admin_key"
            raise errors.ApiError(_FORBIDDEN, message, code="admin_forbidden")
    origin = request.headers.get("origin")
    if origin and urlsplit(origin).netloc != request.headers.get("host"):
        message = f"a page of {errors.shorten(origin)!r} may not do that; open the console of this server"
        raise errors.ApiError(_FORBIDDEN, message, code="admin_forbidden")
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise errors.ApiError(_FORBIDDEN, "a page of another site may not do that", code="admin_forbidden")
    return f"local from {client}"
