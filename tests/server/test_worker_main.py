"""The worker's process, end to end over a socket pair, with the embedded model."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.worker import messages as wire

ROOT = Path(__file__).resolve().parents[2]


class Parent:
    """The gateway's end of a worker, blocking."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.worker.main", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()

    def send(self, *messages: wire.ToWorker) -> None:
        for message in messages:
            self.socket.sendall(wire.encode(message))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def receive(self) -> wire.ToParent:
        return wire.decode_to_parent(self._exactly(struct.unpack(">I", self._exactly(4))[0]))

    def until(self, kind: type, request_id: str | None = None) -> tuple[list[wire.ToParent], wire.ToParent]:
        """Everything up to the first message of a kind (and request), and that message."""
        before: list[wire.ToParent] = []
        while True:
            message = self.receive()
            if isinstance(message, kind) and (request_id is None or message.request_id == request_id):
                return before, message
            before.append(message)

    def close(self) -> int:
        self.socket.close()
        return self.process.wait(20)


@pytest.fixture
def parent() -> Iterator[Parent]:
    parent = Parent()
    yield parent
    parent.socket.close()
    if parent.process.poll() is None:
        parent.process.kill()
    parent.process.wait(20)


@pytest.fixture(scope="module")
def ready() -> Iterator[tuple[Parent, wire.Ready]]:
    parent = Parent()
    parent.send(wire.Load("demo", "demo-7m", device="cpu", setting="exact"))
    before, message = parent.until(wire.Ready)
    assert isinstance(message, wire.Ready)
    assert [m.stage for m in before if isinstance(m, wire.Loading)][0] == "importing libraries"
    yield parent, message
    parent.socket.close()
    parent.process.wait(20)


def chat(name: str, text: str = "What is the capital of France?", **sampling: object) -> wire.Submit:
    settings = wire.Sampling(**{"temperature": 0.0, "max_tokens": 40, **sampling})  # type: ignore[arg-type]
    return wire.Submit(name, "chat", settings, messages=[wire.Message("user", text)])


def text_of(messages: list[wire.ToParent], name: str) -> str:
    return "".join(m.text for m in messages if isinstance(m, wire.Delta) and m.request_id == name)


def test_ready_has_the_figures(ready: tuple[Parent, wire.Ready]) -> None:
    info = ready[1]
    assert (info.context_length, info.setting, info.vocab_size, info.eos_token_ids) == (8192, "exact", 8192, [2])
    assert info.bytes_per_token_exact == 6 * 2 * 2 * 64 * 2 and info.bytes_per_token >= info.bytes_per_token_exact
    assert info.weights_bytes > 4 * 6_000_000 and info.chat_template and info.device == "cpu"


def test_an_answer_streams_after_accepted(ready: tuple[Parent, wire.Ready]) -> None:
    parent, _ = ready
    parent.send(chat("a", logprobs=2), wire.Ping(7))
    before, end = parent.until(wire.Finished, "a")
    kinds = [type(m) for m in before if not isinstance(m, (wire.Stats, wire.Pong))]
    assert kinds[0] is wire.Accepted and set(kinds[1:]) == {wire.Delta}
    assert "Paris" in text_of(before, "a")
    assert isinstance(end, wire.Finished) and end.reason == "stop" and end.usage.kv_bytes > 0
    deltas = [m for m in before if isinstance(m, wire.Delta)]
    assert all(m.logprobs and len(m.logprobs[0].top) == 2 for m in deltas[:-1])
    assert (deltas[-1].text, deltas[-1].logprobs) == ("", [])  # the token that ends the answer is not of it
    assert [m.seq for m in before if isinstance(m, wire.Pong)] == [7]


def test_idle_reports_no_rows(ready: tuple[Parent, wire.Ready]) -> None:
    parent, _ = ready
    parent.send(chat("idle", max_tokens=3))
    parent.until(wire.Finished, "idle")
    stats = parent.until(wire.Stats)[1]
    assert isinstance(stats, wire.Stats) and (stats.running, stats.queued, stats.kv_bytes_used) == (0, 0, 0)
    assert stats.generated_tokens >= 3


def test_bad_requests_are_rejected_by_field(ready: tuple[Parent, wire.Ready]) -> None:
    parent, _ = ready
    parent.send(
        chat("long", "a b c d e " * 9000),
        chat("huge", "word " * 1_000_000),
        chat("neg", max_tokens=-1),
        wire.Submit("ids", "completion", wire.Sampling(), prompt=[99999]),
    )
    expected = {
        "long": (400, "context_length_exceeded", "messages"),
        "huge": (400, "context_length_exceeded", "messages"),
        "neg": (400, "invalid_request", "max_tokens"),
        "ids": (400, "invalid_request", "prompt"),
    }
    got = {}
    while len(got) < len(expected):  # a long prompt's answer may come later
        message = parent.until(wire.Rejected)[1]
        assert isinstance(message, wire.Rejected) and message.message
        got[message.request_id] = (message.status, message.code, message.param)
    assert got == expected


def test_short_requests_do_not_wait_for_a_long_prompt(ready: tuple[Parent, wire.Ready]) -> None:
    parent, _ = ready
    parent.send(chat("long", "a b c d e " * 10_000), chat("short"))
    before, _ = parent.until(wire.Finished, "short")
    assert "Paris" in text_of(before, "short")
    if not any(isinstance(m, wire.Rejected) for m in before):
        parent.until(wire.Rejected, "long")


