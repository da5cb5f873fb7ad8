"""Answers of the Ollama API: one JSON object, or lines of them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from typing import Any

from server import errors, sse
from server.answers.calls import CalledTool, Item, Thought, items
from server.gateway import Generation
from server.schemas.ollama import OllamaChatRequest, OllamaGenerateRequest
from server.worker import messages


class Ollama:
    """One answer of /api/chat or /api/generate. `name`: the model as the client called it."""

    def __init__(self, generation: Generation, body: OllamaChatRequest | OllamaGenerateRequest) -> None:
        self._generation, self._body = generation, body
        self._chat = isinstance(body, OllamaChatRequest)
        self._first: float | None = None

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError where the generation fails."""
        text: list[str] = []
        calls: list[dict[str, Any]] = []
        tokens: list[messages.TokenLogprob] = []
        thoughts: list[str] = []
        async for item in self._items():
            if isinstance(item, messages.Delta):
                text.append(item.text)
                tokens += item.logprobs or []
            elif isinstance(item, CalledTool):
                calls.append(_call(item))
            elif isinstance(item, Thought):
                thoughts.append(item.text)
        return {**self._piece("".join(text), calls, "".join(thoughts)), **self._end(), **_logprobs(tokens)}

    async def lines(self) -> AsyncIterator[bytes]:
        """The stream: one line for each piece, and the last with the figures."""
        async for item in self._items():
            if isinstance(item, messages.Delta):
                if item.text or item.logprobs:
                    yield sse.line({**self._piece(item.text, []), "done": False, **_logprobs(item.logprobs or [])})
            elif isinstance(item, CalledTool):
                yield sse.line({**self._piece("", [_call(item)]), "done": False})
            elif isinstance(item, Thought):
                yield sse.line({**self._piece("", [], item.text), "done": False})
        yield sse.line({**self._piece("", []), **self._end()})

    async def _items(self) -> AsyncIterator[Item]:
        async for item in items(self._generation, self._body.tool_use):
            self._first = self._first or time.monotonic()
            yield item

    def _piece(self, text: str, calls: list[dict[str, Any]], thoughts: str = "") -> dict[str, Any]:
        head = {"model": self._body.model, "created_at": now()}
        thinking = {"thinking": thoughts} if thoughts else {}
        if not self._chat:
            return {**head, "response": text, **thinking}
        message: dict[str, Any] = {"role": "assistant", "content": text, **thinking}
        return {**head, "message": {**message, "tool_calls": calls} if calls else message}

    def _end(self) -> dict[str, Any]:
        generation, over = self._generation, time.monotonic()
        accepted, first = generation.accepted_at, self._first or over
        reason = generation.finish_reasons.get(0, "stop")
        return {
            "done": True,
            "done_reason": "length" if reason == "length" else "stop",
            "total_duration": nanoseconds(over - generation.began),
            "load_duration": nanoseconds(accepted - generation.began),
            "prompt_eval_count": generation.prompt_tokens,
            "prompt_eval_duration": nanoseconds(first - accepted),
            "eval_count": generation.completion_tokens,
            "eval_duration": nanoseconds(over - first),
            "spectral": generation.spectral,
        }


def _call(item: CalledTool) -> dict[str, Any]:
    function = {"index": item.number, "name": item.call.name, "arguments": json.loads(item.call.arguments)}
    return {"id": item.call.id, "function": function}


def _logprobs(tokens: list[messages.TokenLogprob]) -> dict[str, Any]:
    """Nothing where there are none: the field is left out unless it was asked for."""
    found = []
    for token in tokens:
        top = [{"token": one.token, "logprob": one.logprob, "bytes": one.bytes} for one in token.top]
        chosen = {"token": token.token, "logprob": token.logprob, "bytes": token.bytes}
        found.append({**chosen, "top_logprobs": top} if top else chosen)
    return {"logprobs": found} if found else {}


def error_line(error: errors.ApiError) -> bytes:
    """How a stream of lines ends that fails on the way."""
    return sse.line({"error": error.message})


def nanoseconds(seconds: float) -> int:
    """Durations are whole nanoseconds in this interface."""
    return max(0, round(seconds * 1e9))


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
