"""Structured output: which tokens a grammar allows next, through llguidance (Rust, no torch).

What a new grammar takes is bounded by a process of its own, which compiles it first (`grammar_child.py`). What a step
takes is bounded by llguidance, to some tenths of a second, and what an answer's steps take by their time: both end it
(`grammar_too_complex`).
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch

from spectral.engine.chat import tool_format
from spectral.engine.child_process import ChildFailed, ChildProcess
from spectral.engine.grammar_child import MEMORY_BYTES, compile_matcher
from spectral.engine.types import Grammar
from spectral.errors import RequestError

KEPT = 64
"""Compiled grammars, and refused ones, that are kept for the next request with the same one."""
SECONDS = 3.0
"""Longest time that compiling a grammar may take, on the wall. Ordinary ones take a millisecond, the largest schemas
some hundred."""
REFUSED_SECONDS = 60.0
"""So long a refusal is repeated without another look: what was too slow may have been so on a busy machine."""
MASK_SECONDS, MASK_BURST = 0.02, 1.0
"""Processor time that an answer's masks may take, a token, and so much beyond: other requests wait for each of them.
Ordinary ones take 0.1 to 1 ms; those of grammars that read a text in very many ways took up to 0.8 s, each."""

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
        self._left = MASK_BURST
        self.error: RequestError | None = None
        """Why the answer cannot go on; its token of this step is then of no use."""

    def forbid(self, logits: torch.Tensor) -> None:
        """Set the logits [V] of tokens that cannot come next to -inf, in place. If none can, `error` says why."""
        began = time.thread_time()
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._spend(time.thread_time() - began - MASK_SECONDS)
        if self._matcher.is_error():  # only now: what cannot go on is found by the mask, which then offers the end
            self.error = _dead(str(self._matcher.get_error()), "after what the model has answered so far")
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
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._spend(time.thread_time() - began)

    def _spend(self, seconds: float) -> None:
        self._left = min(MASK_BURST, self._left - seconds)
        if self._left < 0:
            self.error = _dead("its steps take too long", "after what the model has answered so far")

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
            return None if whole else _dead(str(self._matcher.get_error()), "where the answer ended")
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


def _dead(reason: str, where: str) -> RequestError:
    """The error of a matcher that cannot go on."""
    reason = reason.partition("\n")[0].strip()  # behind it stands the parser's own state
    if reason in ("", *_NO_EXTENSION):
        said = f"the grammar cannot be satisfied: nothing is allowed {where}, and that is no whole sentence of it; "
        said += "look for a rule, reference or required part that needs itself, or that no text fits"
        return RequestError(said, param="grammar", code=UNSATISFIABLE)
    said = f"the grammar cannot be followed {where}: {reason}; make it simpler"
    return RequestError(said, param="grammar", code=TOO_COMPLEX)


def _too_complex(grammar: Grammar, took: str) -> RequestError:
    """The error of a grammar that could not be compiled within the limits."""
    joined = "fewer patterns joined by allOf" if grammar.kind in ("json_schema", "tool_calls") else "fewer joined by &"
    if grammar.kind in ("regex", "gbnf"):
        joined = "fewer and smaller repetitions"
    said = f"the {grammar.kind} grammar takes {took} to compile; make it simpler ({joined}, shorter patterns)"
    return RequestError(said, param="grammar", code=TOO_COMPLEX)


class GrammarCompiler:
    """Grammars for one model's tokenizer; what was compiled or refused lately is kept.

    Args:
        tokenizer: transformers'; vocab_size: of the logits; ends: ids that end an answer.
        seconds: for compiling a grammar, on the wall.

    One other thread may call `prepare` and `known` while this one goes on.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Collection[int], seconds: float = SECONDS) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._ours: Any = None  # llguidance's view of the tokenizer: made once, when it is first needed
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()
        self._refused: OrderedDict[Grammar, tuple[float, RequestError]] = OrderedDict()  # and until when
        self._order, self._compiling = threading.Lock(), threading.Lock()
        setup = partial(_setup, tokenizer, vocab_size, self._ends)  # not of self, which it would keep
        self._child = ChildProcess("grammar_child.py", ("llguidance",), seconds, setup)
        weakref.finalize(self, self._child.close)

    def known(self, grammar: Grammar | None) -> bool:
        """Whether `prepare` and `start` take no time."""
        return grammar is None or self._recall(grammar) is not None

    def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar, unless it is known. Raises RequestError for one that cannot be used."""
        self._find(grammar)

    def start(self, grammar: Grammar) -> GrammarState:
        """The beginning of an answer. Raises RequestError for a grammar that cannot be used."""
        return GrammarState(self._find(grammar).deep_copy(), self._ours)

    def _find(self, grammar: Grammar) -> Any:
        found = self._recall(grammar)
        if found is None:
            with self._compiling:
                found = self._recall(grammar)  # another thread may just have compiled it
                if found is None:
                    return self._compile_and_keep(grammar)
        if isinstance(found, RequestError):
            raise _again(found)
        return found

    def _recall(self, grammar: Grammar) -> Any:
        """A matcher, the error that it was refused with, or None."""
        with self._order:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
            until, error = self._refused.get(grammar, (0.0, None))
            return error if time.monotonic() < until else None

    def _compile_and_keep(self, grammar: Grammar) -> Any:
        try:
            matcher = self._compile(grammar)
        except RequestError as error:
            self._keep(self._refused, grammar, (time.monotonic() + REFUSED_SECONDS, _again(error)))
            raise
        self._keep(self._kept, grammar, matcher)
        return matcher

    def _keep(self, where: OrderedDict[Grammar, Any], grammar: Grammar, found: Any) -> None:
        with self._order:
            where[grammar] = found
            where.move_to_end(grammar)
            if len(where) > KEPT:
                where.popitem(last=False)

    def _compile(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        try:
            if grammar.kind == "tool_calls":
                text = _tool_calls(tool_format(self._tokenizer), grammar.text)
            else:
                text = _SOURCES[grammar.kind](LLMatcher, grammar.text)
        except (ValueError, TypeError) as error:
            raise _refusal(grammar, "read", str(error)) from error
        vocabulary = self._vocabulary()
        try:
            told = self._child.ask(json.dumps({"source": text}).encode("ascii"))
        except ChildFailed as error:
            if error.kind == "NotStarted":
                raise ChildFailed(error.kind, f"no grammar can be compiled: {error}") from error
            took = f"more than {self._child.seconds:g} s"
            took = took if error.kind == "Timeout" else f"more than {MEMORY_BYTES >> 20} MiB of memory"
            raise _too_complex(grammar, took) from error
        stage, reason, matcher = told["stage"], told["reason"], None
        if not stage:
            matcher, stage, reason = compile_matcher(vocabulary, text)  # other threads go on meanwhile
        if stage == "used":
            raise _refusal(grammar, stage, reason)
        if stage:
            raise _dead(reason, "at its beginning")
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


def _setup(tokenizer: Any, vocab_size: int, ends: list[int]) -> bytes:
    """What the compiling process has to know: the same vocabulary as `from_tokenizer` makes here."""
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    told = {"tokenizer": backend.to_str(), "n_vocab": max(vocab_size, len(tokenizer)), "eos_token": ends}
    return json.dumps(told).encode("ascii")


def _again(error: RequestError) -> RequestError:
    """The same error without what it came from, which would be kept with it."""
    return RequestError(str(error), param=error.param, code=error.code)


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
    return str(matcher.grammar_from_lark(_unforced(text)))


def _gbnf(matcher: Any, text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(matcher.grammar_from_lark(_unforced(gbnf_to_lark(text))))
    except Exception as error:  # its reader fails in several ways, a recursion that is too deep among them
        raise ValueError(error) from error


def _unforced(text: str) -> str:
    """Lark without llguidance's look ahead at bytes that must come: where a terminal takes everything that could follow
    it (`start: "n" Y "y"` with `Y: /y+/`) it never comes to an end, and no limit ends it. Raises ValueError."""
    found = _OPTIONS.search(text)
    if found is None:
        return '%llguidance {"no_forcing": true}\n' + text
    options = json.loads(found[1])
    if not isinstance(options, dict) or _OPTIONS.search(text, found.end()):
        raise ValueError("%llguidance stands once, with an object on its line")
    return f"{text[: found.start(1)]}{json.dumps({**options, 'no_forcing': True})}{text[found.end(1) :]}"


_OPTIONS = re.compile(r"%llguidance([^\n]*)")

_SOURCES: dict[str, Callable[[Any, str], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "lark": _lark,
    "gbnf": _gbnf,
}
