"""Published KV-cache compression methods, implemented from their descriptions, for comparison.

    for method in baselines.get("kivi-2bit,oscar-int2"):
        method.fit(stats, shape)
        keys_hat, values_hat = method.roundtrip_all(keys, values, positions)
        method.nbytes(4096, shape), method.basis_nbytes(shape)

One file per method. `base.py` says what an evaluator may rely on.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from spectral.baselines.aatc import Aatc
from spectral.baselines.base import Baseline, CalibrationStats, ExactWindow, LayerStats, Shape
from spectral.baselines.blockmax import BlockMax
from spectral.baselines.eigen_attention import EigenAttention, EigenBudget
from spectral.baselines.fp8 import Fp8
from spectral.baselines.jarviskv import JarvisPublished, JarvisRepaired
from spectral.baselines.kivi import Kivi
from spectral.baselines.kvquant import KvQuant
from spectral.baselines.kvtc import Kvtc
from spectral.baselines.oscar import Oscar
from spectral.baselines.palu import Palu, PaluFisher
from spectral.baselines.pertoken import HadamardInt, PerToken
from spectral.baselines.spectra import Spectra
from spectral.baselines.svdq import Svdq
from spectral.baselines.think import Think
from spectral.baselines.turboquant import TurboQuant
from spectral.baselines.window import WindowOnly
from spectral.baselines.xkv import Xkv
from spectral.errors import SpectralError

__all__ = ["Baseline", "CalibrationStats", "ExactWindow", "Factory", "LayerStats", "Shape", "all", "get"]

Factory = Callable[[], Baseline]

_FACTORIES: tuple[Factory, ...] = (
    Fp8,
    partial(JarvisPublished, rank=32, bits=8),
    partial(JarvisPublished, rank=32, bits=4),
    partial(JarvisPublished, rank=4, bits=4),
    partial(JarvisRepaired, share=0.75, bits=3),
    partial(JarvisRepaired, share=0.5, bits=3),
    partial(JarvisRepaired, share=0.25, bits=3),
    *(partial(TurboQuant, bits=bits) for bits in (4, 3, 2, 1)),
    *(partial(TurboQuant, bits=bits, qjl=True) for bits in (4, 3, 2)),
    *(partial(TurboQuant, bits=bits, outliers=0.25) for bits in (3, 2)),
    *(partial(Kivi, bits=bits) for bits in (4, 3, 2)),
    *(partial(KvQuant, bits=bits) for bits in (4, 3, 2)),
    *(partial(PerToken, bits=bits) for bits in (4, 3, 2)),
    *(partial(BlockMax, bits=bits) for bits in (8, 4)),
    *(partial(HadamardInt, bits=bits) for bits in (4, 3, 2)),
    *(partial(Oscar, bits=bits) for bits in (4, 3, 2)),
    partial(Oscar, bits=2, tuned=True),
    *(partial(Spectra, bits=bits) for bits in (4.0, 3.0, 2.0, 1.5, 1.0)),
    *(partial(Spectra, bits=bits, per_head=True) for bits in (4.0, 2.0, 1.0)),
    *(partial(Aatc, bits=bits) for bits in (4.0, 2.75, 2.0, 1.5, 1.0)),
    partial(Svdq, schedule=(8, 4, 4, 2, 0, 0, 0, 0), value_bits=16),
    partial(Svdq, schedule=(8, 4, 4, 2, 0, 0, 0, 0), value_bits=4),
    partial(Svdq, schedule=(4, 4, 2, 0, 0, 0, 0, 0), value_bits=2),
    *(partial(Kvtc, ratio=ratio) for ratio in (3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0, 16.0, 22.0, 32.0)),
    *(partial(EigenAttention, share=share) for share in (0.6, 0.25, 0.125)),
    *(partial(EigenBudget, budget=budget) for budget in (0.025, 0.05, 0.1)),
    partial(Xkv, key_share=1 / 8, value_share=3 / 16),
    partial(Xkv, key_share=3 / 32, value_share=9 / 64),
    *(partial(Think, prune=prune) for prune in (0.4, 0.5)),
    partial(Palu, share=0.7, bits=4),
    *(partial(Palu, share=0.5, bits=bits) for bits in (4, 3, 2)),
    *(partial(PaluFisher, share=0.5, bits=bits) for bits in (4, 3, 2)),
    WindowOnly,
    partial(WindowOnly, ratio=8.0),
)


def all() -> dict[str, Factory]:
    """Every method at every registered setting: name -> a function that makes a fresh, unfitted one."""
    return {factory().name: factory for factory in _FACTORIES}


def get(names: str | list[str] = "all") -> list[Baseline]:
    """Fresh instances of methods by name: a list, a comma-separated string, or "all". Raises SpectralError."""
    known = all()
    wanted = names.split(",") if isinstance(names, str) else list(names)
    wanted = [name.strip() for name in wanted if name.strip()]
    if wanted == ["all"]:
        wanted = list(known)
    if not wanted:
        raise SpectralError(f"no comparison was named; choose among: all, {', '.join(known)}")
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise SpectralError(f"there is no comparison {name!r}; did you mean {', '.join(near)}?")
    return [known[name]() for name in wanted]
