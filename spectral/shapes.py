"""What the library must know of a model's attention: sizes only (pure, torch-free)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One attention layer. `sliding`: tokens of its sliding window, None if it sees all."""

    kv_heads: int
    key_dim: int
    value_dim: int
    sliding: int | None = None

    @property
    def head_numbers(self) -> int:
        """Numbers that one KV head keeps of a token: its key and its value."""
        return self.key_dim + self.value_dim

    def token_nbytes(self, itemsize: int = 2) -> int:
        """Bytes of one token's keys and values at `itemsize` bytes an element (2: bf16)."""
        return self.kv_heads * self.head_numbers * itemsize


@dataclass(frozen=True)
class ModelShape:
    """The attention layers of a model, in the order of their layer_idx."""

    layers: tuple[LayerShape, ...]
    query_heads: int
    hidden_size: int

    def token_nbytes(self) -> int:
        """bf16 bytes of one token in all layers: what every ratio is taken against."""
        return sum(layer.token_nbytes() for layer in self.layers)
