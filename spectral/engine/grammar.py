"""Structured output: which tokens a grammar allows next, through llguidance (Rust, no torch)."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from spectral.engine.chat import tool_format
from spectral.engine.types import Grammar
from spectral.errors import RequestError

KEPT = 64
"""Compiled grammars that are kept for the next request with the same one."""

UNSATISFIABLE, TOO_COMPLEX, CUT = "grammar_unsatisfiable", "grammar_too_complex", "grammar_cut_by_stop"
MAX_REASON = 400
"""Characters of llguidance's own words that are passed on; it shows the grammar around what is wrong."""
_REMEDIES = {
    **dict.fromkeys(("json_object", "json_schema", "tool_calls"), "correct the JSON schema there"),
    "regex": "correct the pattern: it has Rust's syntax, without look-around and references back",
    "lark": "correct the grammar there: it is llguidance's Lark, and its first rule is start",
    "gbnf": "correct the grammar there: it is llama.cpp's GBNF, its first rule is root, and none may be called start",
}
_NO_EXTENSION = ("NoExtension", "NoExtensionBias")

WHITESPACE = {"whitespace_pattern": r"( |\n( {0,16}|\t{0,8}))?"}
"""Between the parts of a JSON document: none, a blank, or a new line with its indent. Where more is allowed, small
models write blanks and empty lines instead of an answer."""


class GrammarState:
    """One answer's place in its grammar. `matcher`: llguidance's, at the beginning; it is not shared."""

    def __init__(self, matcher: Any, vocabulary: Any = None) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._beginning = matcher.deep_copy()
        self.error: RequestError | None = None
        """Why the answer cannot go on; its token of this step is then of no use."""

    def forbid(self, logits: torch.Tensor) -> None:
        """Set the logits [V] of tokens that cannot come next to -inf, in place. If none can, `error` says why."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():  # only now: what cannot go on is found by the mask, which then offers the end
            self.error = _dead(self._matcher, "after what the model has answered so far")
            return
        allowed = np.zeros(logits.shape[0], dtype=bool)
        size = min(bits.size, allowed.size)
        allowed[:size] = bits[:size]
        if not allowed.any():
            self.error = RequestError("the grammar allows no token of this model's vocabulary", param="grammar")
            return
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """True when nothing but the end can follow, and the answer is a whole sentence."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error() and self._matcher.is_accepting()

    def fault(self, cut: str | None) -> RequestError | None:
        """Why an answer that ends now is no whole sentence of the grammar; None if it is one.

        cut: its text, where a stop string ended it before its last tokens.
        """
        if cut is None:
            whole = self._matcher.is_accepting() and not self._matcher.is_error()
            return None if whole else _dead(self._matcher, "where the answer ended")
        matcher = self._beginning.deep_copy()
        tokens = self._vocabulary.greedy_tokenize(cut)  # never special ones, whatever the text looks like
        if matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting():
            return None
        return RequestError(
            "a stop string came up before the answer was a whole sentence of its grammar, which ends it by itself; "
            "leave stop out, or choose a string that the grammar does not allow",
            param="stop",
            code=CUT,
        )


def _refusal(grammar: Grammar, what: str, reason: str) -> RequestError:
    """The error of a grammar that cannot be read or used, with what to do."""
    reason = reason.strip()
    keys = re.fullmatch(r"Unimplemented keys: (\[.*\])", reason)
    if keys is not None and grammar.kind in ("json_schema", "tool_calls"):
        wanted = set(json.loads(keys[1]))
        places = ", ".join(_places(json.loads(grammar.text), wanted)) or ", ".join(sorted(wanted))
        said = f"no answer can be held to this part of the JSON schema: {places[:MAX_REASON]}; say it with other keys "
        said += "(enum, const, anyOf, pattern, minimum, ...), or leave it out and check the answer yourself"
        return RequestError(said, param="grammar")
    if len(reason) > MAX_REASON:
        reason = reason[: MAX_REASON - 3] + "..."
    said = f"the {grammar.kind} grammar cannot be {what}: {reason}; {_REMEDIES[grammar.kind]}"
    return RequestError(said, param="grammar")


def _places(schema: Any, wanted: set[str], path: str = "") -> list[str]:
    """Where keys stand in a schema, such as properties.a.not; names of properties are no keys."""
    if isinstance(schema, list):
        return [place for i, part in enumerate(schema) for place in _places(part, wanted, f"{path}[{i}]")]
    if not isinstance(schema, dict):
        return []
    found = []
    for name, part in schema.items():
        at = f"{path}.{name}" if path else name
        if name in wanted:
            found.append(at)
        elif name in _MAPS and isinstance(part, dict):
            found += [place for key, one in part.items() for place in _places(one, wanted, f"{at}.{key}")]
        elif name not in _VALUES:
            found += _places(part, wanted, at)
    return found


