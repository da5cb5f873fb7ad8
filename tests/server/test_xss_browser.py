"""The console in a real Chromium with everybody else as the attacker: models, profiles, events and errors that hold
HTML. Nothing of it becomes part of the page, and no page of another origin administers the server."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spectral.profile import SpectralProfile
from tests.server.conftest import ROOT, Running, serving, settings

SHIPPED = ROOT / "profiles" / "demo-7m.safetensors"
EVIL = '"><img src=x onerror="window.evil=1"><script>window.evil=1</script><svg onload="window.evil=1">'
EVIL += "[x](javascript:window.evil=1)<a href='javascript:window.evil=1'>y</a>{{7*7}}${window.evil=1}\u202e<!--"


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    patch = pytest.MonkeyPatch()
    patch.setenv("FAKE_FINGERPRINT", SpectralProfile.load(SHIPPED).fingerprint)
    folder = tmp_path_factory.mktemp("xss")
    models = [{"name": "demo-7m"}, {"name": "failing", "path": "broken"}]
    with serving(settings(*models, state_dir=str(folder / "state"))) as running:
        running.until_state("demo-7m", "hot")
        running.until_state("failing", "failed")
        yield running
    patch.undo()


@pytest.fixture
def page(browser: Any, console: Running) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.goto(console.url)
    page.locator("#devices .bar").first.wait_for()
    yield page
    check_harmless(page)
    context.close()


def check_harmless(page: Any) -> None:
    """Nothing ran, and nothing that could run is in the page."""
    assert page.evaluate("window.evil") is None
    assert page.locator("main script, main img, [onerror], [onload], a[href^='javascript:']").count() == 0
    assert page.evaluate("document.querySelectorAll('script:not([src])').length") == 0


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


@pytest.mark.parametrize("failing", [False, True])
def test_what_a_model_writes_is_text(page: Any, failing: bool) -> None:
    chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": EVIL}}]}
    last: dict[str, Any] = {"error": {"message": EVIL}} if failing else {"choices": []}
    body = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps(last)}\n\ndata: [DONE]\n\n"
    headers = {"X-Spectral-Setting": "<b>8x</b>"}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body, headers=headers),
    )
    ask(page, EVIL)
    shown = page.locator(".answer .bad" if failing else ".answer .text").last
    shown.wait_for()
    page.wait_for_function("text => document.querySelector('#transcript').textContent.includes(text)", arg=EVIL[:40])
    assert EVIL[:60] in shown.text_content()
    check_harmless(page)


def test_events_and_errors_are_text(page: Any, console: Running) -> None:
    events = console.app.state.admin.events
    loop = console.app.state.scheduler.slots["demo-7m"]  # looked at while it is changed: the page polls it
    console.app.state.scheduler.slots["failing"].error = EVIL
    events.add("squeeze", EVIL, model=EVIL)
    events.add(EVIL, "an event of a kind that is HTML")
    page.locator("#log p", has_text="onerror").first.wait_for()
    page.locator("#cards", has_text="onerror").wait_for()
    assert loop.state == "hot"
    check_harmless(page)


def test_a_profile_is_text(page: Any, console: Running, tmp_path: Path) -> None:
    profile = dataclasses.replace(
        SpectralProfile.load(SHIPPED), model=EVIL.replace("\u202e", ""), provenance={EVIL: EVIL, "corpus": [EVIL]}
    )
    data = profile.save(tmp_path / "evil").read_bytes()
    kind = {"Content-Type": "application/octet-stream"}
    stored = console.client.put("/admin/profiles/demo-7m", content=data, headers=kind)
    assert stored.status_code == 201, stored.text
    page.reload()
    row = page.locator("#versions tr", has_text="upload")
    row.get_by_role("button", name="Show").click()
    page.locator("#rd-title", has_text="onerror").wait_for()
    row.get_by_role("button", name="Compare").click()
    page.locator("#facts", has_text="onerror").wait_for()
    check_harmless(page)


def test_an_answer_opened_as_a_page_runs_nothing(browser: Any, console: Running) -> None:
    context = browser.new_context()
    page = context.new_page()
    for path in ("/admin/status", "/v1/models/<script>window.evil=1</script>", "/<img src=x onerror=window.evil=1>"):
        answer = page.goto(console.url + path)
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert page.evaluate("window.evil") is None
    context.close()


class _Page(http.server.SimpleHTTPRequestHandler):
    """A page of another origin; says nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>evil</title>")

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def elsewhere() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Page)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


ATTACKS = """async ([url, mode, kind, method]) => {
    try {
        const headers = kind ? {"Content-Type": kind} : {};
        const body = method === "GET" ? undefined : "{}";
        const answer = await fetch(url, {method, mode, headers, body, credentials: "include"});
        return answer.type === "opaque" ? "opaque" : await answer.text();
    } catch (error) { return "refused"; }
}"""


def test_a_page_of_another_origin_does_and_reads_nothing(browser: Any, console: Running, elsewhere: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(elsewhere)
    for path in ("/admin/models/demo-7m/pin", "/admin/models/demo-7m/unload", "/admin/config/reload"):
        for mode, kind in (("no-cors", "text/plain"), ("no-cors", ""), ("cors", "application/json"), ("cors", "")):
            said = page.evaluate(ATTACKS, [console.url + path, mode, kind, "POST"])
            assert said in ("refused", "opaque")
    for path in ("/admin/status", "/v1/models", "/ready", "/openapi.json"):
        assert page.evaluate(ATTACKS, [console.url + path, "cors", "", "GET"]) == "refused"
    chat = page.evaluate(ATTACKS, [console.url + "/v1/chat/completions", "cors", "application/json", "POST"])
    assert chat == "refused"
    frame = "url => { const f = document.createElement('iframe'); f.src = url; document.body.append(f); }"
    page.evaluate(frame, console.url)
    form = "url => { const f = document.createElement('form'); f.method = 'POST'; f.action = url;"
    page.evaluate(form + " document.body.append(f); f.submit(); }", console.url + "/admin/models/demo-7m/pin")
    page.wait_for_load_state()
    status = console.client.get("/admin/status").json()["models"]["demo-7m"]
    assert status["state"] == "hot" and status["pinned"] is False
    context.close()


def test_the_console_has_no_inline_code_and_no_other_host() -> None:
    page = (ROOT / "server" / "console" / "index.html").read_text()
    assert "<script>" not in page and " on" + "click" not in page and "style=" not in page and "http:" not in page
    for file in (ROOT / "server" / "console").glob("*.js"):
        text = file.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "https:"):
            assert word not in text, f"{file.name}: {word}"
