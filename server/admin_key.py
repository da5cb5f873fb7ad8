"""The administrator's key in the configuration, and names of this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from server.config_memory import Section
from spectral.files import read_regular
from spectral.keyfile import hash_secret


class AdminKey(Section):
    """The administrator's key, in one of three ways."""

    admin_key: SecretStr | None = Field(
        None, min_length=8, description="Key for /admin; null: only this machine may. Better its hash, or a file."
    )
    admin_key_hash: str | None = Field(
        None, pattern=r"^sha256:[0-9a-f]{64}$", description="sha256: and the key's SHA-256."
    )
    admin_key_file: str | None = Field(None, description="A file whose first line is the key.")

    @model_validator(mode="after")
    def _one_key(self) -> AdminKey:
        given = [name for name in AdminKey.model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give the administrator's key in one way")
        self.admin_hash()
        return self

    def admin_hash(self) -> str | None:
        """The key's hash, or None where there is no key. Raises ValueError for a file without one."""
        if self.admin_key is not None:
            return hash_secret(self.admin_key.get_secret_value())
        if self.admin_key_file is None:
            return self.admin_key_hash
        try:
            secret = read_regular(self.admin_key_file, 1 << 20).decode("utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ValueError(f"admin_key_file: {self.admin_key_file} cannot be read: {reason}") from None
        if len(secret) < 8:
            raise ValueError(f"admin_key_file: {self.admin_key_file} must begin with a key of 8 characters or more")
        return hash_secret(secret)


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def named_host(given: str) -> str:
    """The host's name in "host:port", "[::1]:port" or "scheme://host:port"; "" where there is none."""
    try:
        return urlsplit(given if "//" in given else f"//{given}").hostname or ""
    except ValueError:  # brackets without an address
        return given.strip("[]/") or "?"
