"""Chat templates: programs made of pieces that cost time or memory or reach for Python's internals.

Whatever they do, rendering ends in time, and what comes out is text, or a reason of bounded length.
"""

from __future__ import annotations

from random import Random
from typing import Any

from spectral.engine.templates import Renderer, TemplateFailed
from tests.fuzz.mutate import mutate_bytes, mutate_document
from tests.fuzz.targets.base import Base

VALUES = (
    "messages",
    "9 ** 9",
    "9 ** (9 ** 9)",
    "'x' * 10",
    "'x' * (10 ** 12)",
    "range(99999)",
    "[1] * 10 ** 11",
    "none",
)
VALUES += (
    "namespace(a=1)",
    "cycler",
    "joiner",
    "lipsum",
    "raise_exception",
    "''.__class__",
    "messages | tojson",
    "ns.a",
)
VALUES += (
    "'%0999999999d' | format(1)",
    "'{:99999999999}'.format(1)",
    "self",
    "loop",
    "caller",
    "dict(a=1)",
    "tools",
    "'\\ud800'",
)
VALUES += (
    "messages[0].content",
    "'a' | center(10 ** 11)",
    "x ~ x",
    "(1, 2) | batch(10 ** 10)",
    "'x' | indent(10 ** 9)",
)
BLOCKS = (
    "{{{{ {v} }}}}",
    "{{% set x = {v} %}}",
    "{{% for a in {v} %}}{b}{{% endfor %}}",
    "{{% if {v} %}}{b}{{% endif %}}",
)
BLOCKS += (
    "{{% set ns = namespace(a={v}) %}}{b}",
    "{{% macro f(q) %}}{b}{{{{ f({v}) }}}}{{% endmacro %}}{{{{ f(1) }}}}",
)
BLOCKS += (
    "{{% generation %}}{b}{{% endgeneration %}}",
    "{{% filter upper %}}{b}{{% endfilter %}}",
    "text {v} ",
    "{b}{b}",
)
BLOCKS += ("{{{{ ({v}).{a} }}}}", "{{{{ ({v}) | {f} }}}}", "{{% include {v} %}}", "{{% call {v} %}}{b}{{% endcall %}}")
ATTRIBUTES = ("__class__", "__globals__", "append(1)", "format", "__init__", "mro", "gi_frame", "f_back", "a", "x")
FILTERS = (
    "tojson",
    "length",
    "list",
    "join",
    "attr('__class__')",
    "map('attr', '__base__')",
    "pprint",
    "xmlattr",
    "sum",
    "sort",
)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "tool_calls": []}]


def program(random: Random, depth: int = 0) -> str:
    """A template."""
    block = random.choice(BLOCKS) if depth < 5 else "{{{{ {v} }}}}"
    body = "".join(program(random, depth + 1) for _ in range(random.choice((0, 1, 1, 2)))) if "{b}" in block else ""
    value, attribute, one = random.choice(VALUES), random.choice(ATTRIBUTES), random.choice(FILTERS)
    return block.format(v=value, b=body, a=attribute, f=one)


class Templates(Base):
    """One renderer for all; its limit is short, so that templates that never end do not take the run's time."""

    name = "templates"
    seconds = 3.0

    def __init__(self) -> None:
        self.renderer = Renderer(seconds=0.4)

    def make(self, random: Random) -> tuple[str, Any]:
        """A template and messages."""
        text = "".join(program(random) for _ in range(random.randrange(1, 4)))
        if random.random() < 0.2:
            text = mutate_bytes(text.encode(), random).decode("utf-8", "replace")
        turns = mutate_document(TURNS, random) if random.random() < 0.3 else TURNS
        return text, turns

    def check(self, item: tuple[str, Any]) -> str:
        """Render it."""
        template, turns = item
        try:
            text = self.renderer.render(template, {"messages": turns, "tools": None})
        except TemplateFailed as error:
            assert len(str(error)) < 700
            return error.kind if error.kind in ("Timeout", "MemoryError", "TooLong", "Died") else "refused"
        text.encode()
        return "text"

    def close(self) -> None:
        """End its process."""
        self.renderer.close()


TARGETS = {"templates": Templates}
