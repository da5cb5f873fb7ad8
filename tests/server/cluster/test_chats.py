"""A chat moves with its pages, with the demo model itself: fewer bytes than bf16, and the prompt is not read again."""

from __future__ import annotations

import sys
from typing import Any

import httpx

from tests.server.cluster.local import Local, cluster, until_ready, where
from tests.server.conftest import settings, until

TEXT = "Norway has a long coast with many islands and deep fjords. " * 40


class WithModels(Local):
    """Nodes whose workers hold the model."""

    worker = (sys.executable, "-m", "server.worker.main")


def ask(client: httpx.Client, turns: list[dict[str, str]], session: str) -> str:
    body: dict[str, Any] = {"model": "demo", "messages": turns, "max_tokens": 12, "temperature": 0, "session": session}
    answer = client.post("/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_chat_moves_as_compressed_pages() -> None:
    model = {"name": "demo", "path": "demo-7m", "setting": "8x", "limits": {"context_length": 2048}}
    with cluster(settings(model), "a", "b", kind=WithModels) as local:
        client = local.clients[0]
        until_ready(client, 90)
        (first,) = where(client)
        (second,) = {"a", "b"} - {first}
        turns = [{"role": "user", "content": TEXT}]
        said = ask(client, turns, "chat-1")
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "And its rivers?"}]
        client.post(f"/admin/nodes/{first}/drain").raise_for_status()
        until(lambda: where(client) == [second], 60)
        until(lambda: not any(name.startswith("demo#") for name in local.agents[first].scheduler.slots), 20)
        ask(client, turns, "chat-1")
        chats = local.agents[second].chats
        assert chats.moved == 1 and chats.bytes_received == local.agents[first].chats.bytes_sent
        slot = next(iter(local.agents[second].scheduler.slots.values()))
        until(lambda: slot.stats.kv_tokens >= 0 and slot.ready is not None)
        assert slot.ready is not None
        tokens = client.post("/v1/chat/completions", json={"model": "demo", "messages": turns, "max_tokens": 1}).json()
        bf16 = tokens["usage"]["prompt_tokens"] * slot.ready.bytes_per_token_exact
        assert chats.bytes_received < bf16 / 4, f"{chats.bytes_received} bytes against {bf16:.0f}"
        # Another chat of that name, under another salt or unknown, begins without pages, and without an error.
        assert ask(client, turns, "chat-2")
        assert chats.moved == 1
