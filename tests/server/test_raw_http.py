"""HTTP as no library would send it: smuggling, oversized and endless heads, trailers, through raw sockets."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator

import pytest

from server import http_limits
from tests.server.conftest import Running, serving, settings

BODY = b'{"model": "demo", "prompt": "hello"}'
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
SECOND = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(settings()) as running:
        running.until(lambda: running.client.get("/ready").status_code == 200)
        yield running


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def exchange(server: Running, data: bytes) -> list[bytes]:
    """Send bytes; the status codes of everything that comes back until the server ends the connection."""
    with connect(server) as connection:
        with contextlib.suppress(OSError):  # it was refused before all was sent
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)


def test_an_ordinary_request_and_pipelined_ones(server: Running) -> None:
    assert exchange(server, HEAD + LENGTH + b"Connection: close\r\n\r\n" + BODY) == [b"200"]
    assert exchange(server, SECOND + SECOND.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) == [b"200", b"200"]
    chunked = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
    assert exchange(server, HEAD + chunked) == [b"200"]


CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        HEAD + b"Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + CHUNKED,
        HEAD + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
        HEAD + b"Content-Length: +5\r\n\r\nhello",
        HEAD + b"Content-Length: -5\r\n\r\nhello",
        HEAD + b"Content-Length: 0x5\r\n\r\nhello",
        HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
        HEAD + b"Content-Length : 5\r\n\r\nhello",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKED,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
        HEAD + b"X: a\x00b\r\n" + LENGTH + b"\r\n" + BODY,
        HEAD + b"X Y: a\r\n" + LENGTH + b"\r\n" + BODY,
        HEAD + b": a\r\n" + LENGTH + b"\r\n" + BODY,
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.1 extra") + LENGTH + b"\r\n" + BODY,
        HEAD.replace(b"HTTP/1.1", b"HTTP/3.7") + LENGTH + b"\r\n" + BODY,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_an_ambiguous_request_is_refused_and_nothing_behind_it_is_read(server: Running, head: bytes) -> None:
    """Otherwise a proxy before the server and the server could take one request for two."""
    statuses = exchange(server, head + SECOND)
    assert statuses == [b"400"], statuses


@pytest.mark.parametrize("eol", [b"\n", b"\r"])
def test_lines_end_as_http_says(server: Running, eol: bytes) -> None:
    assert exchange(server, SECOND.replace(b"\r\n", eol)) in ([], [b"400"])


@pytest.mark.parametrize("line", [b"OPTIONS *", b"CONNECT a:1", b"GET /\xff", b"TRACE /"])
def test_odd_request_lines_are_answered(server: Running, line: bytes) -> None:
    statuses = exchange(server, line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert len(statuses) <= 1 and all(b"400" <= status < b"500" for status in statuses)


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        HEAD + b"X: " + b"a" * 3_000_000,
        HEAD + b"x" * 3_000_000,
        HEAD + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 3_000_000,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 3_000_000,
    ],
)
def test_a_head_without_end_is_cut(server: Running, head: bytes) -> None:
    statuses = exchange(server, head)
    assert statuses in ([b"431"], []), statuses  # [] where the end of the connection overtook the answer
    assert server.client.get("/health").status_code == 200


def test_a_head_within_bounds_passes(server: Running) -> None:
    fields = b"".join(b"X-%d: " % number + b"a" * 500 + b"\r\n" for number in range(90))
    assert exchange(server, HEAD + fields + LENGTH + b"Connection: close\r\n\r\n" + BODY) == [b"200"]


def test_a_trailer_adds_nothing_to_the_head(server: Running) -> None:
    """A proxy that sets or removes fields does not look at trailers."""
    chunked = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nX-Request-Id: from-the-trailer\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\nTrailer: X-Request-Id\r\n\r\n" + chunked)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200") and b"from-the-trailer" not in answer


def test_slow_heads_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", 0.3)
    with serving(settings()) as server:
        for begun in (b"", b"GET /health HTTP/1.1\r\nX: "):
            with connect(server) as connection:
                connection.sendall(begun)
                began = time.monotonic()
                answer = connection.recv(4096)
                assert answer.startswith(b"HTTP/1.1 408 ") and time.monotonic() - began < 5
        with connect(server) as connection:  # also the second head of a connection
            connection.sendall(SECOND)
            answer = b""
            while not answer.endswith(b'"ok"}'):
                answer += connection.recv(65536)
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_long_answer_is_not_taken_for_a_slow_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", 0.2)
    with serving(settings(ping_seconds=0.1)) as server:
        server.until(lambda: server.client.get("/ready").status_code == 200)
        with server.client.stream("POST", "/generate_stream", json={"model": "demo", "prompt": "mute"}) as answer:
            pings = [next(lines) for lines in [answer.iter_lines()] for _ in range(8)]
        assert pings.count(": ping") >= 3


def test_websockets_are_not_spoken(server: Running) -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    upgrade += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    statuses = exchange(server, upgrade)
    assert b"101" not in statuses
