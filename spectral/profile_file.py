"""The profile file: one safetensors file, validated in bounded time and memory before anything is built from it.

The header's metadata holds one JSON document and its checksum ("spectral"). Tensors, for compressed layer l and unit u:
`l.u.mean` float32 [D], `l.u.decode` float16 [D, D] (columns of unit length), `l.u.scale` float32 [D] (their lengths),
`l.u.variance` float32 [D], `l.u.deviation` float32 [classes, D]; `l.frequencies` float32 [r / 2] if keys are turned;
`table.w.step` float32 [1], the distance of the uniform levels of width w; and for setting i `setting.i.l.u` uint8
[classes, D]. Classes are those of a page's frequencies; where the document says `"transform": "none"` there is one. The
dual basis is not stored: it is the inverse of the decoder as stored, so that rounding the decoder costs no bias.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral.basis import Unit, covered_heads, side_numbers
from spectral.bits import CHANNEL_GROUP, WIDTHS, Table, class_count, frequency_classes, uniform_table
from spectral.errors import ProfileError
from spectral.files import write_atomically
from spectral.layout import page_layout
from spectral.profile_document import check_document, parse_document

if TYPE_CHECKING:
    from spectral.profile import LadderRow, LayerProfile, SpectralProfile

FORMAT_VERSION = 3
MAX_HEADER_BYTES = 16 << 20
MAX_FILE_BYTES = 4 << 30
MAX_CONDITION = 1e7
"""Largest condition number of a decoder: beyond it the dual basis amplifies rounding without end."""
_MOST_SAID = 300
"""Characters of another library's reason that are repeated: it may hold parts of the file."""


def write_profile(profile: SpectralProfile, path: str | os.PathLike[str]) -> Path:
    """Write the file atomically. Returns the path with its suffix; sets the profile's content hash."""
    from safetensors.numpy import save

    target = Path(path)
    if target.suffix != ".safetensors":
        target = target.with_name(target.name + ".safetensors")
    tensors = _tensors(profile)
    document = json.dumps({"format_version": FORMAT_VERSION, **profile.metadata()}, sort_keys=True, allow_nan=False)
    # One metadata key: safetensors writes several in an order that differs from run to run.
    sealed = json.dumps({"document": document, "sha256": digest(document, tensors)}, sort_keys=True)
    data = save(tensors, metadata={"spectral": sealed})
    profile.content_hash = hashlib.sha256(data).hexdigest()
    profile.file = write_atomically(target, data, mode=0o644)
    return profile.file


def _tensors(profile: SpectralProfile) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for index, layer in enumerate(profile.layers):
        if layer is None:
            continue
        if layer.frequencies is not None:
            tensors[f"{index}.frequencies"] = layer.frequencies.astype(np.float32)
        for number, unit in enumerate(layer.units):
            length = np.maximum(np.linalg.norm(unit.decode, axis=0), 1e-30)
            where = f"{index}.{number}"
            tensors[f"{where}.mean"] = unit.mean.astype(np.float32)
            tensors[f"{where}.decode"] = np.ascontiguousarray(unit.decode / length, dtype=np.float16)
            tensors[f"{where}.scale"] = length.astype(np.float32)
            tensors[f"{where}.variance"] = unit.variance.astype(np.float32)
            tensors[f"{where}.deviation"] = np.ascontiguousarray(unit.deviation, dtype=np.float32)
            for i, row in enumerate(profile.ladder):
                widths = profile.bits[row.name][index]
                assert widths is not None
                tensors[f"setting.{i}.{where}"] = np.ascontiguousarray(widths[number], dtype=np.uint8)
    for width, table in profile.tables.items():
        tensors[f"table.{width}.step"] = np.array([table.step], dtype=np.float32)
    return tensors


def as_stored(profile: SpectralProfile) -> SpectralProfile:
    """The profile with the rounding of its file: what is measured must be what is saved."""
    tensors = _tensors(profile)
    layers = [
        None if facts is None else _read_layer(tensors, index, facts, profile.classes)
        for index, facts in enumerate(profile.metadata()["layers"])
    ]
    return replace(profile, layers=layers, tables={w: _read_table(tensors, w) for w in WIDTHS if w})


