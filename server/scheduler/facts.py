"""What a model will need, before it is loaded: from its files' headers, its profile, and what earlier loads measured.

Nothing heavy is imported: a safetensors header is a length and JSON. A model that is not on this machine yet cannot be
predicted; its weights count as 0 until it is loaded once, and the prediction says so (`known`).
"""

from __future__ import annotations

import json
import logging
import struct
import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from server.config import ModelSettings
from server.scheduler.demand import HOST, Rung
from server.scheduler.steward import Facts
from server.worker import messages
from spectral import resources
from spectral.errors import ProfileError
from spectral.files import write_atomically
from spectral.profile_document import check_sizes, parse_document

log = logging.getLogger("spectral.facts")
MAX_HEADER = 128 << 20
KNOWN_HEADERS, KNOWN_BYTES = 64, 1 << 20
"""Headers that are remembered, each of up to so many bytes: every report of a worker that changes what is known of its
model asks again, in the loop that all streams pass, and a large profile's takes some 10 ms to read."""
_known: dict[tuple[Path, int, int], dict[str, Any]] = {}  # the one used longest ago first
_known_lock = threading.Lock()
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_UNREADABLE = (OSError, ProfileError, *_BROKEN)
"""What the files of a model or profile can raise that are not what they should be."""
_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_WIDTH |= {"F8_E4M3": 1, "F8_E5M2": 1}
_OLDER = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "max_position_embeddings": ("n_positions", "n_ctx"),
}
"""Names of sizes in older families' configurations."""
NF4_BYTES, INT8_BYTES = 0.5 + 4 / 64, 1.0 + 4 / 1024
"""Bytes per number of a quantized linear layer, scales included (nf4: one float32 per 64; int8: one per row)."""
CPU_OVERHEAD, GPU_OVERHEAD = 400 << 20, 900 << 20
"""A worker beside weights and cache before anything was measured: Python and torch; a CUDA context and workspace."""
DISK_BYTES_S, START_S = 1.5e9, 4.0
COPY_BYTES_S, WAKE_S = 15e9, 0.2


@dataclass(frozen=True)
class Prediction:
    """What a model takes. `token_nbytes`: bf16 bytes of a token's keys and values; `default`: the profile's setting."""

    weights: int
    token_nbytes: int
    context: int
    rungs: tuple[Rung, ...]
    default: str
    known: bool


def folder_of(path: str) -> Path | None:
    """Where a model's files lie: a folder, an embedded model, or the hub's cache; None where they are not here."""
    local = Path(resources.model_path(path))
    if local.is_dir():
        return local
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json")
    except (ImportError, ValueError):  # ValueError: not a hub name
        return None
    return Path(found).parent if isinstance(found, str) else None


def header(path: Path) -> dict[str, Any]:
    """A safetensors file's header, which nobody may change. Raises OSError or ValueError for a file that has none."""
    found = path.stat()
    key = path, found.st_mtime_ns, found.st_size
    with _known_lock:
        known = _known.pop(key, None)
        if known is not None:
            _known[key] = known  # the last one again
            return known
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        read = json.loads(file.read(length))
    if not isinstance(read, dict):
        raise ValueError(f"{path} is no safetensors file")
    if length <= KNOWN_BYTES:
        with _known_lock:
            _known[key] = read
            while len(_known) > KNOWN_HEADERS:
                del _known[next(iter(_known))]
    return read


def weights_nbytes(folder: Path, quantization: str, element: int | None) -> int:
    """Bytes of the weights in memory. `element`: bytes of a number where they are converted, None as stored."""
    total = 0.0
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in header(path).items():
            if name == "__metadata__":
                continue
            shape, stored = tensor["shape"], _WIDTH.get(tensor["dtype"], 2)
            count = 1
            for size in shape:
                count *= _natural(size)
            floating = tensor["dtype"] in ("F64", "F32", "F16", "BF16")
            width = float(element if element is not None and floating else stored)
            outside = any(part in name for part in ("embed", "lm_head", "wte", "wpe", "shared"))
            if quantization != "none" and len(shape) == 2 and floating and not outside:
                width = NF4_BYTES if quantization == "nf4" else INT8_BYTES
            total += count * width
    if not total:
        total = float(sum(path.stat().st_size for path in folder.glob("*.bin")))
    return round(total)


