"""A worker's translations between the wire's messages and the engine's values. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from itertools import accumulate
from typing import Any

from server.worker import messages as wire
from server.worker.child_clock import RequestClock
from spectral.engine import types
from spectral.engine.detokenize import Detokenizer, token_bytes
from spectral.engine.templates import RENDERER
from spectral.errors import OutOfPages, QueueFull, RequestError

OWN_FIELDS = ("ignore_eos", "grammar")
LONG_PROMPT = 32_768
"""Characters from which a prompt is tokenized beside the engine's thread; fewer take a few milliseconds."""
SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(types.SamplingParams) if f.name not in OWN_FIELDS)


def to_request(message: wire.Submit) -> types.GenerateRequest:
    """A Submit as the engine takes it. Raises RequestError."""
    sampling = message.sampling
    asked = sampling.grammar
    grammar = None if asked is None else types.Grammar(asked.kind, asked.text)
    params = types.SamplingParams(**{name: getattr(sampling, name) for name in SAMPLING_FIELDS}, grammar=grammar)
    if message.kind == "chat":
        if not message.messages:
            raise RequestError("messages must not be empty", param="messages")
        prompt: Any = _turns(message)
    elif message.kind == "completion":
        prompt = message.prompt
    else:
        raise RequestError(f"kind must be chat or completion, got {message.kind!r}", param="kind")
    return types.GenerateRequest(
        message.request_id,
        prompt,
        params,
        message.timeout_s,
        tools=tuple(message.tools),
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        max_kl=message.max_kl,
        priority=message.priority,
        setting=message.setting,
        session=message.session,
        thinking=message.thinking,
    )


def to_encode(message: wire.Tokenize) -> types.GenerateRequest:
    """What a Tokenize has to be encoded for. Raises RequestError."""
    if message.kind == "chat":
        return types.GenerateRequest(message.request_id, _turns(message), tools=tuple(message.tools))
    if message.kind in ("completion", "ids"):
        return types.GenerateRequest(message.request_id, message.prompt)
    raise RequestError(f"kind must be chat, completion or ids, got {message.kind!r}", param="kind")


def tokenized(request_id: str, tokens: list[int], tokenizer: Any) -> wire.Tokenized:
    """The answer to a Tokenize; special tokens are shown."""
    return wire.Tokenized(request_id, tokens, str(tokenizer.decode(tokens)))


def _turns(message: wire.Submit | wire.Tokenize) -> list[types.Message]:
    turns = []
    for m in message.messages:
        extra = {"tool_calls": m.tool_calls, "tool_call_id": m.tool_call_id, "name": m.name}
        extra["reasoning_content"] = m.reasoning
        turns.append(types.Message(m.role, m.content, {name: value for name, value in extra.items() if value}))
    return turns


def text_length(message: wire.Submit | wire.Tokenize) -> int:
    """Characters that must be tokenized."""
    prompt = len(message.prompt) if isinstance(message.prompt, str) else 0
    described = len(str(message.tools)) if message.tools else 0
    return prompt + described + sum(len(m.content) + len(m.reasoning or "") for m in message.messages)


def takes_long(message: wire.Submit) -> bool:
    """Whether a prompt is better encoded beside the engine's thread."""
    return text_length(message) >= LONG_PROMPT or (message.kind == "chat" and RENDERER.slow)


def rejected(request_id: str, error: Exception) -> wire.Rejected:
    """The refusal of a request that has not started."""
    if isinstance(error, QueueFull):
        return wire.Rejected(request_id, 429, error.code, str(error), error.param)
    if isinstance(error, RequestError):
        return wire.Rejected(request_id, 400, error.code, str(error), error.param)
    return wire.Rejected(request_id, 500, "internal_error", f"{type(error).__name__}: {error}")


def failed(request_id: str, error: Exception) -> wire.Failed:
    """The failure of a request that was accepted."""
    if isinstance(error, RequestError):
        return wire.Failed(request_id, str(error), error.code, error.param)
    if isinstance(error, OutOfPages):
        return wire.Failed(request_id, str(error), "kv_cache_full")
    return wire.Failed(request_id, f"{type(error).__name__}: {error}", "internal_error")


