"""SpectralProfile: what calibration learned about one model, in one safetensors file.

The header's metadata holds one JSON document and its checksum ("spectral"). Tensors, per full-attention layer l and
side s (k or v): `l.s.mean` [D], `l.s.decode` [D, R], `l.s.variance` [R], `l.s.metric` [H, d, d]; and per setting i
`setting.i.bits` [layers, 2, R_max] uint8. The dual basis is not stored: encode = metric @ decode.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral.basis import Basis, block_diagonal
from spectral.bits import WIDTHS
from spectral.errors import ProfileError, SettingError

if TYPE_CHECKING:
    import torch

    from spectral.codec import Codebook
    from spectral.compressor import Projection
    from spectral.hf import LoadedModel

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 16 << 20
MAX_FILE_BYTES = 4 << 30
ORTHONORMAL_TOLERANCE = 2e-2


@dataclass
class LadderRow:
    """One setting and its measured figures. KL in nats per token against the exact cache; bytes are all-in."""

    name: str
    bits_per_element: float
    rank: int
    gain: bool
    sinks: int
    window: int
    page_tokens: int
    page_nbytes: int
    window_nbytes: int
    kl_mean: float = math.nan
    kl_p99: float = math.nan
    top1: float = math.nan
    perplexity: float = math.nan
    exact_perplexity: float = math.nan

    def bytes_per_token(self, context: int) -> float:
        """All-in bytes per token of one sequence of `context` tokens."""
        pages = max(0, (context - self.sinks - self.window) // self.page_tokens)
        return (pages * self.page_nbytes + self.window_nbytes) / context


@dataclass
class LayerProfile:
    """Bases and metrics of one full-attention layer: `metric` is float32 [H, d, d] per head."""

    key: Basis
    value: Basis
    key_metric: np.ndarray
    value_metric: np.ndarray


@dataclass
class SpectralProfile:
    """A profile. `layers[i]` is None for layers with sliding attention; `bits[name]` is [layers, 2, R] uint8."""

    model: str
    fingerprint: str
    token_nbytes: int
    kv_heads: int
    layers: list[LayerProfile | None]
    bits: dict[str, np.ndarray]
    ladder: list[LadderRow]
    default: str
    provenance: dict[str, Any] = field(default_factory=dict)
    frame: str = "post_rope"
    content_hash: str = ""
    sliding: list[int | None] = field(default_factory=list)  # window of every layer in tokens; [] if none slides

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

    def codebook(self, setting: str = "auto", *, device: torch.device | str = "cpu") -> Codebook:
        """The setting's codecs on a device."""
        from spectral.codec import Codebook, LayerCodec, PageCodec

        row = self.row(setting)
        widths = self.bits[row.name]
        codecs: list[PageCodec | None] = []
        for index, layer in enumerate(self.layers):
            if layer is None:
                codecs.append(None)
                continue
            ranks = layer.key.variance.shape[0], layer.value.variance.shape[0]
            codecs.append(
                LayerCodec(
                    layer.key,
                    layer.value,
                    widths[index, 0, : ranks[0]],
                    widths[index, 1, : ranks[1]],
                    kv_heads=self.kv_heads,
                    page_tokens=row.page_tokens,
                    gain=row.gain,
                    device=device,
                )
            )
        return Codebook(row.name, self.content_hash, row.sinks, row.window, row.page_tokens, codecs)

    def get_projection(self, layer: int, head: int, side: str = "key") -> Projection:
        """Statistics of one KV head's keys or values (side: "key" or "value"), for a SpectralKVCompressor."""
        from spectral.compressor import projection_of

        return projection_of(self, layer, head, side)

    def check_model(self, loaded: LoadedModel) -> None:
        """Raise ProfileError unless this profile was made for that very model."""
        if self.fingerprint != loaded.fingerprint:
            raise ProfileError(
                f"this profile was made for {self.model!r} (fingerprint {self.fingerprint[:12]}) and the model is "
                f"{loaded.name!r} (fingerprint {loaded.fingerprint[:12]}); build one with `spectral profile build`"
            )

    # -- reports --------------------------------------------------------------------------------------------------

    @property
    def basis_nbytes(self) -> int:
        """Bytes of all bases as the file stores them."""
        return sum(
            side.decode.astype(np.float32).nbytes + side.mean.astype(np.float32).nbytes
            for layer in self.layers
            if layer is not None
            for side in (layer.key, layer.value)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-ready; `spectrum` holds each layer's latent variances as shares of 1."""
        spectrum = [
            None if x is None else {"key": _shares(x.key.variance), "value": _shares(x.value.variance)}
            for x in self.layers
        ]
        return {
            **self._metadata(),
            "content_hash": self.content_hash,
            "basis_nbytes": self.basis_nbytes,
            "ladder": [
                {
                    **asdict(row),
                    "bytes_per_token": {str(c): row.bytes_per_token(c) for c in (1024, 2048, 8192, 32768)},
                    "ratio": {str(c): self.token_nbytes / row.bytes_per_token(c) for c in (1024, 2048, 8192, 32768)},
                }
                for row in self.ladder
            ],
            "spectrum": spectrum,
        }

    def summary(self) -> str:
        """A few lines for a person: the model, the bases, and the ladder with its measured figures."""
        full = sum(layer is not None for layer in self.layers)
        lines = [
            f"SpectralProfile: {self.model}",
            f"Architecture: {len(self.layers)} layers ({full} compressed), {self.kv_heads} KV heads, "
            f"{self.token_nbytes} bytes/token in bf16",
            f"Frame: {self.frame}; bases {self.basis_nbytes / 2**20:.2f} MiB; "
            f"calibrated on {self.provenance.get('tokens', '?')} tokens ({self.provenance.get('corpus', '?')})",
            f"{'setting':>8} {'bits/el':>8} {'rank':>6} {'x @2K':>6} {'x @8K':>6} "
            f"{'KL':>8} {'KL p99':>8} {'top-1':>7} {'ppl':>8}",
        ]
        for row in self.ladder:
            lines.append(
                f"{row.name + ('*' if row.name == self.default else ''):>8} {row.bits_per_element:8.2f} {row.rank:6d} "
                f"{self.token_nbytes / row.bytes_per_token(2048):6.2f} "
                f"{self.token_nbytes / row.bytes_per_token(8192):6.2f} "
                f"{row.kl_mean:8.4f} {row.kl_p99:8.3f} {row.top1:7.2%} {row.perplexity:8.3f}"
            )
        return "\n".join(lines)

    # -- file -----------------------------------------------------------------------------------------------------

    def _metadata(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "token_nbytes": self.token_nbytes,
            "kv_heads": self.kv_heads,
            "frame": self.frame,
            "default": self.default,
            "compressed_layers": [layer is not None for layer in self.layers],
            "ladder": [asdict(row) for row in self.ladder],
            "provenance": self.provenance,
            **({"sliding": self.sliding} if any(self.sliding) else {}),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically (a half-written profile is never seen). Returns the path with its suffix."""
        from safetensors.numpy import save

        target = Path(path)
        if target.suffix != ".safetensors":
            target = target.with_name(target.name + ".safetensors")
        tensors: dict[str, np.ndarray] = {}
        for index, layer in enumerate(self.layers):
            if layer is None:
                continue
            for side, basis, metric in (("k", layer.key, layer.key_metric), ("v", layer.value, layer.value_metric)):
                tensors[f"{index}.{side}.mean"] = basis.mean.astype(np.float32)
                tensors[f"{index}.{side}.decode"] = np.ascontiguousarray(basis.decode, dtype=np.float32)
                tensors[f"{index}.{side}.variance"] = basis.variance.astype(np.float32)
                tensors[f"{index}.{side}.metric"] = np.ascontiguousarray(metric, dtype=np.float32)
        for i, row in enumerate(self.ladder):
            tensors[f"setting.{i}.bits"] = np.ascontiguousarray(self.bits[row.name], dtype=np.uint8)
        document = json.dumps(self._metadata(), sort_keys=True)
        # One metadata key: safetensors writes several in an order that differs from run to run.
        sealed = json.dumps({"document": document, "sha256": _digest(document, tensors)}, sort_keys=True)
        data = save(tensors, metadata={"spectral": sealed})
        self.content_hash = hashlib.sha256(data).hexdigest()
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpectralProfile:
        """Read and validate a profile. Raises ProfileError with what is wrong; never unpickles anything."""
        source = Path(path)
        if not source.exists() and source.suffix != ".safetensors":
            source = source.with_name(source.name + ".safetensors")
        try:
            return _read(source)
        except OSError as error:
            raise ProfileError(f"profile {source} cannot be read: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"profile {source} is damaged: {type(error).__name__}: {error}") from error


def _digest(document: str, tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over the JSON document and every tensor's name and bytes: what makes a flipped bit visible."""
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _shares(variance: np.ndarray) -> list[float]:
    return [float(v) for v in variance / max(float(variance.sum()), 1e-30)]


def _check_header(source: Path) -> None:
    """Bound the header before any parser sees it, so that a forged length costs nothing."""
    size = source.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ProfileError(f"profile {source} has {size} bytes; the limit is {MAX_FILE_BYTES}")
    with source.open("rb") as file:
        head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise ProfileError(f"profile {source} is not a safetensors file (header of {length} bytes in a file of {size})")


def _read(source: Path) -> SpectralProfile:
    from safetensors import SafetensorError, safe_open

    _check_header(source)
    try:
        with safe_open(source, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise ProfileError(f"profile {source} is not a valid safetensors file: {error}") from error
    if "spectral" not in metadata:
        raise ProfileError(f"{source} is a safetensors file without a Spectral profile in its header")
    sealed = json.loads(metadata["spectral"])
    if sealed["sha256"] != _digest(sealed["document"], tensors):
        raise ProfileError(f"profile {source} is damaged: its checksum does not match; copy or build it again")
    meta = json.loads(sealed["document"])
    if meta.get("format_version") != FORMAT_VERSION:
        raise ProfileError(
            f"profile {source} has format {meta.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    profile = SpectralProfile(
        model=str(meta["model"]),
        fingerprint=str(meta["fingerprint"]),
        token_nbytes=int(meta["token_nbytes"]),
        kv_heads=int(meta["kv_heads"]),
        layers=[_read_layer(tensors, i, meta) if full else None for i, full in enumerate(meta["compressed_layers"])],
        bits={},
        ladder=[LadderRow(**row) for row in meta["ladder"]],
        default=str(meta["default"]),
        provenance=dict(meta["provenance"]),
        frame=str(meta["frame"]),
        content_hash=hashlib.sha256(source.read_bytes()).hexdigest(),
        sliding=list(meta.get("sliding", [])),
    )
    for i, row in enumerate(profile.ladder):
        profile.bits[row.name] = _read_bits(tensors[f"setting.{i}.bits"], profile, row)
    _check_ladder(profile)
    return profile


def _read_layer(tensors: dict[str, np.ndarray], index: int, meta: dict[str, Any]) -> LayerProfile:
    sides, metrics = [], []
    for side in ("k", "v"):
        mean, decode, variance, metric = (
            tensors[f"{index}.{side}.{name}"] for name in ("mean", "decode", "variance", "metric")
        )
        where = f"layer {index} {side}"
        heads, dim, other = metric.shape
        if heads != int(meta["kv_heads"]) or dim != other or mean.shape != (heads * dim,):
            raise ProfileError(f"{where}: shapes of mean {mean.shape} and metric {metric.shape} do not fit the model")
        if decode.ndim != 2 or decode.shape[0] != mean.shape[0] or variance.shape != (decode.shape[1],):
            raise ProfileError(f"{where}: shapes of decode {decode.shape} and variance {variance.shape} do not fit")
        if not all(x.dtype == np.float32 and np.isfinite(x).all() for x in (mean, decode, variance, metric)):
            raise ProfileError(f"{where}: a tensor is not float32, or has values that are not finite")
        if (variance < 0).any() or (np.diff(variance) > 1e-6 * max(float(variance.max()), 1e-30)).any():
            raise ProfileError(f"{where}: variances must be non-negative and descending")
        decode64: np.ndarray = decode.astype(np.float64)
        encode = block_diagonal(metric.astype(np.float64)) @ decode64
        error = float(np.abs(decode64.T @ encode - np.eye(decode.shape[1])).max())
        if not error <= ORTHONORMAL_TOLERANCE:
            raise ProfileError(f"{where}: the basis is not orthonormal in its metric (largest error {error:.3g})")
        sides.append(Basis(mean.astype(np.float64), decode64, encode, variance.astype(np.float64)))
        metrics.append(metric)
    return LayerProfile(sides[0], sides[1], metrics[0], metrics[1])


def _read_bits(bits: np.ndarray, profile: SpectralProfile, row: LadderRow) -> np.ndarray:
    if bits.dtype != np.uint8 or bits.ndim != 3 or bits.shape[:2] != (len(profile.layers), 2):
        raise ProfileError(f"setting {row.name}: bits of type {bits.dtype} and shape {bits.shape} do not fit the model")
    if not set(np.unique(bits).tolist()) <= set(WIDTHS):
        raise ProfileError(f"setting {row.name}: widths must be among {WIDTHS}")
    for index, layer in enumerate(profile.layers):
        if layer is not None and max(layer.key.variance.size, layer.value.variance.size) > bits.shape[2]:
            raise ProfileError(f"setting {row.name}: too few channels for layer {index}")
    return bits


def _check_ladder(profile: SpectralProfile) -> None:
    if profile.frame != "post_rope":
        raise ProfileError(f"frame {profile.frame!r} is not supported by this version")
    if profile.sliding and [w is None for w in profile.sliding] != [x is not None for x in profile.layers]:
        raise ProfileError(f"sliding windows {profile.sliding} do not fit the layers")
    names = [row.name for row in profile.ladder]
    if not names or len(set(names)) != len(names) or "exact" in names or "auto" in names:
        raise ProfileError("the ladder is empty, or its names repeat or are reserved")
    if profile.default not in names:
        raise ProfileError(f"the default setting {profile.default!r} is not in the ladder")
    sizes = [row.page_nbytes / row.page_tokens for row in profile.ladder]
    if any(b >= a for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ProfileError("the ladder must go from finest to coarsest")
    for row in profile.ladder:
        if (
            row.page_tokens % 8
            or row.page_tokens <= 0
            or row.window % row.page_tokens
            or min(row.sinks, row.window) < 0
        ):
            raise ProfileError(f"setting {row.name}: impossible page or window sizes")
