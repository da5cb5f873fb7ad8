"""One evaluation's contenders, window by window: our settings and published methods against the same exact passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from spectral.errors import ModelError
from spectral.oneshot import oneshot_blocks, score_oneshot
from spectral.pages import PageStore
from spectral.recall import RecallSequence, recall_figures, recalled
from spectral.scoring import ExactPass, Progress, score_store, store_blocks, summarised

if TYPE_CHECKING:
    import torch

    from spectral.baselines import Baseline
    from spectral.codec import Codebook
    from spectral.hf import LoadedModel

CONTEXTS = (2048, 8192, 32768)
"""Contexts for which every row states its bytes per token, whatever context was scored."""


class Contest:
    """The contenders, and what has been measured of each so far.

    Args:
        codebooks: our settings by name, None for "exact"; methods: unfitted.
        chunk: tokens fed through the page store at once for ours, or 0: one forward in which every query sees what the
            store would show it in decoding.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        codebooks: dict[str, Codebook | None],
        methods: Sequence[Baseline],
        *,
        chunk: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.loaded, self.codebooks, self.methods = loaded, codebooks, list(methods)
        self.chunk, self.progress = chunk, progress
        names = [*codebooks, *(method.name for method in methods)]
        self.figures: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in names}
        self.recalls: dict[str, list[tuple[RecallSequence, list[bool]]]] = {name: [] for name in names}
        self.nbytes: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def _report(self, stage: str, fraction: float) -> None:
        if self.progress is not None:
            self.progress(stage, fraction)

    def calibrate(self, context: int, texts: Sequence[str] | None, tokens: int, seed: int) -> dict[str, Any]:
        """Fit every method on text, or on text that the model writes (None); says on what."""
        from spectral.calibrate import token_windows
        from spectral.comparison import collect_stats, comparison_shape
        from spectral.selftext import self_generated

        kind = "given text"
        if texts is None:
            kind = f"text written by the model itself (seed {seed + 1})"
            texts = self_generated(self.loaded, tokens=tokens + context, seed=seed + 1, progress=self.progress)
        windows = token_windows(self.loaded, texts, context, tokens, seed)
        needs = frozenset[str]().union(*(method.needs for method in self.methods))
        stats = collect_stats(self.loaded, windows, context=context, seed=seed, needs=needs, progress=self.progress)
        shape = comparison_shape(self.loaded)
        for number, method in enumerate(self.methods):
            try:
                method.fit(stats, shape)
            except ValueError as error:
                raise ModelError(f"{method.name} cannot be fitted to {self.loaded.name}: {error}") from error
            self._report("fitting comparisons", (number + 1) / len(self.methods))
        total = sum(len(window) for window in windows)
        return {"text": kind, "tokens": total, "sample_tokens": len(stats.positions)}

    # -- measuring ----------------------------------------------------------------------------------------------------

    def score(
        self,
        windows: Sequence[Sequence[int]],
        sequences: Sequence[RecallSequence],
        after_window: Callable[[int], None] | None = None,
    ) -> None:
        """Every contender on every window, and its answers to every recall sequence.

        after_window: called with the number of windows that all contenders have read by then.
        """
        keep = any(method.across_layers for method in self.methods)
        steps = len(self.figures) * (len(windows) + len(sequences))
        done = 0
        for number, window in enumerate(windows):
            exact = ExactPass.run(self.loaded, window, keep_cache=keep)
            for name in self.figures:
                self._score_one(name, exact)
                done += 1
                self._report("measuring", done / steps)
            if after_window is not None:
                after_window(number + 1)
        for sequence in sequences:
            exact = ExactPass.run(self.loaded, sequence.ids, keep_cache=keep)
            for name in self.figures:
                self.recalls[name].append((sequence, self._recall_one(name, exact, sequence)))
                done += 1
                self._report("measuring", done / steps)

    def _method(self, name: str) -> Baseline:
        return next(method for method in self.methods if method.name == name)

    def _score_one(self, name: str, exact: ExactPass) -> None:
        from spectral.comparison import method_bytes, score_method

        if name in self.codebooks:
            book = self.codebooks[name]
            found = score_store(exact, book, chunk=self.chunk)[0] if self.chunk else score_oneshot(exact, book)
            self.figures[name].append(found)
            return
        method = self._method(name)
        self.figures[name].append(score_method(exact, method))
        # At once: the bytes of a method with entropy coding are those of its last round trip.
        self.nbytes[name].append(
            {str(context): method_bytes(self.loaded, method, context) for context in (len(exact.ids), *CONTEXTS)}
        )

    def _recall_one(self, name: str, exact: ExactPass, sequence: RecallSequence) -> list[bool]:
        from spectral.comparison import method_blocks

        if name not in self.codebooks:
            return recalled(sequence, method_blocks(exact, self._method(name), sequence.first))
        if not self.chunk:
            return recalled(sequence, oneshot_blocks(self.loaded, self.codebooks[name], sequence.ids, sequence.first))
        store = PageStore(self.loaded.shape, self.codebooks[name], device=self.loaded.device)
        blocks = store_blocks(self.loaded, store, sequence.ids, chunk=self.chunk)
        return recalled(sequence, ((begin, x) for begin, x in blocks if begin + len(x) > sequence.first))

    # -- reporting ----------------------------------------------------------------------------------------------------

    def rows(self, context: int, basis_nbytes: int) -> list[dict[str, Any]]:
        """One row per contender, in order. `basis_nbytes` is the profile's."""
        from spectral.comparison import comparison_shape

        out = []
        for name, windows in self.figures.items():
            row: dict[str, Any] = {"name": name}
            if name in self.codebooks:
                ours = name != "exact"
                row |= {"ours": ours, "in_attention": True, "source": "spectral" if ours else "bf16 cache"}
                row |= self._store_bytes(name, context) | {"basis_nbytes": basis_nbytes if ours else 0}
            else:
                method = self._method(name)
                row |= {"ours": False, "in_attention": method.in_attention, "source": method.source}
                row |= self._method_bytes(name, context)
                row["basis_nbytes"] = method.basis_nbytes(comparison_shape(self.loaded))
            row |= summarised(windows, context) | recall_figures(self.recalls[name])
            out.append(row)
        return out

    def _store_bytes(self, name: str, context: int) -> dict[str, Any]:
        store = PageStore(self.loaded.shape, self.codebooks[name], device=self.loaded.device)
        book, token = store.codebook, self.loaded.shape.token_nbytes()
        full = sum(layer.token_nbytes() for layer in self.loaded.shape.layers if layer.sliding is None)
        page = book.page_nbytes()
        return {
            "bytes_per_token": store.bytes_per_token(context),
            "bytes_per_token_at": {str(c): store.bytes_per_token(c) for c in CONTEXTS},
            "ratio": token / store.bytes_per_token(context),
            "ratio_without_window": full * book.page_tokens / page if page else None,
        }

    def _method_bytes(self, name: str, context: int) -> dict[str, Any]:
        """The means over windows."""
        parts = self.nbytes[name]

        def mean(at: int, key: str) -> float | None:
            values = [part[str(at)][key] for part in parts]
            return None if None in values else sum(values) / len(values)

        return {
            **{key: mean(context, key) for key in ("bytes_per_token", "ratio", "ratio_without_window")},
            "bytes_per_token_at": {str(c): mean(c, "bytes_per_token") for c in CONTEXTS},
        }
