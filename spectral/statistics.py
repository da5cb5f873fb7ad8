"""What calibration gathers of a model: second moments in float64, whatever the length of the corpus.

Per layer and unit (a run of KV heads): the mean and covariance of x = [keys in their frame | values], and the Fisher
information of x: for a small error e of one token's keys and values the model's output distribution moves by
KL = 1/2 e^T E[g g^T] e, where g is the gradient of log p(y) for y drawn from the model itself (Amari, "Natural gradient
works efficiently in learning", 1998). Gradients flow only through reads of tokens that have left the exact window,
because only those are ever compressed. One number system then covers queries, output projections and everything behind
them, keys and values and all layers alike. Fisher information needs a backward pass, and far fewer tokens than the
covariance, so it is taken on evenly spread windows. A bounded sample of x is kept for quantizer tables and errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectral.frames import turn
from spectral.prefill import softcapped

if TYPE_CHECKING:
    from spectral.hf import LoadedModel
    from spectral.shapes import LayerShape

UNIT_NUMBERS = 1024
"""Most numbers (keys and values of a token) of one unit: wider bases cost more arithmetic per code than they save."""

SAMPLE_NBYTES = 1 << 30
SAMPLE_TOKENS = 24_576
"""The kept sample: tokens, or as many as fit these bytes."""


def unit_heads(shape: LayerShape, limit: int = UNIT_NUMBERS) -> list[tuple[int, int]]:
    """The layer's KV heads in equal runs of as many as `limit` numbers allow (one at least)."""
    fitting = [h for h in range(1, shape.kv_heads + 1) if shape.kv_heads % h == 0 and h * shape.head_numbers <= limit]
    run = max(fitting, default=1)
    return [(first, first + run) for first in range(0, shape.kv_heads, run)]


@dataclass
class UnitStatistics:
    """Sums over tokens, float64: total [D], moment [D, D] of x; fisher [D, D] of gradients."""

    total: torch.Tensor
    moment: torch.Tensor
    fisher: torch.Tensor

    @classmethod
    def zeros(cls, size: int) -> UnitStatistics:
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((size,), (size, size), (size, size))))


