"""SpectralProfiler: text -> statistics -> weighted bases -> bit allocations -> measured ladder.

Statistics are second moments in float64, one set per layer, whatever the length of the corpus. The metric of keys and
of values is the Fisher information of what they hold: for a small error e of one token's keys (or values) the model's
output distribution moves by KL = 1/2 e^T E[g g^T] e, where g is the gradient of log p(y) for y drawn from the model
itself (Amari, "Natural gradient works efficiently in learning", 1998). Gradients flow only through reads of tokens that
have left the exact window, because only those are ever compressed. So one number system covers queries, output
projections and everything behind them, and bits can be compared across layers, keys and values: one global reverse
water-filling hands them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectral.attention import softcapped
from spectral.basis import block_diagonal, weighted_basis
from spectral.bits import allocate, plane_layout
from spectral.errors import ModelError
from spectral.profile import LadderRow, LayerProfile, SpectralProfile

if TYPE_CHECKING:
    from spectral.hf import LoadedModel

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction done."""

LADDER_BITS = (4.5, 3.4, 2.6, 2.0, 1.6, 1.3, 1.0)
"""Bits per element of the ladder's settings, finest first: about 3.5x to 16x on the codes."""


@dataclass
class LayerStatistics:
    """Running second moments of one layer, float64 on the CPU.

    key_sum [D], key_moment [D, D]; value_sum [Dv], value_moment [Dv, Dv]; and the Fisher information of keys and
    values per KV head, key_fisher [H, d, d], value_fisher [H, dv, dv].
    """

    key_sum: torch.Tensor
    key_moment: torch.Tensor
    value_sum: torch.Tensor
    value_moment: torch.Tensor
    key_fisher: torch.Tensor
    value_fisher: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, heads: int, key_dim: int, value_dim: int) -> LayerStatistics:
        d, dv = heads * key_dim, heads * value_dim
        shapes = (d,), (d, d), (dv,), (dv, dv), (heads, key_dim, key_dim), (heads, value_dim, value_dim)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values [H, N, d] of one window, any float dtype. Products are float32 on the device."""
        count = key.shape[1]
        keys = key.transpose(0, 1).reshape(count, -1).float()
        values = value.transpose(0, 1).reshape(count, -1).float()
        self.key_sum += keys.sum(0, dtype=torch.float64).cpu()
        self.value_sum += values.sum(0, dtype=torch.float64).cpu()
        self.key_moment += (keys.T @ keys).double().cpu()
        self.value_moment += (values.T @ values).double().cpu()
        self.tokens += count

    def add_gradients(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Gradients of one window's log-likelihood with respect to keys and values, [H, N, d]."""
        for total, gradient in ((self.key_fisher, key.float()), (self.value_fisher, value.float())):
            total += torch.matmul(gradient.transpose(1, 2), gradient).double().cpu()

    def bases(self) -> LayerProfile:
        """The layer's weighted bases and regularised metrics."""
        sides = (
            (self.key_sum, self.key_moment, self.key_fisher),
            (self.value_sum, self.value_moment, self.value_fisher),
        )
        bases, metrics = [], []
        for total, moment, fisher in sides:
            mean = (total / self.tokens).numpy()
            covariance = (moment / self.tokens).numpy() - np.outer(mean, mean)
            metrics.append(regularised((fisher / self.tokens).numpy()))
            bases.append(weighted_basis(mean, covariance, block_diagonal(metrics[-1])))
        return LayerProfile(bases[0], bases[1], metrics[0], metrics[1])


