"""The job of rendering chat templates, for `child_main.py`: it imports Jinja and nothing else of weight.

A template comes with a model, so it is a stranger's program. It runs in Jinja's sandbox, which keeps it from Python's
internals, and in a process that can be bounded where a sandbox cannot. It has no files, sockets or secrets.

Names and behaviour that templates find are those of transformers (`transformers.utils.chat_template_utils`), which
templates are written for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 512 << 20


def environment() -> Any:
    """A sandboxed environment as chat templates expect it."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant wrote, for training; here it only writes its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """`dict(...)` and `dict.fromkeys`, and no way from there to the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, rest = args[0], args[1:]
            given = dict(*rest, **kwargs)
            for name in given:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r} here")

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace)
    return found


def answer(compiled: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """{"text"}, or {"error", "message"} with the kind of what was raised."""
    try:
        text = str(compiled(asked["template"]).render(**asked["variables"]))
        if len(text) > asked["most"]:
            return {"error": "TooLong", "message": f"it writes {len(text)} characters"}
        text.encode()
    except RecursionError:
        return {"error": "RecursionError", "message": "it calls itself without end"}
    except MemoryError:
        return {"error": "MemoryError", "message": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # whatever a stranger's program raises is told to whoever asked
        return {"error": type(error).__name__, "message": str(error)[:500]}
    return {"text": text}


def prepare(read: Callable[[], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What answers {"template", "variables", "most": characters}."""
    compiled = lru_cache(maxsize=8)(environment().from_string)
    compiled("{{ messages }}").render(messages=[])  # what rendering imports is imported before the limits
    return lambda asked: answer(compiled, asked)
