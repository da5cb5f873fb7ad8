"""Decoding on a CPU in fewer operations: there a step of a small model costs as much as it has of them.

Applied by the engine to float32 models, with `spectral.lean`'s rule: what is replaced was asked first, and answers the
same but for a rounding. A profiler measures models as they were loaded.

* Projections of one input become one product. Its weights lie the other way round in memory (`turned`): a product with
  few rows then reads them as they lie, which MKL does faster.
* Norms of query and key heads, and rotary embeddings, run over all heads of that product at once.
* Products do not depend on how many rows there are where that is asked for (spectral.row_by_row); so the output layer,
  too large for the caches, is read once for several rows.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from spectral.lean import Shared, plain, same, sample
from spectral.row_by_row import answers_asked, linear, row_by_row, single_alike


def lean_decoding(model: Any) -> dict[str, int]:
    """Replace what can be replaced in a model on a CPU, once; how many of each kind were."""
    if hasattr(model, "_lean_decoding"):
        return dict(model._lean_decoding)
    parameters = list(model.parameters())
    counts: dict[str, int] = {}
    if all(p.device.type == "cpu" for p in parameters) and parameters[0].dtype == torch.float32:
        modules = [module for module in model.modules() if not hasattr(module, "_hf_hook")]
        with torch.inference_mode(False), torch.no_grad():
            counts = {
                "projections": sum([lean_projections(module) for module in modules]),
                "gates": sum([lean_gate(module) for module in modules]),
                "turned": sum([lean_weight(module) for module in modules if id(module) not in _tied(model)]),
                "head": int(lean_head(model.get_output_embeddings())),
                "rotary": int(lean_rotary(model)),
            }
            for module in modules:
                if plain(module) and "forward" not in vars(module):
                    module.forward = partial(_linear, module, single_alike(module.weight, module.bias))
    model._lean_decoding = counts
    return dict(counts)


def _linear(layer: torch.nn.Linear, single: bool, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias, single)


class Joined(Shared):
    """Those of a model on a CPU."""

    def _join(self, lay: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super()._join(lay)
        self._single = single_alike(self._whole, self._bias)

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._whole, self._bias, self._single)

    def _own(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return _linear(self._linears[number], self._single, x)


def turnable(layer: Any) -> bool:
    """Whether it pays to turn a layer's weights: known of MKL's products in float32."""
    return torch.backends.mkl.is_available() and plain(layer) and layer.weight.dtype == torch.float32


def turned(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers [N, K] in memory as [K, N]."""
    return weight.t().contiguous().t()


def _tied(model: Any) -> set[int]:
    """Modules whose weights stay as they lie: the output layer, which may be the embedding's."""
    return {id(model.get_output_embeddings()), id(model.get_input_embeddings())}


def lean_weight(module: Any) -> bool:
    """Turn the weights of a layer that nothing was done to."""
    if not turnable(module) or "forward" in vars(module) or not module.weight.is_contiguous():
        return False
    module.weight.data = turned(module.weight.data)
    return True


