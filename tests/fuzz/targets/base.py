"""What targets share."""

from __future__ import annotations

import shutil
import tempfile
from functools import cached_property
from pathlib import Path


class Base:
    """Bounds of one input, and a folder in memory where there is one: syncing to a disk is not what is tested."""

    seconds = 1.0
    memory = 256 << 20

    @cached_property
    def folder(self) -> Path:
        """For files that are read."""
        shm = Path("/dev/shm")
        return Path(tempfile.mkdtemp(prefix="spectral-fuzz-", dir=shm if shm.is_dir() else None))

    def close(self) -> None:
        """Remove it."""
        if "folder" in self.__dict__:
            shutil.rmtree(self.folder, ignore_errors=True)
