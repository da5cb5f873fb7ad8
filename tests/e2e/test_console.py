"""The console of the real server, in a real Chromium. With SPECTRAL_SCREENSHOTS=1 it makes the pictures of the docs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from harness import ROOT, Server, wait_for

pytestmark = pytest.mark.e2e
MODEL = "demo-7m"


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(server.url)
    page.locator("#devices .bar").first.wait_for()
    yield page
    context.close()
    server.client.post(f"/admin/models/{MODEL}/setting", json={"setting": "auto"})


def picture(page: Any, name: str) -> None:
    """A picture for the documents, where the run is asked for them."""
    if os.environ.get("SPECTRAL_SCREENSHOTS"):
        page.screenshot(path=ROOT / "docs" / "images" / f"{name}.png", full_page=True)


def test_two_settings_of_the_model_answer_side_by_side(page: Any) -> None:
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Compare two settings").check()
    page.locator("#first").select_option("exact")
    page.locator("#second").select_option("16x")
    page.get_by_role("button", name="Send").click()
    answers = page.locator(".answer")
    for number, setting in enumerate(("exact", "16x")):
        answers.nth(number).locator("dd[data-term='tokens']").wait_for()
        assert "Paris" in answers.nth(number).locator(".text").inner_text()
        assert answers.nth(number).locator("dd[data-term='setting']").inner_text() == setting
        assert "tokens/s" in answers.nth(number).locator("dd[data-term='speed']").inner_text()
    page.locator("#spectrum svg polyline").first.wait_for()
    picture(page, "console")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    picture(page, "console-narrow")


def test_the_slider_squeezes_a_live_cache_and_the_map_shows_it(page: Any, server: Server) -> None:
    body = {"model": MODEL, "prompt": "It was a quiet morning", "stream": True, "max_tokens": 3000}
    body |= {"logit_bias": {"2": -100}}  # the token that would end the text
    stop = threading.Event()

    def long_request() -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            with client.stream("POST", "/v1/completions", json=body) as response:
                for _ in response.iter_lines():
                    if stop.is_set():
                        return

    def per_token() -> float:
        model = server.client.get("/ready").json()["models"][MODEL]
        return float(model["kv_bytes_used"] / model["kv_tokens"]) if model.get("kv_tokens", 0) > 600 else 0.0

    reader = threading.Thread(target=long_request)
    reader.start()
    try:
        before = wait_for("the cache has some hundred tokens", per_token, 60)
        page.locator('.bar [data-kind="kv"][title*="at 8x"]').wait_for(state="attached")
        card = page.locator(f'.card[data-model="{MODEL}"]')
        card.get_by_label("Setting of the cache").press("End")
        card.get_by_role("button", name="Apply").click()
        page.locator('.bar [data-kind="kv"][title*="at 16x"]').wait_for(state="attached")
        wait_for("the running request holds less per token", lambda: 0 < per_token() < before * 0.9, 20)
        assert page.locator("#log p", has_text="8x -> 16x").count() >= 1
        assert reader.is_alive()  # nobody's answer broke off
    finally:
        stop.set()
        reader.join(60)
