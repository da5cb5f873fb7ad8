"""The console of a cluster's gateway, in a real Chromium: it shows the nodes, and empties one."""

from __future__ import annotations

from typing import Any

from tests.server.cluster.local import cluster, until_ready, where
from tests.server.conftest import serving, settings


def test_nodes_are_shown_and_emptied(browser: Any) -> None:
    with cluster(settings({"name": "demo"}, {"name": "other"}), "a", "b") as local:
        client = local.clients[0]
        until_ready(client)
        status = client.get("/admin/status").json()["nodes"]
        assert [node["node"] for node in status] == ["a", "b"] and all(node["connected"] for node in status)
        (first,) = where(client)
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(60_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(str(client.base_url))
        row = page.locator(f'#nodes tr[data-node="{first}"]')
        row.get_by_text("demo on cpu: hot").wait_for()
        assert page.locator("#node-rows tr").count() == 2 and page.get_by_role("link", name="Nodes").is_visible()
        row.get_by_role("button", name="Empty").click()
        row.get_by_text("is being emptied").wait_for()
        row.get_by_role("button", name="Use again").click()
        row.get_by_text("serves").wait_for()
        assert faults == []
        context.close()


def test_a_machine_alone_has_no_nodes() -> None:
    with serving(settings()) as server:
        assert server.client.get("/admin/status").json()["nodes"] == []
