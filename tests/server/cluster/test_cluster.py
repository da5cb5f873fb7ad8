"""A cluster's promises, with fake workers and without Ray: streams, loss of nodes, drains, restarts."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import httpx
import pytest

from server.cluster import wire
from server.cluster.conductor import Conductor, NotConfigured
from server.cluster.store import Store
from tests.server.cluster.local import Local, ask, cluster, until_ready, where
from tests.server.conftest import settings, until

DEMO = {"name": "demo", "aliases": ["d"]}


@pytest.fixture(scope="module")
def pair() -> Iterator[Local]:
    """Two nodes, two models, one on demand."""
    with cluster(settings(DEMO, {"name": "other"}, {"name": "later", "load": "on_demand"}), "a", "b") as local:
        until_ready(local.clients[0])
        yield local


def test_answers_come_from_a_node(pair: Local) -> None:
    answer = ask(pair.clients[0], "hello").json()
    assert answer["choices"][0]["message"]["content"] == "one two three "
    assert answer["usage"]["completion_tokens"] == 3


def test_models_are_spread_over_nodes(pair: Local) -> None:
    assert {*where(pair.clients[0]), *where(pair.clients[0], "other")} == {"a", "b"}


def test_streams_come_event_by_event(pair: Local) -> None:
    events = []
    body = {"model": "d", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    with pair.clients[0].stream("POST", "/v1/chat/completions", json=body) as response:
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]" and len(events) >= 5


def test_refusals_pass_through(pair: Local) -> None:
    refused = ask(pair.clients[0], "long")
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_model_on_demand_is_loaded_somewhere(pair: Local) -> None:
    assert where(pair.clients[0], "later") == []
    assert ask(pair.clients[0], "hello", "later").status_code == 200
    assert len(where(pair.clients[0], "later")) == 1


def test_a_second_gateway_serves_the_same(pair: Local) -> None:
    second = pair.gateway()
    until_ready(second)
    assert ask(second, "hello").status_code == 200
    assert where(second) == where(pair.clients[0])


def test_a_client_that_leaves_cancels_on_the_node(pair: Local) -> None:
    agent = pair.agents[where(pair.clients[0])[0]]
    slot = next(slot for name, slot in agent.scheduler.slots.items() if name.startswith("demo#"))
    before = slot.stats.finished.get("cancelled", 0)
    body = {"model": "demo", "stream": True, "messages": [{"role": "user", "content": "forever"}]}
    with pair.clients[0].stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    until(lambda: slot.stats.finished.get("cancelled", 0) > before)
    assert not slot.streams


def test_a_setting_chosen_by_hand_reaches_the_workers(pair: Local) -> None:
    client = pair.clients[0]
    assert client.post("/admin/models/other/setting", json={"setting": "4x"}).status_code == 200
    until(lambda: client.get("/ready").json()["models"]["other"]["setting"]["setting"] == "4x")
    assert pair.conductor.places.choices["other"].setting == "4x"


def test_metrics_and_the_memory_view_show_nodes(pair: Local) -> None:
    devices = {row["device"] for row in pair.clients[0].get("/admin/vram").json()["devices"]}
    assert devices == {"a/cpu", "b/cpu"}
    text = pair.clients[0].get("/metrics").text
    assert 'spectral_device_memory_total_bytes{device="a/cpu"}' in text
    assert 'spectral_cluster_nodes{state="connected"} 2.0' in text and "demo#" not in text


class Reader:
    """Reads a stream in a thread."""

    def __init__(self, client: httpx.Client, text: str, model: str = "demo", stream: bool = True) -> None:
        self.lines: list[str] = []
        self.status = 0
        self._body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": text}]}
        self._url = client.base_url
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30.0, trust_env=False) as client:
            with client.stream("POST", "/v1/chat/completions", json=self._body) as response:
                self.status = response.status_code
                for line in response.iter_lines():
                    if line:
                        self.lines.append(line)

    @property
    def errors(self) -> list[str]:
        """Codes of error events."""
        found = [json.loads(line.removeprefix("data: ")) for line in self.lines if '"error"' in line]
        return [item["error"]["code"] for item in found]


def test_loss_of_a_node() -> None:
    """Streams elsewhere go on, one that had begun gets a clear error, one that had not is answered by another node."""
    with cluster(settings(DEMO, {"name": "other"}, load_wait_seconds=20.0), "a", "b") as local:
        client = local.clients[0]
        until_ready(client)
        (victim,), (safe,) = where(client), where(client, "other")
        assert victim != safe
        begun, elsewhere = Reader(client, "forever"), Reader(client, "forever", "other")
        silent = Reader(client, "mute")
        until(lambda: len(begun.lines) > 5 and len(elsewhere.lines) > 5)
        until(lambda: sum(len(slot.streams) for slot in local.agents[victim].scheduler.slots.values()) == 2)
        local.kill(victim)
        begun.thread.join(10)
        assert begun.errors == ["node_lost"], begun.lines[-3:]
        until(lambda: where(client) == [safe])
        seen = len(elsewhere.lines)
        until(lambda: len(elsewhere.lines) > seen + 5)
        assert not elsewhere.errors and silent.thread.is_alive() and not silent.errors
        moved = local.agents[safe].scheduler.slots
        until(lambda: any(name.startswith("demo#") and slot.streams for name, slot in moved.items()))
        assert ask(client, "hello").status_code == 200
        local.kill(safe)
        elsewhere.thread.join(10)
        assert elsewhere.errors == ["node_lost"] and silent.thread.is_alive()
    silent.thread.join(10)
    assert silent.errors == ["shutting_down"], "no request is left without an end"


def test_a_new_node_gets_what_waits() -> None:
    with cluster(settings(DEMO, load_wait_seconds=20)) as local:
        client = local.clients[0]
        waiting = Reader(client, "hello", stream=False)
        until(lambda: client.get("/ready").json()["models"]["demo"]["state"] == "loading")
        local.node("late")
        waiting.thread.join(15)
        assert waiting.status == 200 and where(client) == ["late"]


def test_replicas_of_a_hot_model_are_on_several_nodes_and_share_its_requests() -> None:
    config = settings(DEMO)
    config = config.model_copy(update={"cluster": type(config.cluster)(replicas={"demo": {"min": 2, "max": 2}})})
    with cluster(config, "a", "b") as local:
        client = local.clients[0]
        until(lambda: where(client) == ["a", "b"] or where(client) == ["b", "a"], 20)
        readers = [Reader(client, "forever") for _ in range(6)]
        counts = lambda: [  # noqa: E731
            sum(len(slot.streams) for slot in agent.scheduler.slots.values()) for agent in local.agents.values()
        ]
        until(lambda: all(len(reader.lines) > 3 for reader in readers))
        assert min(counts()) >= 2
        local.kill("a")
        until(lambda: sum(not reader.thread.is_alive() for reader in readers) >= 2)
        assert all(reader.errors == ["node_lost"] for reader in readers if not reader.thread.is_alive())
        local.kill("b")
        for reader in readers:
            reader.thread.join(10)


def test_requests_that_wait_go_to_a_replica_that_becomes_hot() -> None:
    config = settings({**DEMO, "limits": {"max_concurrency": 1}})
    config = config.model_copy(update={"cluster": type(config.cluster)(replicas={"demo": {"max": 2}})})
    with cluster(config, "a", "b") as local:
        client = local.clients[0]
        until_ready(client)
        (first,) = where(client)
        slot = next(iter(local.agents[first].scheduler.slots.values()))
        running = Reader(client, "forever")
        until(lambda: len(running.lines) > 3)
        waiting = [Reader(client, "line", stream=streams) for streams in (False, True, False, True)]
        (second,) = {"a", "b"} - {first}
        until(lambda: second in where(client), 20)
        done = lambda: [reader for reader in waiting if not reader.thread.is_alive()]  # noqa: E731
        until(lambda: len(done()) >= 2)  # with the first replica nobody gets an answer while ticks go on
        assert slot.stats.finished["cancelled"], "they were sent there before"
        assert all(reader.status == 200 and "three" in "".join(reader.lines) for reader in done())
        assert not any(reader.errors for reader in done()) and running.thread.is_alive() and not running.errors
        local.kill(first)
        for reader in (running, *waiting):
            reader.thread.join(10)
        assert len(done()) == 4 and running.errors == ["node_lost"]


def test_drain_moves_models_before_streams_end() -> None:
    with cluster(settings(DEMO, drain_seconds=3.0), "a", "b") as local:
        client = local.clients[0]
        until_ready(client)
        (first,) = where(client)
        running = Reader(client, "forever")
        until(lambda: len(running.lines) > 3)
        assert client.post(f"/admin/nodes/{first}/drain").json() == {"node": first, "draining": True}
        (second,) = {"a", "b"} - {first}
        until(lambda: where(client) == [second])
        assert running.thread.is_alive() and not running.errors
        assert ask(client, "hello").status_code == 200
        assert client.post("/admin/nodes/nowhere/drain").status_code == 404
        assert client.post(f"/admin/nodes/{first}/undrain").status_code == 200
        local.kill(first)
        running.thread.join(10)
        assert running.errors == ["node_lost"]


def test_a_conductor_that_is_away_or_new_changes_nothing() -> None:
    with cluster(settings(DEMO), "a", "b") as local:
        client = local.clients[0]
        until_ready(client)
        before = where(client)
        running = Reader(client, "forever")
        until(lambda: len(running.lines) > 3)
        local.direct.away = True
        assert ask(client, "hello").status_code == 200
        local.restart_conductor()
        local.direct.away = False
        until(lambda: len(local.conductor.places.nodes) == 2)
        until(lambda: [r.node for r in local.conductor.places.replicas.values()] == before)
        until(lambda: where(client) == before)  # the gateway may have asked the new one before the nodes told it
        local.do(local.conductor._plan())
        assert where(client) == before and running.thread.is_alive() and not running.errors
        local.kill(before[0])
        running.thread.join(10)


def test_a_gateway_that_is_stopped_lets_its_streams_end() -> None:
    with cluster(settings(DEMO, drain_seconds=0.5), "a") as local:
        until_ready(local.clients[0])
        second = local.gateway()
        until_ready(second)
        running = Reader(second, "forever")
        until(lambda: len(running.lines) > 3)
        local.stop_gateway(1)
        running.thread.join(10)
        assert running.errors == ["shutting_down"]
        assert ask(local.clients[0], "hello").status_code == 200


def test_a_conductor_without_a_configuration_gives_no_orders() -> None:
    async def asked() -> None:
        report = wire.Report("n", "life", "127.0.0.1:1", [], [wire.ReplicaState("demo#1", "demo", "hot")])
        with pytest.raises(NotConfigured):
            await Conductor(Store(None)).sync(wire.pack(report))

    asyncio.run(asked())
