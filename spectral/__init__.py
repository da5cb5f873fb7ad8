"""Spectral: KV caches in a spectral, bit-packed form.

Names are imported lazily: `import spectral` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "SpectralProfile": "spectral.profile",
    "SpectralProfiler": "spectral.calibrate",
    "SpectralCache": "spectral.cache",
    "SpectralKVCompressor": "spectral.compressor",
    "profile_from_tensors": "spectral.from_tensors",
    "PageStore": "spectral.pages",
    "InferenceEngine": "spectral.inference",
    "Engine": "spectral.engine.engine",
    "SpectralError": "spectral.errors",
}

__all__ = [
    "Engine",
    "InferenceEngine",
    "PageStore",
    "SpectralCache",
    "SpectralError",
    "SpectralKVCompressor",
    "SpectralProfile",
    "SpectralProfiler",
    "__version__",
    "profile_from_tensors",
]

if TYPE_CHECKING:
    from spectral.cache import SpectralCache
    from spectral.calibrate import SpectralProfiler
    from spectral.compressor import SpectralKVCompressor
    from spectral.engine.engine import Engine
    from spectral.errors import SpectralError
    from spectral.from_tensors import profile_from_tensors
    from spectral.inference import InferenceEngine
    from spectral.pages import PageStore
    from spectral.profile import SpectralProfile


def __getattr__(name: str) -> Any:
    if name in __all__ and name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'spectral' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
