"""POST /v1/responses, without state: nothing is stored, and the whole conversation is in `input`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.errors import bad_request, unsupported
from server.schemas.base import Harmless, JsonObject, Strict, json_object
from server.schemas.fields import MAX_TOOLS, FunctionName, Limit, Text
from server.schemas.sampling import COMMON_HARMLESS, HINTS, SamplingFields, without_thoughts
from server.schemas.tools import (
    AllowedChoice,
    AllowedTools,
    Function,
    JsonSchema,
    NamedChoice,
    NamedFunction,
    ObjectFormat,
    SchemaFormat,
    TextFormat,
    Tool,
    ToolUse,
    check_choice,
    format_grammar,
)
from server.worker import messages as wire

LOGPROBS = "message.output_text.logprobs"


class FunctionTool(Function):
    """A function; unlike in a chat its fields lie beside its type."""

    type: Literal["function"]


class FunctionChoice(NamedFunction):
    """This function and no other."""

    type: Literal["function"]


class AllowedFunctions(Strict):
    """Some of the tools that are offered; see AllowedTools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class FlatSchemaFormat(Strict):
    """JSON that fits a schema; unlike in a chat its fields lie beside its type."""

    type: Literal["json_schema"]
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    """The form of the answer's text."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesStreamOptions(Strict):
    """Options of a stream; events are not padded."""

    include_obfuscation: Literal[False] = False


class SummaryText(Strict):
    """A part of a summary of thoughts; none is ever written here."""

    type: Literal["summary_text"]
    text: str


class InputItem(Strict):
    """A message, a model's thoughts, a call of a function, or what a function returned."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    id: str | None = Field(None, max_length=200)
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | None = None
    call_id: str | None = Field(None, min_length=1, max_length=200)
    name: FunctionName | None = None
    arguments: str | None = None
    output: Text | None = None
    summary: list[SummaryText] | None = Field(None, max_length=64)


_FIELDS = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


def _or_string(schema: dict[str, Any]) -> None:
    """In the documentation: a text alone is the user's message."""
    items = {name: schema.pop(name) for name in ("items", "minItems", "type")}
    schema["anyOf"] = [{"type": "string", "minLength": 1}, items]


Reasoning = Annotated[
    dict[str, Any], WithJsonSchema({"properties": {"effort": {"const": "none"}}, "additionalProperties": False})
]


Choice = Annotated[
    Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions, BeforeValidator(check_choice)
]