def _natural(value: Any) -> int:
    """A whole number that can be a size. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{str(value)[:40]!r} is no size")
    return value


def shape_of(folder: Path) -> tuple[int, int]:
    """(bf16 bytes of one token's keys and values over all full-attention layers, the model's longest context)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    heads = _named(config, "num_attention_heads", 1)
    kv_heads = 1 if config.get("multi_query") else _natural(config.get("num_key_value_heads") or heads)
    dim = _natural(config.get("head_dim") or _named(config, "hidden_size", heads) // heads)
    kinds = config.get("layer_types")
    full: Collection[int] = range(_named(config, "num_hidden_layers", 1))
    if kinds:
        full = {i for i, kind in enumerate(kinds) if "sliding" not in str(kind)}
        if len(full) < len(kinds):  # those that see everything may be larger (Gemma 4)
            kv_heads = _natural(config.get("num_global_key_value_heads") or kv_heads)
            dim = _natural(config.get("global_head_dim") or dim)
    numbers = kv_heads * dim * len(full)
    for layer, own in (config.get("per_layer_config") or {}).items():
        if int(layer) in full:
            numbers += _natural(own.get("num_key_value_heads") or kv_heads) * _natural(own.get("head_dim") or dim)
            numbers -= kv_heads * dim
    return 2 * 2 * numbers, _named(config, "max_position_embeddings", 8192)


def _named(config: dict[str, Any], name: str, default: int) -> int:
    """A size by its usual name, or by one that older families have. Raises ValueError."""
    found = next((config[key] for key in (name, *_OLDER[name]) if config.get(key) is not None), default)
    return _natural(found)


def ladder_of(profile: Path) -> tuple[tuple[Rung, ...], str]:
    """A profile's settings, finest first, and the name of its default, from its header alone."""
    document = parse_document(parse_document(header(profile)["__metadata__"]["spectral"])["document"])
    rungs = tuple(
        Rung(row["name"], float(row["kl_mean"] or 0.0), row["page_nbytes"] / row["page_tokens"], row["window_nbytes"])
        for row in check_sizes(document)
    )
    return rungs, str(document["default"])[:100]


def predict(model: ModelSettings, device: str, profile: str | None = None) -> Prediction:
    """What a model will take on a device ("cpu" or a GPU). Never raises: what cannot be read is not known."""
    folder = folder_of(model.path)
    rungs: tuple[Rung, ...] = ()
    default = ""
    chosen = profile or model.profile or resources.profile_path(model.path)
    try:
        if chosen is not None:
            rungs, default = ladder_of(Path(chosen))
    except _UNREADABLE as error:  # the worker says what is wrong with it
        log.warning("model %s: its profile's header cannot be read: %s", model.name, error)
    limit = model.limits.context_length
    if folder is None:
        return Prediction(0, 0, limit or 8192, rungs, default, known=False)
    element = {"float32": 4, "bfloat16": 2, "float16": 2}.get(model.dtype, 4 if device == HOST else None)
    try:
        weights = weights_nbytes(folder, model.quantization, element)
        token, context = shape_of(folder)
    except _UNREADABLE as error:
        log.warning("model %s: its files cannot be read: %s", model.name, error)
        return Prediction(0, 0, limit or 8192, rungs, default, known=False)
    return Prediction(weights, token, min(context, limit or context), rungs, default, known=True)


def rungs_for(setting: str, found: Prediction) -> tuple[Rung, ...]:
    """The settings that the scheduler may choose from: "auto" gives the profile's default and all coarser ones; a
    setting that was named stays as it is."""
    exact = Rung("exact", 0.0, float(found.token_nbytes))
    if setting == "exact" or not found.rungs:
        return (exact,)
    names = [rung.name for rung in found.rungs]
    if setting == "auto":
        return found.rungs[names.index(found.default) :] if found.default in names else found.rungs
    return tuple(rung for rung in found.rungs if rung.name == setting) or (exact,)


@dataclass(frozen=True)
class Measure:
    """What a load measured. Bytes and seconds; 0 where it was not measured."""

    weights: int = 0
    overhead: int = 0
    load_s: float = 0.0
    wake_s: float = 0.0


class Measured:
    """Measures of earlier loads, by model and device, kept in a file. `path` None keeps them in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, Measure] = {}
        try:
            data = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
            self._found = {key: Measure(**value) for key, value in data.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:  # measured again soon
            log.warning("%s cannot be used and is begun anew: %s", path, error)

    @staticmethod
    def key(model: ModelSettings, device_name: str) -> str:
        """What makes two loads the same."""
        return f"{model.path}|{model.quantization}|{model.dtype}|{device_name}"

    def get(self, key: str) -> Measure | None:
        """The last measure."""
        return self._found.get(key)

    def put(self, key: str, **changes: Any) -> None:
        """Record parts of a measure."""
        self._found[key] = Measure(**{**asdict(self._found.get(key, Measure())), **changes})

    def save(self) -> None:
        """Write the file; a disk that refuses is logged and no more."""
        if self._path is None:
            return
        try:
            data = {key: asdict(value) for key, value in sorted(self._found.items())}
            write_atomically(self._path, json.dumps(data, indent=1).encode(), mode=0o600)
        except OSError as error:
            log.warning("measures of loads cannot be kept in %s: %s", self._path, error)


def facts_for(
    model: ModelSettings, device: str, setting: str, profile: str | None = None, measured: Measure | None = None
) -> Facts:
    """Prediction and measure together, for the steward."""
    found = predict(model, device, profile)
    measured = measured or Measure()
    weights = measured.weights or found.weights
    return Facts(
        weights=weights,
        rungs=rungs_for(setting, found),
        overhead=measured.overhead or (CPU_OVERHEAD if device == HOST else GPU_OVERHEAD),
        context=found.context,
        load_s=measured.load_s or START_S + weights / DISK_BYTES_S,
        wake_s=measured.wake_s or WAKE_S + weights / COPY_BYTES_S,
        can_sleep=device != HOST,
        measured=bool(measured.weights),
    )


def with_ladder(facts: Facts, setting: str, ready: messages.Ready | None) -> Facts:
    """The facts with the settings that a worker told, where no profile's header was found before."""
    if ready is None or ready.setting in [rung.name for rung in facts.rungs]:
        return facts
    own = Rung(ready.setting, ready.kl_mean, ready.bytes_per_token)
    if setting == "exact" or ready.setting not in [row.name for row in ready.ladder]:
        return replace(facts, rungs=(own,))
    rungs = tuple(Rung(row.name, row.kl_mean, ready.bytes_per_token_exact / row.ratio) for row in ready.ladder)
    at = next((i for i, rung in enumerate(rungs) if rung.name == ready.setting), 0)
    return replace(facts, rungs=rungs[at:] if setting == "auto" else rungs[at : at + 1])
