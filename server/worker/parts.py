"""Parts of the messages between gateway and worker: what a request asks for, and what an answer is made of."""

from __future__ import annotations

from typing import Any

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """A model's limits. Bytes and tokens; None means: the model's own maximum."""

    context_length: int | None = None
    max_concurrency: int = 8
    max_queue: int = 64
    max_kv_bytes: int | None = None
    prefill_chunk: int | None = None


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chat message; `content` is plain text (the gateway has joined the parts).

    `tool_calls` of an assistant: [{"id", "type": "function", "function": {"name", "arguments": object}}].
    `tool_call_id`, `name`: which call a tool's answer belongs to. `reasoning`: an assistant's thoughts before it.
    """

    role: str
    content: str
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like. kind: json_object (no text), json_schema, tool_calls, regex, lark or gbnf."""

    kind: str
    text: str = ""


class Sampling(msgspec.Struct, frozen=True):
    """How to choose tokens. `max_tokens` None: until the context is full. `top_k` 0: off. `logprobs` None: none."""

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
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    typical_p: float = 1.0
    grammar: Grammar | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """A candidate token: its text, its bytes (a token may be part of a character) and its natural log probability."""

    token: str
    logprob: float
    bytes: list[int] = []


class TokenLogprob(msgspec.Struct, frozen=True):
    """A chosen token with its log probability and the most probable candidates at that place. `offset`: characters of
    the text, the prompt's or the answer's, before what the token adds to it."""

    token: str
    logprob: float
    bytes: list[int] = []
    top: list[TopLogprob] = []
    offset: int = 0


class Usage(msgspec.Struct, frozen=True):
    """What one choice used: tokens, and the bytes of cache its row held when it ended. Seconds: until its request's
    first step, from there to the choice's first token, and from that to its end. `cached_tokens`: of the prompt, those
    whose cache was there already."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    kv_bytes: int = 0
    setting: str = ""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cached_tokens: int = 0


class LadderFigure(msgspec.Struct, frozen=True):
    """One setting of the loaded profile. `ratio`: bf16 bytes over all-in bytes at 2,048 tokens. KL in nats, mean."""

    name: str
    bits_per_element: float
    kl_mean: float
    ratio: float
    rank: float = 0.0
