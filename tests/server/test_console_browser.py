"""The console in a real Chromium, with fake workers and the real profile store."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import jobs
from spectral.profile import SpectralProfile
from tests.chromium import missing
from tests.server.conftest import HERE, ROOT, Running, serving, settings

SHIPPED = ROOT / "profiles" / "demo-7m.safetensors"
EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>'


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    patch = pytest.MonkeyPatch()
    patch.setenv("FAKE_FINGERPRINT", SpectralProfile.load(SHIPPED).fingerprint)
    patch.setenv("FAKE_PROFILE", str(SHIPPED))
    patch.setattr(jobs, "BUILD_COMMAND", (sys.executable, str(HERE / "fake_builder.py")))
    folder = tmp_path_factory.mktemp("console")
    models = [{"name": "demo-7m"}, {"name": "org/later", "path": "demo-7m", "load": "on_demand"}]
    with serving(settings(*models, state_dir=str(folder / "state"))) as running:
        running.until_state("demo-7m", "hot")
        yield running
    patch.undo()


@pytest.fixture
def page(browser: Any, console: Running) -> Iterator[Any]:
    """The console in a fresh tab; an exception, a refused policy or a failed request in it fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.faults = faults
    page.goto(console.url)
    page.locator("#devices .bar").first.wait_for()
    yield page
    assert faults == []
    context.close()


def expected_fault(page: Any, part: str) -> None:
    """The browser logs every answer of 400 and above; this one was asked for."""
    assert any(part in fault for fault in page.faults), page.faults
    page.faults[:] = [fault for fault in page.faults if part not in fault]


@pytest.mark.alone
def test_from_first_load_to_the_live_map_within_a_second(browser: Any, console: Running) -> None:
    took = [first_load(browser, console) for _ in range(3)]  # the machine may have had something else to do
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # what is promised is for a machine of its own
    assert min(took) < 1.0 * busy, took


def first_load(browser: Any, console: Running) -> float:
    """Seconds from the address to the live map, with nothing in the browser's cache."""
    context = browser.new_context()
    page = context.new_page()
    page.goto("about:blank")
    began = time.monotonic()
    page.goto(console.url, wait_until="commit")
    page.locator("#devices .bar").first.wait_for()
    took = time.monotonic() - began
    pieces = page.locator("#devices .bar > div")
    widths = pieces.evaluate_all("nodes => nodes.map(node => parseFloat(node.style.width))")
    assert sum(widths) == pytest.approx(100, abs=0.5)
    assert page.locator("#connection").inner_text() == "live"
    context.close()
    return took


def test_the_map_is_live_and_in_figures_too(page: Any, console: Running) -> None:
    page.locator("#devices summary").click()
    assert page.locator("#devices td", has_text="demo-7m weights").count() == 1
    reading = page.locator("#devices .bar").get_attribute("aria-label")
    assert "other programs" in reading and "free" in reading
    with httpx.Client(base_url=console.url, trust_env=False) as client:
        client.post("/admin/models/org/later/load")
        page.locator('#devices td:has-text("org/later weights")').wait_for()
        client.post("/admin/models/org/later/unload", json={"drain_seconds": 0})
    page.locator('#devices td:has-text("org/later weights")').wait_for(state="detached")
    assert page.locator("#devices details").get_attribute("open") is not None


def test_the_slider_predicts_and_applies(page: Any, console: Running) -> None:
    card = page.locator('[data-model="demo-7m"]')
    slider = card.get_by_label("Setting of the cache")
    assert card.get_by_role("button", name="Apply").is_disabled()
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    prediction = card.locator("output").inner_text()
    assert prediction.startswith("4x: 4.00 bits per element, KL 0.0010, 200 B per token")
    assert slider.get_attribute("aria-valuetext") == prediction
    card.get_by_role("button", name="Apply").click()
    card.locator("dd", has_text="4x (8.0 times smaller").wait_for()
    assert console.ready()["demo-7m"]["setting"]["setting"] == "4x"
    page.locator("#log p", has_text="8x -> 4x, by hand").wait_for()
    console.client.post("/admin/models/demo-7m/setting", json={"setting": "auto"})


