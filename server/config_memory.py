"""What config.yaml says about memory: budgets of devices, and what each model may take and how long it stays."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Section(BaseModel):
    """A part of the configuration: unknown fields are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_bytes(value: Any) -> Any:
    """512 -> 512, "512MiB" -> 536870912. Raises ValueError for text that is no size."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError('write a number of bytes, or a size such as "512MiB" or "2GiB"')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_seconds(value: Any) -> Any:
    """300 -> 300, "10m" -> 600, "-1" -> -1: seconds, or text with s, m, h or d, as Ollama writes durations; any
    negative value means for ever. Raises ValueError for text that is no duration."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.removeprefix("-"))
    if not parts or "".join(number + unit for number, unit in parts) != text.removeprefix("-"):
        raise ValueError('write seconds, or a duration such as "10m" or "1h30m"; -1 is for ever, 0 is at once')
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    return -1.0 if text.startswith("-") else seconds


_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["512MiB"]}]}
_DURATION_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "string", "examples": ["10m", "-1"]}]}
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1), WithJsonSchema(_SIZE_SCHEMA)]
BytesOrNone = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0), WithJsonSchema(_SIZE_SCHEMA)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=-1, le=1e9), WithJsonSchema(_DURATION_SCHEMA)]


class DeviceBudget(Section):
    """One device's own cap and reserve."""

    max_vram: Bytes | None = Field(None, description="Most bytes for us; null: memory.max_vram.")
    reserve: BytesOrNone | None = Field(None, description="Bytes left free; null: memory.reserve.")


class MemorySettings(Section):
    """How much of each device may be used."""

    max_vram: Bytes | None = Field(None, description="Most bytes on each GPU, what others use included; null: all.")
    reserve: BytesOrNone = Field(512 * 2**20, description="Bytes left free on each GPU.")
    max_host: Bytes | None = Field(None, description="Most host memory for us: CPU models and sleeping weights.")
    host_reserve: BytesOrNone = Field(2**30, description="Host memory left free.")
    devices: dict[Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")], DeviceBudget] = Field(
        {}, description='Single devices, by name: "cuda:0".'
    )
    spare_workers: int | None = Field(
        None,
        ge=0,
        le=16,
        description="Workers that wait with all libraries imported, about 0.5 GiB of host memory each: a model then "
        "loads, or is back after its worker or its node was lost, without the seconds that imports take; null: one on "
        "every node of a cluster, none on a machine alone.",
    )
    tick_seconds: float = Field(0.25, ge=0.05, le=10, description="How often the devices are read.")


class ModelMemory(Section):
    """What one model may take, and how long it stays."""

    keep_alive: Seconds = Field(
        -1.0, description='Time after the last request until the model leaves the GPU: "10m", seconds, 0, -1 (never).'
    )
    pin: bool = Field(False, description="Stays hot whatever happens.")
    priority: float = Field(1.0, gt=0, le=1000, description="How much its requests count against others'.")
    max_kl: float | None = Field(None, gt=0, description="No setting whose measured mean KL (nats) is above this.")
    min_context: int | None = Field(None, ge=1, description="Tokens of cache it always has; null: one full context.")
    max_vram: Bytes | None = Field(None, description="Most bytes on devices, weights included.")


class DefaultMemory(Section):
    """The same for all models that do not say; null leaves the default."""

    keep_alive: Seconds | None = None
    max_kl: float | None = Field(None, gt=0)
    priority: float | None = Field(None, gt=0, le=1000)


__all__ = ["Bytes", "DefaultMemory", "DeviceBudget", "MemorySettings", "ModelMemory", "Seconds", "Section"]
