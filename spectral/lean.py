"""The small operations of unmodified models in fewer launches, wherever the numbers stay the same.

A decoding step of a large model on a GPU reads the weights once, and beside that costs about 2 µs for every launch; a
layer as transformers writes it has some fifty. Here norms, rotary embeddings and gated activations become one launch
each (spectral.lean_kernels), and projections of the same input one matrix product. On CPUs, where a step of a small
model costs as many microseconds as it has operations, RMS norms take as few as possible.

Every replacement is asked first: only where it answers as the module does, is the module's forward replaced. Modules
that something else has put its hooks on stay as they are, and so do quantized ones, but for products of a few rows with
weights of four bits (spectral.lean_four_bits).
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from spectral.few_rows import ask, few, linear
from spectral.residency import close_gaps

log = logging.getLogger("spectral.engine")

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""Largest difference to a module's own answer, relative to its largest number: a rounding more or less."""


def lean(model: Any) -> list[str]:
    """Replace what can be replaced in a model that is where it will run; the kinds of what was replaced."""
    modules = [module for module in model.modules() if not hasattr(module, "_hf_hook")]
    device = next(model.parameters()).device
    alone = len({parameter.device for parameter in model.parameters()}) == 1  # kernels are launched on one device
    fast = device.type == "cuda" and alone and torch.version.hip is None
    fast = fast and importlib.util.find_spec("triton") is not None
    done = []
    with torch.no_grad():
        if sum([lean_norm(module, fast) for module in modules]):
            done.append("norms")
        if fast:
            done += [name for name, count in _lean_gpu(model, modules).items() if count]
            freed = close_gaps(model)  # where weights lay that were put side by side
            log.debug("weights moved together: %d bytes given back", freed)
    if done:
        log.info("in fewer launches: %s", ", ".join(done))
    return done


def _lean_gpu(model: Any, modules: list[Any]) -> dict[str, int]:
    from spectral import lean_four_bits
    from spectral.lean_layers import lean_layers, lean_linear

    return {
        "projections": sum([lean_projections(module) or lean_four_bits.lean_projections(module) for module in modules]),
        "gates": sum([lean_gate(module) or lean_four_bits.lean_gate(module) for module in modules]),
        "rotary": int(lean_rotary(model)),
        "angles": sum([lean_angles(module) for module in modules]),
        "products": sum([lean_linear(module) or lean_four_bits.lean_linear(module) for module in modules]),
        "layers": lean_layers(model),
    }


