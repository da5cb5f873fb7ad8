"""What every comparison has in common: what it is given, what it returns, and how its bytes are counted.

The protocol of an evaluator:
    method.fit(stats, shape)                     once per model; `stats` holds the calibration sample
    window = method.exact_of(side, context)      the tokens that a query sees exactly (bf16), its own included
    keys_hat, values_hat = method.roundtrip_all(keys, values, positions)      what attention sees of all other tokens
    method.nbytes(context, shape)                everything one sequence of that many tokens holds
    method.basis_nbytes(shape)                   what the model holds once, whatever the number of sequences

Conventions: keys and queries are post-RoPE, as the cache holds them; RoPE is the half-split layout (rotate_half).
Tensors are token-major: keys [T, H, d] of one layer, [L, T, H, d] of all. Everything is float32 in and float32 out;
positions are on the device of the tensors they belong to.
A method sees only full-attention layers; an evaluator keeps layers with sliding attention exact for every method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from spectral.baselines.store import Stored

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
Restore = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(keys, values [T, H, d] float32, positions [T]) of one layer as a cache would give them back."""

HOUSE_SINKS = 4
HOUSE_RECENT = 32
"""The exact window of methods whose description names none. Ours is longer and costs less a token (112 to 127 recent
tokens as integers), which is part of what is measured: its bytes are in every figure."""


@dataclass(frozen=True)
class Shape:
    """The full-attention layers of a model; all alike. `query_heads` is a multiple of `kv_heads`."""

    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int

    def __post_init__(self) -> None:
        if min(self.layers, self.kv_heads, self.head_dim, self.query_heads) < 1 or self.query_heads % self.kv_heads:
            raise ValueError(f"not a shape: {self}; query_heads must be a multiple of kv_heads, all at least 1")

    @property
    def width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.kv_heads * self.head_dim

    def exact_nbytes(self, tokens: int) -> int:
        """bf16 bytes of `tokens` tokens, keys and values, all layers: what every ratio is taken against."""
        return tokens * self.layers * 2 * self.width * 2


@dataclass(frozen=True)
class ExactWindow:
    """Tokens kept exact: the first `sinks` and the last `recent`."""

    sinks: int
    recent: int

    @property
    def tokens(self) -> int:
        return self.sinks + self.recent


@dataclass
class LayerStats:
    """One layer's calibration sample. The N tokens are the same, in the same order, in every layer.

    Attributes:
        keys: [N, H, d] float32, post-RoPE; values: [N, H, d] float32; queries: [N, Hq, d] float32, post-RoPE.
        key_weight, value_weight: [H, d, hidden] float32 projections W_K, W_V, or None where no method needs them.
        hidden_moment: [hidden, hidden] second moment E[h h^T] of the projections' input, or None.
        key_norm: True if a norm stands between W_K and RoPE (Qwen3, Gemma 3): W_K then does not describe the keys.
        output_weight: [Hq, d, hidden] W_O per query head, or None.
        key_bias, value_bias: [H, d] float32 biases of the projections (Qwen2), or None where there are none.
        key_fisher, value_fisher: [H] float32, the mean over the weights of a KV head's W_K (W_V) of the root of the
            mean squared gradient of the next-token loss, or None: only gathered for methods that need it.
        output_error: how far off the decoder layer's output is (norm of the difference by norm) on calibration text
            when its keys and values are restored ones, or None: only there for methods that need it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    key_weight: torch.Tensor | None = None
    value_weight: torch.Tensor | None = None
    hidden_moment: torch.Tensor | None = None
    key_norm: bool = False
    output_weight: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    key_fisher: torch.Tensor | None = None
    value_fisher: torch.Tensor | None = None
    output_error: Callable[[Restore], float] | None = None
    _query_moment: torch.Tensor | None = field(init=False, default=None, repr=False)

    def query_moment(self) -> torch.Tensor:
        """[H, d, d]: sum of q q^T over the sample and over the query heads that read each KV head."""
        if self._query_moment is None:
            kv_heads, dim = self.keys.shape[1:]
            grouped = self.queries.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, dim).double()
            self._query_moment = (grouped.mT @ grouped).float()
        return self._query_moment


@dataclass
class CalibrationStats:
    """The sample of all full-attention layers.

    Attributes:
        layers: in the model's order.
        positions: [N] int64, position of each sample token in its text.
        cos, sin: [P, r] float32 RoPE tables (r <= head_dim rotated channels, half-split), P at least the longest
            context a method will see; as the model applies them, attention scaling included.
    """

    layers: list[LayerStats]
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    memo: dict[str, Any] = field(init=False, default_factory=dict, repr=False)
    """What one setting of a method has computed and its other settings can use."""

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless the sample is of this shape."""
        if len(self.layers) != shape.layers:
            raise ValueError(f"calibration has {len(self.layers)} layers, the shape has {shape.layers}")
        tokens = len(self.positions)
        wanted = {"keys": shape.kv_heads, "values": shape.kv_heads, "queries": shape.query_heads}
        for index, layer in enumerate(self.layers):
            for name, heads in wanted.items():
                got = tuple(getattr(layer, name).shape)
                if got != (tokens, heads, shape.head_dim):
                    raise ValueError(f"layer {index}: {name} are {got}, want {(tokens, heads, shape.head_dim)}")
        if self.cos.shape != self.sin.shape or self.cos.shape[-1] > shape.head_dim:
            raise ValueError(f"cos {tuple(self.cos.shape)} and sin {tuple(self.sin.shape)} do not fit {shape}")


