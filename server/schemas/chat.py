"""POST /v1/chat/completions."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from server.errors import bad_request, unsupported
from server.schemas.base import Harmless, Strict, json_object
from server.schemas.fields import MAX_TOOLS, FunctionName, Limit, Text
from server.schemas.sampling import COMMON_HARMLESS, Effort, OpenAIFields, without_thoughts
from server.schemas.structured import answer_grammar
from server.schemas.tools import Tool, ToolChoice, ToolUse
from server.worker import messages as wire

_EMPTY_MESSAGE_FIELDS = (
    "refusal",
    "tool_calls",
    "function_call",
    "audio",
    "annotations",
    "reasoning_content",
)


class CalledFunction(Strict):
    """A function that the model called; `arguments` is the text of a JSON object."""

    name: FunctionName
    arguments: str


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: str = Field(min_length=1, max_length=200)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One message of a conversation. Only an assistant's may be without content, and only if it calls tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    tool_calls: list[ToolCall] = Field([], max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, min_length=1, max_length=200)
    name: str | None = Field(None, min_length=1, max_length=64, description="Of the tool that answers.")
    reasoning_content: str | None = Field(
        None, description="An assistant's thoughts before its answer, for templates that show them."
    )

    def to_wire(self, where: str) -> wire.Message:
        """The message to the worker. Raises ApiError 400; `where` is how its fields are named there."""
        if self.content is None and not self.tool_calls:
            raise bad_request(
                f"{where}.content: this field is required", f"{where}.content", "missing_required_parameter"
            )
        if self.role == "tool" and self.tool_call_id is None:
            param = f"{where}.tool_call_id"
            raise bad_request(f"{param}: this field is required", param, "missing_required_parameter")
        own = {"tool": ("tool_call_id", "name"), "assistant": ("tool_calls", "reasoning_content")}
        allowed = own.get(self.role, ())
        for name in ("tool_calls", "tool_call_id", "name", "reasoning_content"):
            if getattr(self, name) and name not in allowed:
                raise unsupported(f"{where}.{name}", f"a message of the role {self.role} cannot have it")
        calls = []
        for place, call in enumerate(self.tool_calls):
            param = f"{where}.tool_calls[{place}].function.arguments"
            function = {"name": call.function.name, "arguments": json_object(call.function.arguments or "{}", param)}
            calls.append({"id": call.id, "type": "function", "function": function})
        thoughts = self.reasoning_content or None
        return wire.Message(self.role, self.content or "", calls, self.tool_call_id, self.name, thoughts)


class ChatRequest(OpenAIFields):
    """POST /v1/chat/completions."""

    harmless: ClassVar[Harmless] = {
        **COMMON_HARMLESS,
        "functions": lambda value: value == [],
        "function_call": lambda value: value in ("none", "auto"),
        "modalities": lambda value: value == ["text"],
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Limit | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Clients send their last answer back with empty fields in it; those are dropped."""
        turns = data.get("messages")
        if not data.get("tools") and data.get("tool_choice") in ("none", "auto"):
            data = {name: value for name, value in data.items() if name != "tool_choice"}
        return {**data, "messages": [_plain(turn) for turn in turns]} if isinstance(turns, list) else data

    @cached_property
    def tool_use(self) -> ToolUse:
        """The tools that this request offers. Raises ApiError 400."""
        return ToolUse(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def grammar_field(self) -> str:
        """The field whose grammar it is, should a worker not be able to use it."""
        return super().grammar_field if self.tool_use.grammar is None else "tools"

    def submit(self, request_id: str) -> wire.Submit:
        """The message to the worker. Raises ApiError 400."""
        thinking = without_thoughts(self.reasoning_effort, "reasoning_effort")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        grammar = answer_grammar(self.response_format, self.structured_outputs, tools=bool(self.tool_use))
        return wire.Submit(
            request_id=request_id,
            kind="chat",
            sampling=self.sampling(
                n=self.n, logprobs=wanted, max_tokens=limit, grammar=grammar or self.tool_use.grammar
            ),
            messages=[turn.to_wire(f"messages[{place}]") for place, turn in enumerate(self.messages)],
            tools=self.tool_use.described,
            thinking=thinking,
            **self.service,
        )


def _plain(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    kept = {k: v for k, v in message.items() if not (k in _EMPTY_MESSAGE_FIELDS and (v is None or v == []))}
    kept.pop("parsed", None)  # what the official client made of the content
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_plain_call(call) for call in kept["tool_calls"]]
    return {k: v for k, v in kept.items() if not (k in ("content", "name", "tool_call_id") and v is None)}


def _plain_call(call: Any) -> Any:
    """Without what the official client adds: its place in a stream, and what it made of the arguments."""
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if isinstance(function, dict):
        function = {name: value for name, value in function.items() if name != "parsed_arguments"}
    return {name: value for name, value in call.items() if name != "index"} | {"function": function}