def test_a_long_prompt_can_be_cancelled_while_it_is_tokenized(ready: tuple[Parent, wire.Ready]) -> None:
    parent, _ = ready
    words = " government" * 4000  # more than LONG_PROMPT characters, and it fits the context
    parent.send(chat("long", words, max_tokens=2000), wire.Cancel("long"))
    before, end = parent.until(wire.Finished, "long")
    assert isinstance(end, wire.Finished) and end.reason == "cancelled" and end.usage.completion_tokens == 0
    assert [type(m) for m in before if not isinstance(m, wire.Stats)] == [wire.Accepted]


def test_streams_go_on_while_a_grammar_is_compiled(ready: tuple[Parent, wire.Ready]) -> None:
    parent, _ = ready
    patterns = [f"[a-z]*{letter}[a-z]{{{length}}}" for length, letter in enumerate("abcdefghijklmnopqrstuvwx", start=1)]
    schema = json.dumps({"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]})
    endless = wire.Sampling(max_tokens=8000, logit_bias={2: -100.0})
    parent.send(wire.Submit("stream", "completion", endless, prompt="Once upon"))
    parent.until(wire.Delta, "stream")
    parent.send(
        chat("hostile", grammar=wire.Grammar("json_schema", schema)),
        chat("known", grammar=wire.Grammar("regex", "[0-9]{3}")),
        chat("again", grammar=wire.Grammar("json_schema", schema)),
    )
    before, refused = parent.until(wire.Rejected, "hostile")
    assert isinstance(refused, wire.Rejected)
    assert (refused.status, refused.code, refused.param) == (400, "grammar_too_complex", "grammar")
    steps = [m for m in before if isinstance(m, wire.Delta) and m.request_id == "stream"]
    ended = [m for m in before if isinstance(m, wire.Finished) and m.request_id == "stream"]
    assert len(steps) > 50 or ended, "the stream waited"
    after, again = parent.until(wire.Rejected, "again")
    if not any(isinstance(m, wire.Finished) and m.request_id == "known" for m in after):
        after += parent.until(wire.Finished, "known")[0]
    assert text_of(after, "known").isdigit() and isinstance(again, wire.Rejected) and again.message == refused.message
    if not ended and not any(isinstance(m, wire.Finished) and m.request_id == "stream" for m in after):
        parent.send(wire.Cancel("stream"))
        parent.until(wire.Finished, "stream")


def test_texts_are_tokenized_and_back(ready: tuple[Parent, wire.Ready]) -> None:
    parent, info = ready
    parent.send(wire.Tokenize("t", "completion", "The capital of France is Paris."))
    there = parent.until(wire.Tokenized, "t")[1]
    assert isinstance(there, wire.Tokenized) and there.text == "The capital of France is Paris."
    parent.send(wire.Tokenize("b", "ids", there.tokens))
    back = parent.until(wire.Tokenized, "b")[1]
    assert isinstance(back, wire.Tokenized) and back.text == there.text and back.tokens == there.tokens
    turn = wire.Message("user", "Hello")
    parent.send(wire.Tokenize("c", "chat", messages=[turn]), wire.Tokenize("n", "ids", [info.vocab_size]))
    chat_text = parent.until(wire.Tokenized, "c")[1]
    assert isinstance(chat_text, wire.Tokenized) and chat_text.text.startswith("<|im_start|>user\nHello<|im_end|>")
    refused = parent.until(wire.Rejected, "n")[1]
    assert isinstance(refused, wire.Rejected) and (refused.status, refused.param) == (400, "prompt")
    parent.send(wire.Tokenize("x", "chat", messages=[turn], tools=[{"type": "function"}]))
    described = parent.until(wire.Tokenized, "x")[1]
    assert isinstance(described, wire.Tokenized) and '<tools>\n{"type": "function"}' in described.text
    assert info.tool_format == "hermes"


def test_cancel_ends_one_request(ready: tuple[Parent, wire.Ready]) -> None:
    parent, _ = ready
    parent.send(
        wire.Submit("c", "completion", wire.Sampling(max_tokens=8000, logit_bias={2: -100.0}), prompt="Once upon")
    )
    parent.until(wire.Delta, "c")
    parent.send(chat("d"), wire.Cancel("c"), wire.Cancel("unknown"))
    before, message = parent.until(wire.Finished, "c")
    assert isinstance(message, wire.Finished) and message.reason == "cancelled"
    if not any(isinstance(m, wire.Finished) and m.request_id == "d" for m in before):
        more, _ = parent.until(wire.Finished, "d")
        before += more
    assert "Paris" in text_of(before, "d")


def test_shutdown_drains_and_ends_with_status_0(parent: Parent) -> None:
    parent.send(wire.Load("demo", "demo-7m", device="cpu", setting="exact"))
    parent.until(wire.Ready)
    parent.send(chat("a"), wire.Shutdown(30.0), chat("late"))
    before, end = parent.until(wire.Finished, "a")
    assert isinstance(end, wire.Finished) and end.reason == "stop" and "Paris" in text_of(before, "a")
    assert any(isinstance(m, wire.Rejected) and m.request_id == "late" for m in before)
    assert parent.process.wait(20) == 0


def test_a_gateway_that_is_gone_ends_the_worker(parent: Parent) -> None:
    parent.send(wire.Load("demo", "demo-7m", device="cpu", setting="exact"))
    parent.until(wire.Loading)
    assert parent.close() == 0


def test_bytes_that_are_no_message_end_the_worker(parent: Parent) -> None:
    parent.socket.sendall(struct.pack(">I", 3) + b"abc")
    assert parent.process.wait(20) == 2


def test_a_model_that_cannot_be_loaded_is_reported(parent: Parent, tmp_path: Path) -> None:
    parent.send(wire.Load("none", str(tmp_path), device="cpu"))
    message = parent.until(wire.LoadFailed)[1]
    assert isinstance(message, wire.LoadFailed) and message.permanent and str(tmp_path) in message.message
    assert parent.process.wait(20) == 3
