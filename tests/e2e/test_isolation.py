"""Keys do not share the cache: with the real server, what one key asked does not make another key's answer faster."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from harness import Server, running_server, wait_for

from spectral.keyfile import hash_secret

pytestmark = pytest.mark.e2e
ALICE, MALLORY = "a key that Alice has", "a key that Mallory has"
WORDS = "The harbour was quiet when the first boats came back and nobody on the quay spoke of the storm".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("isolation")
    people = {"alice": ALICE, "mallory": MALLORY}
    keys = "\n".join(f"    - {{name: {name}, hash: '{hash_secret(key)}'}}" for name, key in people.items())
    config = folder / "config.yaml"
    config.write_text(f"auth:\n  metrics: open\n  keys:\n{keys}\nmodels:\n  - {{name: demo-7m}}\n")
    with running_server(folder, "--config", str(config)) as server:
        yield server


def secret(number: int) -> str:
    """A prompt of several hundred tokens that nobody else would send."""
    return f"Case {number}. " + " ".join(f"{word} {(7 * i + number) % 89}" for i, word in enumerate(WORDS * 12))


def ask(server: Server, key: str, prompt: str) -> float:
    """Seconds until the whole answer of one token was there."""
    body = {"model": "demo-7m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    began = time.monotonic()
    answer = server.client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 512
    return time.monotonic() - began


def reused(server: Server, asked: int) -> float:
    """Prompt tokens that were found in the cache, once so many requests are counted."""
    name = "spectral_prefix_asked_tokens_total"
    wait_for("the requests are counted", lambda: server.metrics().get(name, 0.0) >= asked, 20)
    return server.metrics()["spectral_prefix_reused_tokens_total"]


def test_a_key_shares_prefixes_with_itself_alone(shared: Server) -> None:
    prompt = secret(0)
    ask(shared, ALICE, prompt)
    tokens = shared.metrics().get("spectral_prompt_tokens_total", 0.0) or 512
    assert reused(shared, 512) == 0
    ask(shared, MALLORY, prompt)
    assert reused(shared, int(1.5 * tokens)) == 0
    ask(shared, ALICE, prompt)
    assert reused(shared, int(2.5 * tokens)) >= 512
    before = reused(shared, 0)
    ask(shared, MALLORY, prompt)
    assert reused(shared, int(3.5 * tokens)) >= before + 512  # each has its own


@pytest.mark.alone
def test_the_time_of_an_answer_does_not_tell_what_another_key_asked(shared: Server) -> None:
    """Mallory times prompts that Alice has sent and prompts that nobody has sent: the one is not the faster."""
    rounds = 5
    known, unknown, own = [], [], []
    for number in range(rounds):
        ask(shared, ALICE, secret(100 + number))
        known.append(ask(shared, MALLORY, secret(100 + number)))
        unknown.append(ask(shared, MALLORY, secret(200 + number)))
        own.append(ask(shared, MALLORY, secret(200 + number)))
    seen, fresh, again = (min(times) for times in (known, unknown, own))
    assert again < 0.6 * fresh, "reuse cannot be seen here at all, so the comparison would say nothing"
    assert seen > 0.75 * fresh, f"{seen:.3f} s for a prompt that another key sent, {fresh:.3f} s for a new one"