def stats(figures: types.EngineStats, reserved: int = 0, beside: int = 0) -> wire.Stats:
    """A snapshot for the gateway; `reserved`, `beside`: bytes that torch holds on the devices."""
    return wire.Stats(
        running=figures.running,
        queued=figures.queued,
        kv_bytes_allocated=figures.kv_bytes_allocated,
        kv_bytes_used=figures.kv_bytes_used,
        kv_tokens=figures.kv_tokens,
        prompt_tokens=figures.prompt_tokens,
        generated_tokens=figures.generated_tokens,
        finished=figures.finished,
        prefix_asked=figures.prefix_asked,
        prefix_reused=figures.prefix_reused,
        prefix_bytes=figures.prefix_bytes,
        parked=figures.parked,
        parked_bytes=figures.parked_bytes,
        preemptions=figures.preemptions,
        squeezes=figures.squeezes,
        reserved_bytes=reserved,
        beside_bytes=beside,
        sessions=figures.sessions,
    )


class EventTranslator:
    """Engine events to messages; knows the tokenizer for the texts of log probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.clock = RequestClock()
        self._token = lru_cache(maxsize=4096)(lambda token: _token(tokenizer, token))

    def __call__(self, event: types.Event) -> wire.ToParent | None:
        """The message; None for an event that the gateway is not told."""
        if isinstance(event, types.Delta):
            self.clock.token(event.request_id, event.index)
            logprobs = None if event.logprobs is None else [self._logprob(item, item.offset) for item in event.logprobs]
            return wire.Delta(event.request_id, event.index, event.text, list(event.token_ids), logprobs)
        if isinstance(event, types.PromptLogprobs):
            return self._prompt(event)
        if isinstance(event, types.Finished):
            used = event.usage
            times = self.clock.finished(event.request_id, event.index)
            tokens = used.prompt_tokens, used.completion_tokens
            usage = wire.Usage(*tokens, used.kv_bytes, used.setting, *times, cached_tokens=used.cached_tokens)
            return wire.Finished(event.request_id, event.index, event.reason, usage)
        if isinstance(event, types.Failed):
            self.clock.forget(event.request_id)
            return failed(event.request_id, event.error)
        self.clock.started(event.request_id)  # what the gateway is told at the end
        return None

    def _prompt(self, event: types.PromptLogprobs) -> wire.PromptTokens:
        ids = [event.first, *(item.token_id for item in event.logprobs)]
        text = str(self._tokenizer.decode(ids))
        places = self._offsets(ids, text)[1:]
        tokens = [self._logprob(item, offset) for item, offset in zip(event.logprobs, places, strict=True)]
        return wire.PromptTokens(event.request_id, text, self._token(event.first)[0], tokens)

    def _offsets(self, ids: list[int], text: str) -> list[int]:
        """Characters of a prompt's text before each of its tokens."""
        names = [self._token(token)[0] for token in ids]
        if "".join(names) == text:
            return [0, *accumulate(map(len, names))][:-1]
        # Tokens that are parts of characters, or that are written differently behind others.
        decoder = Detokenizer(lambda some: str(self._tokenizer.decode(some)))
        return [0, *accumulate(len(decoder.push(token)) for token in ids)][:-1]

    def _logprob(self, item: types.Logprob, offset: int) -> wire.TokenLogprob:
        text, data = self._token(item.token_id)
        top = [wire.TopLogprob(*self._place(token, value)) for token, value in item.top]
        return wire.TokenLogprob(text, item.logprob, data, top, offset)

    def _place(self, token: int, value: float) -> tuple[str, float, list[int]]:
        text, data = self._token(token)
        return text, value, data


def _token(tokenizer: Any, token: int) -> tuple[str, list[int]]:
    data = token_bytes(tokenizer, token)
    return data.decode("utf-8", errors="replace"), list(data)
