"""Published methods on a real model: their calibration sample, and the score of each in one forward a window.

Scoring: at every full-attention layer the keys and values of the whole window go through the method's round trip, and
the query at position t sees what the method's cache would hold at t: sinks and recent tokens exact (bf16), everything
older through the round trip. So every prediction reads the compressed cache, and errors travel through the layers, at
the price of one forward. Layers with sliding attention stay exact for every method, as they do for ours.

Two simplifications, both in the methods' favour: a method that fits each prompt (SVDq, xKV, ThinK) sees the whole
window, later tokens included; one that codes all layers together is given the keys and values of the exact pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectral.baselines import Baseline, CalibrationStats, LayerStats, Shape
from spectral.errors import ModelError
from spectral.layer_outputs import LayerOutputs
from spectral.prefill import softcapped
from spectral.scoring import BLOCK_ELEMENTS, Blocks, ExactPass, Progress, Tally

if TYPE_CHECKING:
    from spectral.hf import LoadedModel

SAMPLE_TOKENS = 16_384
SAMPLE_NBYTES = 4 << 30
"""Tokens whose keys, values and queries are kept for calibration, and the bytes they may take: the lesser of both."""

FISHER_PIECES, FISHER_LENGTH = 8, 1024
"""Pieces of calibration text, and their tokens at most, whose gradients are taken where a method needs them."""

SCORE_LIMIT = 1 << 24
"""Most attention scores held at once: longer windows are cut into blocks of queries."""

CPU_SCORE_LIMIT = 1 << 22
"""The same on CPUs, where blocks that stay in the caches take 0.6 times as long (4,096 tokens, 8 heads, one core)."""


def full_layers(loaded: LoadedModel) -> list[int]:
    """Indices of the layers that see the whole context: those that are compressed."""
    return [i for i, layer in enumerate(loaded.shape.layers) if layer.sliding is None]


def comparison_shape(loaded: LoadedModel) -> Shape:
    """The full-attention layers as the comparisons see them. Raises ModelError when they are not all alike."""
    kinds = {loaded.shape.layers[i] for i in full_layers(loaded)}
    if len(kinds) != 1 or any(kind.key_dim != kind.value_dim for kind in kinds):
        raise ModelError(
            f"{loaded.name}: comparisons need full-attention layers of one shape with keys as wide as values, "
            f"and this model has {len(kinds)} kinds; leave --baselines out"
        )
    kind = kinds.pop()
    return Shape(len(full_layers(loaded)), kind.kv_heads, kind.key_dim, loaded.shape.query_heads)


# -- calibration ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def collect_stats(
    loaded: LoadedModel,
    windows: Sequence[Sequence[int]],
    *,
    context: int,
    sample: int = SAMPLE_TOKENS,
    seed: int = 0,
    needs: Collection[str] = (),
    progress: Progress | None = None,
) -> CalibrationStats:
    """The comparisons' calibration sample: `sample` tokens at most, spread evenly over windows of token ids.

    Args:
        needs: fields of `LayerStats` that are only gathered for methods that need them: "key_fisher" and "value_fisher"
            take backward passes, "output_error" keeps what decoder layers are given on some windows.
        context: the longest context that will be scored; windows should be as long, so that post-RoPE keys are
            calibrated at the positions at which they are used.

    Raises ModelError for a model without RoPE or with full-attention layers of several shapes.
    """
    from spectral.hf import observing
    from spectral.hf_reading import last_hidden, rotary_tables, watching_inputs

    if not windows:
        raise ModelError("the comparisons' calibration text is shorter than one window; give more of it")
    shape, layers = comparison_shape(loaded), full_layers(loaded)
    token_nbytes = 4 * shape.layers * shape.head_dim * (2 * shape.kv_heads + shape.query_heads)
    sample = max(1, min(sample, SAMPLE_NBYTES // token_nbytes))
    rng = np.random.default_rng(seed)
    kept: dict[int, tuple[list[torch.Tensor], ...]] = {i: ([], [], []) for i in layers}
    moments = {i: torch.zeros(loaded.shape.hidden_size, loaded.shape.hidden_size, device=loaded.device) for i in layers}
    positions: list[torch.Tensor] = []
    total = 0
    for number, window in enumerate(windows):
        share = sample * (number + 1) // len(windows) - sample * number // len(windows)
        pick = torch.from_numpy(np.sort(rng.permutation(len(window))[:share])).to(loaded.device)
        positions.append(pick)
        total += len(window)

        def observe(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> None:
            if layer in kept:
                for store, x in zip(kept[layer], (key, value, query), strict=True):
                    store.append(x[0].index_select(1, pick).transpose(0, 1).float())  # noqa: B023 (used at once)

        def watch(layer: int, hidden: torch.Tensor) -> None:
            if layer in moments:
                moments[layer] += hidden.float().T @ hidden.float()

        with observing(observe), watching_inputs(loaded, watch):
            last_hidden(loaded, window)
        if progress is not None:
            progress("calibrating comparisons", (number + 1) / len(windows))
    gathered = _fisher(loaded, windows) if {"key_fisher", "value_fisher"} & set(needs) else {}
    outputs = LayerOutputs(loaded, windows) if "output_error" in needs else None
    cos, sin = rotary_tables(loaded, layers[0], max(context, *(len(window) for window in windows)))
    out = [
        _layer_stats(loaded, layer, kept.pop(layer), moments.pop(layer) / total, gathered.get(layer, (None, None)))
        for layer in layers
    ]
    for layer, stats in zip(layers, out, strict=True):
        stats.output_error = None if outputs is None else partial(outputs.error, layer)
    return CalibrationStats(out, torch.cat(positions), cos.to(loaded.device), sin.to(loaded.device))


def _layer_stats(
    loaded: LoadedModel,
    layer: int,
    kept: tuple[list[torch.Tensor], ...],
    moment: torch.Tensor,
    fisher: tuple[torch.Tensor | None, torch.Tensor | None],
) -> LayerStats:
    """One layer's sample (keys, values, queries in pieces) beside what its projections are."""
    from spectral.hf_reading import projections

    weights, to = projections(loaded, layer), loaded.device
    keys, values, queries = (torch.cat(x) for x in kept)
    return LayerStats(
        keys=keys,
        values=values,
        queries=queries,
        key_weight=weights.key.to(to),
        value_weight=weights.value.to(to),
        hidden_moment=moment,
        key_norm=weights.key_norm,
        output_weight=weights.output.to(to),
        key_bias=weights.key_bias.to(to),
        value_bias=weights.value_bias.to(to),
        key_fisher=fisher[0],
        value_fisher=fisher[1],
    )


