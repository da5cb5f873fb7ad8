"""Grammars: patterns, schemas and rules that multiply, nest or read a text in many ways, and answers to them.

Whatever they are, compiling and the steps of an answer end in time, and what is wrong is told by a RequestError.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from spectral.engine.grammar import CUT, TOO_COMPLEX, UNSATISFIABLE, GrammarCompiler
from spectral.engine.types import Grammar
from spectral.errors import RequestError
from tests.fuzz.mutate import mutate_bytes
from tests.fuzz.targets.base import Base

MODEL = Path(__file__).parents[3] / "models" / "demo-7m"
CLASSES = ("[a-z]", "[0-9]", "[a-m]", ".", "a", "y", "[^x]", r"\w", r"(.|\n)")
TOKENS = 40


def pattern(random: Random, depth: int) -> str:
    """A regular expression."""
    kind = random.randrange(6) if depth else 0
    if kind == 0:
        return random.choice(CLASSES)
    if kind == 1:
        return "(" + "|".join(pattern(random, depth - 1) for _ in range(random.randint(2, 4))) + ")"
    if kind == 2:
        return f"({pattern(random, depth - 1)}){random.choice('*+?')}"
    if kind == 3:
        return f"({pattern(random, depth - 1)}){{{random.randint(0, 3)},{random.choice((4, 40, 200))}}}"
    return pattern(random, depth - 1) + pattern(random, depth - 1)


def schema(random: Random) -> Any:
    """A JSON schema: patterns joined, or properties."""
    if random.random() < 0.5:
        parts = [{"type": "string", "pattern": pattern(random, 3)} for _ in range(random.randint(1, 16))]
        return {random.choice(("allOf", "allOf", "anyOf")): parts}
    inner: Any = {"$ref": "#"} if random.random() < 0.3 else {"type": "string", "pattern": pattern(random, 2)}
    keys = {pattern(random, 2): {"type": "integer"} for _ in range(random.randint(0, 3))}
    return {"properties": {"a": inner, "b": {"maxLength": 9}}, "patternProperties": keys, "required": ["a"]}


def lark(random: Random) -> str:
    """Lark: terminals joined, or rules that need each other."""
    if random.random() < 0.4:
        parts = (random.choice(("", "", "~")) + f"/{pattern(random, 3)}/" for _ in range(random.randint(1, 12)))
        return "start: A (B A)*\nA: " + random.choice((" & ", " | ")).join(parts) + f"\nB: /{pattern(random, 2)}/"
    rules = ["start: r0"]
    for i in range(4):
        ways = (" ".join(f"r{random.randrange(4)}{random.choice(('', '', '*'))}" for _ in range(2)) for _ in range(3))
        rules.append(f"r{i}: {' | '.join(ways)} | /{pattern(random, 2)}/")
    return "\n".join(rules)


class Grammars(Base):
    """One compiler for all; its limit is short, so that grammars that multiply do not take the run's time."""

    name = "grammars"
    seconds = 6.0
    memory = 512 << 20

    @cached_property
    def compiler(self) -> GrammarCompiler:
        """For the embedded model's tokens."""
        from transformers import AutoTokenizer

        return GrammarCompiler(AutoTokenizer.from_pretrained(MODEL), 8192, [2], seconds=0.4)

    def make(self, random: Random) -> tuple[str, str, int]:
        """A kind, its text, and what the answer's tokens are chosen by."""
        kind = random.choice(("json_schema", "regex", "lark", "gbnf"))
        if kind == "json_schema":
            text = json.dumps(schema(random))
        elif kind == "regex":
            text = pattern(random, 5)
        else:
            text = lark(random)
            text = text.replace("start:", "root:").replace(":", " ::=") if kind == "gbnf" else text
        if random.random() < 0.2:
            text = mutate_bytes(text.encode(), random).decode("utf-8", "replace") or "a"
        return kind, text, random.getrandbits(32)

    def check(self, item: tuple[str, str, int]) -> str:
        """Compile it, and answer."""
        import torch

        kind, text, seed = item
        try:
            state = self.compiler.start(Grammar(kind, text))
        except RequestError as error:
            assert error.param == "grammar" and len(str(error)) < 1000
            return error.code
        random = Random(seed)
        for _ in range(TOKENS):
            logits = torch.zeros(8192)
            state.forbid(logits)
            if state.error is not None:
                assert state.error.code in (TOO_COMPLEX, UNSATISFIABLE, CUT, "invalid_request")
                return f"dead: {state.error.code}"
            state.accept(random.choice(torch.nonzero(logits == 0).flatten().tolist()))
            if state.finished:
                return "finished"
        return "unfinished"

    def close(self) -> None:
        """End its process."""
        if "compiler" in self.__dict__:
            self.compiler._child.close()


TARGETS = {"grammars": Grammars}
