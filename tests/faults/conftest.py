"""Servers under faults: fake workers for what must be exact, real ones for what must be true."""

from __future__ import annotations

from tests.server.conftest import _import_path, server

__all__ = ["_import_path", "server"]
