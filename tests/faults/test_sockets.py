"""Connections that are reset, half open, or read a byte at a time: their requests end, and nobody else notices."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

import pytest

from tests.server.conftest import Running


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}


def fine(server: Running) -> bool:
    return server.client.post("/v1/chat/completions", json=chat("hello")).status_code == 200


def reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("prompt", ["forever", "mute", "flood"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_reset_ends_the_request_in_the_worker(server: Running, prompt: str, stream: bool) -> None:
    before = server.cancelled()
    connection = server.connect("/v1/chat/completions", chat(prompt, stream=stream))
    server.until(lambda: bool(server.slot().streams))
    reset(connection)
    server.until(lambda: server.cancelled() == before + 1)
    assert server.slot().streams == {} and fine(server)


def test_connections_that_say_nothing_or_half_cost_nobody_else(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-"
    begun = [b"", b"POST", head, b"\x16\x03\x01\x02\x00\x01\x00"]
    body = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    connections = []
    for number in range(100):
        connection = socket.create_connection((host, int(port)))
        connection.sendall([*begun, body][number % 5])
        connections.append(connection)
    try:
        began = time.monotonic()
        assert all(fine(server) for _ in range(5))
        assert time.monotonic() - began < 5
        assert server.slot().streams == {}, "a body that has not come yet holds nothing in a worker"
    finally:
        for number, connection in enumerate(connections):
            reset(connection) if number % 2 else connection.close()
    assert fine(server)


def test_one_who_reads_a_byte_at_a_time_gets_everything_and_holds_nobody_up(server: Running) -> None:
    connection = server.connect("/v1/chat/completions", chat("hello", stream=True))
    got = b""
    with connection:
        while b"[DONE]" not in got:
            piece = connection.recv(1)
            assert piece, "the stream ended early"
            got += piece
            if len(got) % 100 == 0:
                assert server.client.get("/health").status_code == 200
    text = got.split(b"\r\n\r\n", 1)[1]
    said = [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in said if c["choices"]) == "one two three "


def test_a_client_that_ends_its_sending_half_still_gets_its_answer_or_an_end(server: Running) -> None:
    connection = server.connect("/v1/chat/completions", chat("hello"))
    connection.shutdown(socket.SHUT_WR)
    with connection:
        got = b"".join(iter(lambda: connection.recv(65536), b""))
    assert got == b"" or b"one two three" in got or b"client_gone" in got
    server.until(lambda: server.slot().streams == {})
    assert fine(server)
