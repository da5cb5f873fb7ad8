"""Figures of one cache on one window against the exact pass: KL, agreement of the best tokens, likelihoods.

A contender is anything that yields logits of a token sequence read through its cache: our own settings through the real
page store in short chunks (`through_store`), published methods in one forward whose attention shows every query what
their cache would (`spectral.comparison`). Logits come in blocks and are compared block by block, so that memory stays
bounded whatever the vocabulary; of the exact pass only the hidden states are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from spectral.errors import ModelError
from spectral.pages import PageStore

if TYPE_CHECKING:
    from spectral.codec import Codebook
    from spectral.hf import LoadedModel
    from spectral.profile import SpectralProfile

Progress = Callable[[str, float], None]

CHUNK = 16
"""Tokens fed at once through a page store. Tokens of one chunk see each other exactly: the exact window is wider by
about CHUNK / 2 than in decoding, where CHUNK is 1."""

SKIP = 256
"""Positions left out at the start of a window, where most of the context is exact in any cache (a quarter at most)."""

BUCKETS = 8
"""Equal parts of the scored positions for which KL is reported on its own."""

BLOCK_ELEMENTS = 1 << 23
"""Logits compared at once (32 MiB of float32), and the largest exact pass whose log-probabilities are kept."""

Blocks = Iterator[tuple[int, torch.Tensor]]
"""(first position, logits float32 [n, vocab]) in order."""


def skipped(length: int) -> int:
    """Positions of a window of this length that are not scored."""
    return min(SKIP, length // 4)


@dataclass
class ExactPass:
    """One window read with an uncompressed cache in the model's own dtype, in one forward.

    Attributes:
        ids: token ids; hidden: final hidden states [N, hidden].
        keys, values: [L, N, H, d] float32 of the full-attention layers, or None when nobody asked for them.
    """

    loaded: LoadedModel
    ids: list[int]
    hidden: torch.Tensor
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    _kept: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def run(cls, loaded: LoadedModel, ids: Sequence[int], *, keep_cache: bool = False) -> ExactPass:
        """Read `ids`; with `keep_cache` keep the keys and values of full-attention layers as well."""
        from spectral.hf import observing
        from spectral.hf_reading import last_hidden

        full = {i for i, layer in enumerate(loaded.shape.layers) if layer.sliding is None}
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []

        def observe(layer: int, _: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> None:
            if keep_cache and layer in full:
                keys.append(key[0].transpose(0, 1).float())
                values.append(value[0].transpose(0, 1).float())

        with observing(observe):
            hidden = last_hidden(loaded, ids)
        if not keep_cache:
            return cls(loaded, list(ids), hidden)
        return cls(loaded, list(ids), hidden, torch.stack(keys), torch.stack(values))

    def log_probs(self, begin: int, end: int) -> torch.Tensor:
        """Log-probabilities float32 [end - begin, vocab] at positions [begin, end)."""
        from spectral.hf_reading import logits_of

        if not self._kept:
            vocab = logits_of(self.loaded, self.hidden[:1]).shape[1]
            rows = max(1, BLOCK_ELEMENTS * 4 // vocab)
            if len(self.ids) <= rows:
                self._kept[0] = logits_of(self.loaded, self.hidden).log_softmax(-1)
        if self._kept:
            return self._kept[0][begin:end]
        return logits_of(self.loaded, self.hidden[begin:end]).log_softmax(-1)


class Tally:
    """Per-position figures of one contender on one window, filled block by block."""

    def __init__(self, exact: ExactPass) -> None:
        self.exact, self.first = exact, skipped(len(exact.ids))
        self.parts: dict[str, list[torch.Tensor]] = {k: [] for k in ("kl", "top1", "top5", "nll", "exact_nll")}

    def add(self, begin: int, logits: torch.Tensor) -> None:
        """Take logits float32 [n, vocab] of positions begin .. begin + n - 1; positions before `first` are left out."""
        step = max(1, BLOCK_ELEMENTS // logits.shape[1])
        for at in range(max(0, self.first - begin), len(logits), step):
            self._add(begin + at, logits[at : at + step])

    def _add(self, begin: int, logits: torch.Tensor) -> None:
        other = logits.log_softmax(-1)
        exact = self.exact.log_probs(begin, begin + len(logits))
        best, exact_best = other.topk(5, -1).indices, exact.topk(5, -1).indices
        self.parts["kl"].append((exact.exp() * (exact - other)).sum(-1).clamp_min(0.0))
        self.parts["top1"].append((best[:, 0] == exact_best[:, 0]).float())
        self.parts["top5"].append((best[:, :, None] == exact_best[:, None, :]).any(2).float().mean(1))
        target = torch.tensor(self.exact.ids[begin + 1 : begin + len(logits) + 1], device=logits.device)[:, None]
        for name, table in (("nll", other), ("exact_nll", exact)):
            self.parts[name].append(-table[: len(target)].gather(1, target)[:, 0])

    def joined(self) -> dict[str, torch.Tensor]:
        """Every figure per scored position, float32 on the CPU: `nll` and `exact_nll` lack the last position."""
        return {name: torch.cat(parts).cpu() for name, parts in self.parts.items()}


def summarised(windows: Sequence[dict[str, torch.Tensor]], length: int) -> dict[str, Any]:
    """The mean figures of several windows of `length` tokens: what a row of the report holds."""
    joined = {key: torch.cat([window[key] for window in windows]) for key in windows[0]}
    per_position = torch.stack([window["kl"] for window in windows]).double().mean(0)
    first = length - len(per_position)
    edges = [first + round(i * len(per_position) / BUCKETS) for i in range(BUCKETS + 1)]
    return {
        "kl_mean": float(joined["kl"].mean()),
        "kl_p99": float(joined["kl"].double().quantile(0.99)),
        "top1": float(joined["top1"].mean()),
        "top5_overlap": float(joined["top5"].mean()),
        "perplexity": math.exp(min(700.0, float(joined["nll"].mean()))),
        "exact_perplexity": math.exp(min(700.0, float(joined["exact_nll"].mean()))),
        "scored_tokens": int(joined["kl"].numel()),
        "kl_by_position": [
            {"from": a, "to": b, "kl_mean": float(per_position[a - first : b - first].mean())}
            for a, b in zip(edges[:-1], edges[1:], strict=True)
            if b > a
        ],
    }


def store_blocks(loaded: LoadedModel, store: PageStore, ids: Sequence[int], *, chunk: int = CHUNK) -> Blocks:
    """Logits of a sequence that a page store holds, `chunk` tokens at a time: every prediction reads the store."""
    from spectral.hf import attending

    row = store.open()
    try:
        for begin in range(0, len(ids), chunk):
            piece = list(ids[begin : begin + chunk])
            batch = store.begin([(row, len(piece))])
            with torch.inference_mode(), attending(loaded.model, batch):
                logits = loaded.model(
                    input_ids=torch.tensor([piece], device=loaded.device),
                    attention_mask=loaded.no_mask,
                    position_ids=torch.arange(begin, begin + len(piece), device=loaded.device)[None],
                    use_cache=False,
                ).logits[0]
            batch.commit()
            yield begin, logits.float()
    finally:
        store.close(row)


def codebooks_of(
    loaded: LoadedModel, profile: SpectralProfile | None, settings: Sequence[str]
) -> dict[str, Codebook | None]:
    """Every setting's codecs on the model's device; None for "exact"."""
    out: dict[str, Codebook | None] = {}
    for name in settings:
        if name != "exact" and profile is None:
            raise ModelError(f"setting {name!r} needs a profile; this model has none: build one or use exact")
        out[name] = profile.codebook(name, device=loaded.layer_devices) if profile and name != "exact" else None
    return out


def score_store(
    exact: ExactPass, codebook: Codebook | None, *, chunk: int = CHUNK
) -> tuple[dict[str, torch.Tensor], float]:
    """One of our settings on one window: its figures per position, and its all-in bytes per token."""
    loaded = exact.loaded
    store = PageStore(loaded.shape, codebook, device=loaded.device, devices=loaded.layer_devices)
    tally = Tally(exact)
    for begin, logits in store_blocks(loaded, store, exact.ids, chunk=chunk):
        tally.add(begin, logits)
    return tally.joined(), store.bytes_per_token(len(exact.ids))


def score_settings(
    loaded: LoadedModel,
    profile: SpectralProfile | None,
    windows: Sequence[Sequence[int]],
    settings: Sequence[str],
    *,
    progress: Progress | None = None,
    chunk: int = CHUNK,
) -> dict[str, dict[str, Any]]:
    """Mean figures of every setting ("exact" allowed) over windows of token ids, all of one length."""
    codebooks = codebooks_of(loaded, profile, settings)
    figures: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in settings}
    held: dict[str, float] = {}
    for number, window in enumerate(windows):
        exact = ExactPass.run(loaded, window)
        for at, name in enumerate(settings):
            found, held[name] = score_store(exact, codebooks[name], chunk=chunk)
            figures[name].append(found)
            if progress is not None:
                progress("measuring", (number * len(settings) + at + 1) / (len(windows) * len(settings)))
    return {
        name: {**summarised(parts, len(windows[0])), "bytes_per_token": held[name]} for name, parts in figures.items()
    }
