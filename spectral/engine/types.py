"""What goes into and comes out of the engine: frozen values, checked when made. Nothing heavy is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from spectral.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled"]
COLD_LEVELS = ("auto", "fast", "small")
"""At which level of the cold tier a session is saved (spectral.link_files)."""

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_NAME = 256
MAX_SHOWN = 120  # characters of a wrong value that are told
GRAMMAR_KINDS = ("json_object", "json_schema", "tool_calls", "regex", "lark", "gbnf")


def _refuse(param: str, rule: str, value: object) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + "..."
    raise RequestError(f"{param} must be {rule}, got {shown}", param=param)


def _number(param: str, value: float, low: float, high: float, rule: str, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _refuse(param, rule, value)
    if value < low or value > high or (open_low and value == low):
        _refuse(param, rule, value)


def _integer(param: str, value: int, low: int, high: int | None, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        _refuse(param, rule, value)


def cold_level(level: str) -> str:
    """The level. Raises RequestError for anything else than one of COLD_LEVELS."""
    if level not in COLD_LEVELS:
        _refuse("cold_level", f"one of {', '.join(COLD_LEVELS)}", level)
    return level


def session_name(name: str) -> str:
    """The name of a session. Raises RequestError for anything else than a text of 1 to MAX_NAME characters."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        _refuse("session", f"a name of 1 to {MAX_NAME} characters", name)
    return name


@dataclass(frozen=True)
class Message:
    """One chat message. `role`: system, developer, user, assistant or tool; `content`: plain text.

    `extra`: more fields for the chat template, such as tool_calls, tool_call_id and name.
    """

    role: str
    content: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    kind: "json_object" (any JSON object; no text), "json_schema" (the schema as JSON text), "tool_calls" (any text, and
    calls of tools in the model's own form that fit the schema of {"name", "arguments"}), "regex" (the whole answer;
    Rust's syntax without look-around), "lark" (llguidance's dialect) or "gbnf" (llama.cpp's).
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            _refuse("grammar", f"of a kind among {', '.join(GRAMMAR_KINDS)}", self.kind)
        if not isinstance(self.text, str) or (self.kind == "json_object") == bool(self.text):
            _refuse("grammar", "a text (and none for json_object)", self.text)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when an answer ends. Raises RequestError naming the field at fault.

    Attributes:
        max_tokens: most new tokens; None: until the context is full.
        temperature: 0 is greedy. top_k 0, top_p 1, min_p 0 and typical_p 1 are off; they apply in that order, after
            temperature. typical_p keeps the tokens whose surprise is nearest to the entropy, up to that mass.
        repetition_penalty: divides (multiplies, if negative) the logits of every token seen, prompt included.
        frequency_penalty, presence_penalty: subtracted per occurrence, or once, for tokens of the answer.
        logit_bias: added to the logits of token ids.
        seed: the same seed gives the same text, on a CPU whatever else is served (on a GPU products of more rows are
            rounded otherwise); None draws one. Choice i of n uses its own stream of the seed.
        stop: strings that end the answer and are not part of it.
        logprobs: None for none, else how many of the most probable tokens to report beside the chosen one.
        prompt_logprobs: as logprobs, for the prompt's own tokens; None for none. The prompt is then computed anew.
        ignore_eos: go on past the model's end token (for measurements).
        grammar: what the answer must look like; None for anything.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    typical_p: float = 1.0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None, "at least 1")
        _number("temperature", self.temperature, 0.0, 100.0, "between 0 and 100")
        _number("top_p", self.top_p, 0.0, 1.0, "above 0 and at most 1", open_low=True)
        _integer("top_k", self.top_k, 0, None, "0 (off) or more")
        _number("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        _number("typical_p", self.typical_p, 0.0, 1.0, "above 0 and at most 1", open_low=True)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            _refuse("grammar", "a Grammar", self.grammar)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            _refuse("seed", "an integer", self.seed)
        if not isinstance(self.stop, (list, tuple)) or not all(isinstance(s, str) and s for s in self.stop):
            _refuse("stop", "a list of strings that are not empty (leave it out for none)", self.stop)
        _integer("n", self.n, 1, MAX_CHOICES, f"between 1 and {MAX_CHOICES}")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, "between -2 and 2")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "between -2 and 2")
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, "above 0 and at most 100", open_low=True)
        if not isinstance(self.logit_bias, dict):
            _refuse("logit_bias", "a map from token ids to numbers (leave it out for none)", self.logit_bias)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, None, "a map from token ids to numbers")
            _number("logit_bias", bias, -100.0, 100.0, "between -100 and 100")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")

    @property
    def penalised(self) -> bool:
        """True if logits are changed before a token is chosen."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        )


@dataclass(frozen=True)
class GenerateRequest:
    """One request: `prompt` is text, token ids, or chat messages. `timeout_s`: fail if not finished by then.

    Attributes:
        tools: descriptions of functions, as OpenAI writes them, for chat templates that know tools.
        priority: higher ones run first, and in the place of lower ones; -100 to 100.
        tenant: on whose behalf; tenants of one priority are served the same number of tokens.
        cache_salt: only requests with the same one share prefixes and sessions.
        max_kl: the cache's setting must be measured to be at least this close to the exact cache, nats per token; None
            for any. A squeeze in mid-answer keeps to it too.
        setting: "exact" or a row of the profile's ladder, instead of the engine's; None for that one.
        session: a name under which the cache is kept in host memory when the answer has ended, for the next request
            with this name and a prompt that goes on from there.
        thinking: False asks the chat template for an answer without thoughts before it; None leaves that to it.
    """

    request_id: str
    prompt: str | list[int] | list[Message]
    params: SamplingParams = field(default_factory=SamplingParams)
    timeout_s: float | None = None
    tools: tuple[dict[str, Any], ...] = ()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    max_kl: float | None = None
    session: str | None = None
    setting: str | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        if not self.request_id:
            raise RequestError("request_id must not be empty", param="request_id")
        _integer("priority", self.priority, -100, 100, "between -100 and 100")
        if self.max_kl is not None:
            _number("max_kl", self.max_kl, 0.0, 1e9, "0 or more")
        for name in ("tenant", "cache_salt"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > MAX_NAME:
                _refuse(name, f"a text of at most {MAX_NAME} characters", value)
        if self.session is not None and session_name(self.session) and self.params.n != 1:
            raise RequestError("n must be 1 with a session, which goes on from one answer", param="session")
        if self.timeout_s is not None:
            _number("timeout_s", self.timeout_s, 0.0, 1e9, "above 0", open_low=True)

    @property
    def is_chat(self) -> bool:
        """True if the prompt is a list of messages."""
        return not isinstance(self.prompt, str) and bool(self.prompt) and isinstance(self.prompt[0], Message)

    @property
    def prompt_field(self) -> str:
        """The field to name when the prompt is at fault."""
        return "messages" if self.is_chat else "prompt"


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine. Tokens, sequences, bytes; None: the model's own context, no byte limit.

    `prefill_chunk`: most prompt tokens of one sequence in a step; `token_budget`: most tokens in a step.
    Chunks are shortened where token_budget does not hold one beside max_concurrency decoding sequences.
    `max_queue`: sequences that may wait beyond those that run.
    `max_host_bytes`: host memory for parked sequences and sessions. `prefix_bytes`: for prefixes that are kept for
    later prompts, pages and snapshots together; None: half of max_kv_bytes, or 1 GiB; 0: none are kept.
    `cold_level`: how sessions are saved, fast or small; auto: small where links lie beside the profile.
    """

    max_concurrency: int = 8
    max_queue: int = 64
    context_length: int | None = None
    max_kv_bytes: int | None = None
    prefill_chunk: int = 256
    token_budget: int = 512
    max_host_bytes: int | None = 4 << 30
    prefix_bytes: int | None = None
    cold_level: str = "auto"

    def __post_init__(self) -> None:
        cold_level(self.cold_level)
        for name in ("max_concurrency", "prefill_chunk", "token_budget"):
            _integer(name, getattr(self, name), 1, None, "at least 1")
        _integer("max_queue", self.max_queue, 0, None, "0 or more")
        for name in ("max_host_bytes", "prefix_bytes"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, None, "0 or more")
        for name in ("context_length", "max_kv_bytes"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, None, "at least 1")


