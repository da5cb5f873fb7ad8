"""A chat that moves to another node: bytes shipped against the same cache in bf16, and the wait for the first token.

    python bench/chat_move.py [--rounds 5] [--tokens 1500] [--json bench/results/chat_move.json]

Two node agents and a gateway in this process, the demo model in workers of their own. In each round a chat with a long
prompt is answered, its node is drained, and its next turn is asked for: with the chat's name, so that its pages are
fetched, and as a chat that nobody knows, so that the prompt is read again. Waits are of whole requests of one token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import deliver, run_facts  # noqa: E402
from tests.server.cluster.local import cluster, until_ready, where  # noqa: E402
from tests.server.cluster.test_chats import WithModels  # noqa: E402
from tests.server.conftest import settings, until  # noqa: E402

WORDS = "Norway has a long coast with many islands and deep fjords, and its rivers are short and fast. "


def turn(client: Any, turns: list[dict[str, str]], name: str, most: int) -> tuple[float, dict[str, Any]]:
    """Seconds of a request, and its answer."""
    body = {"model": "demo", "messages": turns, "max_tokens": most, "temperature": 0, "session": name}
    began = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    return time.perf_counter() - began, answer.json()


def a_round(local: Any, client: Any, number: int, tokens: int) -> dict[str, float]:
    """One chat from one node to the other."""
    (first,) = where(client)
    (second,) = {"a", "b"} - {first}
    turns = [{"role": "user", "content": f"Text {number}. " + WORDS * (tokens // 20)}]
    _, said = turn(client, turns, f"chat-{number}", 8)
    turns += [said["choices"][0]["message"], {"role": "user", "content": "Go on."}]
    turns = [{"role": each["role"], "content": each["content"]} for each in turns]
    before = local.agents[second].chats.bytes_received
    client.post(f"/admin/nodes/{first}/drain").raise_for_status()
    until(lambda: where(client) == [second], 90)
    client.post(f"/admin/nodes/{first}/undrain").raise_for_status()
    moved, answer = turn(client, turns, f"chat-{number}", 1)
    unknown = [{**turns[0], "content": "Other " + turns[0]["content"]}, *turns[1:]]
    again, _ = turn(client, unknown, f"unknown-{number}", 1)
    slot = next(iter(local.agents[second].scheduler.slots.values()))
    tokens_held = said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
    return {
        "tokens": tokens_held,
        "bytes": local.agents[second].chats.bytes_received - before,
        "bf16_bytes": tokens_held * slot.ready.bytes_per_token_exact,
        "moved_s": moved,
        "read_again_s": again,
        "prompt_tokens": answer["usage"]["prompt_tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    model = {"name": "demo", "path": "demo-7m", "setting": "8x", "limits": {"context_length": 2048}}
    with cluster(settings(model), "a", "b", kind=WithModels) as local:
        client = local.clients[0]
        until_ready(client, 120)
        rows = [a_round(local, client, number, options.tokens) for number in range(options.rounds)]
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    result = {
        "setting": "8x",
        "tokens": middle["tokens"],
        "shipped_bytes": middle["bytes"],
        "bf16_bytes": middle["bf16_bytes"],
        "times_fewer_bytes": round(middle["bf16_bytes"] / middle["bytes"], 2),
        "request_ms": {
            "pages_fetched": round(middle["moved_s"] * 1e3, 1),
            "read_again": round(middle["read_again_s"] * 1e3, 1),
        },
        "rounds": options.rounds,
        **run_facts(),
    }
    deliver(result, options.json)


if __name__ == "__main__":
    main()