def lean_projections(module: Any) -> bool:
    """q, k and v of one input as one product; with it the norms of their heads, where the model has them."""
    linears: tuple[Any, ...] = tuple(getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if not plain(*linears) or any("forward" in vars(layer) for layer in linears):
        return False
    x = sample(1, 3, linears[0].in_features, like=linears[0].weight)
    wanted = [layer(x) for layer in linears]
    shared = Joined(linears, turned if turnable(linears[0]) else None)
    if not all(same(want, shared(x, number=number)) for number, want in enumerate(wanted)):
        return False
    for number, layer in enumerate(linears):
        layer.forward = partial(shared, number=number)
    norms = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    gains = [getattr(norm, "lean_gain", None) for norm in norms]
    if all(gain is not None and linears[0].out_features % gain[0].numel() == 0 for gain in gains):
        _join_norms(shared, linears, norms, gains)
    return True


def _join_norms(shared: Shared, linears: tuple[Any, ...], norms: tuple[Any, ...], gains: list[Any]) -> None:
    """The norms of query and key heads as one, where both have the same size and epsilon."""
    (gain, epsilon), (other, other_epsilon) = gains
    size = gain.numel()
    if other.numel() != size or other_epsilon != epsilon:
        return
    heads = [linears[0].out_features // size, linears[1].out_features // size]
    joined = HeadNorms(shared, torch.cat([gain.expand(heads[0], -1), other.expand(heads[1], -1)]), epsilon, heads[0])
    x = sample(1, 3, linears[0].in_features, like=linears[0].weight)
    own = [norm.forward for norm in norms]
    replaced = [joined.queries(own[0]), joined.keys(own[1])]

    def both(forwards: list[Callable[[torch.Tensor], torch.Tensor]]) -> list[torch.Tensor]:
        """As a model calls them."""
        with torch.inference_mode():
            first = forwards[0](linears[0](x).unflatten(-1, (-1, size)))
            return [first, forwards[1](linears[1](x).unflatten(-1, (-1, size))), linears[2](x)]

    if all(same(want, found) for want, found in zip(both(own), both(replaced), strict=True)):
        for norm, forward in zip(norms, replaced, strict=True):
            norm.forward = forward


class HeadNorms:
    """RMS norms of all query and key heads of a shared product [..., (Hq + H) * size + rest] at once: the first norm
    computes both, the second takes its own. What comes from elsewhere goes to the norms as they were."""

    def __init__(self, shared: Shared, gain: torch.Tensor, epsilon: float, query_heads: int) -> None:
        size = gain.shape[1]
        self._shared, self._heads, self._size = shared, query_heads, size
        self._width = gain.numel()
        self._scaled, self._least = gain * size**0.5, torch.tensor(epsilon * size)
        self._keys: tuple[int, torch.Tensor] | None = None

    def queries(self, own: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward of the queries' norm, which had `own`."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            self._keys = None
            product = self._shared.product
            if product is None or not torch.is_inference_mode_enabled() or x.data_ptr() != product.data_ptr():
                return own(x)
            heads = product.narrow(-1, 0, self._width).view(*product.shape[:-1], -1, self._size)
            length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
            out = torch.addcmul(self._least, length, length).rsqrt_().mul(heads).mul_(self._scaled)
            where = product.data_ptr() + self._heads * self._size * product.element_size()
            self._keys = where, out.narrow(-2, self._heads, out.shape[-2] - self._heads)
            return out.narrow(-2, 0, self._heads)

        return forward

    def keys(self, own: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward of the keys' norm, which had `own`."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            kept, self._keys = self._keys, None
            product = self._shared.product  # as long as it lives, nothing else has its address
            if product is None or kept is None or x.data_ptr() != kept[0] or x.shape != kept[1].shape:
                return own(x)
            return kept[1]

        return forward


def lean_gate(module: Any) -> bool:
    """down(act(gate x) * up x): gate and up as one product."""
    linears: tuple[Any, ...] = tuple(getattr(module, name, None) for name in ("gate_proj", "up_proj"))
    down: Any = getattr(module, "down_proj", None)
    act: Any = getattr(module, "act_fn", None)
    if not plain(*linears) or not plain(down) or not callable(act) or "forward" in vars(module):
        return False
    x = sample(1, 3, linears[0].in_features, like=linears[0].weight)
    wanted = module(x)
    shared = Joined(linears, turned if turnable(linears[0]) else None)
    if turnable(down):
        down.weight.data = turned(down.weight.data)

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = shared.parts(x)
        return down(act(gate) * up)  # type: ignore[no-any-return]

    if not same(wanted, forward(x)):
        return False
    module.forward = forward
    return True


def lean_head(head: Any) -> bool:
    """The output layer's product in pieces of the weights, row by row, for a few rows: so it is read once, and how many
    answers are wanted of a forward changes none of them."""
    if not turnable(head) or "forward" in vars(head):
        return False
    single = single_alike(head.weight, head.bias)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with row_by_row(answers_asked()):
            return _linear(head, single, x)

    x = sample(1, 3, head.in_features, like=head.weight)
    if not same(head(x), forward(x)):
        return False
    head.forward = forward
    return True


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, turning: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries [1, Hq, N, d] and keys [1, H, N, d] that lie behind one another, turned: cos [1, 1, N, d], and `turning`,
    sin with its first half negated, likewise."""
    heads = [q.shape[1], k.shape[1]]
    x = q.as_strided((1, sum(heads), *q.shape[2:]), q.stride())
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), turning).split_with_sizes(heads, 1)


def neighbours(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether keys lie right behind the queries in one storage."""
    if q.ndim != 4 or q.shape[0] != 1 or k.ndim != 4 or q.shape[2:] != k.shape[2:]:
        return False
    if any(q.stride(at) != k.stride(at) for at in (1, 2, 3) if q.shape[at] > 1 or at == 1):
        return False  # a single token's stride is anything
    behind = q.storage_offset() + q.shape[1] * q.stride(1)
    return k.storage_offset() == behind and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def lean_rotary(model: Any) -> bool:
    """The function `apply_rotary_pos_emb` of the model's own module of transformers, over queries and keys at once.

    It serves every model of that architecture in this process, and hands over to the original whatever does not come
    from a shared product in inference.
    """
    home = sys.modules.get(type(model).__module__)
    original = getattr(home, "apply_rotary_pos_emb", None)
    if home is None or original is None or hasattr(original, "original"):
        return original is not None
    both = sample(1, 3, 6, 64, like=next(model.parameters())).transpose(1, 2)
    q, k = both[:, :4], both[:, 4:]
    angle = torch.cat([both[:, 0, :, :32]] * 2, -1)
    cos, sin = angle.cos(), angle.sin()
    try:
        wanted = original(q, k, cos, sin)
        if not all(same(want, found) for want, found in zip(wanted, rotary(q, k, *_turning(cos, sin)), strict=True)):
            return False
    except (TypeError, ValueError, RuntimeError):  # another signature
        return False
    last: list[Any] = [None, ()]  # the sin that all layers of a forward share, weakly, and what was made of it

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **other: Any
    ) -> tuple[torch.Tensor, ...]:
        ours = torch.is_inference_mode_enabled() and not more and not other and q.device.type == "cpu"
        if not ours or cos.ndim != 3 or q.shape[-1] != cos.shape[-1] or not neighbours(q, k):
            return original(q, k, cos, sin, *more, **other)  # type: ignore[no-any-return]
        if last[0] is None or last[0]() is not sin:
            last[:] = weakref.ref(sin), _turning(cos, sin)
        return rotary(q, k, *last[1])

    apply_rotary_pos_emb.original = original  # type: ignore[attr-defined]
    home.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]
    return True


def _turning(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotary` takes, of cos and sin [1, N, d]."""
    first, second = sin.chunk(2, -1)
    return cos.unsqueeze(1), torch.cat([-first, second], -1).unsqueeze(1)
