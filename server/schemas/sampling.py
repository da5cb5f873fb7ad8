"""Fields that all ways of generating share."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from server.schemas.base import Harmless, Request
from server.schemas.fields import (
    MAX_TOKEN_ID,
    Bias,
    KvQuality,
    Limit,
    ModelName,
    Probability,
    Seed,
    Stop,
    StreamOptions,
)
from server.worker import messages as wire

# Fields of the OpenAI API that change nothing at these values (null is always one of them), so clients may send them.
COMMON_HARMLESS: Harmless = {
    "service_tier": lambda value: value in ("auto", "default"),
    "store": lambda value: value is False,
    "audio": lambda value: False,
    "prediction": lambda value: False,
    "web_search_options": lambda value: False,
    "verbosity": lambda value: value == "medium",
    "prompt_cache_key": lambda value: isinstance(value, str),
    "prompt_cache_retention": lambda value: value == "in_memory",
    "safety_identifier": lambda value: isinstance(value, str),
}
_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
)


class SamplingFields(Request):
    """A model, how to choose its tokens, and how good its cache has to be. Interfaces limit tokens each in its way."""

    model: ModelName
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: Probability = 1.0
    top_k: int = Field(0, ge=0, lt=MAX_TOKEN_ID)
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: Probability = 1.0
    seed: Seed | None = None
    stop: Stop = ()
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: Bias = {}
    kv_quality: KvQuality | None = None

    @property
    def max_kl(self) -> float | None:
        """The most that the cache's setting may cost, mean KL in nats; None: whatever it costs."""
        return None if self.kv_quality is None else self.kv_quality.max_kl

    def check(self, ready: wire.Ready) -> None:
        """The worker checks what depends on the model."""

    def sampling(self, **more: Any) -> wire.Sampling:
        """The sampling part of the message to the worker."""
        values = {name: getattr(self, name) for name in _PASSED_ON}
        return wire.Sampling(**values, **more)


class OpenAIFields(SamplingFields):
    """What chat and text completions share."""

    harmless: ClassVar[Harmless] = COMMON_HARMLESS

    max_tokens: Limit | None = None
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=8)
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def include_usage(self) -> bool:
        """True where the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage
