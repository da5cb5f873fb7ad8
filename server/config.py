"""The configuration: YAML, overridden by SPECTRAL_* environment variables, checked in full before anything starts.

A nested value is named with two underscores: SPECTRAL_SERVER__PORT=9000, SPECTRAL_DEFAULTS__DEVICE=cuda.
SPECTRAL_MODELS takes a JSON list.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from server.admin_key import AdminKey, is_loopback
from server.config_auth import AuthSettings
from server.config_cluster import ClusterSettings
from server.config_memory import Bytes, DefaultMemory, MemorySettings, ModelMemory, Section
from server.config_sessions import SessionSettings
from server.config_tracing import TracingSettings
from server.worker import messages
from server.yaml_source import YamlSource, explain_yaml

ENV_PREFIX, ENV_DELIMITER = "SPECTRAL_", "__"
_OVERRIDES: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("_OVERRIDES", default=None)


class ConfigError(Exception):
    """The configuration cannot be used; the message names the field and the remedy."""


def _origin_of_a_page(value: str) -> str:
    if value != "*" and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", value) is None:
        raise ValueError('must be an origin without a path, such as "https://chat.example", or "*" for all pages')
    return value


Origin = Annotated[str, AfterValidator(_origin_of_a_page)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")]


class ServerSettings(AdminKey, Section):
    """Where and how the gateway listens."""

    host: str = Field("127.0.0.1", description="Address to listen on; a public one needs keys (see auth).")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    allow_public: bool = Field(
        False, description="With auth.allow_without_keys: allow a host that other machines can reach, without keys."
    )
    allowed_origins: tuple[Origin, ...] = Field(
        (), description='Web pages that may use the server from a browser, "https://chat.example"; "*": all.'
    )
    max_body_bytes: Bytes = Field(10 * 2**20, description="Largest request body.")
    ping_seconds: float = Field(15.0, gt=0, description="Seconds between comment pings on a silent stream.")
    request_timeout_seconds: float = Field(600.0, gt=0, description="Longest time one request may take.")
    load_wait_seconds: float = Field(60.0, gt=0, description="How long a request waits for its model to load.")
    worker_silence_seconds: float = Field(30.0, gt=0, description="A worker silent for so long is killed and replaced.")
    state_dir: str | None = Field(
        None, min_length=1, description="Folder of profiles, audit trail, events and saved sessions; null: ./.spectral."
    )
    max_profile_bytes: Bytes = Field(2**30, description="Largest profile that may be uploaded.")
    drain_seconds: float = Field(10.0, ge=0, description="Time that running requests get at shutdown.")


class LogSettings(Section):
    """What the log looks like. Prompts and answers are never in it, nor are keys."""

    format: Literal["console", "json"] = Field("console", description="json: one object per line.")
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="--log-level wins over it.")
    access: bool = Field(True, description="A line for each request.")


class LimitSettings(Section):
    """A model's limits; null means the model's own maximum."""

    context_length: int | None = Field(None, ge=2, description="Longest prompt plus answer, in tokens.")
    max_concurrency: int = Field(8, ge=1, le=1024, description="Sequences that run at once.")
    max_queue: int = Field(64, ge=0, le=100_000, description="Requests that may wait; more get 429.")
    longest_wait_seconds: float | None = Field(
        None, gt=0, description="Longest wait in the queue; null: 10 s, or the time of two answers where that is more."
    )
    max_kv_bytes: Bytes | None = Field(None, description='Most bytes of KV cache, for example "512MiB".')
    prefill_chunk: int | None = Field(
        None, ge=1, le=65536, description="Prompt tokens of one sequence per step; null: 256 on a CPU, 1024 on a GPU."
    )


Quantization = Literal["none", "nf4", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Thoughts = Literal["apart", "in_text"]
ColdLevel = Literal["auto", "fast", "small"]
LoadWhen = Literal["startup", "on_demand"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")]
SettingName = Annotated[str, Field(min_length=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]


class DefaultSettings(DefaultMemory):
    """Values for all models that do not give their own; null leaves the model's own default."""

    quantization: Quantization | None = None
    dtype: Dtype | None = None
    device: Device | None = None
    setting: SettingName | None = None
    load: LoadWhen | None = None
    limits: LimitSettings | None = Field(None, description="Those given here; a model's own limits win one by one.")
    threads: Threads | None = None
    thoughts: Thoughts | None = None
    cold_level: ColdLevel | None = None


