"""Help as a person reads it: a flag takes no value, and what may be repeated is named by what it takes."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


def _named(parameters: list[Any], context: Any) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "metavar", None) is not None:
            continue
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif getattr(parameter, "multiple", False) and hasattr(parameter, "display_type"):
            inner = re.sub(r"list\[(\w+)\]", lambda found: found[1].lower(), str(parameter.display_type(context)))
            parameter.metavar = inner + "..."
    return parameters


class Command(TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, with names for their values."""
        return _named(super().get_params(ctx), ctx)


class Group(TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, with names for their values."""
        return _named(super().get_params(ctx), ctx)


class App(typer.Typer):
    """An application whose commands are of these kinds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Group, **options)

    def command(self, *names: Any, **options: Any) -> Any:
        """As in Typer."""
        return super().command(*names, **{"cls": Command, **options})
