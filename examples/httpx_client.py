"""Plain HTTP with httpx: server-sent events read by hand, and a stream that is given up.

    pip install httpx
    python examples/httpx_client.py

SPECTRAL_URL names another server than http://127.0.0.1:8000, SPECTRAL_API_KEY a key where it asks for one.
"""

from __future__ import annotations

import json
import os

import httpx

url = os.environ.get("SPECTRAL_URL", "http://127.0.0.1:8000")
key = os.environ.get("SPECTRAL_API_KEY", "")
headers = {"Authorization": f"Bearer {key}"} if key else {}

with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.is_error:  # an error before the first token has a status; its body says what to do
            raise SystemExit(answer.read().decode())
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":  # an empty line, a ping, or the end
                continue
            event = json.loads(data)
            if "error" in event:  # an error on the way is the last event
                raise SystemExit(event["error"]["message"])
            for choice in event["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
            if event.get("usage"):
                print(f"\n{event['usage']['completion_tokens']} tokens, cache {event['spectral']['cache_bytes']} bytes")

    # Leaving the block closes the connection, and the server ends the answer within a step.
    endless = {"model": model, "prompt": "Once", "max_tokens": 500}
    with client.stream("POST", "/generate_stream", json=endless) as answer:
        print("given up after:", next(line for line in answer.iter_lines() if line))
