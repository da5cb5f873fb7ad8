"""/ and /console/: the console's page, its style and its modules, from files beside the server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server import errors

router = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).resolve().parents[1] / "console"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No inline script or style, nothing from other hosts, in no frame: what a model writes cannot become part of the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    data: bytes
    kind: str
    tag: str


@lru_cache(maxsize=1)
def _files() -> dict[str, _File]:
    """All files by name, read once: a request chooses among these names and never becomes a path."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in _TYPES:
            data = path.read_bytes()
            found[path.name] = _File(data, _TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return found


@router.get("/")
async def page(request: Request) -> Response:
    """The console."""
    return _send(request, "index.html")


@router.get("/console/{name}")
async def file(name: str, request: Request) -> Response:
    """A part of it."""
    return _send(request, name)


def _send(request: Request, name: str) -> Response:
    found = _files().get(name)
    if found is None:
        raise errors.ApiError(404, f"the console has no file {errors.shorten(name)!r}", code="not_found")
    headers = {**_HEADERS, "ETag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.data, media_type=found.kind, headers=headers)
