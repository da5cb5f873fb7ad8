"""Answers of /v1/completions, /generate and /generate_stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from server import sse
from server.gateway import Generation
from server.schemas import CompletionRequest
from server.worker import messages


class Completion:
    """One text completion."""

    def __init__(self, generation: Generation, body: CompletionRequest) -> None:
        self._generation, self._body = generation, body
        self._offsets = [0] * body.n  # characters before the next token, for each choice

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError where the generation fails."""
        n = self._body.n
        texts: list[list[str]] = [[] for _ in range(n)]
        tokens: list[list[messages.TokenLogprob]] = [[] for _ in range(n)]
        async for item in self._generation.items():
            if isinstance(item, messages.Delta):
                texts[item.index].append(item.text)
                tokens[item.index].extend(item.logprobs or [])
        reasons = self._generation.finish_reasons
        choices = [self._choice(index, "".join(texts[index]), tokens[index], reasons[index]) for index in range(n)]
        generation = self._generation
        return {**self._head(), "choices": choices, "usage": generation.usage, "spectral": generation.spectral}

    async def events(self) -> AsyncIterator[bytes]:
        """The stream: text, the ends, perhaps the usage, and [DONE]."""
        generation, n = self._generation, self._body.n
        head = self._head()
        if self._body.include_usage:
            head["usage"] = None
        async for item in generation.items():
            if isinstance(item, messages.Finished):
                extra = {"spectral": generation.spectral} if len(generation.finish_reasons) == n else {}
                end = {"index": item.index, "text": "", "logprobs": None, "finish_reason": item.reason}
                yield sse.event({**head, "choices": [end], **extra})
            elif item.text or item.logprobs:
                yield sse.event({**head, "choices": [self._choice(item.index, item.text, item.logprobs or [], None)]})
        if self._body.include_usage:
            yield sse.event({**head, "choices": [], "usage": generation.usage, "spectral": generation.spectral})
        yield sse.DONE

    def _head(self) -> dict[str, Any]:
        generation = self._generation
        ident = "cmpl-" + generation.request_id
        return {"id": ident, "object": "text_completion", "created": generation.created, "model": generation.model}

    def _choice(self, index: int, text: str, tokens: list[messages.TokenLogprob], reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens) if self._body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: list[messages.TokenLogprob]) -> dict[str, Any]:
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{t.token: t.logprob for t in token.top} for token in tokens],
            "text_offset": offsets,
        }


async def plain_text(generation: Generation) -> str:
    """The text of the only choice. Raises ApiError where the generation fails."""
    return "".join([item.text async for item in generation.items() if isinstance(item, messages.Delta)])