@dataclass(frozen=True)
class Usage:
    """What one choice used: tokens, the cache bytes that its row held at the end, and the setting that it ended at.

    cached_tokens: of the prompt, those whose cache was there already (an earlier prompt's, or its session's).
    """

    prompt_tokens: int
    completion_tokens: int
    kv_bytes: int
    setting: str = ""
    cached_tokens: int = 0


@dataclass(frozen=True)
class Logprob:
    """A chosen token, its natural log probability under the model's own distribution, and the most probable ones.

    offset: characters of the answer's text before it; a token that is not shown, or completes no character, adds none.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Started:
    """A request left the queue for the first time."""

    request_id: str
    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """New text of choice `index`, with the tokens that have come since the last delta."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] | None = None


@dataclass(frozen=True)
class PromptLogprobs:
    """The prompt's tokens under the model, all but the first (which nothing predicts); before the first Delta."""

    request_id: str
    first: int
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True)
class Finished:
    """Choice `index` ended."""

    request_id: str
    index: int
    reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """The whole request failed; no further event names it."""

    request_id: str
    error: Exception


Event: TypeAlias = Started | PromptLogprobs | Delta | Finished | Failed


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; counters since the engine was made. `finished`: choices by reason, and failed requests.

    `prefix_asked`, `prefix_reused`: prompt tokens of sequences that began, and those of them that were taken over from
    an earlier prompt; `prefix_bytes`: what is kept for that. `parked`, `parked_bytes`: sequences in host memory, and
    the bytes of them and of sessions. `preemptions`: sequences that gave way; `squeezes`: stores that were re-encoded.
    """

    running: int
    queued: int
    kv_bytes_allocated: int
    kv_bytes_used: int
    kv_tokens: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    finished: dict[str, int]
    setting: str = ""
    prefix_asked: int = 0
    prefix_reused: int = 0
    prefix_bytes: int = 0
    parked: int = 0
    parked_bytes: int = 0
    squeezes: int = 0
    sessions: int = 0
