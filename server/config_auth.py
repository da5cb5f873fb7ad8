"""The part of the configuration that says who may use the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spectral.keyfile import KeyFileError, KeyRecord, check_unique, load_keys

Count = Annotated[int, Field(ge=1, le=10**9)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeySettings(_Section):
    """One API key, by its hash (`spectral keys create` prints it)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Unique; it stands in logs.")
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$", description="What is kept of the key.")
    role: Literal["user", "admin"] = Field("user", description="admin may also use /admin.")
    models: tuple[str, ...] | None = Field(None, description='Names or patterns such as "qwen*"; null allows all.')
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = Field(None, description="Tokens of prompts and answers.")
    max_concurrency: Count | None = Field(None, description="Requests at once.")


class AuthSettings(_Section):
    """Keys, and what can be seen without one. Where there are no keys, everything is open."""

    keys: tuple[KeySettings, ...] = Field((), description="Keys that stand in this file.")
    keys_file: str | None = Field(None, description="A file of `spectral keys`; read again whenever it changes.")
    health: Literal["open", "key"] = Field("open", description="What /health, /ready and /version need.")
    metrics: Literal["open", "key", "admin"] = Field("key", description="What /metrics needs.")
    allow_without_keys: bool = Field(
        False, description="With server.allow_public: let anybody on the network in, without a key."
    )

    @model_validator(mode="after")
    def _keys_are_usable(self) -> AuthSettings:
        try:
            records = self.records()
            if self.keys_file is not None:
                if not Path(self.keys_file).is_file():
                    raise ValueError(
                        f"keys_file: {self.keys_file} does not exist; "
                        f"`spectral keys create NAME --file {self.keys_file}` makes it"
                    )
                records += load_keys(self.keys_file)
            check_unique(records, "keys")
        except KeyFileError as error:
            raise ValueError(str(error)) from error
        return self

    def records(self) -> list[KeyRecord]:
        """The keys that stand in the configuration."""
        return [KeyRecord(**key.model_dump()) for key in self.keys]

    @property
    def has_keys(self) -> bool:
        """Whether callers need keys."""
        return bool(self.keys) or self.keys_file is not None
