"""Who may do what: API keys, checked in constant time, before any route sees the request.

1. A path's rule says what it needs: nothing, a key, or an admin's key (`rule`).
2. Where no keys are configured everything is open: the server then listens on a loopback address, or was told twice
   to be open (see Settings).
3. A key comes as `Authorization: Bearer KEY` or `X-Api-Key: KEY`. Without one 401, with the wrong role 403.
"""

from __future__ import annotations

import fnmatch
import hmac
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server import errors
from server.config_auth import AuthSettings
from spectral.keyfile import KeyFileError, KeyRecord, check_unique, hash_secret, load_keys

log = logging.getLogger("spectral.auth")
Rule = Literal["open", "key", "admin"]
RELOAD_S = 1.0
_HEALTH = ("/health", "/ready", "/version")
_PAGES = ("/", "/favicon.ico", "/openapi.json", "/docs", "/redoc")


@dataclass(frozen=True)
class Caller:
    """Who sent a request; `record` is None where no keys are configured, or none was asked for."""

    record: KeyRecord | None = None

    def check_model(self, *names: str) -> None:
        """Raises ApiError 403 where the key may not use a model; `names` are its name and its aliases."""
        if not self.may_use(*names):
            message = f"this API key may not use the model {names[0]!r}"
            raise errors.forbidden(message, "model_not_allowed", "model")

    def may_use(self, *names: str) -> bool:
        """Whether the key's list of models contains one of these names."""
        if self.record is None or self.record.models is None:
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.record.models)


ANYBODY = Caller()


def caller_of(scope: Scope) -> Caller:
    """The caller that :class:`Guard` found."""
    caller = scope.get("state", {}).get("caller", ANYBODY)
    assert isinstance(caller, Caller)
    return caller


class KeyRing:
    """All keys of the configuration and of its file, which is read again when it changes. Raises KeyFileError."""

    def __init__(self, settings: AuthSettings, admin_key: SecretStr | None = None) -> None:
        self._settings = settings
        self._own = settings.records()
        if admin_key is not None and settings.has_keys:
            secret = admin_key.get_secret_value()
            self._own.append(KeyRecord("server.admin_key", hash_secret(secret), role="admin"))
        self._file: list[KeyRecord] = []
        self._stamp: tuple[int, int] | None = None
        self._checked = time.monotonic()
        if settings.keys_file is not None:
            self._file = load_keys(settings.keys_file)
            self._stamp = self._file_stamp()
        check_unique([*self._own, *self._file], "auth")

    @property
    def records(self) -> Sequence[KeyRecord]:
        """The keys, revoked ones too."""
        self._refresh()
        return [*self._own, *self._file]

    def find(self, secret: str) -> KeyRecord | None:
        """The valid key with this secret. Takes as long for a wrong one as for a right one."""
        wanted, found = hash_secret(secret), None
        for record in self.records:
            if hmac.compare_digest(record.hash, wanted):
                found = record
        return found if found is not None and found.valid_at(datetime.now(timezone.utc)) else None

    def _file_stamp(self) -> tuple[int, int] | None:
        assert self._settings.keys_file is not None
        facts = os.stat(self._settings.keys_file)
        return facts.st_mtime_ns, facts.st_ino

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._settings.keys_file is None or now - self._checked < RELOAD_S:
            return
        self._checked = now
        try:
            stamp = self._file_stamp()
            if stamp == self._stamp:
                return
            records = load_keys(self._settings.keys_file)
            check_unique([*self._own, *records], "auth")
        except (
            OSError,
            KeyFileError,
        ) as error:  # a file that is broken for a moment must neither open nor lock the server
            log.error("the keys are not read again, those from before stay in force: %s", error)
            return
        self._file, self._stamp = records, stamp
        log.info("the keys were read again: %d", len(records))


class Guard:
    """ASGI middleware: puts the caller into the request's state, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, keys: KeyRing, settings: AuthSettings) -> None:
        self._app, self._keys, self._settings = app, keys, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            state: dict[str, Any] = scope.setdefault("state", {})
            try:
                state["caller"] = self._check(scope)
            except errors.ApiError as error:
                await error.response(scope["path"])(scope, receive, send)
                return
            if state["caller"].record is not None:
                state["key"] = state["caller"].record.name
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> Caller:
        needed = rule(scope["path"], self._settings)
        if not self._settings.has_keys:
            return ANYBODY
        secret = presented(Headers(scope=scope))
        if secret is None:
            if needed == "open":
                return ANYBODY
            raise errors.unauthorized("this server asks for an API key; send the header Authorization: Bearer KEY")
        record = self._keys.find(secret)
        if record is None:
            if needed == "open":
                return ANYBODY
            raise errors.unauthorized("this API key is not known here, or it was revoked or has expired")
        if needed == "admin" and record.role != "admin":
            raise errors.forbidden("this needs a key with the role admin", "admin_key_required")
        return Caller(record)


def rule(path: str, settings: AuthSettings) -> Rule:
    """What a path needs. The pages of the console are open, the data that they ask for are not."""
    if path in _HEALTH:
        return settings.health
    if path == "/metrics":
        return settings.metrics
    if path == "/admin" or path.startswith("/admin/"):
        return "admin"
    return "open" if path in _PAGES or path.startswith("/console/") else "key"


def presented(headers: Headers) -> str | None:
    """The key that a request brings, or None."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key") or None
