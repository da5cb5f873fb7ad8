"""What config.yaml says about a cluster: read only by `spectral serve --cluster ray`."""

from __future__ import annotations

from pydantic import Field, model_validator

from server.config_memory import Section


class ReplicaSettings(Section):
    """How often one model is served."""

    min: int = Field(1, ge=1, le=1000, description="Replicas of a model that is served at all.")
    max: int = Field(1, ge=1, le=1000, description="Most replicas, on as many nodes where there are so many.")
    target: float = Field(0.7, gt=0, le=1, description="Part of all replicas' max_concurrency that is busy; then more.")

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaSettings:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; make max as large as min, or min smaller")
        return self


class ClusterSettings(Section):
    """Several machines as one server, on Ray."""

    address: str | None = Field(
        None, min_length=1, description="Ray's address, host:port; null: the cluster that this machine is part of."
    )
    namespace: str = Field("spectral", min_length=1, description="Ray namespace; two clusters on one Ray need two.")
    node_resource: str | None = Field(
        None, min_length=1, description="Only nodes with this Ray resource serve models; null: all nodes."
    )
    listen: str | None = Field(
        None,
        min_length=1,
        description="Address where agents take gateways' connections; null: the node's in Ray.",
    )
    ports: tuple[int, int] = Field((0, 0), description="First and last port for that; 0: any free one.")
    silence_seconds: float = Field(5.0, ge=1, le=300, description="A node that says nothing for so long is lost.")
    state_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder of the conductor's state, on storage that its node has; null: a "
        "folder cluster in server.state_dir.",
    )
    replicas: dict[str, ReplicaSettings] = Field({}, description="By model; one replica where nothing is said.")

    @model_validator(mode="after")
    def _ports_are_a_range(self) -> ClusterSettings:
        first, last = self.ports
        if not 0 <= first <= last <= 65535 or (first == 0) != (last == 0):
            raise ValueError(f"ports must be [first, last] within 1 to 65535, or [0, 0] for any; got [{first}, {last}]")
        return self


__all__ = ["ClusterSettings", "ReplicaSettings"]