class ModelSettings(ModelMemory):
    """One model and its worker process."""

    name: Name = Field(description="The name that requests use.")
    path: str = Field("", description="Embedded model, folder or hub name; the name where it is left out.")
    quantization: Quantization = Field("none", description="nf4 and int8 need the gpu extra.")
    dtype: Dtype = Field("auto", description="Type of the weights; auto chooses by device.")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N.")
    setting: SettingName = Field("auto", description='"exact", a row of the profile\'s ladder, or "auto".')
    profile: str | None = Field(None, description="A profile file; null takes the one shipped for the model.")
    load: LoadWhen = Field("startup", description="When the model is loaded.")
    limits: LimitSettings = LimitSettings()
    threads: Threads = Field(1, description="CPU threads of the worker.")
    aliases: tuple[Name, ...] = Field((), description="Other names for the same model.")
    thoughts: Thoughts = Field(
        "apart", description="Thoughts before answers, of models that mark them: fields of their own, or in the text."
    )
    cold_level: ColdLevel = Field(
        "fast",
        description="How a chat that is saved, or moves to another node, is written: fast; small, with fewer bytes, "
        "twenty times the work on both sides, and the same links beside both profiles; auto: small where links are.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's folder brings along.")

    @model_validator(mode="before")
    @classmethod
    def _path_from_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("path") and data.get("name"):
            return {**data, "path": data["name"]}
        return data

    @model_validator(mode="after")
    def _profile_exists(self) -> ModelSettings:
        if self.profile is not None and not Path(self.profile).is_file():
            raise ValueError(
                f"the profile file {self.profile} does not exist; correct the path, "
                "or make it null to use the profile shipped for the model"
            )
        return self

    def load_message(self) -> messages.Load:
        """What the worker is told to load."""
        return messages.Load(
            name=self.name,
            path=self.path,
            quantization=self.quantization,
            dtype=self.dtype,
            device=self.device,
            setting=self.setting,
            profile=self.profile,
            limits=messages.Limits(**self.limits.model_dump(exclude={"longest_wait_seconds"})),
            threads=self.threads,
            trust_remote_code=self.trust_remote_code,
            cold_level=self.cold_level,
        )


def _with_defaults(model: Any, defaults: dict[str, Any]) -> Any:
    if not isinstance(model, dict):
        return model
    merged = {**defaults, **model}
    limits, own = defaults.get("limits"), model.get("limits")
    if isinstance(limits, dict) and (own is None or isinstance(own, dict)):
        merged["limits"] = {**limits, **(own or {})}
    return merged