@dataclass
class SpectralProfiler:
    """Learns a profile from a model and text.

    Args:
        seed: of everything random (drawn labels, self-generated text).
        tokens: calibration tokens at most; window: tokens of one forward.
        positions: the statistics cover positions below this (or the model's context, if that is less): each window is
            placed at a random offset. Attention sees relative positions only, so the text reads the same, but post-RoPE
            keys turn with position, and a basis that has seen only early ones fits later ones badly.
        sinks, recent, page_tokens: the exact window of every setting, in tokens.
        ladder_bits: bits per element of each setting, finest first.
        measure_tokens: tokens of held-back text on which the ladder is measured (a quarter of `tokens` at most).
        progress: called with (stage, fraction).
    """

    seed: int = 0
    tokens: int = 49_152
    window: int = 1024
    positions: int = 8_192
    sinks: int = 4
    recent: int = 32
    page_tokens: int = 16
    ladder_bits: Sequence[float] = LADDER_BITS
    measure_tokens: int = 8_192
    default_ratio: float = 8.0
    progress: Progress | None = None

    # -- entry points ---------------------------------------------------------------------------------------------

    def profile_from_model(
        self, name: str, *, quantize: str | None = None, texts: Sequence[str] | None = None, tokens: int | None = None
    ) -> SpectralProfile:
        """Load a model by folder or hub name and profile it. `quantize`: None, "4bit" (nf4) or "8bit" (int8)."""
        from spectral.hf import load_model

        kinds = {None: "none", "none": "none", "4bit": "nf4", "nf4": "nf4", "8bit": "int8", "int8": "int8"}
        if quantize not in kinds:
            raise ModelError(f"quantize must be None, '4bit' or '8bit', got {quantize!r}")
        return self.profile_from_loaded(load_model(name, quantization=kinds[quantize]), texts=texts, tokens=tokens)

    def profile_from_loaded(
        self, loaded: LoadedModel, *, texts: Sequence[str] | None = None, tokens: int | None = None
    ) -> SpectralProfile:
        """Profile a model that is in memory already. `texts` None: text that the model itself generates (seeded)."""
        from spectral.selftext import self_generated

        wanted = tokens or self.tokens
        # A quick calibration gets a quick measurement: never more than a quarter of its text, but one window.
        measured = min(self.measure_tokens, max(self.window, wanted // 4))
        corpus = "files"
        if texts is None:
            corpus = "self-generated"
            texts = self_generated(loaded, tokens=wanted + measured, seed=self.seed, progress=self.progress)
        windows = token_windows(loaded, texts, self.window, wanted + measured, self.seed)
        held = max(1, min(len(windows) // 4, math.ceil(measured / self.window)))
        if len(windows) < 2:
            raise ModelError(
                f"calibration needs at least {2 * self.window} tokens of text and got {len(windows)} window(s) of "
                f"{self.window}; give more text or ask for more tokens"
            )
        fit, measure = windows[held:], windows[:held]
        statistics = self._collect(loaded, fit)
        layers = [statistics[i].bases() if i in statistics else None for i in range(len(loaded.shape.layers))]
        profile = self._allocate(loaded, layers)
        profile.provenance = {
            "corpus": corpus,
            "tokens": sum(len(w) for w in fit),
            "measured_on_tokens": sum(len(w) for w in measure),
            "positions": min(self.positions, loaded.context_length),
            "seed": self.seed,
            "library": _version(),
            "torch": torch.__version__,
            "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
            "quantization": loaded.quantization,
        }
        self._measure(loaded, profile, measure)
        return profile

    # -- stages ---------------------------------------------------------------------------------------------------

    def _report(self, stage: str, fraction: float) -> None:
        if self.progress is not None:
            self.progress(stage, fraction)

    def _collect(self, loaded: LoadedModel, windows: list[list[int]]) -> dict[int, LayerStatistics]:
        from spectral.hf import observing

        full = [i for i, layer in enumerate(loaded.shape.layers) if layer.sliding is None]
        shapes = loaded.shape.layers
        statistics = {
            i: LayerStatistics.zeros(shapes[i].kv_heads, shapes[i].key_dim, shapes[i].value_dim) for i in full
        }

        leaves: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def observe(
            layer: int,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            scaling: float,
            softcap: float | None,
        ) -> torch.Tensor | None:
            if layer not in statistics:
                return None
            statistics[layer].add(key[0].detach(), value[0].detach())
            # The leaves stand for the error that compression will add; their gradient is the gradient by that error.
            errors = torch.zeros_like(key, requires_grad=True), torch.zeros_like(value, requires_grad=True)
            leaves[layer] = errors
            near = self.recent + self.page_tokens // 2  # the exact window's mean length
            return split_attention(query, (key, value), errors, near, self.sinks, scaling, softcap)

        generator = torch.Generator().manual_seed(self.seed)
        rng = np.random.default_rng(self.seed)
        reach = min(self.positions, loaded.context_length)
        for done, window in enumerate(windows):
            offset = int(rng.integers(0, max(1, reach - len(window) + 1)))
            places = torch.arange(offset, offset + len(window), device=loaded.device)[None]
            leaves.clear()
            with torch.enable_grad(), observing(observe):
                ids = torch.tensor([window], device=loaded.device)
                logits = loaded.model(input_ids=ids, position_ids=places, use_cache=False).logits[0]
                logits = logits.float().log_softmax(-1)
            drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=generator).to(loaded.device)
            flat = [leaf for pair in leaves.values() for leaf in pair]
            gradients = torch.autograd.grad(logits.gather(1, drawn).sum(), flat, allow_unused=True)
            for number, layer in enumerate(leaves):
                key_gradient, value_gradient = gradients[2 * number], gradients[2 * number + 1]
                if key_gradient is not None and value_gradient is not None:
                    statistics[layer].add_gradients(key_gradient[0], value_gradient[0])
            self._report("statistics", (done + 1) / len(windows))
        return statistics

    def _allocate(self, loaded: LoadedModel, layers: list[LayerProfile | None]) -> SpectralProfile:
        rank = max(max(x.key.variance.size, x.value.variance.size) for x in layers if x is not None)
        weighted = np.zeros((len(layers), 2, rank))
        elements = 0
        for index, layer in enumerate(layers):
            if layer is None:
                continue
            for side, basis in enumerate((layer.key, layer.value)):
                weighted[index, side, : basis.variance.size] = basis.variance
                elements += basis.variance.size
        profile = SpectralProfile(
            model=loaded.name.rstrip("/").rsplit("/", 1)[-1],
            fingerprint=loaded.fingerprint,
            token_nbytes=loaded.shape.token_nbytes(),
            kv_heads=loaded.shape.layers[0].kv_heads,
            layers=layers,
            bits={},
            ladder=[],
            default="",
            sliding=[shape.sliding for shape in loaded.shape.layers],
        )
        for number, bits in enumerate(self.ladder_bits):
            widths: np.ndarray = allocate(weighted, int(bits * elements)).astype(np.uint8)
            row = self._row(loaded, layers, widths, float(widths.sum()) / elements)
            profile.bits[row.name] = widths
            profile.ladder.append(row)
            self._report("allocation", (number + 1) / len(self.ladder_bits))
        closest = min(profile.ladder, key=lambda r: abs(math.log(16 / r.bits_per_element / self.default_ratio)))
        profile.default = closest.name
        return profile

    def _row(
        self, loaded: LoadedModel, layers: list[LayerProfile | None], widths: np.ndarray, bits: float
    ) -> LadderRow:
        pages = sum(
            plane_layout(widths[i, s]).nbytes(self.page_tokens) for i, x in enumerate(layers) if x for s in (0, 1)
        )
        window = 0
        for shape in loaded.shape.layers:
            tokens = shape.sliding or self.sinks + self.recent + self.page_tokens
            window += tokens * shape.token_nbytes()
        return LadderRow(
            name=f"{16 / bits:.3g}x",
            bits_per_element=bits,
            rank=int((widths > 0).sum()),
            gain=False,
            sinks=self.sinks,
            window=self.recent,
            page_tokens=self.page_tokens,
            page_nbytes=pages,
            window_nbytes=window,
        )

    def _measure(self, loaded: LoadedModel, profile: SpectralProfile, windows: list[list[int]]) -> None:
        from spectral.evaluate import score_settings

        names = [row.name for row in profile.ladder]
        figures = score_settings(loaded, profile, windows, names, progress=self.progress)
        for row in profile.ladder:
            measured = figures[row.name]
            row.kl_mean, row.kl_p99, row.top1 = measured["kl_mean"], measured["kl_p99"], measured["top1"]
            row.perplexity, row.exact_perplexity = measured["perplexity"], measured["exact_perplexity"]


def regularised(metric: np.ndarray, share: float = 3e-3) -> np.ndarray:
    """[H, d, d] plus a share of each head's mean eigenvalue on the diagonal: unseen directions keep some weight."""
    trace = np.trace(metric, axis1=1, axis2=2) / metric.shape[1]
    floor = np.maximum(trace, trace.max() * 1e-6 + 1e-12)
    return metric + share * floor[:, None, None] * np.eye(metric.shape[1])


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


def token_windows(loaded: LoadedModel, texts: Sequence[str], length: int, tokens: int, seed: int) -> list[list[int]]:
    """Windows of `length` token ids from all texts in turn, shuffled by seed, `tokens` in total at most."""
    per_text: list[list[list[int]]] = []
    rest: list[int] = []  # what is left of each text, joined: many short texts must not be thrown away
    for text in texts:
        ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) - len(ids) % length
        per_text.append([ids[i : i + length] for i in range(0, whole, length)])
        rest += ids[whole:]
    per_text.append([rest[i : i + length] for i in range(0, len(rest) - length + 1, length)])
    rng = np.random.default_rng(seed)
    for windows in per_text:
        rng.shuffle(windows)
    out: list[list[int]] = []
    while len(out) * length < tokens and any(per_text):
        for windows in per_text:
            if windows and len(out) * length < tokens:
                out.append(windows.pop())
    return out


def _version() -> str:
    import spectral

    return spectral.__version__
