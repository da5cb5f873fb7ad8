"""The parts of a cluster as Ray actors. Only this file and join.py import Ray.

    conductor   a named, detached actor that Ray starts again when it dies; its calls carry bytes
    agent       one detached actor for each node, pinned to it, holding the node's GPUs as Ray resources; it runs in a
                thread with an event loop of its own, so that Ray's calls and tokens do not wait for each other

Ray moves the actors' arguments, which are bytes of msgpack and names. Tokens never pass through it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from server import heap
from server.aio import within
from server.cluster import wire
from server.cluster.agent import ConductorAway, NodeAgent
from server.cluster.conductor import Conductor
from server.cluster.store import Store
from server.config import ServerSettings, Settings
from server.config_cluster import ClusterSettings
from server.config_memory import MemorySettings

log = logging.getLogger("spectral.cluster")
CONDUCTOR, HEAD = "spectral-conductor", "node:__internal_head__"
CALL_S, FIND_S = 15.0, 5.0
WATCH_S = 0.5
ANY_ADDRESS = ("0.0.0.0", "::")
CONCURRENT_CALLS = 10_000
"""Every agent and every gateway has one call open all the time."""


def on_head() -> dict[str, Any]:
    """Options of an actor that is to be on the head. Without the head there is no Ray cluster; on any other node the
    conductor would be lost with it, and until Ray notices that, after some 17 s, nobody plans anew what the node
    served. (Ray took a soft affinity to the head for a hint only.)"""
    there = any(node["Alive"] and HEAD in node["Resources"] for node in ray.nodes())
    return {"resources": {HEAD: 0.001}} if there else {}


class RayConductor:
    """The conductor from anywhere in the cluster; finds it again after its restart."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._handle: Any = None

    async def sync(self, report: bytes) -> bytes:
        """Raises ConductorAway."""
        return await self._call("sync", report)

    async def ask(self, question: bytes) -> bytes:
        """Raises ConductorAway."""
        return await self._call("ask", question)

    async def command(self, what: bytes) -> bytes:
        """Raises ConductorAway."""
        return await self._call("command", what)

    async def _call(self, method: str, body: bytes) -> bytes:
        try:
            if self._handle is None:
                find = asyncio.to_thread(ray.get_actor, CONDUCTOR, namespace=self._namespace)
                self._handle = await within(FIND_S, find)
            answer: bytes = await within(CALL_S, getattr(self._handle, method).remote(body))
            return answer
        except (RayError, ValueError, asyncio.TimeoutError) as error:
            self._handle = None
            raise ConductorAway(f"{type(error).__name__}") from error


class ConductorActor:
    """The conductor and the watch over Ray's nodes. `folder`: of its state; `command`: the workers' command line."""

    def __init__(self, folder: str, namespace: str, command: list[str] | None = None) -> None:
        _log_to_stderr()
        self._store = Store(Path(folder))
        self._conductor = Conductor(self._store)
        self._namespace, self._command = namespace, command
        self._agents: dict[str, Any] = {}
        self._watch: asyncio.Task[None] | None = None

    def _begin(self) -> None:
        """On the first call: Ray makes the loop after the constructor."""
        if self._watch is None:
            heap.keep()
            self._conductor.start()
            self._watch = asyncio.create_task(self._watching())

    async def join(self, configure: bytes) -> str:
        """A gateway starts: take its configuration over. Returns the secret. Raises ValueError."""
        self._begin()
        answer = wire.unpack(await self._conductor.command(configure), wire.Answer)
        if answer.error:
            raise ValueError(answer.error)
        return self._conductor.secret

    async def sync(self, report: bytes) -> bytes:
        """See Conductor."""
        self._begin()
        return await self._conductor.sync(report)

    async def ask(self, question: bytes) -> bytes:
        """See Conductor."""
        self._begin()
        return await self._conductor.ask(question)

    async def command(self, what: bytes) -> bytes:
        """See Conductor."""
        self._begin()
        return await self._conductor.command(what)

    # ------------------------------------------------------------------------------------------ nodes

    async def _watching(self) -> None:
        while True:
            try:
                await self._look(await asyncio.to_thread(ray.nodes))
            except Exception:  # Ray's own control store may be away for a while
                log.exception("Ray's nodes could not be read")
            await asyncio.sleep(WATCH_S)

    async def _look(self, nodes: list[dict[str, Any]]) -> None:
        resource = self._conductor.places.cluster.node_resource
        there = [n for n in nodes if n["Alive"] and (resource is None or n["Resources"].get(resource))]
        self._conductor.expected.update(n["NodeID"] for n in there)
        for node in nodes:
            ident = node["NodeID"]
            if not node["Alive"]:
                if ident in self._agents:
                    del self._agents[ident]
                    await self._conductor.lost(ident, "Ray says that it is dead")
            elif ident not in self._agents and node in there:
                self._agents[ident] = await asyncio.to_thread(self._make_agent, node)

    def _make_agent(self, node: dict[str, Any]) -> Any:
        places, ident = self._conductor.places, node["NodeID"]
        config = self._store.get("configure", {})
        own = node["NodeManagerAddress"]
        host = places.cluster.listen or own
        told = own if host in ANY_ADDRESS else host
        options: dict[str, Any] = {
            "name": f"spectral-node-{ident}",
            "namespace": self._namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_restarts": -1,
            "num_cpus": 0,
            "num_gpus": node["Resources"].get("GPU", 0),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(ident, soft=False),
        }
        made = ray.remote(AgentActor).options(**options)
        return made.remote(ident, config, self._conductor.secret, self._namespace, (host, told), self._command)


class AgentActor:
    """A node's agent in a thread of its own. Where it fails the process ends, and Ray starts another."""

    def __init__(
        self,
        node: str,
        config: dict[str, Any],
        secret: str,
        namespace: str,
        host: tuple[str, str],
        command: list[str] | None,
    ) -> None:
        _log_to_stderr()
        settings = node_settings(config)
        words = tuple(command) if command else (sys.executable, "-m", "server.worker.main")
        self._agent: NodeAgent | None = None
        self._loop = asyncio.new_event_loop()
        self._node, self._host = node, host
        self._build = lambda: NodeAgent(node, settings, secret, RayConductor(namespace), words)
        self._ports = settings.cluster.ports
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_forever()
        except Exception:  # logged; Ray restarts the actor
            log.exception("the node agent failed")
            os._exit(1)

    async def _serve(self) -> None:
        self._agent = self._build()
        await start_on_free_port(self._agent, self._host, self._ports)
        log.info("the agent of node %s listens on %s", self._node[:12], self._agent.address)

    def pid(self) -> int:
        """The agent's process."""
        return os.getpid()


async def start_on_free_port(agent: NodeAgent, host: tuple[str, str], ports: tuple[int, int]) -> None:
    """Listen on the first port of a range that is free; (0, 0): any. `host`: where, and what gateways are told. Raises
    OSError."""
    first, last = ports
    for port in range(first, last + 1):
        try:
            await agent.start(host[0], port, host[1])
            return
        except OSError:
            if port == last:
                raise


def node_settings(config: dict[str, Any]) -> Settings:
    """An agent's settings, from what gateways told the conductor; the node's environment has no part in it."""
    memory = MemorySettings.model_validate(config.get("memory", {}))
    if memory.spare_workers is None:  # what a lost node served is then hot elsewhere without the seconds of imports
        memory = memory.model_copy(update={"spare_workers": 1})
    return Settings.model_construct(
        server=ServerSettings(state_dir=None, **config.get("server", {})),
        memory=memory,
        cluster=ClusterSettings.model_validate(config.get("cluster", {})),
        models=(),
    )


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
