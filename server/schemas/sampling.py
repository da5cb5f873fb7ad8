"""Fields that all ways of generating share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from server.errors import unsupported
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
from server.schemas.structured import StructuredOutputs, grammar_field
from server.schemas.tools import ResponseFormat
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
_TEXT_ONLY = "models here read and write text only; remove it"
_STRUCTURED = "say it with structured_outputs: an object with one of json, regex, choice and grammar"
_NOTHING_KEPT = "this server keeps no answers; send the whole conversation with each request"
HINTS = {
    "audio": _TEXT_ONLY,
    "background": "answers are given while the client waits; remove it",
    "best_of": "answers are not ranked here; ask for n of them, with logprobs, and choose among them",
    "conversation": _NOTHING_KEPT,
    "function_call": "use tool_choice",
    "functions": "use tools",
    "image": _TEXT_ONLY,
    "max_tool_calls": "no tools are run here; the client runs them and decides how often",
    "modalities": _TEXT_ONLY,
    "moderation": "nothing is moderated here; remove it",
    "prediction": "a predicted answer is not used here; remove it",
    "previous_response_id": _NOTHING_KEPT,
    "prompt": "stored prompts are not there; send instructions and input",
    "reasoning": "the only effort is none, without thoughts; else a model thinks as its chat template says; remove it",
    "reasoning_effort": "the only effort is none, without thoughts; else a model thinks as its chat template says",
    "service_tier": "there is one tier, auto; priority says who goes first",
    "store": _NOTHING_KEPT,
    "suffix": "models here go on from a prompt and fill no gaps; say in the prompt what comes after",
    "truncation": "a prompt is never cut; shorten it",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _STRUCTURED),
    **dict.fromkeys(("regex", "ebnf", "grammar", "json_schema"), _STRUCTURED),
    "web_search_options": "nothing is searched here; offer a tool of your own",
}
"""What to do instead of a field that is refused."""
Effort = Annotated[str, WithJsonSchema({"const": "none"})]


def without_thoughts(effort: Any, param: str) -> bool | None:
    """False where an effort of "none" is asked for, None where nothing is. Raises ApiError 400 for any other."""
    if effort is None or effort == "none":
        return None if effort is None else False
    raise unsupported(param, HINTS["reasoning_effort"])


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

    hints: ClassVar[Mapping[str, str]] = HINTS

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
    session: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="A name under which the cache is kept in host memory, for the next request with this name whose "
        "prompt goes on from here.",
    )
    priority: int = Field(0, ge=-100, le=100, description="Higher ones run first; above 0 only for admin keys.")
    timeout_seconds: float | None = Field(
        None, gt=0, le=86_400, description="The request fails (504) if it is not over by then."
    )

    @property
    def service(self) -> dict[str, Any]:
        """Fields of Submit that say how the request is to be served."""
        asked = self.kv_quality
        quality = {} if asked is None else {"max_kl": asked.max_kl, "setting": asked.setting}
        return {**quality, "session": self.session, "priority": self.priority}

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
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=8)
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def grammar_field(self) -> str:
        """The field whose grammar it is, should a worker not be able to use it."""
        return grammar_field(self.structured_outputs)

    @property
    def include_usage(self) -> bool:
        """True where the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage
