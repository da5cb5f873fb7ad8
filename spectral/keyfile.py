"""API keys in a file: only their hashes, what each may do, and how much of it.

A key is 32 random bytes, so that one round of SHA-256 is enough: there is nothing to guess. The file is JSON, readable
by its owner only, replaced atomically, and read again by a running server when it changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from spectral.errors import SpectralError
from spectral.files import read_regular, write_atomically

PREFIX = "sk-spectral-"
ROLES = ("user", "admin")
FORMAT = 1
MAX_BYTES = 64 << 20
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency")


class KeyFileError(SpectralError):
    """A file of keys cannot be used; the message names the file, the entry and the remedy."""


@dataclass(frozen=True)
class KeyRecord:
    """One key.

    Attributes:
        name: what people call it, unique; it stands in logs. hash: "sha256:" and 64 hexadecimal digits.
        role: "user", or "admin" (may also use /admin). models: names or patterns such as "qwen*"; None: all.
        requests_per_minute, tokens_per_minute, max_concurrency: limits; None: none.
        created, revoked, expires: times in ISO 8601, UTC.
    """

    name: str
    hash: str
    role: str = "user"
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    created: str | None = None
    expires: str | None = None
    revoked: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise KeyFileError(f"name: {self.name!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", self.hash):
            raise KeyFileError(f"hash: key {self.name!r} needs 'sha256:' and 64 hexadecimal digits")
        if self.role not in ROLES:
            raise KeyFileError(f"role: key {self.name!r} must have one of {', '.join(ROLES)}, got {self.role!r}")
        for field in _LIMITS:
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise KeyFileError(f"{field}: of key {self.name!r} must be a whole number of at least 1")
        if self.models is not None and not all(isinstance(model, str) and model for model in self.models):
            raise KeyFileError(f"models: of key {self.name!r} must be a list of names")
        for field in ("created", "expires", "revoked"):
            if getattr(self, field) is not None:
                _time(getattr(self, field), f"{field}: of key {self.name!r}")

    def valid_at(self, now: datetime) -> bool:
        """False once it is revoked or has expired. `now` has a time zone."""
        return self.revoked is None and (self.expires is None or _time(self.expires, "expires") > now)


def _time(text: Any, where: str) -> datetime:
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except (ValueError, AttributeError):
        raise KeyFileError(f"{where} must be a time such as 2030-01-31T12:00:00+00:00, got {text!r}") from None
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)


def utc_now() -> str:
    """The time in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def new_secret() -> str:
    """A new key. It is shown once and kept nowhere."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """What is kept of a key."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def load_keys(path: str | os.PathLike[str]) -> list[KeyRecord]:
    """All keys of a file, revoked ones too. Raises KeyFileError."""
    try:
        data = json.loads(read_regular(path, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise KeyFileError(f"{path} does not exist; `spectral keys create NAME --file {path}` makes it") from None
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path} cannot be read as a file of keys: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("keys"), list):
        raise KeyFileError(f"{path} is no file of keys of format {FORMAT}")
    records: list[KeyRecord] = []
    known = {field.name for field in dataclasses.fields(KeyRecord)}
    for place, item in enumerate(data["keys"]):
        where = f"{path}, keys[{place}]"
        if not isinstance(item, dict) or not {"name", "hash"} <= set(item) or not set(item) <= known:
            raise KeyFileError(f"{where}: must have name and hash, and of other fields only {', '.join(sorted(known))}")
        models = item.get("models")
        if models is not None and not isinstance(models, list):
            raise KeyFileError(f"{where}: models must be a list of names")
        try:
            records.append(KeyRecord(**{**item, "models": None if models is None else tuple(models)}))
        except (KeyFileError, TypeError) as error:
            raise KeyFileError(f"{where}: {error}") from error
    check_unique(records, str(path))
    return records


def check_unique(records: list[KeyRecord], where: str) -> None:
    """Raises KeyFileError where two keys have one name or one hash."""
    for field in ("name", "hash"):
        values = [getattr(record, field) for record in records]
        twice = next((record.name for record in records if values.count(getattr(record, field)) > 1), None)
        if twice is not None:
            raise KeyFileError(f"{where}: the {field} of key {twice!r} is there twice")


def save_keys(path: str | os.PathLike[str], records: list[KeyRecord]) -> None:
    """Replace the file; nobody sees half of it, and only its owner may read it. Raises OSError."""
    check_unique(records, str(path))
    keys = [{name: value for name, value in dataclasses.asdict(r).items() if value is not None} for r in records]
    text = json.dumps({"format": FORMAT, "keys": keys}, indent=2) + "\n"
    write_atomically(path, text.encode(), mode=0o600)