_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")


def _dead(matcher: Any, where: str) -> RequestError:
    """The error of a matcher that cannot go on."""
    reason = str(matcher.get_error()).partition("\n")[0].strip()  # behind it stands the parser's own state
    if reason in ("", *_NO_EXTENSION):
        said = f"the grammar cannot be satisfied: nothing is allowed {where}, and that is no whole sentence of it; "
        said += "look for a rule, reference or required part that needs itself, or that no text fits"
        return RequestError(said, param="grammar", code=UNSATISFIABLE)
    said = f"the grammar cannot be followed {where}: {reason}; make it simpler"
    return RequestError(said, param="grammar", code=TOO_COMPLEX)


class GrammarCompiler:
    """Grammars for one model's tokenizer; what was compiled lately is kept.

    Args:
        tokenizer: transformers'; vocab_size: of the logits; ends: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._ours: Any = None  # llguidance's view of the tokenizer: made once, when it is first needed
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()

    def start(self, grammar: Grammar) -> GrammarState:
        """The beginning of an answer. Raises RequestError for a grammar that cannot be used."""
        matcher = self._kept.get(grammar)
        if matcher is None:
            matcher = self._kept[grammar] = self._compile(grammar)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return GrammarState(matcher.deep_copy(), self._ours)

    def _compile(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        try:
            if grammar.kind == "tool_calls":
                text = _tool_calls(tool_format(self._tokenizer), grammar.text)
            else:
                text = _SOURCES[grammar.kind](LLMatcher, grammar.text)
        except (ValueError, TypeError) as error:
            raise _refusal(grammar, "read", str(error)) from error
        matcher = LLMatcher(self._vocabulary(), text, log_level=0)
        if matcher.is_error():
            raise _refusal(grammar, "used", str(matcher.get_error()))
        matcher.compute_bitmask()
        if matcher.is_error():
            raise _dead(matcher, "at its beginning")
        return matcher

    def _vocabulary(self) -> Any:
        if self._ours is None:
            from llguidance.hf import from_tokenizer

            if getattr(self._tokenizer, "backend_tokenizer", None) is None or not self._ends:
                raise RequestError(
                    "structured output needs a model with a fast tokenizer and an end token; this one has not both",
                    param="grammar",
                )
            size = max(self._vocab_size, len(self._tokenizer))
            self._ours = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._ends)
        return self._ours


def _json_object(matcher: Any, text: str) -> str:
    return str(matcher.grammar_from_json_schema({"type": "object"}, overrides=WHITESPACE))


def _json_schema(matcher: Any, text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, (dict, bool)):
        raise ValueError("a JSON schema is an object")
    return str(matcher.grammar_from_json_schema(json.dumps(schema), overrides=WHITESPACE))


def _tool_calls(form: str, text: str) -> str:
    """Lark: text with calls of tools among it, as a model of this form writes them. Raises RequestError."""
    if form not in _CALLS:
        raise RequestError(
            "strict arguments cannot be held in this model's form of calls unless tool_choice forces one; "
            'use tool_choice "required" or a name, or leave strict out',
            param="tools",
        )
    schema = json.loads(text)
    for call in schema.get("anyOf", [schema]) if form == "json" else []:
        call["properties"] = {_LLAMA.get(name, name): part for name, part in call["properties"].items()}
        call["required"] = [_LLAMA.get(name, name) for name in call["required"]]
    return _CALLS[form] + f"call: %json {json.dumps({**schema, 'x-guidance': WHITESPACE})}\n"


_LLAMA = {"arguments": "parameters"}
_CALLS = {
    "hermes": r"""%llguidance {}
start: (lead GAP call GAP "</tool_call>")* REST
lead[lazy]: /(.|\n)*<tool_call>/
GAP: /\n?/
REST: /(.|\n)*/ & ~/(.|\n)*<tool_call>(.|\n)*/
""",
    "json": r"""%llguidance {}
start: REST | call (GAP call)*
GAP: /[ \n]{0,2};?[ \n]{0,2}/
REST: /([^{\[](.|\n)*)?/
""",
}


def _regex(matcher: Any, text: str) -> str:
    return str(matcher.grammar_from_regex(text))


def _lark(matcher: Any, text: str) -> str:
    return str(matcher.grammar_from_lark(text))


def _gbnf(matcher: Any, text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(matcher.grammar_from_lark(gbnf_to_lark(text)))
    except Exception as error:  # its reader fails in several ways, a recursion that is too deep among them
        raise ValueError(error) from error


_SOURCES: dict[str, Callable[[Any, str], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "lark": _lark,
    "gbnf": _gbnf,
}
