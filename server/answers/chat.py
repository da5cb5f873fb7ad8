"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from server import sse
from server.answers.calls import CalledPart, CalledTool, Thought, items
from server.gateway import Generation
from server.schemas import ChatRequest
from server.worker import messages


class Chat:
    """One chat answer."""

    def __init__(self, generation: Generation, body: ChatRequest) -> None:
        self._generation, self._body = generation, body
        self._logprobs = body.logprobs

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError where the generation fails."""
        n = self._body.n
        texts: list[list[str]] = [[] for _ in range(n)]
        tokens: list[list[messages.TokenLogprob]] = [[] for _ in range(n)]
        calls: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        thoughts: list[list[str]] = [[] for _ in range(n)]
        async for item in items(self._generation, self._body.tool_use, n):
            if isinstance(item, messages.Delta):
                texts[item.index].append(item.text)
                tokens[item.index].extend(item.logprobs or [])
            elif isinstance(item, CalledTool):
                calls[item.index].append(call_object(item))
            elif isinstance(item, Thought):
                thoughts[item.index].append(item.text)
        choices = []
        for index in range(n):
            text = "".join(texts[index])
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls[index]:
                message |= {"content": text or None, "tool_calls": calls[index]}
            if thoughts[index]:
                message["reasoning_content"] = "".join(thoughts[index])
            reason = self._generation.finish_reasons[index]
            choice = {"index": index, "message": message, "logprobs": self.logprobs(tokens[index])}
            choices.append({**choice, "finish_reason": reason})
        head = self._head("chat.completion")
        return {**head, "choices": choices, "usage": self._generation.usage, "spectral": self._generation.spectral}

    async def events(self) -> AsyncIterator[bytes]:
        """The stream: the role, thoughts, text and calls, the ends, perhaps the usage, and [DONE]."""
        generation, n = self._generation, self._body.n
        head = self._head("chat.completion.chunk")
        if self._body.include_usage:
            head["usage"] = None
        for index in range(n):
            yield sse.event({**head, "choices": [chunk(index, {"role": "assistant", "content": ""})]})
        if self._body.tool_use or generation.thought_format:
            async for data in self._sorted(head, n):
                yield data
        else:  # nothing is done for a token that could be done once for all of them
            texts = [_TextEvent(head, index) for index in range(n)]
            async for batch in generation.batches():
                if isinstance(batch, messages.Finished):
                    yield self._end_event(head, batch, n)
                elif self._logprobs:
                    yield b"".join([self._text_event(head, item) for item in batch])
                else:
                    yield b"".join([texts[item.index](item.text) for item in batch if item.text])
        if self._body.include_usage:
            yield sse.event({**head, "choices": [], "usage": generation.usage, "spectral": generation.spectral})
        yield sse.DONE

    async def _sorted(self, head: dict[str, Any], n: int) -> AsyncIterator[bytes]:
        """Thoughts, text and calls."""
        async for item in items(self._generation, self._body.tool_use, n, live=True):
            if isinstance(item, messages.Delta):
                yield self._text_event(head, item)
            elif isinstance(item, Thought):
                yield sse.event({**head, "choices": [chunk(item.index, {"reasoning_content": item.text})]})
            elif isinstance(item, CalledTool):
                delta = {"tool_calls": [{"index": item.number, **call_object(item)}]}
                yield sse.event({**head, "choices": [chunk(item.index, delta)]})
            elif isinstance(item, CalledPart):
                if item.first or item.part.arguments:
                    yield sse.event({**head, "choices": [chunk(item.index, {"tool_calls": [call_part(item)]})]})
            else:
                yield self._end_event(head, item, n)

    def _text_event(self, head: dict[str, Any], item: messages.Delta) -> bytes:
        if not item.text and not item.logprobs:
            return b""
        choice = chunk(item.index, {"content": item.text}, self.logprobs(item.logprobs))
        return sse.event({**head, "choices": [choice]})

    def _end_event(self, head: dict[str, Any], item: messages.Finished, n: int) -> bytes:
        generation = self._generation
        extra = {"spectral": generation.spectral} if len(generation.finish_reasons) == n else {}
        return sse.event({**head, "choices": [self.end(item)], **extra})

    def end(self, item: messages.Finished) -> dict[str, Any]:
        """The last chunk of a choice."""
        return {**chunk(item.index, {}), "finish_reason": item.reason}

    def logprobs(self, tokens: list[messages.TokenLogprob] | None) -> dict[str, Any] | None:
        """Log probabilities as the API has them; null where they are not wanted."""
        if not self._logprobs or tokens is None:
            return None
        content = []
        for token in tokens:
            top = [{"token": t.token, "logprob": t.logprob, "bytes": t.bytes} for t in token.top]
            one = {"token": token.token, "logprob": token.logprob, "bytes": token.bytes, "top_logprobs": top}
            content.append(one)
        return {"content": content, "refusal": None}

    def _head(self, name: str) -> dict[str, Any]:
        generation = self._generation
        ident = "chatcmpl-" + generation.request_id
        return {"id": ident, "object": name, "created": generation.created, "model": generation.model}


class _TextEvent:
    """The event of a choice's next piece of text: all but the text is written once."""

    def __init__(self, head: dict[str, Any], index: int) -> None:
        whole = sse.event({**head, "choices": [chunk(index, {"content": ""})]})
        before, mark, self._after = whole.rpartition(b'"content":""')
        self._before = before + mark[:-2]

    def __call__(self, text: str) -> bytes:
        return self._before + sse.encode(text) + self._after


def call_object(item: CalledTool) -> dict[str, Any]:
    """A call as a message has it."""
    function = {"name": item.call.name, "arguments": item.call.arguments}
    return {"id": item.call.id, "type": "function", "function": function}


def call_part(item: CalledPart) -> dict[str, Any]:
    """A part of a call as a stream has it: the first has its id and name."""
    part = item.part
    if not item.first:
        return {"index": item.number, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": item.number, "id": part.id, "type": "function", "function": function}


def chunk(index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    """A choice of a chunk."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
