"""How far a decoder layer's output goes off when its keys and values come from a cache: what some methods search by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from spectral.baselines.base import Restore
from spectral.prefill import causal_attention

if TYPE_CHECKING:
    from spectral.hf import LoadedModel

PIECES, LENGTH = 2, 2048
"""Pieces of calibration text that are read, and their tokens at most."""


class LayerOutputs:
    """What the decoder layers of a model are given on some pieces of text, and what they make of it.

    Every layer is given what the exact model gives it: errors of the layers below are not in its error.
    """

    def __init__(self, loaded: LoadedModel, windows: Sequence[Sequence[int]]) -> None:
        from spectral.hf_reading import decoder_inputs, decoder_layers

        pieces = [list(window[:LENGTH]) for window in windows]
        pieces = pieces[:: -(-len(pieces) // PIECES)]
        self.modules = decoder_layers(loaded)
        self.inputs = [decoder_inputs(loaded, piece) for piece in pieces]
        self._exact: tuple[int, list[torch.Tensor]] | None = None

    def error(self, layer: int, restore: Restore) -> float:
        """Norm of the difference of the layer's outputs by the norm of the exact ones, over all pieces."""
        if self._exact is None or self._exact[0] != layer:
            self._exact = layer, [self._output(layer, piece, None) for piece in range(len(self.inputs))]
        wrong = total = 0.0
        for piece, exact in enumerate(self._exact[1]):
            wrong += float((self._output(layer, piece, restore) - exact).pow(2).sum(dtype=torch.float64))
            total += float(exact.pow(2).sum(dtype=torch.float64))
        return (wrong / total) ** 0.5

    @torch.no_grad()
    def _output(self, layer: int, piece: int, restore: Restore | None) -> torch.Tensor:
        """[N, hidden] float32."""
        from spectral.hf import observing

        def observe(
            _: int,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            scaling: float,
            softcap: float | None,
        ) -> torch.Tensor | None:
            if restore is None:
                return None
            places = torch.arange(key.shape[2], device=key.device)
            keys, values = (x[0].transpose(0, 1).float().contiguous() for x in (key, value))
            back = (x.transpose(0, 1)[None].to(query.dtype) for x in restore(keys, values, places))
            return causal_attention(query, *back, scaling=scaling, softcap=softcap)

        args, kwargs = self.inputs[piece][layer]
        with observing(observe):
            out: Any = self.modules[layer](*args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out)[0].float()
