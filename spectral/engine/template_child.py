"""A process that renders chat templates: run as a file by `templates.py`, it imports Jinja and nothing else of weight.

A template comes with a model, so it is a stranger's program. It runs in Jinja's sandbox, which keeps it from Python's
internals, and in this process, which can be bounded where a sandbox cannot: no loop, power, repetition or format width
takes more memory or time than the operating system gives it. It has no files, sockets or secrets.

Messages on standard input and output: JSON behind a 4-byte big-endian length; an empty one says that it has begun.
Names and behaviour that templates find are those of transformers (`transformers.utils.chat_template_utils`), which
templates are written for.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

LENGTH = struct.Struct(">I")
MEMORY_BYTES = 512 << 20
"""Address space beyond what the process has when it starts."""
CPU_SECONDS = 10
"""Processor time for one rendering, should nobody be there any more to end it sooner."""
OPEN_FILES = 8


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


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Say that it has begun, then answer until the other side closes its end."""
    compiled = lru_cache(maxsize=8)(environment().from_string)
    compiled("{{ messages }}").render(messages=[])  # what rendering imports is imported before the limits
    _limit()
    target.write(LENGTH.pack(0))
    target.flush()
    while True:
        head = source.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return
        body = source.read(LENGTH.unpack(head)[0])
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds if hard < 0 else min(seconds, hard), hard))
        data = json.dumps(answer(compiled, json.loads(body)), ensure_ascii=True).encode("ascii")
        target.write(LENGTH.pack(len(data)) + data)
        target.flush()


def _limit() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    wanted = {resource.RLIMIT_AS: size + MEMORY_BYTES, resource.RLIMIT_NOFILE: OPEN_FILES}
    for limit, most in {**wanted, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}.items():
        hard = resource.getrlimit(limit)[1]  # one that is lower already stays
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])  # where Jinja lies, should that not be among an isolated interpreter's own places
    serve(sys.stdin.buffer, sys.stdout.buffer)
