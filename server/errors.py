"""Every error that leaves the server, in one envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.state_schema import StateUnusable

log = logging.getLogger("spectral.errors")

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
_TYPES |= {404: "not_found_error", 405: "invalid_request_error"}
_TYPES |= {408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error"}
_TYPES |= {503: "service_unavailable_error", 504: "timeout_error"}


class ApiError(Exception):
    """An answer other than 200. `code` is stable; `param` names the field; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def envelope(self) -> dict[str, Any]:
        """The JSON body, also used for an error event in the middle of a stream."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> JSONResponse:
        """The HTTP response; under /api as Ollama writes errors."""
        if path.startswith("/api/"):
            return JSONResponse({"error": self.message}, status_code=self.status, headers=self.headers)
        return JSONResponse(self.envelope, status_code=self.status, headers=self.headers)


def shorten(text: str, limit: int = 120) -> str:
    """What a client sent, cut so that it can be shown."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer (logged as 499)."""


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400."""
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, hint: str = "remove it from the request") -> ApiError:
    """400 for a field that this server does not know or does not support."""
    param = shorten(param)
    return ApiError(400, f"{param}: unknown or unsupported field; {hint}", code="unsupported_parameter", param=param)


def model_not_found(name: str, known: list[str]) -> ApiError:
    """404 with the names that exist."""
    message = f"the model {shorten(name)!r} does not exist here; available: {', '.join(known)}"
    return ApiError(404, message, code="model_not_found", param="model")


def body_too_large(limit: int) -> ApiError:
    """413."""
    return ApiError(413, f"the request body is over the limit of {limit} bytes; send less", code="request_too_large")


def model_unavailable(name: str, state: str, why: str, retry_after: int) -> ApiError:
    """503 while a model loads, or after it failed."""
    what = "could not be loaded" if state == "failed" else f"is {state}"
    message = f"the model {name!r} {what}" + (f": {why}" if why else "") + f"; try again in {retry_after} s"
    return ApiError(503, message, code=f"model_{state}", retry_after=retry_after)


def unauthorized(message: str) -> ApiError:
    """401."""
    return ApiError(401, message, code="invalid_api_key")


def forbidden(message: str, code: str = "forbidden", param: str | None = None) -> ApiError:
    """403."""
    return ApiError(403, message, code=code, param=param)


def rate_limited(message: str, retry_after: int, headers: dict[str, str]) -> ApiError:
    """429 for the limits of a key."""
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=retry_after, headers=headers)


def too_many_wrong_keys(seconds: int) -> ApiError:
    """429 for an address that sent many keys that are not known."""
    message = f"too many wrong keys came from this address; try again in {seconds} s"
    return ApiError(429, message, code="too_many_wrong_keys", retry_after=seconds)


def no_embeddings() -> ApiError:
    """400 for every request for embeddings."""
    message = "this server has no embeddings: its models write text; use a server with an embedding model for them"
    return ApiError(400, message, code="unsupported_endpoint")


def queue_full(why: str, retry_after: int = 2) -> ApiError:
    """429 from the gateway itself."""
    return ApiError(429, f"{why}; try again in {retry_after} s", code="queue_full", retry_after=retry_after)


_FAILURES = {"queue_timeout": 503, "shutting_down": 503, "deadline_exceeded": 504}
_FAILURES |= dict.fromkeys(("grammar_unsatisfiable", "grammar_too_complex", "grammar_cut_by_stop"), 400)


def failed(message: str, code: str, retry_after: int, param: str | None = None) -> ApiError:
    """A request that failed in its worker after it was accepted: 500, or what fits its reason better."""
    status = _FAILURES.get(code, 500)
    return ApiError(status, message, code=code, param=param, retry_after=retry_after if status == 503 else None)


def unsupported_media_type(given: str) -> ApiError:
    """415."""
    what = f"Content-Type {shorten(given)!r}" if given else "a body without a Content-Type"
    message = f"{what} is not understood; send JSON with the header Content-Type: application/json"
    return ApiError(415, message, code="unsupported_media_type")


def body_too_late(seconds: float) -> ApiError:
    """408."""
    return ApiError(408, f"the body did not arrive within {seconds:g} s; send it faster", code="request_timeout")


def slow_client() -> ApiError:
    """503 in mid-stream: the buffer of a client that does not read is full."""
    return ApiError(503, "the client reads too slowly; the request was cancelled", code="slow_client")


def cancelled() -> ApiError:
    """503: the worker cancelled a request on its own account."""
    return ApiError(503, "the worker cancelled the request; send it again", code="cancelled", retry_after=2)


def deadline_exceeded(seconds: float, param: str | None = None) -> ApiError:
    """504. `param`: the field that set the time, where it was not the server's own limit."""
    more = "allow more time" if param is None else f"allow more time in {param}"
    message = f"the request did not finish within {seconds:g} s; ask for fewer tokens, or {more}"
    return ApiError(504, message, code="deadline_exceeded", param=param)


def internal(error: Exception, where: str) -> ApiError:
    """500, with the exception in the log and not in the answer."""
    log.error("unexpected error in %s", where, exc_info=error)
    return ApiError(500, "the server failed on this request; its log has the details", code="internal_error")


def worker_lost(name: str) -> ApiError:
    """503: the worker ended while it worked on this request."""
    message = f"the worker of model {name!r} ended while it answered; it is being restarted, send the request again"
    return ApiError(503, message, code="worker_lost", retry_after=2)


def storage_failed(error: Exception) -> ApiError:
    """507: a disk that is full, read-only or broken; nothing was changed."""
    why = getattr(error, "strerror", None) or str(error)
    return ApiError(507, f"the server cannot write to its disk: {why}; make room, then try again", code="storage")


def state_unusable(error: Exception) -> ApiError:
    """503: the state's file cannot be read or written now."""
    return ApiError(503, str(error), code="state_unusable", retry_after=10)


def shutting_down() -> ApiError:
    """503: the server ends."""
    message = "the server is shutting down; send the request again when it is back"
    return ApiError(503, message, code="shutting_down", retry_after=10)


def install(app: FastAPI) -> None:
    """Make every way in which a request can fail use the envelope; unexpected exceptions are the middleware's part."""

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        request.scope.setdefault("state", {})["code"] = error.code
        return error.response(request.url.path)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path, method = request.url.path, request.method
        if error.status_code == 404:
            message = f"there is no {shorten(path)} here; GET /openapi.json lists what there is"
            answer = ApiError(404, message, code="not_found")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "another method")
            answer = ApiError(405, f"{shorten(path)} does not take {method}; use {allowed}", code="method_not_allowed")
        else:
            answer = ApiError(error.status_code, str(error.detail), code="http_error")
        request.scope.setdefault("state", {})["code"] = answer.code
        response = answer.response(path)
        response.headers.update(error.headers or {})
        return response

    async def invalid_query(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        request.scope.setdefault("state", {})["code"] = "invalid_value"
        first = error.errors()[0]
        param = str(first["loc"][-1])
        return bad_request(f"{param}: {str(first['msg']).lower()}", param).response()

    async def client_gone(_: Request, error: Exception) -> JSONResponse:
        return ApiError(499, "the client closed the connection", code="client_gone").response()

    async def no_state(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s: %s", request.method, request.url.path, error)
        return await api_error(request, state_unusable(error))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(StateUnusable, no_state)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid_query)
    app.add_exception_handler(ClientGone, client_gone)
