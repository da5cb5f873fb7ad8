"""Who may use the administrator's routes."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from fastapi import Request

from server import errors
from server.auth import caller_of
from server.config import is_loopback

_FORBIDDEN = 403


async def require_admin(request: Request) -> str:
    """The actor's name for the audit trail. Raises ApiError 401 or 403.

    Where there are API keys, one with the role admin is needed, or server.admin_key (server/auth.py has seen to it).
    With server.admin_key: `Authorization: Bearer KEY`. Without one only programs on this machine may: the connection
    must be a loopback one, and neither the name the client asked for nor the page that asks may be another machine's
    (a browser sends requests of any page to 127.0.0.1).
    """
    caller = caller_of(request.scope)
    client = request.client.host if request.client is not None else ""
    if caller.record is not None and caller.record.role == "admin":
        return f"key {caller.record.name} from {client}"
    key = request.app.state.scheduler.settings.server.admin_key
    if key is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key.get_secret_value().encode())
        if scheme.lower() != "bearer" or not right:
            message = "this needs the administrator's key: send Authorization: Bearer KEY (server.admin_key)"
            raise errors.ApiError(401, message, code="invalid_admin_key")
        return f"admin key from {client}"
    if not is_loopback(client):
        message = "without server.admin_key only this machine may do that; set a key in the configuration"
        raise errors.ApiError(_FORBIDDEN, message, code="admin_forbidden")
    for header in ("host", "origin"):
        named = request.headers.get(header)
        if named and not is_loopback(_host(named)):
            shown = errors.shorten(named)
            message = f"the {header} {shown!r} is another machine; use 127.0.0.1, or set server.admin_key"
            raise errors.ApiError(_FORBIDDEN, message, code="admin_forbidden")
    origin = request.headers.get("origin")
    if origin and urlsplit(origin).netloc != request.headers.get("host"):
        message = f"a page of {errors.shorten(origin)!r} may not do that; open the console of this server"
        raise errors.ApiError(_FORBIDDEN, message, code="admin_forbidden")
    return f"local from {client}"


def _host(given: str) -> str:
    """The host's name in "host:port", "[::1]:port" or "scheme://host:port"."""
    return urlsplit(given if "//" in given else f"//{given}").hostname or ""