class Settings(BaseSettings):
    """Everything in config.yaml."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        extra="forbid",
        frozen=True,
        title="Spectral configuration",
    )

    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    logging: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    memory: MemorySettings = MemorySettings()
    sessions: SessionSettings = SessionSettings()
    cluster: ClusterSettings = ClusterSettings()
    defaults: DefaultSettings = DefaultSettings()
    models: tuple[ModelSettings, ...] = Field(min_length=1, description="The models to serve.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line first, then the environment, then the file (the constructor's)."""
        given = _OVERRIDES.get()
        command_line = InitSettingsSource(settings_cls, {"server": given} if given else {})
        return command_line, env_settings, init_settings

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("models"), (list, tuple)):
            return data
        given = data.get("defaults")
        if not isinstance(given, dict):
            return data
        defaults = {name: value for name, value in given.items() if value is not None}
        return {**data, "models": [_with_defaults(model, defaults) for model in data["models"]]}

    @model_validator(mode="after")
    def _public_only_with_keys(self) -> Settings:
        told_twice = self.server.allow_public and self.auth.allow_without_keys
        if not is_loopback(self.server.host) and not self.auth.has_keys and not told_twice:
            raise ValueError(
                f"server.host {self.server.host!r} can be reached from other machines and there are no API keys; make "
                "some with `spectral keys create NAME --file keys.json` and set auth.keys_file, use 127.0.0.1, or let "
                "everybody in with both server.allow_public: true and auth.allow_without_keys: true"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Settings:
        seen: dict[str, str] = {}
        for model in self.models:
            for name in (model.name, *model.aliases):
                if name in seen:
                    raise ValueError(
                        f"the name {name!r} is used by model {seen[name]!r} and again by {model.name!r}; "
                        "names and aliases must be unique"
                    )
                seen[name] = model.name
        return self

    def find(self, name: str) -> ModelSettings | None:
        """The model with this name or alias."""
        return next((model for model in self.models if name == model.name or name in model.aliases), None)


def default_path() -> Path:
    """./config.yaml where there is one, else the one in the package."""
    here = Path("config.yaml")
    if here.is_file():
        return here
    from spectral import resources

    return Path(resources.config_path())


def load_settings(path: str | Path | None = None, **server_overrides: Any) -> Settings:
    """Read and check the configuration. `server_overrides` (host=, port=) win over everything. Raises ConfigError."""
    file = Path(path) if path is not None else default_path()
    try:
        source = YamlSource(file)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the configuration {file}: {why}; give one with --config FILE") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {explain_yaml(error)}") from None
    if not isinstance(source.data, dict):
        raise ConfigError(f"{file} must hold the key 'models'; copy the shipped config.yaml and edit it")
    _refuse_unknown_variables()
    overrides = {key: value for key, value in server_overrides.items() if value is not None}
    try:
        with _overridden(overrides):
            return Settings(**{str(key): value for key, value in source.data.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_explain(file, source, error)) from error
    except SettingsError as error:
        raise ConfigError(f"an environment variable {ENV_PREFIX}* cannot be read: {error}") from error


@contextlib.contextmanager
def _overridden(server: dict[str, Any]) -> Iterator[None]:
    """Values of the command line win over the environment's, and are checked together with everything else."""
    token = _OVERRIDES.set(server)
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def _refuse_unknown_variables() -> None:
    """SPECTRAL_SEVER__PORT would otherwise be ignored; names without "__" may belong to other programs."""
    for name in os.environ:
        section, delimiter, _ = name.upper().removeprefix(ENV_PREFIX).partition(ENV_DELIMITER)
        if name.upper().startswith(ENV_PREFIX) and delimiter and section.lower() not in Settings.model_fields:
            sections = [field for field in Settings.model_fields if field != "models"]
            known = ", ".join(f"{ENV_PREFIX}{field.upper()}__..." for field in sections)
            raise ConfigError(f"the environment variable {name} names no section of the configuration; use {known}")


_REMEDIES = {
    "extra_forbidden": "there is no such field; check its spelling, or remove it (`python -m server schema` lists all)",
    "missing": "this field is required; add it",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of fields",
    "model_attributes_type": "must be a mapping of fields",
    "too_short": "must have at least 1 entry",
}


def _explain(file: Path, source: YamlSource, error: ValidationError) -> str:
    lines = [f"The configuration {file} cannot be used:"]
    items = error.errors()
    # A wrong default is wrong in every model that takes it; once is enough.
    items = [item for item in items if item["loc"][:1] == ("defaults",)] or items
    for item in items:
        place = item["loc"]
        if any(other["loc"][: len(place)] == place != other["loc"] for other in items):
            continue  # a list with a wrong entry is reported as too short as well
        field = ".".join(str(part) for part in place) or "configuration"
        remedy = _REMEDIES.get(item["type"], item["msg"].removeprefix("Value error, "))
        if item["type"] == "too_short" and item["ctx"]["min_length"] > 1:
            remedy = f"must have at least {item['ctx']['min_length']} characters"
        lines.append(f"  {_origin(source, place)}{field}: {remedy}")
    return "\n".join(lines)


def _origin(source: YamlSource, place: tuple[str | int, ...]) -> str:
    """Where a value comes from: its variable, or its line in the file."""
    variables = {name.upper(): name for name in os.environ}
    for length in range(len(place), 0, -1):
        wanted = ENV_PREFIX + ENV_DELIMITER.join(str(part) for part in place[:length]).upper()
        if wanted in variables:
            return f"{variables[wanted]}: "
    line = source.line(place)
    return f"line {line}: " if line is not None else ""


def schema_json() -> str:
    """The JSON schema of config.yaml, as kept in config.schema.json."""
    return json.dumps(Settings.model_json_schema(), indent=2, sort_keys=True) + "\n"
