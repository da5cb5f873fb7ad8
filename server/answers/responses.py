"""Answers of /v1/responses: an object with output items, or the events that build it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from server import errors, sse
from server.answers.calls import CalledTool, items
from server.gateway import Generation
from server.schemas import ResponsesRequest
from server.worker import messages


class Responses:
    """One response."""

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        self._generation, self._body = generation, body
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the open message
        self._tokens: list[dict[str, Any]] = []

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError where the generation fails."""
        async for item in items(self._generation, self._body.tool_use):
            for _ in self._take(item):
                pass  # the events are for streams; what they build is the answer
        return self._response(self._status())

    async def events(self) -> AsyncIterator[bytes]:
        """The stream. A failure is the event response.failed; there is no [DONE] in this interface."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        try:
            async for item in items(self._generation, self._body.tool_use):
                for event in self._take(item):
                    yield event
        except errors.ApiError as error:
            failure = {"code": "server_error", "message": error.message}
            yield self._event("response.failed", response={**self._response("failed"), "error": failure})
            return
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _take(self, item: messages.Delta | messages.Finished | CalledTool) -> list[bytes]:
        """Add an item to the output; the events that say so."""
        if isinstance(item, CalledTool):
            return [*self._end_message(), *self._call(item)]
        if isinstance(item, messages.Finished):
            nothing = self._text is None and not self._output
            return [*(self._begin_message() if nothing else []), *self._end_message()]
        found = [] if self._text is not None or not item.text else self._begin_message()
        tokens = [_logprob(token) for token in item.logprobs or []] if self._body.wants_logprobs else []
        self._tokens += tokens
        if self._text is not None and item.text:
            self._text.append(item.text)
            place = {**self._place(), "delta": item.text, "logprobs": tokens}
            found.append(self._event("response.output_text.delta", **place))
        return found

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id(), "output_index": len(self._output), "content_index": 0}

    def _message_id(self) -> str:
        return f"msg_{self._generation.request_id}_{len(self._output)}"

    def _begin_message(self) -> list[bytes]:
        self._text = []
        item = self._message("in_progress", [])
        added = self._event("response.output_item.added", output_index=len(self._output), item=item)
        return [added, self._event("response.content_part.added", **self._place(), part=_part("", []))]

    def _end_message(self) -> list[bytes]:
        if self._text is None:
            return []
        text, place = "".join(self._text), self._place()
        part = _part(text, self._tokens)
        cut = self._generation.finish_reasons.get(0) == "length"
        item = self._message("incomplete" if cut else "completed", [part])
        found = [
            self._event("response.output_text.done", **place, text=text, logprobs=self._tokens),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=len(self._output), item=item),
        ]
        self._output.append(item)
        self._text, self._tokens = None, []
        return found

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        ident = self._message_id()
        return {"id": ident, "type": "message", "status": status, "role": "assistant", "content": content}

    def _call(self, item: CalledTool) -> list[bytes]:
        ident, index = f"fc_{self._generation.request_id}_{len(self._output)}", len(self._output)
        call = {"id": ident, "type": "function_call", "call_id": item.call.id, "name": item.call.name}
        done = {**call, "arguments": item.call.arguments, "status": "completed"}
        place = {"item_id": ident, "output_index": index}
        begun = {**call, "arguments": "", "status": "in_progress"}
        self._output.append(done)
        arguments = item.call.arguments
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=item.call.name, arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=done),
        ]

    def _status(self) -> str:
        return "incomplete" if self._generation.finish_reasons.get(0) == "length" else "completed"

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return sse.named_event(kind, data)

    def _response(self, status: str) -> dict[str, Any]:
        generation, body = self._generation, self._body
        over = status in ("completed", "incomplete")
        usage = generation.usage
        return {
            "id": "resp_" + generation.request_id,
            "object": "response",
            "created_at": generation.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": generation.model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True) if body.text and body.text.format else _PLAIN,
            "tool_choice": _plain(body.tool_choice) or "auto",
            "tools": [_plain(tool) for tool in body.tools],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": _usage(usage) if over else None,
            "user": body.user,
            "metadata": body.metadata or {},
            **({"spectral": generation.spectral} if over else {}),
        }


_PLAIN = {"format": {"type": "text"}}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else value.model_dump()


def _part(text: str, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _logprob(token: messages.TokenLogprob) -> dict[str, Any]:
    one: dict[str, Any] = msgspec.structs.asdict(token)
    top = [msgspec.structs.asdict(candidate) for candidate in one.pop("top")]
    return {**one, "top_logprobs": top}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
