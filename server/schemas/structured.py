"""structured_outputs: what an answer must look like, beyond what response_format can say."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from server.errors import bad_request, unsupported
from server.schemas.base import JsonObject, Strict
from server.schemas.tools import ResponseFormat, TextFormat, format_grammar, schema_grammar
from server.worker import messages as wire

MAX_GRAMMAR = 16 << 10
"""Characters of a grammar or a pattern: a grammar of so many is compiled in 0.4 s, and the model waits."""
MAX_CHOICES, MAX_CHOICE_TEXT = 2000, 64 << 10

Choice = Annotated[str, Field(min_length=1)]


class StructuredOutputs(Strict):
    """What the answer must be, in exactly one of these ways. The names are vLLM's."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    json_: JsonObject | None = Field(None, alias="json", description="JSON that fits this schema.")
    regex: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_GRAMMAR,
        description="A text that this regular expression matches from its beginning to its end (Rust's syntax, without "
        "look-around and references back).",
    )
    choice: list[Choice] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description="One of these texts and nothing else."
    )
    grammar: str | None = Field(
        None,
        max_length=MAX_GRAMMAR,
        description="A text of this grammar, in llama.cpp's GBNF: rules `name ::= ...`, the answer is `root`.",
    )

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self._given) != 1:
            raise ValueError(f"must have exactly one of json, regex, choice and grammar, has {len(self._given)}")
        if sum(map(len, self.choice or ())) > MAX_CHOICE_TEXT:
            raise ValueError(f"choice must not have more than {MAX_CHOICE_TEXT} characters in all")
        if self.grammar is not None and "::=" not in self.grammar:
            raise ValueError('grammar must be GBNF, with rules such as root ::= "yes" | "no"')
        return self

    @property
    def _given(self) -> list[str]:
        fields = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        return [name for name, value in fields.items() if value is not None]

    @property
    def field(self) -> str:
        """The field that says what the answer must be."""
        return f"structured_outputs.{self._given[0]}"

    def to_wire(self) -> wire.Grammar:
        """The grammar for the worker. Raises ApiError 400 for a schema that is too large."""
        if self.json_ is not None:
            return schema_grammar(self.json_, self.field)
        if self.regex is not None:
            return wire.Grammar("regex", self.regex)
        if self.grammar is not None:
            return wire.Grammar("gbnf", self.grammar)
        return wire.Grammar("regex", "|".join(map(_literally, dict.fromkeys(self.choice or ()))))


def _literally(text: str) -> str:
    """A pattern that this text matches and nothing else."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def answer_grammar(
    form: ResponseFormat | None, structured: StructuredOutputs | None, *, tools: bool = False
) -> wire.Grammar | None:
    """What an answer is held to; None where it is free. Raises ApiError 400 where two things are asked for at once."""
    formed = form is not None and not isinstance(form, TextFormat)
    if formed and structured is not None:
        message = "structured_outputs: response_format says already what the answer must be; leave one of them out"
        raise bad_request(message, "structured_outputs")
    if tools and formed:
        raise unsupported("response_format", "an answer that may call tools cannot have another form; leave one out")
    if tools and structured is not None:
        message = "structured_outputs: an answer that may call tools cannot have another form; leave one of them out"
        raise bad_request(message, "structured_outputs")
    return format_grammar(form) if structured is None else structured.to_wire()


def grammar_field(structured: StructuredOutputs | None) -> str:
    """The field whose grammar it is, should a worker not be able to use it."""
    return "response_format" if structured is None else structured.field
