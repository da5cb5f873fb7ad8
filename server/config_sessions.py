"""What config.yaml says about paused chats: whether their caches outlive their workers, and within which bounds."""

from __future__ import annotations

from pydantic import Field

from server.config_memory import Bytes, Seconds, Section


class SessionSettings(Section):
    """Caches of requests with a `session`, in files under server.state_dir while no worker has them."""

    keep: bool = Field(
        True,
        description="Write them when a worker ends on purpose and go on from them afterwards; false: they end with "
        "their worker, and what earlier starts have written is deleted.",
    )
    max_bytes: Bytes = Field(4 * 2**30, description="Most bytes of files, all models together; the oldest go first.")
    max_age: Seconds = Field(
        7 * 86400.0, description='A session that was not used for so long is deleted: "7d", seconds, -1 (never).'
    )
    save_seconds: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Time for writing them when a worker ends, those used last first; the rest is lost.",
    )


__all__ = ["SessionSettings"]
