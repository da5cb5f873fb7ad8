"""The console's files: how they are served, and what they may not contain."""

from __future__ import annotations

import re

import pytest

from server.routes.console import FOLDER
from tests.server.conftest import ROOT, Running

FILES = sorted(path.name for path in FOLDER.iterdir())


def test_the_page_comes_with_a_policy_and_a_tag(server: Running) -> None:
    page = server.client.get("/")
    assert page.status_code == 200 and page.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    again = server.client.get("/", headers={"If-None-Match": page.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_and_asks_for_nothing_from_elsewhere(server: Running, name: str) -> None:
    answer = server.client.get(f"/console/{name}")
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert answer.status_code == 200 and answer.text == text
    assert not re.findall(r"(?:src|href|url\(|import|from|fetch)\W{1,3}https?:", text)
    words = r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b|style=|\bon\w+=\""
    assert not re.findall(words, text), "text is set as text, and the policy forbids inline scripts and styles"
    assert len(text.splitlines()) < 400


def test_names_outside_the_folder_are_not_found(server: Running) -> None:
    for name in ("nothing.js", "../routes/console.py", "..%2f..%2fpyproject.toml", "%2e%2e/app.py"):
        answer = server.client.get(f"/console/{name}")
        assert answer.status_code == 404 and "router" not in answer.text


def test_every_import_of_a_module_resolves_and_the_wheel_has_them() -> None:
    for path in FOLDER.glob("*.js"):
        for target in re.findall(r'from "(\./[^"]+)"', path.read_text(encoding="utf-8")):
            assert (FOLDER / target).is_file(), (path.name, target)
    assert 'packages = ["spectral", "server"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