@dataclass
class Baseline(ABC):
    """One published method. A subclass overrides `encode` and `decode` (and `prepare`, if it is calibrated).

    Attributes:
        sinks, recent: its exact window, in tokens; seed: of everything random.
    """

    source: ClassVar[str]
    """Paper or package, with its year."""
    in_attention: ClassVar[bool] = False
    """True if attention can run on the codes without rebuilding every key."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of `LayerStats` that `fit` reads."""
    across_layers: ClassVar[bool] = False
    """True if only `roundtrip_all` makes sense."""
    drops_tokens: ClassVar[bool] = False
    """True if tokens outside the exact window are gone: an evaluator must mask them, not attend to zeros."""

    sinks: int = HOUSE_SINKS
    recent: int = HOUSE_RECENT
    seed: int = 0
    shape: Shape | None = field(init=False, default=None, repr=False)
    stats: CalibrationStats | None = field(init=False, default=None, repr=False)
    _held: dict[int, int] = field(init=False, default_factory=dict, repr=False)

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique name of the method at its setting."""

    @abstractmethod
    def encode(self, layer: int, side: Side, x: torch.Tensor, positions: torch.Tensor) -> Stored:
        """What is stored of x [T, H, d] float32."""

    @abstractmethod
    def decode(self, layer: int, side: Side, stored: Stored, positions: torch.Tensor) -> torch.Tensor:
        """x [T, H, d] float32 again, as good as `stored` allows."""

    def prepare(self, stats: CalibrationStats, shape: Shape) -> None:
        """Learn from the sample. The default learns nothing."""
        del stats, shape

    @abstractmethod
    def payload_nbytes(self, tokens: int, shape: Shape) -> int:
        """Bytes of `tokens` compressed tokens in all layers, per-prompt bases included, the exact window left out."""

    def basis_nbytes(self, shape: Shape) -> int:
        """Bytes held once per model for the method: calibrated bases (bf16), means, codebooks."""
        return 0

    # -- the same for all ---------------------------------------------------------------------------------------------

    def fit(self, stats: CalibrationStats, shape: Shape) -> None:
        """Calibrate. Raises ValueError when the sample is not of this shape or lacks something the method needs."""
        stats.check(shape)
        for index, layer in enumerate(stats.layers):
            missing = sorted(name for name in self.needs if getattr(layer, name) is None)
            if missing:
                raise ValueError(f"{self.name} needs {', '.join(missing)} and layer {index} has none")
        self.shape, self.stats, self._held = shape, stats, {}
        self.prepare(stats, shape)

    def exact(self, context: int) -> ExactWindow:
        """Which of `context` tokens the query at the last of them sees exactly, on both sides."""
        sinks = min(self.sinks, context)
        return ExactWindow(sinks, min(self.recent, context - sinks))

    def exact_of(self, side: Side, context: int) -> ExactWindow:
        """The same of one side: a method may keep more values than keys."""
        return self.exact(context)

    def held(self, context: int) -> ExactWindow:
        """The tokens counted as bf16 in `nbytes`: the mean where the window fills and empties as the text grows."""
        return self.exact(context)

    def nbytes(self, context: int, shape: Shape) -> int:
        """All bytes of one sequence: packed codes, scales, zero points, norms, per-prompt bases, padding, window."""
        window = self.held(context).tokens
        return shape.exact_nbytes(window) + self.payload_nbytes(context - window, shape)

    @property
    def measured_nbytes(self) -> int:
        """Bytes that the last round trip stored (exact window left out)."""
        return sum(self._held.values())

    def roundtrip(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress and restore one layer: keys, values [T, H, d] float32, positions [T] int64."""
        shape = self._fitted()
        if self.across_layers:
            raise TypeError(f"{self.name} codes all layers together: call roundtrip_all")
        if not 0 <= layer < shape.layers:
            raise ValueError(f"layer {layer} is not among the {shape.layers} layers")
        want = (len(positions), shape.kv_heads, shape.head_dim)
        check_tensor("keys", keys, want)
        check_tensor("values", values, want)
        out, held = [], 0
        for side, x in zip(SIDES, (keys, values), strict=True):
            stored = self.encode(layer, side, x, positions)
            held += stored.nbytes
            out.append(self.decode(layer, side, stored, positions))
        self._held[layer] = held
        return out[0], out[1]

    def _check_all(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> Shape:
        """The fitted shape, once keys and values of all layers are seen to have it."""
        shape = self._fitted()
        want = (shape.layers, len(positions), shape.kv_heads, shape.head_dim)
        check_tensor("keys", keys, want)
        check_tensor("values", values, want)
        return shape

    def roundtrip_all(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress and restore all layers: keys, values [L, T, H, d] float32, positions [T] int64."""
        shape = self._check_all(keys, values, positions)
        self._held = {}
        pairs = [self.roundtrip(layer, keys[layer], values[layer], positions) for layer in range(shape.layers)]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    def _fitted(self) -> Shape:
        if self.shape is None:
            raise RuntimeError(f"{self.name} has not been fitted: call fit(stats, shape) first")
        return self.shape

    def _rope(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._fitted()
        assert self.stats is not None
        return self.stats.cos, self.stats.sin


def filling_window(sinks: int, most: int, context: int) -> ExactWindow:
    """A window that grows to `most` recent tokens, is then quantized as a whole, and starts again at one."""
    sinks = min(sinks, context)
    return ExactWindow(sinks, (context - sinks - 1) % most + 1 if context > sinks else 0)


def check_tensor(name: str, x: torch.Tensor, want: tuple[int, ...]) -> None:
    """Raise ValueError unless x is float32 of exactly this shape, with at least one token."""
    if tuple(x.shape) != want or x.numel() == 0:
        raise ValueError(f"{name} are {tuple(x.shape)}, want {want} with at least one token")
    if x.dtype != torch.float32:
        raise ValueError(f"{name} are {x.dtype}, want float32")
