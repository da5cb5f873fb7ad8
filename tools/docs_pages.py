"""Pages of the documentation that are made from the code: the command line, and the HTTP interfaces.

python tools/docs_pages.py cli|http    prints one
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = ("get", "put", "post", "delete")


def command_line() -> str:
    """Every command with its options, as `--help` has them."""
    import typer

    from spectral.cli import app

    lines = ["# The command line", "", "Made from the program's own help.", ""]
    for path, command in commands(typer.main.get_command(app), ("spectral",)):
        lines += [f"## `{' '.join(path)}`", "", plain(command.help or ""), ""]
        rows = [row for parameter in command.params for row in parameter_rows(parameter)]
        if rows:
            lines += ["| | | |", "|---|---|---|", *rows, ""]
    lines += [
        "## Exit status",
        "",
        "0 done; 1 the server could not start, or a check says no; 2 a wrong command line, or an",
    ]
    lines += ["error that the last line names; 130 Ctrl-C."]
    return "\n".join(lines) + "\n"


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands below a group, with the words that name them."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    elif not command.hidden:
        yield path, command


def parameter_rows(parameter: Any) -> Iterator[str]:
    """An option or argument as a row of a table."""
    if getattr(parameter, "hidden", False):
        return
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    default = parameter.default
    shown = "" if default in (None, False, [], ()) or callable(default) else f"default `{default}`"
    yield f"| {names} | {cell(getattr(parameter, 'help', '') or '')} | {'required' if parameter.required else shown} |"


def http_reference() -> str:
    """Every path of the OpenAPI document: what it takes and how it answers."""
    document = openapi()
    lines = [
        "# HTTP reference",
        "",
        "Made from the OpenAPI document that the server has at `/openapi.json`. What each interface does",
    ]
    lines += ["with its fields, and what each status means, is in [Interfaces](apis.md).", ""]
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                lines += operation(document, path, method, methods[method])
    return "\n".join(lines) + "\n"


def openapi() -> dict[str, Any]:
    """The document of a server that is never started."""
    from server.app import create_app
    from server.config import Settings

    with tempfile.TemporaryDirectory() as folder:
        app = create_app(Settings(server={"state_dir": folder}, models=[{"name": "demo-7m"}]))
        try:
            return dict(app.openapi())
        finally:
            app.state.admin.state.close()


def operation(document: dict[str, Any], path: str, method: str, found: dict[str, Any]) -> list[str]:
    """One method of one path."""
    lines = [f"## `{method.upper()} {path}`", "", plain(found.get("description", found.get("summary", ""))), ""]
    rows = []
    for parameter in found.get("parameters", []):
        note = parameter.get("description") or ""
        sort = kind(document, parameter["schema"])
        rows.append(
            (parameter["name"], sort if parameter["in"] == "path" else f"{sort}, in the {parameter['in']}", note)
        )
    for media, content in found.get("requestBody", {}).get("content", {}).items():
        schema = resolved(document, content["schema"])
        required = schema.get("required", [])
        if not schema.get("properties"):
            lines += [f"The body is `{media}`.", ""]
        for name, field in schema.get("properties", {}).items():
            sort = kind(document, field) + (", required" if name in required else "")
            rows.append((name, sort, about(document, field)))
    if rows:
        lines += ["| field | kind | |", "|---|---|---|"]
        lines += [f"| `{name}` | {cell(sort)} | {cell(note)} |" for name, sort, note in rows] + [""]
    return [*lines, f"Answers: {', '.join(found['responses'])}.", ""]


def about(document: dict[str, Any], field: dict[str, Any]) -> str:
    """What a field is for: its own description, or that of the object that it takes."""
    kinds = [part for part in (*field.get("anyOf", []), *field.get("oneOf", [])) if part.get("type") != "null"]
    choices = [field, *(kinds if len(kinds) == 1 else [])]
    found = (choice.get("description") or resolved(document, choice).get("description") for choice in choices)
    return next((text for text in found if text), "")


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its reference followed."""
    while "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target
    return schema


def kind(document: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    schema = resolved(document, schema)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        kinds = [kind(document, choice) for choice in choices if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    name = str(schema.get("type", "anything"))
    if name == "array":
        return f"list of {kind(document, schema.get('items', {}))}"
    limits = {word: schema[key] for key, word in BOUNDS.items() if isinstance(schema.get(key), (int, float))}
    bounds = [f"{word} {limit:g}" for word, limit in limits.items() if abs(limit) < 2**24]
    default = schema.get("default")
    shown = [f"default {default}"] if default not in (None, "", [], {}) else []
    return ", ".join([name, *bounds, *shown])


BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def plain(text: str) -> str:
    """Help without its line breaks, except between paragraphs."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def cell(text: str) -> str:
    """A text for a table's cell."""
    return plain(text).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print({"cli": command_line, "http": http_reference}[sys.argv[1]]())