def digest(document: str, tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over the JSON document and every tensor's name and bytes: what makes a flipped bit visible."""
    total = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()


def read_profile(path: str | os.PathLike[str]) -> SpectralProfile:
    """Read and validate a profile. Raises ProfileError with what is wrong."""
    source = Path(path)
    if not source.exists() and source.suffix != ".safetensors":
        source = source.with_name(source.name + ".safetensors")
    try:
        return _read(source)
    except OSError as error:
        raise ProfileError(f"profile {source} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, np.linalg.LinAlgError) as error:
        raise ProfileError(f"profile {source} is damaged: {type(error).__name__}: {error}") from error


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


def _open(source: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The document and the tensors, once the checksum has been seen to hold."""
    from safetensors import SafetensorError, safe_open

    _check_header(source)
    try:
        with safe_open(source, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "spectral" not in metadata:
                raise ProfileError(f"{source} is a safetensors file without a Spectral profile in its header")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise ProfileError(f"profile {source} is not a valid safetensors file: {str(error)[:_MOST_SAID]}") from error
    sealed = parse_document(metadata["spectral"])
    document = parse_document(sealed["document"])
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ProfileError(
            f"profile {source} has format {str(version)[:20]} and this version of Spectral reads format "
            f"{FORMAT_VERSION}; build it again with `spectral profile build`"
        )
    if sealed["sha256"] != digest(sealed["document"], tensors):
        raise ProfileError(f"profile {source} is damaged: its checksum does not match; copy or build it again")
    return check_document(document), tensors


def _read(source: Path) -> SpectralProfile:
    """Build it; whatever is raised names the file and repeats little of it."""
    try:
        return _build(source)
    except ProfileError as error:
        raise error if str(source) in str(error) else ProfileError(f"profile {source}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        said = str(error)[:_MOST_SAID]
        raise ProfileError(f"profile {source} is damaged: {type(error).__name__}: {said}") from error


def _build(source: Path) -> SpectralProfile:
    from spectral.profile import LadderRow, SpectralProfile

    meta, tensors = _open(source)
    ladder = [LadderRow.from_dict(row) for row in meta["ladder"]]
    _check_ladder(ladder, str(meta["default"]), int(meta["block_tokens"]))
    classes = class_count(ladder[0].page_tokens, "transform" not in meta)
    profile = SpectralProfile(
        model=str(meta["model"]),
        fingerprint=str(meta["fingerprint"]),
        token_nbytes=int(meta["token_nbytes"]),
        layers=[
            None if facts is None else _read_layer(tensors, index, facts, classes)
            for index, facts in enumerate(meta["layers"])
        ],
        tables={width: _read_table(tensors, width) for width in WIDTHS if width},
        bits={},
        ladder=ladder,
        default=str(meta["default"]),
        block_tokens=int(meta["block_tokens"]),
        provenance=dict(meta["provenance"]),
        content_hash=hashlib.sha256(source.read_bytes()).hexdigest(),
        file=source,
        sliding=list(meta.get("sliding", [])),
    )
    if profile.sliding and [w is None for w in profile.sliding] != [x is not None for x in profile.layers]:
        raise ProfileError(f"sliding windows {profile.sliding} do not fit the layers")
    if not any(layer is not None for layer in profile.layers):
        raise ProfileError(f"profile {source} has no compressed layer")
    for i, row in enumerate(ladder):
        profile.bits[row.name] = [
            None
            if layer is None
            else [_read_widths(tensors, i, f"{index}.{u}", unit, classes) for u, unit in enumerate(layer.units)]
            for index, layer in enumerate(profile.layers)
        ]
        held = sum(
            page_layout(w[:, w.any(0)], row.page_tokens).nbytes
            for widths in profile.bits[row.name]
            for w in widths or []
        )
        if held != row.page_nbytes:
            raise ProfileError(f"setting {row.name}: its widths make pages of {held} bytes, not {row.page_nbytes}")
    return profile


def _numbers(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A tensor of exactly this shape and dtype with finite values, as float64."""
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ProfileError(f"{name}: {tensor.dtype} {tensor.shape}, want {np.dtype(dtype)} {shape}")
    if not np.isfinite(tensor).all():
        raise ProfileError(f"{name}: it has values that are not finite")
    return tensor.astype(np.float64)


def _read_layer(tensors: dict[str, np.ndarray], index: int, facts: dict[str, Any], classes: int) -> LayerProfile:
    from spectral.profile import LayerProfile

    key_dim, value_dim = int(facts["key_dim"]), int(facts["value_dim"])
    frequencies = None
    if f"{index}.frequencies" in tensors:
        count = tensors[f"{index}.frequencies"].size
        if not 0 < 2 * count <= key_dim:
            raise ProfileError(f"layer {index}: {count} RoPE frequencies do not fit keys of {key_dim}")
        frequencies = _numbers(tensors, f"{index}.frequencies", (count,), np.float32)
    units = []
    held = list(zip(map(tuple, facts["heads"]), facts.get("sides", ["both"] * len(facts["heads"])), strict=True))
    try:
        covered_heads(held)
    except ValueError as error:
        raise ProfileError(f"layer {index}: {error}") from None
    for number, (heads, side) in enumerate(held):
        where = f"{index}.{number}"
        size = sum(side_numbers(heads, side, key_dim, value_dim))
        variance = _numbers(tensors, f"{where}.variance", (size,), np.float32)
        scale = _numbers(tensors, f"{where}.scale", (size,), np.float32)
        deviation = _numbers(tensors, f"{where}.deviation", (classes, size), np.float32)
        if (variance < 0).any() or (np.diff(variance) > 1e-6 * max(float(variance.max()), 1e-30)).any():
            raise ProfileError(f"{where}.variance: importances must be non-negative and descending")
        if (scale <= 0).any() or (deviation < 0).any():
            raise ProfileError(f"{where}: scales must be positive and deviations non-negative")
        columns = _numbers(tensors, f"{where}.decode", (size, size), np.float16)
        if np.abs(np.linalg.norm(columns, axis=0) - 1).max() > 1e-2:
            raise ProfileError(f"{where}.decode: its columns do not have unit length")
        inverse = np.linalg.inv(columns)
        condition = np.linalg.norm(columns) * np.linalg.norm(inverse)
        if not condition <= MAX_CONDITION:  # a bound from above; the singular values themselves take seconds
            condition = np.linalg.norm(columns, 2) * np.linalg.norm(inverse, 2)
        if not condition <= MAX_CONDITION:
            raise ProfileError(f"{where}.decode: the basis is singular (condition {condition:.3g})")
        mean = _numbers(tensors, f"{where}.mean", (size,), np.float32)
        units.append(Unit(heads, mean, columns * scale, inverse.T / scale, variance, deviation, side))
    return LayerProfile(units, key_dim, value_dim, frequencies)


def _read_table(tensors: dict[str, np.ndarray], width: int) -> Table:
    step = float(_numbers(tensors, f"table.{width}.step", (1,), np.float32)[0])
    if not 1e-6 < step < 1e3:
        raise ProfileError(f"table.{width}.step: the distance of levels must be positive and sensible, got {step!r}")
    return uniform_table(width, step)


def _read_widths(tensors: dict[str, np.ndarray], setting: int, where: str, unit: Unit, classes: int) -> np.ndarray:
    name = f"setting.{setting}.{where}"
    widths = tensors[name]
    if widths.dtype != np.uint8 or widths.shape != (classes, unit.variance.size):
        raise ProfileError(f"{name}: widths of type {widths.dtype} and shape {widths.shape} do not fit the basis")
    if not set(np.unique(widths).tolist()) <= set(WIDTHS):
        raise ProfileError(f"{name}: widths must be among {WIDTHS}")
    usable = widths.shape[1] - widths.shape[1] % CHANNEL_GROUP
    runs = widths[:, :usable].reshape(classes, -1, CHANNEL_GROUP)
    if (runs != runs[..., :1]).any() or widths[:, usable:].any():
        raise ProfileError(f"{name}: widths must be the same in every run of {CHANNEL_GROUP} latents")
    return widths


def _check_ladder(ladder: list[LadderRow], default: str, block_tokens: int) -> None:
    names = [row.name for row in ladder]
    if not names or len(set(names)) != len(names) or "exact" in names or "auto" in names:
        raise ProfileError("the ladder is empty, or its names repeat or are reserved")
    if default not in names:
        raise ProfileError(f"the default setting {default!r} is not in the ladder")
    sizes = [row.page_nbytes / row.page_tokens for row in ladder]
    if any(b >= a for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ProfileError("the ladder must go from finest to coarsest")
    for row in ladder:
        page = row.page_tokens
        if page != ladder[0].page_tokens or row.sinks != ladder[0].sinks:
            raise ProfileError(f"setting {row.name}: pages and sinks must be the same in all settings")
        frequency_classes(page)
        if row.window < 0 or row.window % page or row.sinks < 0 or block_tokens < 0 or block_tokens % page:
            raise ProfileError(f"setting {row.name}: impossible page, block or window sizes")
        if row.window_bits not in (8, 10, 16):
            raise ProfileError(f"setting {row.name}: a window has 8, 10 or 16 bits, not {row.window_bits}")
