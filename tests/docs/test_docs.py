"""What the documents promise exists: links, commands, names, and a licence that is whole."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
MADE_BY_THE_SITE = {"cli.md", "http-reference.md"}
"""Pages that exist in the built site only (tools/docs_hooks.py)."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def links(path: Path) -> list[str]:
    """Targets of the links in a document that point into the repository."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in LINK.findall(text)]
    return [target for target in targets if target and not target.startswith(("http://", "https://", "mailto:"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    made = MADE_BY_THE_SITE if document.parent.name == "docs" else set()
    missing = [target for target in links(document) if target not in made and not (document.parent / target).exists()]
    assert missing == []


def readme_commands() -> list[list[str]]:
    """Every `spectral ...` command that the README names, as its words without options and arguments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:`|\.venv/bin/)spectral ([a-z]+)((?: [a-z]+)?)", text)
    return [[first, *second.split()] for first, second in found]


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_readme_commands_exist(words: list[str]) -> None:
    from spectral.cli import app

    # A second word is a subcommand only where the first is a group; else it is an argument such as a model's name.
    path = words if words[0] == "profile" else words[:1]
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output


def test_readme_names_some_commands() -> None:
    assert {"serve", "chat", "ps", "models", "eval", "profile", "version"} <= {words[0] for words in readme_commands()}


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_names_that_the_readme_imports_exist() -> None:
    imported = [
        (node.module, alias.name)
        for block in python_blocks()
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    ]
    assert ("spectral", "SpectralProfile") in imported
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


PUBLIC = [
    "SpectralProfile",
    "SpectralProfiler",
    "SpectralCache",
    "SpectralKVCompressor",
    "profile_from_tensors",
    "InferenceEngine",
    "SpectralError",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_import(name: str) -> None:
    import spectral

    assert name in spectral.__all__
    assert getattr(spectral, name).__name__ == name


@pytest.mark.parametrize("statement", ["import spectral", "import spectral.cli", "import spectral.resources"])
def test_import_is_torch_free(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


YAML = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", YAML)
def test_yaml_in_the_documents_is_a_valid_configuration(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.config import ModelSettings, Settings

    monkeypatch.setattr(ModelSettings, "_profile_exists", lambda self: self)
    data = yaml.safe_load(block)
    data.setdefault("models", [{"name": "demo-7m"}])
    assert Settings(**data).models


def test_there_is_yaml_to_check() -> None:
    assert len(YAML) >= 6


def test_yaml_in_the_readme_is_a_valid_configuration(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    from server.config import ModelSettings

    models = [ModelSettings(**item) for block in blocks for item in yaml.safe_load(block)["models"]]
    assert [model.name for model in models] == ["demo-7m", "mine"]


def test_version_is_the_same_everywhere() -> None:
    import spectral
    from spectral.commands.version import FALLBACK

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    written = re.search(r'^version = "([^"]+)"', text, flags=re.MULTILINE)
    assert written is not None
    assert spectral.__version__ == written[1] == FALLBACK


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text


def test_the_kernels_page_names_every_choice() -> None:
    from dataclasses import fields

    from spectral.kernels.choices import CodeChoices, DecodeChoices

    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    missing = [one.name for kind in (DecodeChoices, CodeChoices) for one in fields(kind) if f"`{one.name}`" not in text]
    assert missing == []
