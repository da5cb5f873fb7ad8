"""What the console of a cluster's gateway is told of its nodes."""

from __future__ import annotations

from tests.server.cluster.local import cluster, until_ready
from tests.server.conftest import serving, settings


def test_the_console_is_told_of_all_nodes_and_draws_them() -> None:
    config = settings({"name": "demo"})
    config = config.model_copy(update={"cluster": type(config.cluster)(silence_seconds=60)})
    with cluster(config, "a", "b") as local:
        client = local.clients[0]
        until_ready(client)
        nodes = {node["node"]: node for node in client.get("/admin/status").json()["nodes"]}
        assert sorted(nodes) == ["a", "b"] and all(node["connected"] for node in nodes.values())
        served = [replica["model"] for node in nodes.values() for replica in node["replicas"]]
        assert served == ["demo"] and all(node["devices"][0]["budget_bytes"] for node in nodes.values())
        page, module = client.get("/").text, client.get("/console/nodes.js")
        assert 'id="node-rows"' in page and module.status_code == 200 and "/admin/nodes/" in module.text


def test_a_machine_alone_has_no_nodes() -> None:
    with serving(settings()) as server:
        assert server.client.get("/admin/status").json()["nodes"] == []
        assert server.client.get("/admin/nodes").json() == {"cluster": False, "nodes": [], "plan": {}}
