"""The job of compiling grammars, for `child_main.py`: it imports llguidance and nothing else of weight.

What a grammar takes cannot be seen from it, nor be bounded by llguidance's own limits: whether patterns that are joined
(`allOf`, Lark's `&` and `~`) leave anything is decided by multiplying their cases, each further pattern makes that
several times as long, and its fuel counts the products' results. So it is compiled here first, and with the model's
tokens, which may take longer than the grammar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 512 << 20


def prepare(read: Callable[[], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """First comes {"tokenizer": its file's text, "n_vocab", "eos_token": ids}; then what `compile_matcher` answers."""
    from llguidance import LLTokenizer

    told = read()
    vocabulary = LLTokenizer(told["tokenizer"], n_vocab=told["n_vocab"], eos_token=told["eos_token"])
    compile_matcher(vocabulary, 'start: "warm"')  # what compiling sets up lazily

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        _, stage, reason = compile_matcher(vocabulary, asked["source"])
        return {"stage": stage, "reason": reason}

    return answer


def compile_matcher(vocabulary: Any, source: str) -> tuple[Any, str, str]:
    """An LLMatcher at its beginning, "" and ""; or where it failed ("used": as a grammar, "begun": no token can be its
    first) and llguidance's reason."""
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary, source, log_level=0)
    if matcher.is_error():
        return matcher, "used", str(matcher.get_error())
    matcher.compute_bitmask()
    if matcher.is_error():
        return matcher, "begun", str(matcher.get_error())
    return matcher, "", ""
