"""From reports to orders, under a clock of the test's own: splits, growth with traffic, a conductor that is new."""

from __future__ import annotations

from server.cluster import wire
from server.cluster.ledger import Model, Node, Replica
from server.cluster.placement import Placements
from server.config import ModelSettings
from server.scheduler.steward import Facts
from server.worker import messages
from tests.server.cluster.test_fleet import LADDER
from tests.server.scheduler.cases import GIB


class Clocked(Placements):
    """With nodes of two GPUs of 16 GiB; models of as many GiB as `sizes` says."""

    def __init__(self, sizes: dict[str, float], nodes: int = 2, **replicas: dict[str, int]) -> None:
        self.now, self.sizes = 0.0, sizes
        self.ended: dict[str, int] = {}
        super().__init__(lambda: self.now)
        models = [ModelSettings(name=name, path="x").model_dump(mode="json") for name in sizes]
        self.configure(wire.Configure(models, {"replicas": replicas}))
        for number in range(nodes):
            node = self.nodes[f"n{number}"] = Node(f"n{number}")
            node.devices = [wire.DeviceState(f"cuda:{i}", 16 * GIB, 17 * GIB) for i in range(2)]
            node.devices.append(wire.DeviceState("cpu", 64 * GIB, 64 * GIB))

    def facts(self, settings: ModelSettings, kind: str, setting: str, replica: Replica) -> Facts:
        return Facts(int(self.sizes[settings.name] * GIB), LADDER, GIB // 2, load_s=8.0)

    def orders(self) -> dict[str, list[wire.Assignment]]:
        return {name: self.assignments(name) for name in self.nodes}

    def report(self, running: int = 0, ended: int = 0) -> None:
        """Every replica is hot; together they run so many requests, and so many have ended since the last report."""
        count = len(self.replicas)
        for node in list(self.nodes.values()):
            states = []
            for r in self.replicas.on(node.name):
                at = list(self.replicas).index(r.name)
                mine, over = (running + at) // count, (ended + at) // count
                self.ended[r.name] = self.ended.get(r.name, 0) + over
                stats = messages.Stats(running=mine, finished={"stop": self.ended[r.name]})
                states.append(
                    wire.ReplicaState(r.name, r.model, "hot", r.device, streams=mine, retiring=r.retiring, stats=stats)
                )
            self.reported(node, states)


def test_a_model_that_no_gpu_holds_is_spread_over_one_nodes_gpus() -> None:
    places = Clocked({"big": 22.0, "small": 2.0})
    places.plan()
    big = next(iter(places.replicas.of("big")))
    assert big.device == "cuda:0,cuda:1" and set(big.devices) == {f"{big.node}/cuda:0", f"{big.node}/cuda:1"}
    ordered = {a.model: a.device for a in places.orders()[big.node]}
    assert ordered["big"] == "cuda", "the node divides it, by what its GPUs have left"
    places.report()
    for _ in range(3):
        places.now += 10.0
        places.plan()
    assert big.device == "cuda:0,cuda:1" and big.live and not places.moves


def test_a_new_conductor_finds_a_split_model_where_it_is() -> None:
    first = Clocked({"big": 22.0})
    first.plan()
    first.report()
    (big,) = first.replicas.of("big")
    second = Clocked({"big": 22.0})
    second.reported(second.nodes[big.node], [wire.ReplicaState(big.name, "big", "hot", big.device)])
    second.plan()
    (found,) = second.replicas.of("big")
    assert (found.name, found.node, found.device) == (big.name, big.node, big.device) and found.live


def test_replicas_follow_traffic_and_stay_while_it_lasts() -> None:
    places = Clocked({"chat": 2.0}, nodes=4, chat={"min": 1, "max": 8})
    places.plan()
    for second in range(400):
        places.now += 1.0
        rate = 6 if second < 200 else 0
        places.asked(wire.Ask("g", {"chat": rate} if rate else {}, {}, 0, 1.0))
        live = [r for r in places.replicas.of("chat") if r.live]
        places.report(4 * rate, rate if second != 200 else 24)
        places.plan()
        if second == 199:
            assert 4 <= len(live) <= 6 and len({r.node for r in live}) == 4
            high = len(live)
        if second == 290:
            assert len(live) == high, "it may come back"
    assert sum(r.live for r in places.replicas.of("chat")) == 1


def test_plans_have_an_end_however_many_cells_changed() -> None:
    places = Clocked({f"m{i}": 2.0 for i in range(60)}, nodes=40)
    places.plan()
    assert places.last is not None and not places.last.unmet
    assert all(replica.node for replica in places.replicas.values())
    for _ in range(50):
        places.report()
        if not places.due():
            break
        places.now += 0.25
        places.plan()
    assert places.last.left == 0 and not places.due(), "what was left has been planned"


def test_neighbours_part_once_and_stay_apart() -> None:
    """Five models learn what they cost each other: each that has to go goes once, however long traffic lasts."""
    names = [f"m{i}" for i in range(5)]
    places, moves = Clocked(dict.fromkeys(names, 2.0), nodes=3), []
    crowded = next(iter(places.nodes))
    places.plan()
    for number, replica in enumerate(list(places.replicas.values())):
        places.replicas.settle(replica, crowded, f"cuda:{number % 2}")  # as if the other nodes had come later
    for _ in range(1500):
        places.now += 1.0
        places.asked(wire.Ask("g", dict.fromkeys(names, 2), {}, 0, 1.0))
        places.report(5, 5)
        if places.due():
            places.plan()
        moves.append(places.moves)
    assert 2 <= moves[-1] <= 5 and moves[-1] == moves[len(moves) // 2]
    assert len({(r.node, r.device) for r in places.replicas.values() if r.live}) == 5


def test_a_rate_is_known_from_the_time_that_was_seen() -> None:
    model = Model("chat", since=100.0)
    for second in range(60):
        model.came(3, 101.0 + second)
    assert abs(model.rate_at(160.0) - 3.0) < 0.1
    assert abs(model.rate_at(760.0) - 3.0 * 60 / 660) < 0.2
    model = Model("other", since=0.0)
    model.came(1, 1.0)
    assert model.rate_at(1.0) < 0.05, "one request says little"