def same(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two answers are the same but for a rounding."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    error = (wanted.float() - found.float()).abs().max()
    return bool(error <= TOLERANCE.get(wanted.dtype, 0.0) * wanted.float().abs().max())


def close(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    """As `same`, of all numbers together: where both have rounded weights too, each in its own way, the largest
    difference of many numbers is no measure."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    error = (wanted.float() - found.float()).norm()
    return bool(error <= 2 * TOLERANCE.get(wanted.dtype, 0.0) * wanted.float().norm())


HEADS: ContextVar[dict[int, Any] | None] = ContextVar("spectral_heads", default=None)
"""Norms of queries' and keys' heads that are left to the rotary embedding, by the address of what they are of; None
where they are not."""


def sample(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Random numbers of a tensor's kind, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def lean_norm(module: Any, fast: bool) -> bool:
    """An RMS norm in few operations: in float32 on a CPU, or as a kernel on a GPU (`fast`). Gains are the weight, or
    one plus it (Gemma)."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, torch.Tensor) or epsilon is None:
        return False
    if weight.ndim != 1 or not (fast or (weight.device.type == "cpu" and weight.dtype == torch.float32)):
        return False
    scales = torch.tensor([[1e-3], [0.1], [1.0], [30.0]], device=weight.device, dtype=weight.dtype)
    x = sample(4, weight.shape[0], like=weight) * scales
    wanted = module(x)
    candidates: list[Callable[..., torch.Tensor]]
    if fast:
        candidates = [_kernel_norm(module, float(epsilon), plus_one) for plus_one in (False, True)]
    else:
        candidates = [_cpu_norm(gain, float(epsilon)) for gain in (weight.detach(), 1.0 + weight.detach())]
    for number, candidate in enumerate(candidates):
        with torch.inference_mode():
            found = candidate(x)
        if all(same(*rows) for rows in (*zip(wanted, candidate(x), strict=True), *zip(wanted, found, strict=True))):
            module.forward = candidate
            if not fast:
                module.lean_gain = number + weight.detach(), float(epsilon)  # for spectral.lean_cpu
            return True
    return False


def _cpu_norm(gain: torch.Tensor, epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch's RMS norm; in inference mode, where half of its time goes into seven operations, in four."""
    size = gain.shape[0]
    scaled, least = gain * size**0.5, torch.tensor(epsilon * size)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not torch.is_inference_mode_enabled():
            return torch.rms_norm(x, [size], gain, epsilon)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(least, length, length).rsqrt_().mul(x).mul_(scaled)

    return forward


def _kernel_norm(module: Any, epsilon: float, plus_one: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    from spectral import lean_kernels as kernels

    original = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != module.weight.dtype or _learns(x):
            return original(x)  # type: ignore[no-any-return]
        heads = HEADS.get()
        if heads is not None and x.ndim == 4:
            heads[x.data_ptr()] = kernels.HeadNorm(module.weight, epsilon, plus_one)
            return x
        return kernels.rms_norm(x, module.weight, epsilon, plus_one)

    return forward


def _learns(*tensors: torch.Tensor) -> bool:
    """Whether gradients have to flow through these (a profiler asks for them): kernels have none."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def plain(*linears: Any) -> bool:
    """Whether these are ordinary linear layers of one input and kind, which nothing has hooks on."""
    if not all(type(x) is torch.nn.Linear and not hasattr(x, "_hf_hook") for x in linears):
        return False
    first = linears[0]
    return all(
        x.in_features == first.in_features
        and (x.bias is None) == (first.bias is None)
        and (x.weight.device, x.weight.dtype) == (first.weight.device, first.weight.dtype)
        for x in linears
    )


def merge(
    *linears: torch.nn.Linear, lay: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of layers of one input as one; each keeps its own as a view of that. `lay`: what puts the
    weights where they are to lie."""
    parts = [x.out_features for x in linears]
    whole = torch.cat([x.weight.data for x in linears])
    if lay is not None:
        whole = lay(whole)
    bias = None if linears[0].bias is None else torch.cat([x.bias.data for x in linears])
    for x, weight in zip(linears, whole.split(parts), strict=True):
        x.weight.data = weight
    if bias is not None:
        for x, part in zip(linears, bias.split(parts), strict=True):
            x.bias.data = part
    return whole, bias


class Shared:
    """The projections of one input, which come one after another: the first computes all, the others take theirs.
    `product`: what was computed, as long as some of it is to be taken."""

    def __init__(
        self, linears: tuple[torch.nn.Linear, ...], lay: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self._linears = linears
        self._sizes = [x.out_features for x in linears]
        self._input: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}
        self.product: torch.Tensor | None = None
        self._join(lay)

    def _join(self, lay: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """Make one of them."""
        self._whole, self._bias = merge(*self._linears, lay=lay)

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        """All of them, of this input, side by side."""
        return linear(x, self._whole, self._bias)

    def _own(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """One of them."""
        return linear(x, self._linears[number].weight, self._linears[number].bias)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All of them, of this input."""
        return self._all(x).split_with_sizes(self._sizes, -1)

    def __call__(self, x: torch.Tensor, *, number: int) -> torch.Tensor:
        if number == 0:
            self.product = self._all(x)
            parts = self.product.split_with_sizes(self._sizes, -1)
            self._input, self._left = x, dict(enumerate(parts[1:], start=1))
            return parts[0]
        found = self._left.pop(number, None) if self._input is x else None
        if not self._left:
            self._input = self.product = None
        return self._own(x, number) if found is None else found


def lean_projections(module: Any) -> bool:
    """q, k and v of one input as one matrix product."""
    linears: tuple[Any, ...] = tuple(getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if not plain(*linears):
        return False
    x = sample(1, 3, linears[0].in_features, like=linears[0].weight)
    wanted = [own(x) for own in linears]
    shared = Shared(linears)  # the weights lie side by side from here on, whoever reads them
    if not all(same(want, shared(x, number=number)) for number, want in enumerate(wanted)):
        return False
    for number, own in enumerate(linears):
        own.forward = partial(shared, number=number)
    return True


def gate_kind(activation: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> str | None:
    """Which of the kernels' activations this is, on a tensor's device and in its dtype."""
    from spectral.lean_kernels import gated

    probe = sample(2, 2 * 64, like=like) * 3
    own = activation(probe[:, :64]) * probe[:, 64:]
    return next((kind for kind in ("silu", "gelu_tanh") if same(own, gated(probe, kind))), None)


def lean_gate(module: Any) -> bool:
    """down(act(gate x) * up x): gate and up as one matrix product, the rest as one launch."""
    from spectral import lean_kernels as kernels
    from spectral.lean_products import product

    linears: tuple[Any, ...] = tuple(getattr(module, name, None) for name in ("gate_proj", "up_proj"))
    down: Any = getattr(module, "down_proj", None)
    if not plain(*linears) or not plain(down) or not callable(getattr(module, "act_fn", None)):
        return False
    if linears[0].out_features != linears[1].out_features:
        return False
    x = sample(1, 3, linears[0].in_features, like=linears[0].weight)
    wanted = module(x)
    kind = gate_kind(module.act_fn, x)
    if kind is None:
        return False
    whole, bias = merge(*linears)

    original = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if _learns(x):
            return original(x)  # type: ignore[no-any-return]
        if few(x, whole):
            return down(product(x, whole, bias, gate=kind))  # type: ignore[no-any-return]
        return down(kernels.gated(F.linear(x, whole, bias), kind))  # type: ignore[no-any-return]

    if not same(wanted, forward(x)):
        return False
    ask(lambda rows: wanted[:, :rows], lambda rows: forward(x[:, :rows]))
    module.forward = forward
    return True


def _here(x: torch.Tensor) -> bool:
    """Whether the kernels serve a tensor."""
    return x.is_cuda


def lean_rotary(model: Any) -> bool:
    """The function `apply_rotary_pos_emb` of the model's own module of transformers: queries and keys in one launch.

    It serves every model of that architecture in this process, and hands over to the original whatever it is not for.
    """
    from spectral import lean_kernels as kernels

    home = sys.modules.get(type(model).__module__)
    original = getattr(home, "apply_rotary_pos_emb", None)
    if home is None or original is None or hasattr(original, "original"):
        return original is not None
    weight = next(model.parameters())
    q, k, angle = (sample(1, h, 3, 64, like=weight) for h in (4, 2, 1))
    cos, sin = angle[:, 0].float().cos().to(q.dtype), angle[:, 0].float().sin().to(q.dtype)
    try:
        wanted = original(q, k, cos, sin)
        if not all(same(want, found) for want, found in zip(wanted, kernels.rotary(q, k, cos, sin), strict=True)):
            return False
    except (TypeError, ValueError, RuntimeError):  # another signature
        return False

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **other: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ours = _here(q) and not more and not other and q.ndim == 4 and q.shape[0] == 1 and cos.ndim == 3
        heads = HEADS.get() or {}
        norms = [heads.pop(x.data_ptr(), None) for x in (q, k)]
        if ours and q.shape[-1] == cos.shape[-1] and not _learns(q, k):
            return kernels.rotary(q, k, cos, sin, norms)
        q, k = (x if norm is None else kernels.rms_norm(x, *norm) for x, norm in zip((q, k), norms, strict=True))
        return original(q, k, cos, sin, *more, **other)  # type: ignore[no-any-return]

    apply_rotary_pos_emb.original = original  # type: ignore[attr-defined]
    home.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]
    return True


def lean_angles(module: Any) -> bool:
    """A rotary embedding's cos and sin of positions in one launch, where its frequencies are always the same."""
    from spectral import lean_kernels as kernels

    inverse, scaling = getattr(module, "inv_freq", None), getattr(module, "attention_scaling", None)
    if "RotaryEmbedding" not in type(module).__name__ or not isinstance(inverse, torch.Tensor) or inverse.ndim != 1:
        return False
    if not isinstance(scaling, (int, float)) or getattr(module, "rope_type", "default") in ("dynamic", "longrope"):
        return False
    last = int(getattr(module, "max_seq_len_cached", 4096)) - 1
    position = torch.tensor([[0, 1, 2, 77, last // 3, last]], device=inverse.device)
    original = module.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *more: Any, **other: Any) -> Any:
        if more or other or not _here(x) or position_ids.ndim != 2 or position_ids.shape[0] != 1:
            return original(x, position_ids, *more, **other)
        return kernels.angles(position_ids, module.inv_freq, float(module.attention_scaling), x.dtype)

    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.zeros((), dtype=dtype, device=inverse.device)
            found = kernels.angles(position, inverse, float(scaling), dtype)
            if not all(same(want, ours) for want, ours in zip(original(x, position), found, strict=True)):
                return False
    except (TypeError, ValueError, RuntimeError):  # another signature
        return False
    module.forward = forward
    return True