def test_load_pin_unpin_unload_with_the_keyboard(page: Any, console: Running) -> None:
    page.get_by_role("button", name="Load org/later", exact=True).press("Enter")
    page.locator('[data-model="org/later"] .state', has_text="hot").wait_for()
    page.get_by_role("button", name="Pin org/later", exact=True).press("Space")
    page.get_by_role("button", name="Unpin org/later", exact=True).wait_for()
    page.get_by_role("button", name="Unload org/later", exact=True).click()
    page.locator("#notice", has_text="is pinned").wait_for()
    expected_fault(page, "409")
    page.get_by_role("button", name="Unpin org/later", exact=True).press("Space")
    page.get_by_role("button", name="Pin org/later", exact=True).wait_for()
    page.get_by_role("button", name="Unload org/later", exact=True).click()
    page.locator('[data-model="org/later"] .state', has_text="cold").wait_for()


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_chat_streams_and_says_what_it_cost(page: Any) -> None:
    ask(page, "hello")
    answer = page.locator(".answer").first
    answer.locator("dd[data-term='cache']").wait_for()
    assert answer.locator(".text").inner_text().strip() == "one two three"
    figures = answer.locator("dl").inner_text()
    assert "8x" in figures and "640 B" in figures and "0.012" in figures and "5 + 3" in figures
    ask(page, "forever")
    page.locator(".answer .text", has_text="tick tick").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator(".answer .bad", has_text="stopped").wait_for()
    ask(page, "long")
    page.locator(".answer .bad", has_text="too long").wait_for()
    expected_fault(page, "400")


def test_two_settings_answer_side_by_side(page: Any, console: Running) -> None:
    page.get_by_label("Compare two settings").check()
    page.locator("#first").select_option("exact")
    page.locator("#second").select_option("4x")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.method == "POST" else None)
    ask(page, "hello")
    answers = page.locator(".answer")
    answers.nth(1).locator("dd[data-term='cache']").wait_for()
    answers.nth(0).locator("dd[data-term='cache']").wait_for()
    assert [answers.nth(i).locator("dd[data-term='setting']").inner_text() for i in (0, 1)] == ["exact", "4x"]
    assert console.ready()["demo-7m"]["setting"]["setting"] == "8x"
    assert [address for address in asked if "/admin/" in address] == []  # nothing was changed for anybody


def test_what_a_model_writes_is_only_text(page: Any) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": EVIL}}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, EVIL)
    page.locator(".answer dd[data-term='first token']").wait_for()
    assert page.locator(".answer .text").inner_text() == EVIL
    assert page.locator("#transcript img, #transcript script").count() == 0
    assert page.evaluate("window.evil") is None


def test_thoughts_are_shown_apart_from_the_answer(page: Any) -> None:
    deltas: list[dict[str, str]] = [{"reasoning_content": "Is it "}, {"reasoning_content": EVIL}, {"content": "Yes."}]
    body = "".join(f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n" for delta in deltas)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body + "data: [DONE]\n\n"),
    )
    ask(page, "think")
    page.locator(".answer dd[data-term='first token']").wait_for()
    assert page.locator(".answer > .text").inner_text() == "Yes."
    assert page.locator(".thoughts p").inner_text() == "Is it " + EVIL
    page.locator(".thoughts summary").press("Enter")
    assert not page.locator(".thoughts p").is_visible() and page.evaluate("window.evil") is None


def test_the_policy_stops_inline_code(page: Any) -> None:
    made = "const s = document.createElement('script'); s.textContent = 'window.evil = 1'; document.body.append(s);"
    page.evaluate(f"() => {{ {made} }}")
    assert page.evaluate("window.evil") is None
    expected_fault(page, "Content Security Policy")


def test_a_good_and_a_bad_profile_are_dropped(page: Any, tmp_path: Path, console: Running) -> None:
    profile = SpectralProfile.load(SHIPPED)
    good = dataclasses.replace(profile, provenance={"corpus": EVIL}).save(tmp_path / "good")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing of the kind")
    page.locator("#spectrum svg polyline").first.wait_for()
    page.locator("#rd svg circle").first.wait_for()
    assert page.locator("#rd svg circle").count() == len(profile.ladder)
    page.get_by_label("use it at once").check()
    drop(page, bad)
    page.locator("#upload.bad", has_text="not a safetensors file").wait_for()
    expected_fault(page, "422")
    drop(page, good)
    page.locator("#upload", has_text="published").wait_for()
    page.locator("#versions tr", has_text="upload").locator("td", has_text="in use").wait_for()
    page.locator("#versions tr", has_text="shipped").get_by_role("button", name="Compare").click()
    page.get_by_role("rowheader", name="provenance.corpus", exact=True).wait_for()
    assert page.evaluate("window.evil") is None
    page.get_by_role("button", name="Roll back").click()
    page.locator("#versions tr", has_text="shipped").locator("td", has_text="in use").wait_for()
    page.locator("#versions tr", has_text="upload").get_by_role("button", name="Delete").click()
    page.locator("#versions tr", has_text="upload").wait_for(state="detached")


