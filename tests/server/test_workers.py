"""Workers that die, fail, load late or misbehave; the gateway and the other models go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduler import policy
from server.worker import messages as m
from server.worker.channel import MessageReader, SocketChannel
from tests.server.conftest import Running, alive, serving, settings


def read_body(connection: socket.socket) -> bytes:
    """The body of an answer that announces its length."""
    stream = connection.makefile("rb")
    length = next(int(line.split(b":")[1]) for line in iter(stream.readline, b"") if line.startswith(b"content-length"))
    while stream.readline().strip():
        pass
    return stream.read(length)


def post(server: Running, model: str, text: str) -> Any:
    return server.client.post("/v1/completions", json={"model": model, "prompt": text})


def test_a_killed_worker_ends_its_streams_and_comes_back(server: Running) -> None:
    body = {"model": "demo", "prompt": "forever", "stream": True}
    restarts = server.ready()["demo"]["restarts"]
    pid = server.ready()["demo"]["pid"]
    other = server.ready()["other"]["pid"]
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert "tick" in next(lines)
        os.kill(pid, signal.SIGKILL)
        last = [line for line in lines if line.startswith("data:")][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert post(server, "other", "hello").status_code == 200
    assert server.until_state("demo", "hot") < 10
    assert post(server, "demo", "hello").status_code == 200
    assert server.ready()["demo"]["restarts"] == restarts + 1
    assert server.ready()["demo"]["pid"] != pid
    assert server.ready()["other"]["pid"] == other


def test_bytes_that_are_no_message_replace_the_worker() -> None:
    with serving(settings()) as server:
        server.until_state("demo", "hot")
        pid = server.ready()["demo"]["pid"]
        response = post(server, "demo", "garbage")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
        assert response.headers["retry-after"] == "2"
        server.until(lambda: server.ready()["demo"].get("pid", pid) != pid)


def test_a_model_on_demand_is_loaded_once_for_all_who_ask(server: Running) -> None:
    assert server.ready()["later"]["state"] == "cold"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post(server, "later", "hello"), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert (server.ready()["later"]["state"], server.ready()["later"]["restarts"]) == ("hot", 0)


def test_a_model_that_cannot_load_is_503_and_keeps_the_server_not_ready() -> None:
    models = [{"name": "bad", "path": "broken"}, {"name": "good"}, {"name": "crash", "path": "crashing"}]
    with serving(settings(*models)) as server:
        for name in ("bad", "crash"):
            server.until_state(name, "failed")
        server.until_state("good", "hot")
        assert server.client.get("/ready").status_code == 503
        error = post(server, "bad", "hello")
        assert (error.status_code, error.json()["error"]["code"]) == (503, "model_failed")
        assert "check models.path" in error.json()["error"]["message"]
        assert int(error.headers["retry-after"]) > 1
        assert "status 3" in server.ready()["crash"]["error"]
        assert post(server, "good", "hello").status_code == 200


def test_a_worker_that_hangs_is_replaced() -> None:
    with serving(settings(worker_silence_seconds=1.5)) as server:
        server.until_state("demo", "hot")
        pid = server.ready()["demo"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        server.until(lambda: server.ready()["demo"].get("pid", pid) != pid)
        server.until(lambda: post(server, "demo", "hello").status_code == 200)
        assert not alive(pid)


def test_a_worker_that_does_not_end_is_killed_at_shutdown() -> None:
    with serving(settings({"name": "demo", "path": "stubborn"}, drain_seconds=0.1)) as server:
        server.until_state("demo", "hot")
        pid = server.ready()["demo"]["pid"]
    assert not alive(pid)


def test_shutdown_does_not_wait_for_a_load_nor_do_its_clients() -> None:
    with serving(settings({"name": "demo", "path": "stuck"}, drain_seconds=60)) as server:
        server.until(lambda: server.ready()["demo"].get("stage") == "weights")
        pid, began = server.ready()["demo"]["pid"], time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, server, "demo", "hello")
            server.until(lambda: server.slot().waiting == 1)
            server.stop()
            answer = waiting.result(20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert time.monotonic() - began < 20
    assert not alive(pid)


def test_a_load_is_given_up_while_other_models_still_finish_their_requests() -> None:
    models = [{"name": "demo", "path": "stubborn"}, {"name": "late", "path": "stuck"}]
    with serving(settings(*models, drain_seconds=60)) as server:
        server.until_state("demo", "hot")
        server.until(lambda: server.ready()["late"].get("stage") == "weights")
        pids = {name: model["pid"] for name, model in server.ready().items()}
        with server.connect("/generate", {"model": "demo", "prompt": "hello"}):
            server.until(lambda: len(server.slot().streams) == 1)
            server.stop()
            server.until(lambda: not alive(pids["late"]))
            assert alive(pids["demo"]) and server.slot().state == "stopping"
            os.kill(pids["demo"], signal.SIGKILL)


def test_a_request_waits_for_a_load_only_so_long_and_a_client_may_leave() -> None:
    with serving(settings({"name": "demo", "path": "stuck"}, load_wait_seconds=0.2)) as server:
        response = post(server, "demo", "hello")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")
        assert int(response.headers["retry-after"]) >= 1
    with serving(settings({"name": "demo", "path": "stuck"})) as server:
        with server.connect("/generate", {"model": "demo", "prompt": "hello"}):
            server.until(lambda: server.slot().waiting == 1)
        server.until(lambda: server.slot().waiting == 0)


def test_requests_do_not_pile_up() -> None:
    limits = {"max_queue": 0, "max_concurrency": 1}
    models = [{"name": "demo", "limits": limits}, {"name": "late", "path": "stuck", "limits": limits}]
    with serving(settings(*models)) as server, contextlib.ExitStack() as connections:
        server.until_state("demo", "hot")
        for count in (1, 2):
            connections.enter_context(server.connect("/generate", {"model": "demo", "prompt": "mute"}))
            server.until(lambda count=count: len(server.slot().streams) == count)
        connections.enter_context(server.connect("/generate", {"model": "late", "prompt": "hello"}))
        server.until(lambda: server.slot("late").waiting == 1)
        for model in ("demo", "late"):
            response = post(server, model, "hello")
            assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
            assert int(response.headers["retry-after"]) >= 1


def test_a_defect_in_the_supervision_costs_one_worker_and_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    with serving(settings({"name": "demo"}, {"name": "other"})) as server:
        for name in ("demo", "other"):
            server.until_state(name, "hot")
        with monkeypatch.context() as patch:
            patch.setattr(server.app.state.scheduler, "_take_stats", broken)
            with server.connect("/generate", {"model": "demo", "prompt": "forever"}) as client:
                assert b"worker_lost" in read_body(client)
        server.until(lambda: post(server, "demo", "hello").status_code == 200)
        assert server.ready()["other"]["restarts"] == 0


def test_shutdown_ends_a_stream_that_would_go_on_for_ever() -> None:
    with serving(settings(drain_seconds=0.2)) as server:
        server.until_state("demo", "hot")
        body = {"model": "demo", "prompt": "forever", "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert "tick" in next(lines)
            server.stop()
            last = [line for line in lines if line.startswith("data:")][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_request_that_takes_too_long_is_504() -> None:
    with serving(settings(request_timeout_seconds=0.2)) as server:
        server.until_state("demo", "hot")
        response = post(server, "demo", "mute")
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (504, "deadline_exceeded", None)
        capped = server.client.post("/generate", json={"model": "demo", "prompt": "mute", "timeout_seconds": 60.0})
        assert capped.json()["error"]["param"] is None  # more of it would not help: the server's own limit was first
        server.until(lambda: server.cancelled() == 2)


def test_shutdown_ends_streams_and_workers() -> None:
    with serving(settings()) as server:
        server.until_state("demo", "hot")
        pid = server.ready()["demo"]["pid"]
        scheduler = server.app.state.scheduler
        thread = threading.Thread(target=lambda: post(server, "demo", "hello"))
        thread.start()
        thread.join()
    assert scheduler.slots["demo"].state == "cold"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_metrics_and_version(server: Running) -> None:
    assert post(server, "demo", "hello").status_code == 200
    text = server.client.get("/metrics").text
    assert 'spectral_requests_total{model="demo",status="200"}' in text
    assert all(":" not in line.split("{")[0].split()[0] for line in text.splitlines() if not line.startswith("#"))
    assert 'spectral_model_state{model="other",state="hot"} 1.0' in text
    assert 'spectral_setting_bytes_per_element{model="demo"} 0.2375' in text
    assert 'spectral_time_to_first_token_seconds_count{model="demo"}' in text
    assert server.client.get("/version").json()["version"]
    assert server.client.get("/health").json() == {"status": "ok"}


def count(server: Running, model: str, status: int) -> float:
    value = server.app.state.metrics.registry.get_sample_value(
        "spectral_requests_total", {"model": model, "status": str(status)}
    )
    return float(value or 0.0)


@pytest.mark.parametrize(
    ("model", "counted", "prompt", "status"),
    [("d", "demo", "full", 429), ("nope", "none", "hello", 404), ("d", "none", "", 400), ("d", "demo", "fail", 500)],
)
@pytest.mark.parametrize("stream", [True, False])
def test_each_request_is_counted_once_with_what_became_of_it(
    server: Running, model: str, counted: str, prompt: str, status: int, stream: bool
) -> None:
    before = count(server, counted, status)
    server.client.post("/v1/completions", json={"model": model, "prompt": prompt, "stream": stream})
    server.until(lambda: count(server, counted, status) > before)
    assert count(server, counted, status) == before + 1


@given(st.integers(1, 10_000))
def test_back_off_starts_at_once_grows_and_is_bounded(failures: int) -> None:
    assert policy.restart_delay(1) == 0
    assert policy.restart_delay(failures) <= policy.restart_delay(failures + 1) <= policy.MAX_DELAY_S
    assert policy.failures_after(failures, None) == failures + 1
    assert policy.failures_after(failures, policy.STABLE_AFTER_S) == 1


def test_the_two_ends_of_the_socket_understand_each_other() -> None:
    ours, theirs = socket.socketpair()
    child = SocketChannel(theirs)
    sent = [m.Accepted("r", 3), m.Delta("r", 0, "é", [1], [m.TokenLogprob("é", -1.0)]), m.Stats(finished={"stop": 1})]

    async def parent() -> list[Any]:
        reader, writer = await asyncio.open_connection(sock=ours)
        m.write_message(writer, m.Submit("r", "completion", m.Sampling(logit_bias={3: 1.0}), prompt=[1, 2]))
        await writer.drain()
        assert child.poll(1.0)
        request = child.receive()
        assert isinstance(request, m.Submit) and request.sampling.logit_bias == {3: 1.0}
        child.send(*sent)
        child.close()
        messages = MessageReader(reader)
        got = []
        while taken := await messages.take():
            got += taken
        writer.close()
        return got

    assert asyncio.run(parent()) == sent


@pytest.mark.parametrize("size", [1, 3, 7, 100_000])
async def test_messages_come_whole_in_pieces_of_any_size(size: int) -> None:
    sent = [m.Accepted("r", 1), m.Delta("r", 0, "x" * 1000, [1]), m.Pong(1), m.Finished("r", 0, "stop")]
    data = b"".join(m.encode(message) for message in sent)
    reader = asyncio.StreamReader()
    messages = MessageReader(reader)
    for at in range(0, len(data), size):
        reader.feed_data(data[at : at + size])
    assert await messages.take() == sent
    reader.feed_data(m.encode(m.Pong(2)) + b"\x00\x00\x00\x01\x00" + m.encode(m.Pong(3)))
    reader.feed_eof()
    assert await messages.take() == [m.Pong(2)]
    for _ in range(2):
        with pytest.raises(m.BadFrame):
            await messages.take()


async def test_a_frame_that_is_cut_off_is_the_end() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(m.encode(m.Pong(2))[:-1])
    reader.feed_eof()
    assert await MessageReader(reader).take() == []


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\x00", b"\x00\x00\x00\x00"])
def test_bad_frames_are_noticed_and_a_closed_end_is_none(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(data)
    channel = SocketChannel(theirs)
    with pytest.raises(m.BadFrame):
        channel.receive()
    ours.close()
    assert channel.receive() is None
    channel.close()