@dataclass
class LayerStatistics:
    """One layer's units, and a sample of x per unit: float16 [pages, P, D] pieces on the CPU."""

    shape: LayerShape
    heads: list[tuple[int, int]]
    frequencies: np.ndarray | None
    units: list[UnitStatistics] = field(default_factory=list)
    sample: list[list[torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.units:
            sizes = [(b - a) * self.shape.head_numbers for a, b in self.heads]
            self.units = [UnitStatistics.zeros(size) for size in sizes]
            self.sample = [[] for _ in sizes]

    def rows(self, key: torch.Tensor, value: torch.Tensor, centre: torch.Tensor | None) -> list[torch.Tensor]:
        """Keys [H, N, d] (turned back by `centre` [N] positions) and values [H, N, dv] -> per unit x [N, D] float32.

        Gradients of post-RoPE keys turn like the keys themselves.
        """
        key, value = key.float(), value.float()
        if centre is not None and self.frequencies is not None:
            angle = centre[:, None] * torch.tensor(self.frequencies, device=key.device)
            key = turn(key, angle.cos().float(), -angle.sin().float())
        return [torch.cat([side[a:b].transpose(0, 1).flatten(1) for side in (key, value)], 1) for a, b in self.heads]

    def add(self, rows: list[torch.Tensor], keep: int, page_tokens: int) -> None:
        """Add a window's x; its first `keep` pages go into the sample."""
        for unit, sample, x in zip(self.units, self.sample, rows, strict=True):
            unit.total += x.sum(0, dtype=torch.float64).cpu()
            unit.moment += (x.T @ x).double().cpu()
            if keep:
                pages = x[: keep * page_tokens].unflatten(0, (-1, page_tokens))
                sample.append(pages.clamp(-65504, 65504).to(torch.float16).cpu())

    def add_gradients(self, rows: list[torch.Tensor]) -> None:
        """Add a window's gradients."""
        for unit, g in zip(self.units, rows, strict=True):
            unit.fisher += (g.T @ g).double().cpu()


@dataclass
class Statistics:
    """All compressed layers, and how far the corpus has been read.

    Attributes:
        tokens, fisher_tokens: in the sums; windows: read so far.
    """

    layers: dict[int, LayerStatistics]
    tokens: int = 0
    fisher_tokens: int = 0
    windows: int = 0

    @classmethod
    def of(cls, loaded: LoadedModel, *, turned: bool) -> Statistics:
        """Empty statistics of a model's full-attention layers; `turned`: keys are turned back to their block."""
        from spectral.hf_reading import rope_frequencies

        return cls(
            {
                index: LayerStatistics(shape, unit_heads(shape), rope_frequencies(loaded, index) if turned else None)
                for index, shape in enumerate(loaded.shape.layers)
                if shape.sliding is None
            }
        )

    # -- interrupting and resuming --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as named tensors, for a file."""
        out = {"counts": torch.tensor([self.tokens, self.fisher_tokens, self.windows], dtype=torch.int64)}
        for index, layer in self.layers.items():
            for number, (unit, sample) in enumerate(zip(layer.units, layer.sample, strict=True)):
                for name in ("total", "moment", "fisher"):
                    out[f"{index}.{number}.{name}"] = getattr(unit, name)
                if sample:
                    out[f"{index}.{number}.sample"] = torch.cat(sample)
        return out

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`. Raises KeyError or ValueError when they are another model's."""
        for index, layer in self.layers.items():
            for number, unit in enumerate(layer.units):
                for name in ("total", "moment", "fisher"):
                    found = tensors[f"{index}.{number}.{name}"]
                    if found.shape != getattr(unit, name).shape:
                        raise ValueError(f"layer {index}: {name} has the shape {tuple(found.shape)}")
                    setattr(unit, name, found)
                sample = tensors.get(f"{index}.{number}.sample")
                layer.sample[number] = [] if sample is None else [sample]
        self.tokens, self.fisher_tokens, self.windows = (int(n) for n in tensors["counts"])


@dataclass(frozen=True)
class Collector:
    """Reads windows of tokens into statistics; the same seed gives the same statistics, resumed or not.

    Args:
        sinks, recent, page_tokens: the exact window of the settings; block_tokens: of the frame, 0 for none.
        fisher_tokens: tokens with a backward pass, at most; sample_tokens: tokens kept, at most.
    """

    loaded: LoadedModel
    seed: int
    sinks: int
    recent: int
    page_tokens: int
    block_tokens: int
    fisher_tokens: int
    sample_tokens: int

    def centres(self, number: int, length: int) -> torch.Tensor | None:
        """Position of the block's centre for every token of window `number`: float64 [length], None without blocks.

        A window starts anywhere within a block (at random, by seed and number): attention sees relative positions only.
        """
        if not self.block_tokens:
            return None
        per_block = self.block_tokens // self.page_tokens
        phase = int(np.random.default_rng([self.seed, number, 1]).integers(0, per_block))
        page: np.ndarray = np.arange(length) // self.page_tokens
        block: np.ndarray = (page + phase) // per_block
        centre = ((block + 0.5) * per_block - phase) * self.page_tokens
        return torch.tensor(centre, dtype=torch.float64, device=self.loaded.device)

    def read(self, statistics: Statistics, windows: list[list[int]]) -> None:
        """Read the next window (`statistics.windows` says which)."""
        number, count = statistics.windows, len(windows)
        window = windows[number]
        backward = _share(number, count, self.fisher_tokens // max(1, len(window)))
        pages = _spread(number, count, self.sample_tokens // self.page_tokens, len(window) // self.page_tokens)
        leaves: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        centre = self.centres(number, len(window))

        def observe(
            layer: int,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            scaling: float,
            softcap: float | None,
        ) -> torch.Tensor | None:
            if layer not in statistics.layers:
                return None
            found = statistics.layers[layer]
            found.add(found.rows(key[0].detach(), value[0].detach(), centre), pages, self.page_tokens)
            if not backward:
                return None
            # The leaves stand for the error that compression will add; their gradient is the gradient by that error.
            leaves[layer] = torch.zeros_like(key, requires_grad=True), torch.zeros_like(value, requires_grad=True)
            near = self.recent + self.page_tokens // 2  # the exact window's mean length
            return split_attention(query, (key, value), leaves[layer], near, self.sinks, scaling, softcap)

        from spectral.hf import observing
        from spectral.hf_reading import last_hidden

        if backward:
            with torch.enable_grad(), observing(observe):
                ids = torch.tensor([window], device=self.loaded.device)
                logits = self.loaded.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            self._backward(statistics, logits, leaves, number, centre)
            statistics.fisher_tokens += len(window)
        else:
            with torch.inference_mode(), observing(observe):
                last_hidden(self.loaded, window)
        statistics.tokens += len(window)
        statistics.windows += 1

    def _backward(
        self,
        statistics: Statistics,
        logits: torch.Tensor,
        leaves: dict[int, tuple[torch.Tensor, torch.Tensor]],
        number: int,
        centre: torch.Tensor | None,
    ) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=generator).to(logits.device)
        flat = [leaf for pair in leaves.values() for leaf in pair]
        gradients = torch.autograd.grad(logits.gather(1, drawn).sum(), flat, allow_unused=True)
        for at, layer in enumerate(leaves):
            key, value = gradients[2 * at], gradients[2 * at + 1]
            if key is not None and value is not None:
                found = statistics.layers[layer]
                found.add_gradients(found.rows(key[0], value[0], centre))


def _share(number: int, count: int, wanted: int) -> bool:
    """Whether item `number` of `count` is among `wanted` evenly spread ones (the first always is)."""
    wanted = min(count, max(1, wanted))
    return (number * wanted) % count < wanted


def _spread(number: int, count: int, wanted: int, most: int) -> int:
    """How many of `wanted` things fall to item `number` of `count`, `most` at most."""
    return min(most, wanted * (number + 1) // count - wanted * number // count)


def sample_tokens(layers: dict[int, LayerStatistics], page_tokens: int) -> int:
    """Tokens of the kept sample that fit SAMPLE_NBYTES, whole pages."""
    token = 2 * sum(layer.shape.kv_heads * layer.shape.head_numbers for layer in layers.values())
    return max(64 * page_tokens, min(SAMPLE_TOKENS, SAMPLE_NBYTES // max(1, token)) // page_tokens * page_tokens)


def split_attention(
    query: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    errors: tuple[torch.Tensor, torch.Tensor],
    near: int,
    sinks: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention that reads `exact` keys and values near by (and the sinks), and exact + errors farther away.

    query [1, Hq, N, d]; keys/values and their errors [1, H, N, d] -> [1, Hq, N, dv]. Differentiable.
    """
    groups, length = query.shape[1] // exact[0].shape[1], query.shape[2]
    key, value = (x.repeat_interleave(groups, 1).float() for x in exact)
    key_error, value_error = (x.repeat_interleave(groups, 1).float() for x in errors)
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    far = (distance >= near) & (position[None, :] >= sinks)
    q = query.float() * scaling
    scores = torch.matmul(q, key.transpose(2, 3)) + torch.matmul(q, key_error.transpose(2, 3)) * far
    weights = softcapped(scores, softcap).masked_fill(distance < 0, float("-inf")).softmax(-1)
    return (torch.matmul(weights, value) + torch.matmul(weights * far, value_error)).to(query.dtype)
