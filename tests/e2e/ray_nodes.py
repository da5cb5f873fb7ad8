"""Ray nodes of one machine, in a process of their own: a line on stdin is a command, its answer a line of JSON.

add RESOURCE     one more node that has this resource; {"node": its id}
kill NODE        the node and everything on it ends at once, as by a power cut; {}
head             {"address": of the cluster, "node": id of the head}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Ray replaces loopback addresses by the machine's own, which tests must not listen on, unless it is told otherwise.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import psutil
from ray.cluster_utils import Cluster

SMALL: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    "node_ip_address": "127.0.0.1",
}


def main() -> None:
    """Serve until stdin ends."""
    cluster = patient(lambda: Cluster(initialize_head=True, head_node_args=dict(SMALL)))
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        what, _, argument = line.strip().partition(" ")
        answer: dict[str, Any] = {}
        if what == "add":
            node = patient(lambda name=argument: cluster.add_node(**SMALL, resources={name: 1}))
            nodes[node.node_id] = node
            answer = {"node": node.node_id}
        elif what == "kill":
            power_off(nodes[argument])
            cluster.remove_node(nodes.pop(argument), allow_graceful=False)
        elif what == "head":
            answer = {"address": cluster.address, "node": cluster.head_node.node_id}
        print(json.dumps(answer), flush=True)
    cluster.shutdown()


def patient(make: Callable[[], Any]) -> Any:
    """What `make` makes, at the third attempt at the latest: Ray gives a node 30 s to start, however busy all is."""
    for _ in range(2):
        try:
            return make()
        except Exception as error:  # Ray raises no other type
            print(f"Ray did not start a node: {error}", file=sys.stderr)
    return make()


def power_off(node: Any) -> None:
    """Kill a node's raylet and all of its descendants: agent, workers, Ray's own helpers."""
    for info in node.all_processes["raylet"]:
        raylet = psutil.Process(info.process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


if __name__ == "__main__":
    main()
