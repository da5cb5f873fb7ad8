"""Functions that a model may call, the choice among them, and the form of an answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.errors import bad_request
from server.schemas.base import JsonObject, Strict
from server.schemas.fields import MAX_TOOLS, FunctionName
from server.worker import messages as wire

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Function(Strict):
    """A function's name, purpose and parameters (a JSON schema)."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function

    def described(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.function.name, "description": self.function.description or ""}
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {**function, "parameters": parameters}}


class NamedFunction(Strict):
    """A function by its name."""

    name: FunctionName


class NamedChoice(Strict):
    """This function and no other."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    """These functions and no others: as many calls as it likes (auto), or at least one (required)."""

    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedChoice(Strict):
    """Some of the tools that are offered."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def check_choice(value: Any) -> Any:
    """Its kind, so that what is wrong with it is told of the kind that was meant. Raises ValueError."""
    if isinstance(value, dict) and value.get("type") not in ("function", "allowed_tools"):
        raise ValueError('must be "none", "auto", "required", or an object of the type function or allowed_tools')
    return value


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedChoice | AllowedChoice, BeforeValidator(check_choice)
]


class JsonSchema(Strict):
    """A JSON schema with a name. `strict` is always kept: the answer cannot be anything else."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """No form."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


MAX_SCHEMA_TEXT, MAX_SCHEMA_FIELDS = 256 << 10, 2000
"""Characters of a schema that an answer is held to, and names in one of its objects: compiling it takes the square of
these (0.35 s for 2,000), and the model waits."""


def schema_grammar(schema: dict[str, Any], param: str = "response_format") -> wire.Grammar:
    """A JSON schema as the worker takes it. Raises ApiError 400 for one that is too large to be compiled in time."""
    text, rest, widest = json.dumps(schema), [schema], 0
    while rest:
        part: Any = rest.pop()
        widest = max(widest, len(part)) if isinstance(part, dict) else widest
        rest += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    if len(text) > MAX_SCHEMA_TEXT or widest > MAX_SCHEMA_FIELDS:
        limits = f"{MAX_SCHEMA_TEXT} characters, and {MAX_SCHEMA_FIELDS} names in an object"
        raise bad_request(f"{param}: the schema is too large; at most {limits}", param)
    return wire.Grammar("json_schema", text)


def format_grammar(
    asked: TextFormat | ObjectFormat | SchemaFormat | None, param: str = "response_format"
) -> wire.Grammar | None:
    """The grammar of a response_format; None for text. Raises ApiError 400."""
    if isinstance(asked, SchemaFormat):
        return schema_grammar(asked.json_schema.schema_ or _ANY_OBJECT, param)
    return wire.Grammar("json_object") if isinstance(asked, ObjectFormat) else None


class ToolUse:
    """What a request says about tools, worked out.

    Attributes:
        described: the tools as the chat template gets them. names: of the functions that may be called.
        forced: whether the answer has to be a call; strict: whether calls among free text are held to their schemas.
        grammar: of such answers; None where the model is free.
        parallel: whether more than one call may come of an answer.
    """

    def __init__(self, tools: list[Tool], choice: str | NamedChoice | AllowedChoice | None, parallel: bool) -> None:
        offered = {tool.function.name: tool for tool in tools}
        if len(offered) < len(tools):
            raise bad_request("tools: two functions have the same name", "tools")
        if choice not in (None, "none", "auto") and not tools:
            raise bad_request("tool_choice: needs tools", "tool_choice")
        named = [choice] if isinstance(choice, NamedChoice) else []
        named = choice.allowed_tools.tools if isinstance(choice, AllowedChoice) else named
        for one in named:
            if one.function.name not in offered:
                raise bad_request(f"tool_choice: there is no tool {one.function.name!r}", "tool_choice")
        if isinstance(choice, AllowedChoice):  # the others are not even shown to the model
            kept = {one.function.name for one in named}
            tools, choice = [tool for tool in tools if tool.function.name in kept], choice.allowed_tools.mode
        used = [] if choice == "none" else tools
        callable_tools = [offered[choice.function.name]] if isinstance(choice, NamedChoice) else used
        self.forced = choice == "required" or isinstance(choice, NamedChoice)
        self.strict = not self.forced and any(tool.function.strict for tool in used)
        self.described = [tool.described() for tool in used]
        self.names = tuple(tool.function.name for tool in callable_tools)
        self.parallel = parallel
        self.grammar: wire.Grammar | None = None
        if self.forced or self.strict:
            made = schema_grammar(_call_schema(callable_tools), "tools")
            self.grammar = wire.Grammar("tool_calls", made.text) if self.strict else made

    def __bool__(self) -> bool:
        return bool(self.described)


def _call_schema(tools: list[Tool]) -> dict[str, Any]:
    """The JSON of a call of one of these functions."""
    calls = []
    definitions: dict[str, Any] = {}
    for place, tool in enumerate(tools):
        arguments = _moved(tool.function.parameters or _ANY_OBJECT, f"#/$defs/{place}.")
        if arguments.get("properties"):  # a function takes the arguments that it declares
            arguments.setdefault("additionalProperties", False)
        for kind in _DEFINITIONS:
            definitions |= {f"{place}.{name}": part for name, part in arguments.pop(kind, {}).items()}
        if f'"#/$defs/{place}."' in json.dumps([arguments, definitions]):  # it refers to itself as a whole
            definitions[f"{place}."] = arguments
        properties = {"name": {"const": tool.function.name}, "arguments": arguments}
        call = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
        calls.append({**call, "additionalProperties": False})
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


_DEFINITIONS = ("$defs", "definitions")


def _moved(schema: Any, where: str) -> Any:
    """A schema whose definitions are at `where`: its references are from its root, which it is no longer."""
    if isinstance(schema, list):
        return [_moved(part, where) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _moved(part, where) for name, part in schema.items()}
    target = found.get("$ref")
    if isinstance(target, str):
        start = next((f"#/{kind}/" for kind in _DEFINITIONS if target.startswith(f"#/{kind}/")), "#")
        if target == "#" or start != "#":
            found["$ref"] = where + target.removeprefix(start)
    return found
