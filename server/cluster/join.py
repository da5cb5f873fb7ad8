"""`spectral serve --cluster ray`: find or start Ray, find or start the conductor, and be a gateway of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server.cluster import wire
from server.cluster.facade import Client, configuration
from server.cluster.gateway import ClusterScheduler
from server.config import Settings
from server.events import EventLog
from server.metrics import Metrics
from server.scheduler.loop import Scheduler
from server.state import DEFAULT_FOLDER

log = logging.getLogger("spectral.cluster")
LOCAL_STORE_BYTES = 100 << 20
"""Ray's shared memory where this command starts Ray itself: nothing of ours lies in it."""


class ClusterError(Exception):
    """The cluster cannot be joined; the message says what to do."""


def join(settings: Settings, command: Sequence[str] | None = None) -> Client:
    """Connect this process to Ray and to the conductor. `command`: the workers' command line, where it is not the
    usual one. Raises ClusterError."""
    try:
        import ray

        from server.cluster import ray_backend
    except ImportError as error:
        hint = "install it: pip install 'spectral-serve[ray]'"
        raise ClusterError(f"--cluster ray needs Ray ({error}); {hint}") from error
    namespace = settings.cluster.namespace
    _connect(ray, settings.cluster.address, namespace)
    folder = settings.cluster.state_dir or str(Path(settings.server.state_dir or DEFAULT_FOLDER, "cluster"))
    options: dict[str, Any] = {
        "name": ray_backend.CONDUCTOR,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "num_cpus": 0,
        "max_concurrency": ray_backend.CONCURRENT_CALLS,
        **ray_backend.on_head(),
    }
    made: Any = ray.remote(ray_backend.ConductorActor).options(**options)
    handle = made.remote(str(Path(folder).resolve()), namespace, list(command) if command else None)
    try:
        secret: Any = ray.get(handle.join.remote(wire.pack(configuration(settings))), timeout=60)
    except Exception as error:  # Ray wraps whatever it was
        raise ClusterError(f"the cluster's conductor does not take this configuration: {error}") from error
    return Client(ray_backend.RayConductor(namespace), secret)


def scheduler_of(client: Client) -> Callable[[Settings, Metrics, EventLog], Scheduler]:
    """What makes the scheduler of a gateway's application."""
    return lambda settings, metrics, events: ClusterScheduler(settings, metrics, client, events)


def _connect(ray: Any, address: str | None, namespace: str) -> None:
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.WARNING}
    try:
        ray.init(address=address or "auto", **quiet)
    except ConnectionError as error:
        if address is not None:
            raise ClusterError(f"there is no Ray at cluster.address {address!r}: {error}") from error
        log.info("no Ray runs on this machine: one is started, of this machine alone")
        ray.init(object_store_memory=LOCAL_STORE_BYTES, include_dashboard=False, **quiet)
