"""Who may do what: API keys, checked in constant time, before any route sees the request.

1. A path's rule says what it needs: nothing, a key, or an admin's key (`rule`).
2. Where no keys are configured everything is open: the server then listens on a loopback address, or was told twice
   to be open (see Settings).
3. A key comes as `Authorization: Bearer KEY` or `X-Api-Key: KEY`. Without one 401, with the wrong role 403. An address
   that sent many wrong ones has to wait (server/throttle.py).
4. `server.admin_key` is one of the keys, for /admin; where there are no others, everything else is open.
5. Without keys a name in the Host header that is another machine's is refused: a page could have pointed its own name
   to this machine (DNS rebinding).
"""

from __future__ import annotations

import fnmatch
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server import errors
from server.admin_key import AdminKey, is_loopback, named_host
from server.config_auth import AuthSettings
from server.throttle import Throttle
from spectral.keyfile import KeyFileError, KeyRecord, check_unique, hash_secret, load_keys

if TYPE_CHECKING:
    from server.config import ServerSettings

log = logging.getLogger("spectral.auth")
Rule = Literal["open", "key", "admin"]
RELOAD_S = 1.0
ADMIN_NAME = "server.admin_key"
_HEALTH = ("/health", "/ready", "/version")
_PAGES = ("/", "/favicon.ico", "/openapi.json")


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
    """All keys of the configuration and of its file, which is read again when it changes: the one place where a key is
    compared. `admin`: the section that holds the administrator's key now. Raises KeyFileError."""

    def __init__(self, settings: AuthSettings, admin: Callable[[], ServerSettings] | None = None) -> None:
        self._settings = settings
        self._own = settings.records()
        self._admin = admin
        self._admin_record: tuple[AdminKey, KeyRecord | None] | None = None
        _ = self.admin  # a file is read when its configuration is, and not later
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
        admin = self.admin
        return [*self._own, *self._file, *([admin] if admin is not None else [])]

    @property
    def admin(self) -> KeyRecord | None:
        """The administrator's own key, as the configuration has it now."""
        section = self._admin() if self._admin is not None else None
        if section is None:
            return None
        if self._admin_record is None or self._admin_record[0] is not section:
            found = section.admin_hash()
            record = None if found is None else KeyRecord(ADMIN_NAME, found, role="admin")
            self._admin_record = section, record
        return self._admin_record[1]

    @property
    def own_names(self) -> bool:
        """Whether only this machine's names may stand in the Host header: it listens for itself and was not told
        twice that it is for everybody."""
        section = self._admin() if self._admin is not None else None
        if section is None or not is_loopback(section.host):
            return False
        return not (section.allow_public and self._settings.allow_without_keys)

    def find(self, wanted: str) -> KeyRecord | None:
        """The valid key with this hash. Takes as long for a wrong one as for a right one."""
        found = None
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

    def __init__(self, app: ASGIApp, keys: KeyRing, settings: AuthSettings, throttle: Throttle | None = None) -> None:
        self._app, self._keys, self._settings = app, keys, settings
        self._throttle = throttle or Throttle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            state: dict[str, Any] = scope.setdefault("state", {})
            try:
                state["caller"] = self._check(scope)
            except errors.ApiError as error:
                state["code"] = error.code
                await error.response(scope["path"])(scope, receive, send)
                return
            if state["caller"].record is not None:
                state["key"] = state["caller"].record.name
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> Caller:
        needed = rule(scope["path"], self._settings)
        headers = Headers(scope=scope)
        if not self._settings.has_keys:
            self._check_host(headers)
            if needed != "admin" or self._keys.admin is None:
                return ANYBODY
        secret = presented(headers)
        if secret is None:
            if needed == "open":
                return ANYBODY
            raise self._unknown("this server asks for an API key; send the header Authorization: Bearer KEY")
        record = self._find(secret, (scope.get("client") or ("",))[0])
        if record is None:
            if needed == "open":
                return ANYBODY
            raise self._unknown("this API key is not known here, or it was revoked or has expired")
        if needed == "admin" and record.role != "admin":
            raise errors.forbidden("this needs a key with the role admin", "admin_key_required")
        return Caller(record)

    def _find(self, secret: str, client: str) -> KeyRecord | None:
        wanted = hash_secret(secret)
        seconds = self._throttle.wait(client, wanted)
        if seconds:
            raise errors.too_many_wrong_keys(seconds)
        record = self._keys.find(wanted)
        if record is None:
            self._throttle.failed(client)
        else:
            self._throttle.passed(client, wanted)
        return record

    def _unknown(self, message: str) -> errors.ApiError:
        if self._settings.has_keys:
            return errors.unauthorized(message)
        needed = "this needs the administrator's key: send Authorization: Bearer KEY (server.admin_key)"
        return errors.ApiError(401, needed, code="invalid_admin_key")

    def _check_host(self, headers: Headers) -> None:
        """A name without a dot is no name of the Internet, and an address cannot be pointed elsewhere."""
        host = named_host(headers.get("host", ""))
        if self._keys.own_names and "." in host.rstrip(".") and not is_loopback(host) and not is_address(host):
            shown = errors.shorten(host)
            message = (
                f"this server has no keys and is for this machine alone, and {shown!r} is another name; "
                "use 127.0.0.1 or localhost, or make keys (spectral keys create)"
            )
            raise errors.forbidden(message, "host_not_allowed")


def is_address(host: str) -> bool:
    """True for an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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
