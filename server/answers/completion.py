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
            if isinstance(item, messages.Delta) and not self._nothing:
                texts[item.index].append(item.text)
                tokens[item.index].extend(item.logprobs or [])
        reasons = self._generation.finish_reasons
        choices = [
            self._choice(index, self._echo() + "".join(texts[index]), tokens[index], reasons[index], echo=True)
            for index in range(n)
        ]
        return {**self._head(), "choices": choices, "usage": self._usage(), "spectral": self._generation.spectral}

    async def events(self) -> AsyncIterator[bytes]:
        """The stream: the prompt if wanted, text, the ends, perhaps the usage, and [DONE]."""
        generation, n = self._generation, self._body.n
        head = self._head()
        if self._body.include_usage:
            head["usage"] = None
        silent = set(range(n)) if self._body.echo else set()  # choices that have not shown the prompt
        async for item in generation.items():
            if item.index in silent:
                silent.remove(item.index)
                yield sse.event({**head, "choices": [self._choice(item.index, self._echo(), [], None, echo=True)]})
            if isinstance(item, messages.Finished):
                extra = {"spectral": generation.spectral} if len(generation.finish_reasons) == n else {}
                end = {"index": item.index, "text": "", "logprobs": None, "finish_reason": item.reason}
                yield sse.event({**head, "choices": [end], **extra})
            elif (item.text or item.logprobs) and not self._nothing:
                yield sse.event({**head, "choices": [self._choice(item.index, item.text, item.logprobs or [], None)]})
        if self._body.include_usage:
            yield sse.event({**head, "choices": [], "usage": self._usage(), "spectral": generation.spectral})
        yield sse.DONE

    @property
    def _nothing(self) -> bool:
        """True where only the prompt is wanted: the one token that was generated is not shown."""
        return self._body.max_tokens == 0

    def _echo(self) -> str:
        """The prompt's text where it is part of the answer."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompt
        if isinstance(prompt, str):
            return prompt
        return self._generation.prompt.text if self._generation.prompt is not None else ""

    def _usage(self) -> dict[str, int]:
        usage = self._generation.usage
        if self._nothing:
            return {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _head(self) -> dict[str, Any]:
        generation = self._generation
        ident = "cmpl-" + generation.request_id
        return {"id": ident, "object": "text_completion", "created": generation.created, "model": generation.model}

    def _choice(
        self, index: int, text: str, tokens: list[messages.TokenLogprob], reason: str | None, *, echo: bool = False
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens, echo) if self._body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: list[messages.TokenLogprob], echo: bool) -> dict[str, Any]:
        prompt = self._generation.prompt if echo and self._body.echo else None
        first = [] if prompt is None else [prompt.first]  # nothing predicts the first token: null stands for it
        unknown: list[Any] = [None for _ in first]
        tokens = tokens if prompt is None else [*prompt.logprobs, *tokens]
        names = [*first, *(token.token for token in tokens)]
        offsets: list[int] = []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {
            "tokens": names,
            "token_logprobs": [*unknown, *(token.logprob for token in tokens)],
            "top_logprobs": [*unknown, *({t.token: t.logprob for t in token.top} for token in tokens)],
            "text_offset": offsets,
        }


async def plain_text(generation: Generation) -> str:
    """The text of the only choice. Raises ApiError where the generation fails."""
    return "".join([item.text async for item in generation.items() if isinstance(item, messages.Delta)])
