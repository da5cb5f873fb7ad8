"""Answers of /v1/completions, /generate and /generate_stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from server import sse
from server.aio import merged, together
from server.gateway import Generation
from server.schemas import CompletionRequest
from server.worker import messages


class Completions:
    """The answer to one prompt or several: choice `i` of prompt `p` has the number p * n + i."""

    def __init__(self, generations: list[Generation], body: CompletionRequest) -> None:
        self._generations, self._body = generations, body
        requests = zip(generations, body.split(), strict=True)
        self._parts = [_Part(generation, one, place * body.n) for place, (generation, one) in enumerate(requests)]

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError where a generation fails."""
        found = await together([part.whole() for part in self._parts])
        choices = [choice for part in found for choice in part]
        return {**self._head(), "choices": choices, "usage": self._usage(), "spectral": self._spectral()}

    async def events(self) -> AsyncIterator[bytes]:
        """The stream: prompts if wanted, text, the ends, perhaps the usage, and [DONE]."""
        head = self._head()
        if self._body.include_usage:
            head["usage"] = None
        open_choices = len(self._parts) * self._body.n
        parts = [part.pieces() for part in self._parts]
        async for choice in parts[0] if len(parts) == 1 else merged(parts):
            open_choices -= choice["finish_reason"] is not None
            extra = {} if open_choices else {"spectral": self._spectral()}
            yield sse.event({**head, "choices": [choice], **extra})
        if self._body.include_usage:
            yield sse.event({**head, "choices": [], "usage": self._usage(), "spectral": self._spectral()})
        yield sse.DONE

    async def close(self) -> None:
        """Stop listening to all generations."""
        for generation in self._generations:
            await generation.close()

    @property
    def headers(self) -> dict[str, str]:
        """Response headers."""
        return self._generations[-1].headers

    def _head(self) -> dict[str, Any]:
        first = self._generations[0]
        ident = "cmpl-" + first.request_id
        return {"id": ident, "object": "text_completion", "created": first.created, "model": first.model}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(generation.prompt_tokens for generation in self._generations)
        answer = sum(generation.completion_tokens for generation in self._generations)
        answer = 0 if self._body.max_tokens == 0 else answer
        cached = sum(generation.cached_tokens for generation in self._generations)
        counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}

    def _spectral(self) -> dict[str, Any]:
        held = sum(generation.kv_bytes for generation in self._generations)
        return {**self._generations[0].spectral, "cache_bytes": held}


class _Part:
    """The choices of one prompt; `offset`: the number of the first."""

    def __init__(self, generation: Generation, body: CompletionRequest, offset: int) -> None:
        self._generation, self._body, self._offset = generation, body, offset

    async def whole(self) -> list[dict[str, Any]]:
        """All choices. Raises ApiError where the generation fails."""
        n = self._body.n
        texts: list[list[str]] = [[] for _ in range(n)]
        tokens: list[list[messages.TokenLogprob]] = [[] for _ in range(n)]
        async for item in self._generation.items():
            if isinstance(item, messages.Delta) and not self._nothing:
                texts[item.index].append(item.text)
                tokens[item.index].extend(item.logprobs or [])
        reasons = self._generation.finish_reasons
        return [
            self._choice(index, self._echo() + "".join(texts[index]), tokens[index], reasons[index], echo=True)
            for index in range(n)
        ]

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Choices as a stream has them."""
        silent = set(range(self._body.n)) if self._body.echo else set()  # choices that have not shown the prompt
        async for item in self._generation.items():
            if item.index in silent:
                silent.remove(item.index)
                yield self._choice(item.index, self._echo(), [], None, echo=True)
            if isinstance(item, messages.Finished):
                reason = "length" if self._nothing else item.reason
                yield {"index": self._offset + item.index, "text": "", "logprobs": None, "finish_reason": reason}
            elif (item.text or item.logprobs) and not self._nothing:
                yield self._choice(item.index, item.text, item.logprobs or [], None)

    @property
    def _nothing(self) -> bool:
        """True where only the prompt is wanted: the one token that was generated is not shown."""
        return self._body.max_tokens == 0

    def _echo(self) -> str:
        """The prompt's text where it is part of the answer."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompt[0]
        if isinstance(prompt, str):
            return prompt
        return self._generation.prompt.text if self._generation.prompt is not None else ""

    def _choice(
        self, index: int, text: str, tokens: list[messages.TokenLogprob], reason: str | None, *, echo: bool = False
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens, echo) if self._body.logprobs is not None else None
        if reason is not None and self._nothing:
            reason = "length"
        return {"index": self._offset + index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[messages.TokenLogprob], echo: bool) -> dict[str, Any]:
        prompt = self._generation.prompt if echo and self._body.echo else None
        first = [] if prompt is None else [prompt.first]  # nothing predicts the first token: null stands for it
        unknown: list[Any] = [None for _ in first]
        shown = len(self._echo())
        offsets = [shown + token.offset for token in tokens]
        if prompt is not None:
            offsets = [0, *self._prompt_offsets(prompt), *offsets]
            tokens = [*prompt.logprobs, *tokens]
        names = [*first, *(token.token for token in tokens)]
        return {
            "tokens": names,
            "token_logprobs": [*unknown, *(token.logprob for token in tokens)],
            "top_logprobs": [*unknown, *({t.token: t.logprob for t in token.top} for token in tokens)],
            "text_offset": offsets,
        }


    def _prompt_offsets(self, prompt: messages.PromptTokens) -> list[int]:
        """Where the prompt's tokens but the first stand in its text as it is shown: a text as it was sent, which has
        none of the special tokens that the tokenizer put around it."""
        text = self._echo()
        before = max(0, prompt.text.find(text))
        return [min(max(0, token.offset - before), len(text)) for token in prompt.logprobs]


async def plain_text(generation: Generation) -> str:
    """The text of the only choice. Raises ApiError where the generation fails."""
    return "".join([item.text async for item in generation.items() if isinstance(item, messages.Delta)])
