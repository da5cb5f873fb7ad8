"""Answers of /v1/responses: an object with output items, or the events that build it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from server import errors, sse
from server.answers.calls import CalledPart, CalledTool, Item, Thought, items
from server.gateway import Generation
from server.schemas import ResponsesRequest
from server.toolcalls import Call, CallPart
from server.worker import messages


class Responses:
    """One response."""

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        self._generation, self._body = generation, body
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the open message
        self._tokens: list[dict[str, Any]] = []
        self._thoughts: list[str] | None = None  # of the open item of thoughts
        self._arguments: list[str] = []  # of the open call

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
            async for item in items(self._generation, self._body.tool_use, live=True):
                for event in self._take(item):
                    yield event
        except errors.ApiError as error:
            failure = {"code": "server_error", "message": error.message}
            yield self._event("response.failed", response={**self._response("failed"), "error": failure})
            return
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _take(self, item: Item) -> list[bytes]:
        """Add an item to the output; the events that say so."""
        if isinstance(item, Thought):
            return self._think(item.text)
        if isinstance(item, CalledTool):
            return [*self._end_thoughts(), *self._end_message(), *self._call(item)]
        if isinstance(item, CalledPart):
            return [*self._end_thoughts(), *self._end_message(), *self._call_part(item)]
        if isinstance(item, messages.Finished):
            over = self._end_thoughts()
            nothing = self._text is None and not self._output
            return [*over, *(self._begin_message() if nothing else []), *self._end_message()]
        found = [] if self._text is not None or not item.text else [*self._end_thoughts(), *self._begin_message()]
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

    def _think(self, text: str) -> list[bytes]:
        place = {**self._place(), "item_id": self._thoughts_id()}
        found = []
        if self._thoughts is None:
            self._thoughts = []
            item = self._reasoning("in_progress", None)
            found.append(self._event("response.output_item.added", output_index=len(self._output), item=item))
            found.append(self._event("response.content_part.added", **place, part=_thought("")))
        self._thoughts.append(text)
        return [*found, self._event("response.reasoning_text.delta", **place, delta=text)]

    def _end_thoughts(self) -> list[bytes]:
        if self._thoughts is None:
            return []
        text, place = "".join(self._thoughts), {**self._place(), "item_id": self._thoughts_id()}
        cut = self._generation.finish_reasons.get(0) == "length"
        item = self._reasoning("incomplete" if cut else "completed", text)
        found = [
            self._event("response.reasoning_text.done", **place, text=text),
            self._event("response.content_part.done", **place, part=_thought(text)),
            self._event("response.output_item.done", output_index=len(self._output), item=item),
        ]
        self._output.append(item)
        self._thoughts = None
        return found

    def _reasoning(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_thought(text)]
        return {"id": self._thoughts_id(), "type": "reasoning", "summary": [], "content": content, "status": status}

    def _thoughts_id(self) -> str:
        return f"rs_{self._generation.request_id}_{len(self._output)}"

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
        call = item.call
        return [*self._begin_call(call.id, call.name), *self._more(call.arguments), *self._end_call(call, "completed")]

    def _call_part(self, item: CalledPart) -> list[bytes]:
        part = item.part
        found = self._begin_call(part.id, part.name) if item.first else []
        found += self._more(part.arguments) if part.arguments else []
        return [*found, *(self._end_call(part, "completed" if part.whole else "incomplete") if part.end else [])]

    def _begin_call(self, ident: str, name: str) -> list[bytes]:
        self._arguments = []
        item = self._call_item(ident, name, "", "in_progress")
        return [self._event("response.output_item.added", output_index=len(self._output), item=item)]

    def _more(self, arguments: str) -> list[bytes]:
        self._arguments.append(arguments)
        return [self._event("response.function_call_arguments.delta", **self._call_place(), delta=arguments)]

    def _end_call(self, call: Call | CallPart, status: str) -> list[bytes]:
        text, place = "".join(self._arguments), self._call_place()
        item = self._call_item(call.id, call.name, text, status)
        found = [
            self._event("response.function_call_arguments.done", **place, name=call.name, arguments=text),
            self._event("response.output_item.done", output_index=len(self._output), item=item),
        ]
        self._output.append(item)
        return found

    def _call_place(self) -> dict[str, Any]:
        return {"item_id": f"fc_{self._generation.request_id}_{len(self._output)}", "output_index": len(self._output)}

    def _call_item(self, ident: str, name: str, arguments: str, status: str) -> dict[str, Any]:
        about = {"id": self._call_place()["item_id"], "type": "function_call", "call_id": ident, "name": name}
        return {**about, "arguments": arguments, "status": status}

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


def _thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _logprob(token: messages.TokenLogprob) -> dict[str, Any]:
    one: dict[str, Any] = msgspec.structs.asdict(token)
    top = [msgspec.structs.asdict(candidate) for candidate in one.pop("top")]
    return {**one, "top_logprobs": top}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage.get("completion_tokens_details", {"reasoning_tokens": 0}),
        "total_tokens": usage["total_tokens"],
    }
