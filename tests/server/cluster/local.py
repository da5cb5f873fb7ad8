"""A cluster without Ray in one thread: a conductor, agents with fake workers, and a gateway under a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import httpx
import uvicorn

from server.app import create_app
from server.cluster import wire
from server.cluster.agent import ConductorAway, NodeAgent
from server.cluster.conductor import Conductor
from server.cluster.facade import Client, configuration
from server.cluster.join import scheduler_of
from server.cluster.store import Store
from server.config import Settings
from server.serving import GracefulServer
from tests.server.conftest import FAKE, until

T = TypeVar("T")


class Direct:
    """Calls the conductor in the same loop; `away` stands for one that is being restarted."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor, self.away = conductor, False

    def __getattr__(self, name: str) -> Any:
        if name not in ("sync", "ask", "command"):
            raise AttributeError(name)

        async def call(body: bytes) -> bytes:
            if self.away:
                raise ConductorAway("for a test")
            return await getattr(self.conductor, name)(body)

        return call


class Local:
    """The running parts. Everything that touches them goes through :meth:`do`, on their loop."""

    worker = FAKE
    """The workers' command line."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.loop = asyncio.new_event_loop()
        self.agents: dict[str, NodeAgent] = {}
        self.gateways: list[tuple[GracefulServer, asyncio.Task[None], str, Any]] = []
        self.clients: list[httpx.Client] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.conductor = self.do(self._conduct())
        self.direct = Direct(self.conductor)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def do(self, work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
        """The result of a coroutine on the cluster's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    async def _conduct(self) -> Conductor:
        conductor = Conductor(self.store)
        await conductor.command(wire.pack(configuration(self.settings)))
        conductor.start()
        return conductor

    def restart_conductor(self) -> None:
        """Another one with the same storage takes its place."""

        async def replace() -> None:
            await self.conductor.stop()
            self.store.restored = True
            self.conductor = Conductor(self.store)
            self.conductor.start()
            self.direct.conductor = self.conductor

        self.do(replace())

    def node(self, name: str) -> NodeAgent:
        """One more machine."""

        async def start() -> NodeAgent:
            agent = NodeAgent(name, self.settings, self.conductor.secret, self.direct, self.worker)
            await agent.start("127.0.0.1")
            return agent

        self.agents[name] = self.do(start())
        return self.agents[name]

    def kill(self, name: str) -> None:
        """A machine loses power: its connections end without a word, its workers too."""
        agent = self.agents.pop(name)

        async def die() -> None:
            assert agent._server is not None
            agent._server.close()
            for task in list(agent._tasks):
                task.cancel()
            for relay in list(agent._relays):
                relay.link._writer.transport.abort()
            agent.scheduler.hurry()
            await agent.scheduler.stop()

        self.do(die())

    def gateway(self) -> httpx.Client:
        """One more gateway; a client of it."""

        async def start() -> tuple[GracefulServer, asyncio.Task[None], str, Any]:
            client = Client(self.direct, self.conductor.secret)
            server = self.settings.server.model_copy(update={"state_dir": tempfile.mkdtemp(prefix="spectral-test-")})
            app = create_app(self.settings.model_copy(update={"server": server}), make_scheduler=scheduler_of(client))
            listener = socket.create_server(("127.0.0.1", 0))
            config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=3)
            running = GracefulServer(config, app.state.scheduler)
            task = asyncio.create_task(running.serve(sockets=[listener]))
            return running, task, f"http://127.0.0.1:{listener.getsockname()[1]}", app

        self.gateways.append(self.do(start()))
        self.clients.append(httpx.Client(base_url=self.gateways[-1][2], timeout=30.0, trust_env=False))
        return self.clients[-1]

    def stop_gateway(self, number: int) -> None:
        """SIGTERM, so to say."""
        self.gateways[number][0].should_exit = True

    def close(self) -> None:
        """End everything."""
        for client in self.clients:
            client.close()
        for server, _, _, _ in self.gateways:
            server.should_exit = True

        async def end() -> None:
            await asyncio.gather(*(task for _, task, _, _ in self.gateways))
            await asyncio.gather(*(agent.stop() for agent in self.agents.values()))
            await self.conductor.stop()

        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextlib.contextmanager
def cluster(
    settings: Settings, *nodes: str, store: Store | None = None, kind: type[Local] | None = None
) -> Iterator[Local]:
    """A cluster of these nodes with one gateway, `clients[0]`; ended when the block is left."""
    local = (kind or Local)(settings, store or Store(None))
    try:
        local.conductor.expected.update(nodes)
        for name in nodes:
            local.node(name)
        local.gateway()
        yield local
    finally:
        local.close()


def ready(client: httpx.Client) -> bool:
    """Whether every startup model is hot."""
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def until_ready(client: httpx.Client, within_s: float = 20.0) -> float:
    """Wait for that; the seconds that it took."""
    return until(lambda: ready(client), within_s)


def where(client: httpx.Client, model: str = "demo") -> list[str]:
    """Nodes on which a model is hot."""
    nodes = client.get("/admin/nodes").json()["nodes"]
    return [
        node["node"]
        for node in nodes
        for replica in node["replicas"]
        if replica["model"] == model and replica["state"] == "hot" and not replica["retiring"]
    ]


def ask(client: httpx.Client, text: str, model: str = "demo", **more: Any) -> httpx.Response:
    """One chat request."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return client.post("/v1/chat/completions", json=body)
