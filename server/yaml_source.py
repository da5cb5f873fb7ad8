"""A YAML file with its line numbers; a key that is given twice is an error."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from spectral.files import read_regular

MAX_BYTES, MAX_VALUES = 4 << 20, 50_000


class TooMuch(yaml.YAMLError):
    """A file that is too large, or whose aliases stand for more than anybody writes."""


class DuplicateKey(yaml.YAMLError):
    """A key stands twice in one mapping: one of the two values would silently be lost."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise DuplicateKey(f"line {line}: a name must be a text, not a list or a mapping")
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise DuplicateKey(f"line {line}: {key.value} is given again; line {seen[key.value]} has it already")
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep=deep)


class YamlSource:
    """The decoded file in `data`, and where its values stand. Raises OSError (also where it has more than MAX_BYTES),
    UnicodeDecodeError or YAMLError."""

    def __init__(self, path: Path) -> None:
        text = read_regular(path, MAX_BYTES).decode("utf-8")
        try:
            self._root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
            _check_size(self._root)
            self.data: Any = yaml.load(text, Loader=_Loader)
        except RecursionError:
            raise TooMuch("it is nested too deeply") from None
        except (ValueError, TypeError, OverflowError, AttributeError) as error:  # numbers and dates that are none
            raise yaml.YAMLError(f"a value cannot be read: {error}") from None

    def line(self, place: Sequence[str | int]) -> int | None:
        """The line (from 1) of a value, such as ("models", 0, "name"), or of what would hold it; None for neither."""
        node, line = self._root, None
        for part in place:
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = (node.value[part], node.value[part])
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line


def _check_size(root: yaml.Node | None) -> None:
    """Count values as they stand after aliases and merges are followed; a mapping within itself has no end."""
    rest, seen = [root], 0
    while rest:
        node = rest.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise TooMuch(f"its aliases stand for more than {MAX_VALUES} values")
        if isinstance(node, yaml.MappingNode):
            rest += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            rest += node.value


def explain_yaml(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the lines themselves: they may hold a key."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return where + ", ".join(part for part in (error.context, error.problem) if part)
