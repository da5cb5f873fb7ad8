"""The one that decides which node serves what. Knows nothing of Ray; one event loop owns it.

    sync(report)   an agent tells what it has and gets its orders: at once where they changed, else after SYNC_S
    ask(question)  a gateway tells its traffic and gets the table of nodes, in the same way
    command        what an administrator wants

What is decided follows from what nodes report, so a conductor that was restarted knows everything again after the
first reports; storage has what cannot be asked for: the configuration, choices, drained nodes, and the secret.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from server.cluster import wire
from server.cluster.ledger import Node, Replica
from server.cluster.placement import Placements
from server.cluster.store import Store

log = logging.getLogger("spectral.cluster")
SYNC_S = 0.5
TICK_S = 0.25
TABLE_S = 1.0
"""A table in which nothing but figures changed may be so old."""
BROKEN_S = 1.5
"""Silence of a node that a gateway has lost as well; reports come every SYNC_S."""
SETTLE_S = 20.0
"""How long the first plan waits for nodes that are there: what is placed on the first one would have to move later."""


class NotConfigured(Exception):
    """The conductor does not know what is to be served; nodes go on with what they have."""


class Conductor:
    """Made before the loop runs; :meth:`start` belongs to the loop. `clock`: monotonic seconds."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self.secret = store.secret()
        self.places = Placements(clock)
        self._changed = asyncio.Condition()
        self._version = 1
        self._drained: set[str] = set(store.get("drained", []))
        self._ticking: asyncio.Task[None] | None = None
        self._began = clock()
        self._not_before = -math.inf
        self._packed = 0, 0.0, b""  # the table as it was told last: its version, when, its bytes
        self.expected: set[str] = set()
        """Nodes that are known to be there and may not have reported yet: the first plan waits for them a while."""
        known = store.get("configure", None)
        if known is not None:
            self._configure(wire.Configure(**known))
        for model, choice in store.get("choices", {}).items():
            self.places.choices[model] = wire.Choice(**{**choice, "model": model})

    def start(self) -> None:
        """Begin to watch and to plan. Safe to call again."""
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop planning; nodes go on with their last orders."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
            self._ticking = None

    # ------------------------------------------------------------------------------------------ agents

    async def sync(self, body: bytes) -> bytes:
        """An agent's report; its orders. Raises BadFrame, NotConfigured."""
        report: wire.Report = wire.unpack(body, wire.Report)
        if not self.places.settings:  # no orders are not the same as orders to serve nothing
            raise NotConfigured("no gateway has told yet which models there are")
        node = self.places.nodes.get(report.node)
        if node is None:
            node = self.places.nodes[report.node] = Node(report.node, draining=report.node in self._drained)
            log.info("node %s joined, %s", report.node, report.address)
        if node.life != report.life or node.address != report.address:
            node.life, node.address = report.life, report.address
            node.version += 1
            self.places.touch()
            await self._tell()
        node.seen_at, node.devices = self._clock(), report.devices
        self.places.reported(node, report.replicas)
        await self._plan_if_due()
        if report.seen == node.version:
            await self._wait(lambda: node.version != report.seen, SYNC_S)
        node.seen_at = self._clock()
        return wire.pack(wire.Orders(node.version, self.places.assignments(node.name)))

    # ------------------------------------------------------------------------------------------ gateways

    async def ask(self, body: bytes) -> bytes:
        """A gateway's traffic and who waits there; the table. Raises BadFrame."""
        asked: wire.Ask = wire.unpack(body, wire.Ask)
        for name in asked.broken:
            node = self.places.nodes.get(name)
            if node is not None and self._clock() - node.seen_at > BROKEN_S:
                await self.lost(name, f"its connection to a gateway broke, and it was silent for {BROKEN_S:g} s")
        self.places.asked(asked)
        await self._plan_if_due()
        if asked.seen == self._version and asked.wait > 0:
            await self._wait(lambda: self._version != asked.seen, min(asked.wait, 10.0))
        if self._packed[0] != self._version or self._clock() - self._packed[1] > TABLE_S:
            self._packed = self._version, self._clock(), wire.pack(self.table())
        return self._packed[2]

    def table(self) -> wire.Table:
        """Where everything is."""
        nodes = [
            wire.NodeInfo(
                node.name,
                node.address,
                node.draining,
                devices=node.devices,
                replicas=[r.name for r in self.places.replicas.on(node.name)],
            )
            for node in self.places.nodes.values()
        ]
        stages = {model.name: model.stage for model in self.places.models.values() if model.stage}
        return wire.Table(self._version, nodes, stages, _described(self.places))

    # ------------------------------------------------------------------------------------------ commands

    async def command(self, body: bytes) -> bytes:
        """Carry a command out. Raises BadFrame; a command that cannot be carried out is answered with an error."""
        what = wire.command(body)
        error = ""
        if isinstance(what, wire.Configure):
            error = self._configure(what)
            if not error:
                self._store.put("configure", json.loads(json.dumps(_plain(what))))
        elif isinstance(what, wire.Choice):
            self.places.choices[what.model] = what
            self._store.put("choices", {name: _plain(choice) for name, choice in self.places.choices.items()})
            self.places.touch()
        elif isinstance(what, wire.Release):
            self.places.release(what.model)
        elif what.node not in self.places.nodes and what.on:
            error = f"there is no node {what.node!r}; there are {', '.join(self.places.nodes) or 'none'}"
        else:
            self._drain(what.node, what.on)
        await self._plan()
        return wire.pack(wire.Answer(error))

    def _configure(self, what: wire.Configure) -> str:
        try:
            self.places.configure(what)
        except ValidationError as error:
            return f"the configuration cannot be used by the cluster: {error}"
        return ""

    def _drain(self, name: str, on: bool) -> None:
        (self._drained.add if on else self._drained.discard)(name)
        self._store.put("drained", sorted(self._drained))
        if name in self.places.nodes:
            self.places.nodes[name].draining = on
            for replica in self.places.replicas.on(name):
                replica.leaving = on
            self.places.touch()

    # ------------------------------------------------------------------------------------------ the loop

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self._look()
            except Exception:  # whatever it is, nodes go on with their orders and the next tick tries again
                log.exception("the conductor's loop failed once")

    async def _look(self) -> None:
        now, silence = self._clock(), self.places.cluster.silence_seconds
        for node in [node for node in self.places.nodes.values() if now - node.seen_at > silence]:
            await self.lost(node.name, f"it was silent for {silence:g} s")
        await self._plan_if_due()

    async def lost(self, name: str, why: str) -> None:
        """A node is gone, as silence or Ray says: what it served is planned anew."""
        self.expected.discard(name)
        if name in self.places.nodes:
            log.error("node %s is lost: %s", name, why)
            self.places.lost(name)
            await self._plan()

    async def _plan_if_due(self) -> None:
        """Reports of a large fleet come faster than it can be planned: plans take a third of the time at most."""
        if self.places.due() and self._clock() >= self._not_before:
            await self._plan()

    async def _plan(self) -> None:
        # A conductor that has just begun does not know yet what runs where: it waits for reports first.
        age, missing = self._clock() - self._began, self.expected - set(self.places.nodes)
        early = self._store.restored and age < self.places.cluster.silence_seconds / 2
        empty = not any(replica.node for replica in self.places.replicas.values())
        if early or (empty and missing and age < SETTLE_S):
            self.places.touch()
            return
        began = self._clock()
        self.places.plan()
        self._not_before = self._clock() + 2 * (self._clock() - began)
        await self._tell()

    async def _tell(self) -> None:
        self._version += 1
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        until = self._clock() + seconds
        async with self._changed:
            while not condition() and (left := until - self._clock()) > 0:
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except asyncio.TimeoutError:
                    return


def _described(places: Placements) -> dict[str, Any]:
    """The plan, JSON-ready."""
    last = places.last
    return {
        "cost": last.cost if last is not None else 0.0,
        "cells": len(places.fleet.cells),
        "unmet": list(last.unmet) if last is not None else [],
        "replicas": {
            replica.name: {
                "model": replica.model,
                "node": replica.node,
                "device": replica.device,
                "state": replica.state.state if replica.state is not None else "placed",
                "retiring": replica.retiring,
                "reason": last.reasons.get(replica.name, "") if last is not None else "",
            }
            for replica in places.replicas.values()
        },
    }


def _plain(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}


__all__ = ["Conductor", "Replica"]