def test_the_profile_asked_for_last_is_shown(page: Any, tmp_path: Path, console: Running) -> None:
    other = dataclasses.replace(SpectralProfile.load(SHIPPED), model="another").save(tmp_path / "other").read_bytes()
    kind = {"Content-Type": "application/octet-stream"}
    stored = console.client.put("/admin/profiles/demo-7m", content=other, headers=kind)
    assert stored.status_code == 201, stored.text
    held: list[Any] = []
    page.route("**/versions/shipped", lambda route: held.append(route))
    with page.expect_request("**/versions/shipped"):  # the one in use, which the page asks for by itself
        page.reload()
    page.locator("#versions tr", has_text="upload").get_by_role("button", name="Show").click()
    title = page.locator("#rd-title")
    title.filter(has_text="another").wait_for()
    with page.expect_response("**/versions/shipped"):
        held.pop().continue_()
    page.locator("#versions tr", has_text="upload").get_by_role("button", name="Compare").click()
    page.get_by_role("rowheader", name="model", exact=True).wait_for()  # by now the late answer has been read
    assert "another" in title.inner_text()
    page.locator("#versions tr", has_text="upload").get_by_role("button", name="Delete").click()
    page.locator("#versions tr", has_text="upload").wait_for(state="detached")


def drop(page: Any, file: Path) -> None:
    """What a person does who drags a file onto the page."""
    script = """([name, data]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name));
        const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
        for (const kind of ["dragenter", "dragover", "drop"])
            document.getElementById("drop").dispatchEvent(new DragEvent(kind, options));
    }"""
    import base64

    page.evaluate(script, [file.name, base64.b64encode(file.read_bytes()).decode()])


def test_a_build_shows_its_progress_and_its_end(page: Any) -> None:
    page.get_by_role("button", name="Build a new one").click()
    page.locator("#notice", has_text="The build for demo-7m: done").wait_for()
    page.locator("#versions tr", has_text="build").wait_for()
    assert page.locator("#notice").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(page: Any, scheme: str) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        missing("axe-playwright-python")
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("Compare two settings").check()
    ask(page, "hello")
    page.locator(".answer dd[data-term='cache']").first.wait_for()
    page.locator("#spectrum svg polyline").first.wait_for()
    for summary in page.locator("summary").all():
        summary.click()
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    violations = found.response["violations"]
    shown = [(item["id"], item["impact"], [node["html"][:200] for node in item["nodes"]]) for item in violations]
    # axe itself is put into the page as an inline script's text, which the policy may have something to say about.
    page.faults.clear()
    assert shown == []


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    page.locator("#spectrum svg").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.locator("button:visible, select:visible, input:visible:not([type=file])").evaluate_all(
        "nodes => nodes.filter((n) => n.getBoundingClientRect().right > window.innerWidth + 1"
        " && !n.closest('.scroll')).map((n) => n.outerHTML)"
    )
    assert cut == []


def test_everything_can_be_reached_with_the_tabulator_key(page: Any) -> None:
    page.locator("#spectrum svg").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    wanted = {"theme", "key", "chat-model", "prompt", "send", "profile-model", "file", "activate", "build", "kind"}
    assert wanted <= reached, wanted - reached


def test_a_key_is_asked_for_and_used(browser: Any) -> None:
    with serving(settings(admin_key="correct horse")) as running:
        running.until_state("demo", "hot")
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.url)
        page.get_by_label("Key", exact=True).fill("correct horse")
        page.get_by_role("button", name="Use this key").click()
        page.locator("#devices .bar").first.wait_for()
        assert page.evaluate("localStorage.getItem('spectral-key')") is None
        context.close()