def _fisher(loaded: LoadedModel, windows: Sequence[Sequence[int]]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Per layer `LayerStats.key_fisher` and `value_fisher`, from FISHER_PIECES pieces spread over the windows."""
    from spectral.hf_reading import projection_gradients

    pieces = [
        window[at : at + FISHER_LENGTH]
        for window in windows
        for at in range(0, max(1, len(window) - FISHER_LENGTH + 1), FISHER_LENGTH)
    ]
    pieces = pieces[:: -(-len(pieces) // FISHER_PIECES)]
    squares: dict[int, list[torch.Tensor]] = {}
    for piece in pieces:
        for layer, pair in projection_gradients(loaded, piece).items():
            found = squares.setdefault(layer, [torch.zeros_like(x) for x in pair])
            for total, gradient in zip(found, pair, strict=True):
                total += gradient.pow(2)
    means = {layer: [(total / len(pieces)).sqrt().mean((1, 2)) for total in pair] for layer, pair in squares.items()}
    return {layer: (key, value) for layer, (key, value) in means.items()}


# -- attention as a method's cache would show it ----------------------------------------------------------------------


@dataclass
class Windows:
    """Which tokens each query of a window sees exactly.

    sinks: the first tokens, for all queries; key_recent, value_recent: [N] int64, recent tokens (its own included).
    """

    sinks: int
    key_recent: torch.Tensor
    value_recent: torch.Tensor

    @classmethod
    def of(cls, method: Baseline, length: int, device: torch.device) -> Windows:
        """Those of a method whose cache grows token by token to `length`."""
        recent = [[method.exact_of(side, t + 1).recent for t in range(length)] for side in ("key", "value")]
        sinks = method.exact(length).sinks
        return cls(sinks, *(torch.tensor(r, device=device) for r in recent))


def cache_attention(
    query: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    restored: tuple[torch.Tensor, torch.Tensor],
    windows: Windows,
    *,
    scaling: float,
    softcap: float | None = None,
    drops: bool = False,
    own: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal attention of a window with itself through a cache.

    Args:
        query: [1, Hq, N, d]; exact, restored: keys and values [H, N, d] float32: what the exact window holds, and what
            is seen of the tokens outside it. drops: those are gone instead. own: each query's own token as that query
            sees it, where it is not yet what the window will hold.

    Returns:
        [1, Hq, N, dv] in the query's dtype.
    """
    heads, length = exact[0].shape[:2]
    groups, device = query.shape[1] // heads, query.device
    keys, values = (r.clone(memory_format=torch.contiguous_format) for r in restored)
    for x, true in ((keys, exact[0]), (values, exact[1])):
        x[:, : windows.sinks] = true[:, : windows.sinks]
    position = torch.arange(length, device=device)
    out = torch.empty((query.shape[1], length, values.shape[-1]), dtype=query.dtype, device=device)
    limit = min(SCORE_LIMIT, CPU_SCORE_LIMIT) if device.type == "cpu" else SCORE_LIMIT
    block = max(16, limit // (query.shape[1] * length))
    for begin in range(0, length, block):
        end = min(length, begin + block)
        span = slice(begin, end)
        q = (query[0, :, span].float() * scaling).reshape(heads, groups * (end - begin), -1)
        scores = torch.matmul(q, keys[:, :end].transpose(1, 2)).view(heads, groups, end - begin, end)
        reach = int(torch.maximum(windows.key_recent[span], windows.value_recent[span]).max())
        near = slice(max(0, begin - reach + 1), end)  # the only tokens that some query of the block sees exactly
        distance = position[span, None] - position[None, near]
        key_exact, value_exact = (distance < r[span, None] for r in (windows.key_recent, windows.value_recent))
        close = torch.matmul(q, exact[0][:, near].transpose(1, 2)).view(heads, groups, end - begin, -1)
        scores[..., near] = torch.where(key_exact, close, scores[..., near])
        if own is not None:
            itself = (q.view(heads, groups, end - begin, -1) * own[0][:, None, span]).sum(-1)
            scores.diagonal(begin, -2, -1).copy_(itself)
        scores = softcapped(scores, softcap)
        scores[..., span].masked_fill_(position[None, span] > position[span, None], float("-inf"))
        if drops:
            gone = torch.ones((end - begin, end), dtype=torch.bool, device=device)
            gone[:, near] = ~key_exact
            gone[:, : windows.sinks] = False
            scores.masked_fill_(gone, float("-inf"))
        weights = scores.softmax(-1)
        mixed = torch.matmul(weights.view(heads, -1, end), values[:, :end])
        difference = exact[1][:, near] - values[:, near]
        mixed += torch.matmul((weights[..., near] * value_exact).view(heads, mixed.shape[1], -1), difference)
        if own is not None:
            weight = weights.diagonal(begin, -2, -1).unsqueeze(-1)  # [H, G, n, 1]
            mixed += (weight * (own[1] - exact[1])[:, None, span]).flatten(1, 2)
        out[:, span] = mixed.view(query.shape[1], end - begin, -1).to(query.dtype)
    return out[None]


class MethodCache:
    """An attention observer: a fitted method's cache over one window.

    Args:
        layers: the model's full-attention layers; static: restored keys and values [L, N, H, d] of all of them, for
            methods that code layers together.
    """

    def __init__(
        self, method: Baseline, layers: list[int], length: int, static: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        self.method, self.static, self.length = method, static, length
        self.index = {layer: number for number, layer in enumerate(layers)}
        self.windows: Windows | None = None

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor | None:
        """As `spectral.hf.Observer`: None for layers that stay exact."""
        if layer not in self.index:
            return None
        if self.windows is None:
            self.windows = Windows.of(self.method, self.length, query.device)
        number = self.index[layer]
        rounded = tuple(x[0].bfloat16().float() for x in (key, value))
        if self.static is not None:
            restored = tuple(x[number].transpose(0, 1) for x in self.static)
        else:
            places = torch.arange(self.length, device=key.device)
            keys, values = (x[0].transpose(0, 1).float().contiguous() for x in (key, value))
            restored = tuple(x.transpose(0, 1) for x in self.method.roundtrip(number, keys, values, places))
        return cache_attention(
            query,
            (rounded[0], rounded[1]),
            (restored[0], restored[1]),
            self.windows,
            scaling=scaling,
            softcap=softcap,
            drops=self.method.drops_tokens,
        )


def method_blocks(exact: ExactPass, method: Baseline, first: int = 0) -> Blocks:
    """Logits from position `first` on of a window that is read through a fitted method's cache.

    Raises ModelError when the method codes layers together and the exact pass kept no keys and values.
    """
    from spectral.hf import observing
    from spectral.hf_reading import last_hidden, logits_of

    loaded, length = exact.loaded, len(exact.ids)
    static = None
    if method.across_layers:
        if exact.keys is None or exact.values is None:
            raise ModelError(f"{method.name} codes layers together: run the exact pass with keep_cache")
        static = method.roundtrip_all(exact.keys, exact.values, torch.arange(length, device=loaded.device))
    with torch.inference_mode(), observing(MethodCache(method, full_layers(loaded), length, static)):
        hidden = last_hidden(loaded, exact.ids)
    step = max(1, BLOCK_ELEMENTS // logits_of(loaded, hidden[:1]).shape[1])
    for begin in range(first, length, step):
        yield begin, logits_of(loaded, hidden[begin : begin + step])


def score_method(exact: ExactPass, method: Baseline) -> dict[str, torch.Tensor]:
    """A fitted method on one window: its figures per position, as `Tally.joined`."""
    tally = Tally(exact)
    for begin, logits in method_blocks(exact, method, tally.first):
        tally.add(begin, logits)
    return tally.joined()


def method_bytes(loaded: LoadedModel, method: Baseline, context: int) -> dict[str, float | None]:
    """All-in bytes of one sequence: per token, and the ratios against bf16 with and without the exact window.

    Sliding layers count as bf16 in full. `ratio_without_window` is that of the compressed tokens alone.
    """
    shape = comparison_shape(loaded)
    sliding = sum(min(context, x.sliding) * x.token_nbytes() for x in loaded.shape.layers if x.sliding is not None)
    total = method.nbytes(context, shape) + sliding
    tokens = context - method.held(context).tokens
    payload = method.payload_nbytes(tokens, shape) if tokens > 0 else 0
    return {
        "bytes_per_token": total / context,
        "ratio": loaded.shape.token_nbytes() * context / total,
        "ratio_without_window": shape.exact_nbytes(tokens) / payload if payload else None,
    }