class ResponsesRequest(SamplingFields):
    """POST /v1/responses."""

    harmless: ClassVar[Harmless] = {
        **{name: test for name, test in COMMON_HARMLESS.items() if name not in ("audio", "prediction", "store")},
        "truncation": lambda value: value == "disabled",
        "background": lambda value: value is False,
    }

    input: list[InputItem] = Field(min_length=1, json_schema_extra=_or_string)
    instructions: str | None = None
    max_output_tokens: Limit | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs"]] = Field([], max_length=8)
    reasoning: Reasoning | None = None
    store: bool = Field(False, description="Taken as a wish: nothing is ever stored, and the answer says store: false.")
    stream_options: ResponsesStreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Items of an earlier answer come back with fields that are null or empty."""
        if not data.get("tools") and data.get("tool_choice") in ("none", "auto"):
            data = {name: value for name, value in data.items() if name != "tool_choice"}
        items = data.get("input")
        if items in ("", []):
            raise bad_request("input: must be a text, or a list of items, that is not empty", "input")
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if not isinstance(items, list):
            return data
        return {**data, "input": [_thoughts(_plain(item), f"input[{place}]") for place, item in enumerate(items)]}

    @cached_property
    def tool_use(self) -> ToolUse:
        """The tools that this request offers. Raises ApiError 400."""
        fields = ("name", "description", "parameters", "strict")
        tools = [
            Tool(type="function", function=Function(**{name: getattr(tool, name) for name in fields}))
            for tool in self.tools
        ]
        asked = self.tool_choice
        choice: str | NamedChoice | AllowedChoice | None
        if isinstance(asked, AllowedFunctions):
            allowed = AllowedTools(mode=asked.mode, tools=[_as_in_a_chat(one) for one in asked.tools])
            choice = AllowedChoice(type="allowed_tools", allowed_tools=allowed)
        else:
            choice = _as_in_a_chat(asked) if isinstance(asked, FunctionChoice) else asked
        return ToolUse(tools, choice, self.parallel_tool_calls)

    @property
    def grammar_field(self) -> str:
        """The field whose grammar it is, should a worker not be able to use it."""
        return "text.format" if self.tool_use.grammar is None else "tools"

    @property
    def wants_logprobs(self) -> bool:
        """True where log probabilities are part of the answer."""
        return LOGPROBS in self.include

    def submit(self, request_id: str) -> wire.Submit:
        """The message to the worker. Raises ApiError 400."""
        if self.top_logprobs and not self.wants_logprobs:
            raise bad_request(f"top_logprobs: needs {LOGPROBS!r} in include", "top_logprobs")
        asked = _plain(self.reasoning or {})
        if asked.keys() - {"effort"}:
            raise unsupported("reasoning", HINTS["reasoning"])
        thinking = without_thoughts(asked.get("effort"), "reasoning")
        wanted = (self.top_logprobs or 0) if self.wants_logprobs else None
        grammar = self._grammar()
        if grammar is not None and self.tool_use:
            raise unsupported("text.format", "an answer that may call tools cannot have another form; leave one out")
        grammar = grammar or self.tool_use.grammar
        return wire.Submit(
            request_id=request_id,
            kind="chat",
            sampling=self.sampling(logprobs=wanted, max_tokens=self.max_output_tokens, grammar=grammar),
            messages=self._turns(),
            tools=self.tool_use.described,
            thinking=thinking,
            **self.service,
        )

    def _grammar(self) -> wire.Grammar | None:
        asked = self.text.format if self.text is not None else None
        if isinstance(asked, FlatSchemaFormat):
            schema = JsonSchema(name=asked.name, schema=asked.schema_)
            return format_grammar(SchemaFormat(type="json_schema", json_schema=schema), "text.format")
        return format_grammar(asked)

    def _turns(self) -> list[wire.Message]:
        turns = [wire.Message("system", self.instructions)] if self.instructions else []
        thoughts: str | None = None  # of the answer that comes next
        for place, item in enumerate(self.input):
            where = f"input[{place}]"
            _check_item(item, where)
            if item.type == "reasoning":
                thoughts = item.content
                continue
            before, thoughts = thoughts, None
            if item.type == "message":
                before = before if item.role == "assistant" else None
                turns.append(wire.Message(item.role or "user", item.content or "", reasoning=before))
            elif item.type == "function_call_output":
                turns.append(wire.Message("tool", item.output or "", tool_call_id=item.call_id))
            else:
                arguments = json_object(item.arguments or "{}", f"{where}.arguments")
                function = {"name": item.name, "arguments": arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                last = turns[-1] if turns and turns[-1].role == "assistant" else None
                if last is None or before is not None:
                    turns.append(wire.Message("assistant", "", [call], reasoning=before))
                else:  # a text and calls, or several calls, of one answer
                    calls = [*last.tool_calls, call]
                    turns[-1] = wire.Message("assistant", last.content, calls, reasoning=last.reasoning)
        return turns


def _as_in_a_chat(choice: FunctionChoice) -> NamedChoice:
    return NamedChoice(type="function", function=NamedFunction(name=choice.name))


def _plain(item: Any) -> Any:
    """Without what is null, and without what the official client made of the arguments."""
    if not isinstance(item, dict):
        return item
    return {name: value for name, value in item.items() if value is not None and name != "parsed_arguments"}


def _thoughts(item: Any, where: str) -> Any:
    """An item of thoughts with its parts joined. Raises ApiError 400."""
    if not isinstance(item, dict) or item.get("type") != "reasoning" or not isinstance(item.get("content"), list):
        return item
    texts = []
    for part in item["content"]:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "reasoning_text":
            message = 'a part of thoughts must be exactly {"type": "reasoning_text", "text": "..."}'
            raise bad_request(f"{where}.content: {message}", f"{where}.content")
        texts.append(part["text"])
    if not all(isinstance(text, str) for text in texts):
        raise bad_request(f"{where}.content: the text of a part must be a string", f"{where}.content")
    return {**item, "content": "".join(texts)}


def _check_item(item: InputItem, where: str) -> None:
    needed = _FIELDS.get(item.type, ())
    allowed = needed or ("content", "summary")
    for name in ("role", "content", "call_id", "name", "arguments", "output", "summary"):
        given = getattr(item, name) is not None
        if given and name not in allowed:
            raise unsupported(f"{where}.{name}", f"an item of the type {item.type} cannot have it")
        if not given and name in needed:
            param = f"{where}.{name}"
            raise bad_request(f"{param}: this field is required", param, "missing_required_parameter")
