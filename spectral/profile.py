"""SpectralProfile: what calibration learned about one model. `profile_file` reads and writes it."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral.basis import Unit, side_numbers
from spectral.bits import Table, row_classes
from spectral.errors import ProfileError, SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from spectral.codec import Codebook
    from spectral.compressor import Projection
    from spectral.hf import LoadedModel

CONTEXT = 4096
"""Tokens at which a setting's name states its all-in ratio."""

REPORT_CONTEXTS = (2048, 8192, 32768)

Widths = list["list[np.ndarray] | None"]
"""Per layer (None: not compressed) and unit: uint8 [classes, R]."""


@dataclass
class LadderRow:
    """One setting and its measured figures. KL in nats per token against the exact cache; bytes are all-in.

    Attributes:
        name: its all-in ratio over the full-attention layers at 4,096 tokens.
        bits_per_element: bits of the codes per number of keys and values; rank: coefficients with bits per token, over
            all layers; window_bits: of a recent token's number; window_nbytes: exact windows of all layers.
        top1: share of tokens with the same most likely next token; top5: mean overlap of the five most likely.
        energy: share of the importance-weighted variance that the codes keep, by calibration's error curves.
        recall: share of facts recalled over a distance (NaN: not measured).
    """

    name: str
    bits_per_element: float
    rank: float
    sinks: int
    window: int
    window_bits: int
    page_tokens: int
    page_nbytes: int
    window_nbytes: int
    energy: float = math.nan
    kl_mean: float = math.nan
    kl_p99: float = math.nan
    top1: float = math.nan
    top5: float = math.nan
    perplexity: float = math.nan
    exact_perplexity: float = math.nan
    recall: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: None for what was not measured."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> LadderRow:
        """The inverse of `to_dict`. Raises TypeError for facts that are no row's."""
        known: dict[str, Any] = {k: math.nan if v is None else v for k, v in facts.items()}
        return cls(**known)

    def bytes_per_token(self, context: int) -> float:
        """All-in bytes per token of one sequence of `context` tokens."""
        pages = max(0, (context - self.sinks - self.window) // self.page_tokens)
        return (pages * self.page_nbytes + self.window_nbytes) / context


@dataclass
class LayerProfile:
    """One full-attention layer: its units with keys cover the KV heads in order, and so do those with values.

    Attributes:
        frequencies: [r / 2] RoPE frequencies of the keys' frame, None if keys are not turned (spectral.frames).
    """

    units: list[Unit]
    key_dim: int
    value_dim: int
    frequencies: np.ndarray | None = None

    @property
    def kv_heads(self) -> int:
        return self.units[-1].heads[1]


@dataclass
class SpectralProfile:
    """A profile.

    Attributes:
        layers: per layer of the model; None for layers with sliding attention, which stay exact.
        tables: quantizers by width, for coefficients of unit deviation; bits: setting -> widths.
        file: where it was read from or last written to; None: it was not.
        frame: "block": keys are turned back to their block of `block_tokens` tokens; "post_rope": they are not.
    """

    model: str
    fingerprint: str
    token_nbytes: int
    layers: list[LayerProfile | None]
    tables: dict[int, Table]
    bits: dict[str, Widths]
    ladder: list[LadderRow]
    default: str
    block_tokens: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""
    sliding: list[int | None] = field(default_factory=list)  # window of every layer in tokens; [] if none slides
    file: Path | None = None

    # -- settings -------------------------------------------------------------------------------------------------

    def resolve(self, setting: str) -> str:
        """A ladder row's name for "auto" or a name. Raises SettingError naming the ladder."""
        name = self.default if setting == "auto" else setting
        if name not in self.bits:
            known = ", ".join(row.name for row in self.ladder)
            raise SettingError(f"setting {setting!r} is not in this profile's ladder: choose auto, exact, {known}")
        return name

    def choose(self, setting: str = "auto", bits: float | None = None) -> str:
        """ "exact" or a ladder row's name, for a setting or, where that is "auto", the closest to bits per element."""
        if setting == "exact" or (setting == "auto" and bits == 16):
            return "exact"
        if setting != "auto" or bits is None:
            return self.resolve(setting)
        if not 0 < bits <= 16:
            raise SettingError(f"bits must be above 0 and at most 16, got {bits!r}")
        return min(self.ladder, key=lambda row: abs(row.bits_per_element - bits)).name

    def row(self, setting: str) -> LadderRow:
        """The ladder row of a setting (or "auto")."""
        name = self.resolve(setting)
        return next(row for row in self.ladder if row.name == name)

    def codebook(
        self,
        setting: str = "auto",
        *,
        device: torch.device | str | Sequence[torch.device] = "cpu",
        finer: Codebook | None = None,
    ) -> Codebook:
        """The setting's codecs on a device, or each layer's on its own. `finer`: a codebook on the same devices; where
        it is of this profile, what it has in common with this setting is taken from there."""
        from spectral.codec import Codebook, LayerCodec, PageCodec
        from spectral.frames import BlockFrame

        row = self.row(setting)
        codecs: list[PageCodec | None] = []
        homes = device if isinstance(device, (list, tuple)) else [device] * len(self.layers)
        same = finer is not None and bool(self.content_hash) and finer.profile_hash == self.content_hash
        known = finer.layers if finer is not None and same else [None] * len(self.layers)
        for layer, widths, home, like in zip(self.layers, self.bits[row.name], homes, known, strict=True):
            if layer is None or widths is None:
                codecs.append(None)
                continue
            frame = BlockFrame(
                layer.frequencies,
                block_tokens=self.block_tokens,
                page_tokens=row.page_tokens,
                sinks=row.sinks,
                device=home,
            )
            codecs.append(
                LayerCodec(
                    list(zip(layer.units, widths, strict=True)),
                    self.tables,
                    frame,
                    key_dim=layer.key_dim,
                    value_dim=layer.value_dim,
                    page_tokens=row.page_tokens,
                    device=home,
                    finer=like if isinstance(like, LayerCodec) else None,
                )
            )
        return Codebook(
            row.name, self.content_hash, row.sinks, row.window, row.page_tokens, codecs, window_bits=row.window_bits
        )

    def check_model(self, loaded: LoadedModel) -> None:
        """Raise ProfileError unless this profile was made for that very model."""
        if self.fingerprint != loaded.fingerprint:
            raise ProfileError(
                f"this profile was made for {self.model!r} (fingerprint {self.fingerprint[:12]}) and the model is "
                f"{loaded.name!r} (fingerprint {loaded.fingerprint[:12]}); build one with `spectral profile build`"
            )
        ours = [None if x is None else (x.kv_heads, x.key_dim, x.value_dim) for x in self.layers]
        theirs = [None if x.sliding is not None else (x.kv_heads, x.key_dim, x.value_dim) for x in loaded.shape.layers]
        if ours != theirs:
            raise ProfileError(
                f"this profile's layers do not fit {loaded.name!r}, although it names that model; "
                "build it again with `spectral profile build`"
            )

    # -- what is inside -------------------------------------------------------------------------------------------

    @property
    def kv_heads(self) -> int:
        """KV heads of the first compressed layer."""
        return next((layer.kv_heads for layer in self.layers if layer is not None), 0)

    @property
    def frame(self) -> str:
        """The keys' frame."""
        return "block" if self.block_tokens else "post_rope"

    @property
    def apart(self) -> bool:
        """Whether keys and values have bases of their own in any layer, as with all that is not made for quality."""
        return any(unit.side != "both" for layer in self.layers if layer is not None for unit in layer.units)

    @property
    def classes(self) -> int:
        """Classes of a page's rows: 1 where pages are not transformed (spectral.bits.row_classes)."""
        return next((len(unit.deviation) for layer in self.layers if layer is not None for unit in layer.units), 0)

    def bits_map(self, setting: str = "auto") -> list[np.ndarray | None]:
        """Widths of a setting by page frequency: per layer uint8 [P, latents of all units] (None: not compressed)."""
        row = self.row(setting)
        counts = [len(rows) for rows in row_classes(row.page_tokens, self.classes)]
        return [
            None if widths is None else np.concatenate([np.repeat(w, counts, axis=0) for w in widths], 1)
            for widths in self.bits[row.name]
        ]

    def head_statistics(self, layer: int, head: int, side: str = "key") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean [d], metric [d, d] and covariance [d, d] of one head's keys or values, float64, keys in their frame.

        Raises ProfileError for a layer, head or side that the profile does not have.
        """
        if side not in ("key", "value"):
            raise ProfileError(f"side must be 'key' or 'value', got {side!r}")
        if not 0 <= layer < len(self.layers) or not 0 <= head < self.kv_heads:
            raise ProfileError(
                f"layer {layer}, head {head}: the profile of {self.model!r} has {len(self.layers)} layers "
                f"and {self.kv_heads} KV heads"
            )
        found = self.layers[layer]
        if found is None:
            raise ProfileError(
                f"layer {layer} has sliding attention and stays exact: choose a layer with full attention"
            )
        unit = next(u for u in found.units if u.heads[0] <= head < u.heads[1] and u.side in ("both", side))
        dim = found.key_dim if side == "key" else found.value_dim
        start = (head - unit.heads[0]) * dim
        if side == "value":
            start += side_numbers(unit.heads, unit.side, found.key_dim, found.value_dim)[0]
        rows = slice(start, start + dim)
        encode, decode = unit.encode[rows], unit.decode[rows]
        return unit.mean[rows], (encode * unit.variance) @ encode.T, decode @ decode.T

    def get_projection(self, layer: int, head: int, side: str = "key") -> Projection:
        """Statistics of one KV head's keys or values (side: "key" or "value"), for a SpectralKVCompressor."""
        from spectral.compressor import Projection

        return Projection(layer, head, *self.head_statistics(layer, head, side))

    # -- reports --------------------------------------------------------------------------------------------------

    @property
    def basis_nbytes(self) -> int:
        """Bytes that a worker holds for the bases of one setting, at most: encoder, decoder, mean, deviations, fp32."""
        return sum(
            4 * (unit.encode.size + unit.decode.size + unit.mean.size + unit.deviation.size)
            for layer in self.layers
            if layer is not None
            for unit in layer.units
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-ready; `spectrum` holds each unit's latent importances as shares of 1."""
        spectrum = [None if x is None else {_unit_name(u): _shares(u.variance) for u in x.units} for x in self.layers]
        return {
            **self.metadata(),
            "content_hash": self.content_hash,
            "basis_nbytes": self.basis_nbytes,
            "ladder": [
                {
                    **row.to_dict(),
                    "bytes_per_token": {str(c): row.bytes_per_token(c) for c in REPORT_CONTEXTS},
                    "ratio": {str(c): self.token_nbytes / row.bytes_per_token(c) for c in REPORT_CONTEXTS},
                }
                for row in self.ladder
            ],
            "spectrum": spectrum,
        }

    def metadata(self) -> dict[str, Any]:
        """What the file's header holds."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "token_nbytes": self.token_nbytes,
            "block_tokens": self.block_tokens,
            "default": self.default,
            "layers": [
                None
                if layer is None
                else {
                    "key_dim": layer.key_dim,
                    "value_dim": layer.value_dim,
                    "heads": [list(unit.heads) for unit in layer.units],
                    **({"sides": [u.side for u in layer.units]} if any(u.side != "both" for u in layer.units) else {}),
                }
                for layer in self.layers
            ],
            "ladder": [row.to_dict() for row in self.ladder],
            "provenance": self.provenance,
            **({"transform": "none"} if self.classes == 1 else {}),
            **({"sliding": self.sliding} if any(self.sliding) else {}),
        }

    def summary(self) -> str:
        """A few lines for a person: the model, the bases, and the ladder with its measured figures."""
        full = sum(layer is not None for layer in self.layers)
        lines = [
            f"SpectralProfile: {self.model}",
            f"Architecture: {len(self.layers)} layers ({full} compressed), {self.kv_heads} KV heads, "
            f"{self.token_nbytes} bytes/token in bf16",
            f"Frame: {self.frame}; bases of keys and values {'apart' if self.apart else 'together'}, "
            f"{self.basis_nbytes / 2**20:.2f} MiB; {'pages not transformed; ' if self.classes == 1 else ''}"
            f"calibrated on {self.provenance.get('tokens', '?')} tokens ({self.provenance.get('corpus', '?')})",
            f"{'setting':>8} {'bits/el':>8} {'x @2K':>6} {'x @8K':>6} {'x @32K':>6} "
            f"{'KL':>8} {'KL p99':>8} {'top-1':>7} {'top-5':>7} {'ppl':>8} {'recall':>7}",
        ]
        for row in self.ladder:
            ratios = [self.token_nbytes / row.bytes_per_token(context) for context in REPORT_CONTEXTS]
            lines.append(
                f"{row.name + ('*' if row.name == self.default else ''):>8} {row.bits_per_element:8.2f} "
                f"{ratios[0]:6.2f} {ratios[1]:6.2f} {ratios[2]:6.2f} "
                f"{row.kl_mean:8.5f} {row.kl_p99:8.4f} {row.top1:7.2%} {row.top5:7.2%} {row.perplexity:8.3f} "
                + ("      -" if math.isnan(row.recall) else f"{row.recall:7.2%}")
            )
        return "\n".join(lines)

    # -- file -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically (a half-written profile is never seen). Returns the path with its suffix."""
        from spectral.profile_file import write_profile

        return write_profile(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpectralProfile:
        """Read and validate a profile. Raises ProfileError with what is wrong; never unpickles anything."""
        from spectral.profile_file import read_profile

        return read_profile(path)


def _unit_name(unit: Unit) -> str:
    heads = f"heads {unit.heads[0]}-{unit.heads[1] - 1}"
    return heads if unit.side == "both" else f"{unit.side}s of {heads}"


def _shares(variance: np.ndarray) -> list[float]:
    return [float(v) for v in variance / max(float(variance.sum()), 1e-30)]
