"""What the administrator's requests may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server import errors

S = TypeVar("S", bound=BaseModel)


def parse(schema: type[S], data: Any) -> S:
    """A decoded body, checked. Raises ApiError 400 that names the first field at fault."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise errors.unsupported(param) from error
        raise errors.bad_request(f"{param or 'the body'}: {first['msg'].lower()}", param or None) from error


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Empty(_Strict):
    """No fields."""


class Unload(_Strict):
    """`drain_seconds`: time for running requests (null: as configured); `force`: also a pinned model."""

    drain_seconds: Annotated[float | None, Field(ge=0, le=3600)] = None
    force: bool = False


class ChooseSetting(_Strict):
    """A row of the ladder, "exact", or "auto" for the configured one. `live`: re-encode what running requests hold."""

    setting: Annotated[str, Field(min_length=1, max_length=100)]
    live: bool = False


class Activate(_Strict):
    """A profile's hash (or its first 8 or more characters), or "shipped"."""

    profile: Annotated[str, Field(min_length=7, max_length=64)]


class Build(_Strict):
    """A profiling job; `device` null: as configured; `prefer`: what the profile is made for: least loss for its bytes
    (quality), or to be read faster by GPUs for more loss (balanced, speed)."""

    tokens: Annotated[int, Field(ge=4096, le=10_000_000)] = 65_536
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    device: Annotated[str | None, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")] = None
    prefer: Literal["quality", "balanced", "speed"] = "quality"
