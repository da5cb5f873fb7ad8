"""Measuring what launches should choose on this GPU (spectral.kernels.choices), as a worker does before it is ready and
`spectral tune` when it is told to; never within a request.

Times are of captured launches on one layer's codes, at a few sizes of steps, after the second-level cache was filled
with something else, as a model's weights fill it between one layer and the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from spectral.dispatch import launching
from spectral.kernels.check import Case, wrong
from spectral.kernels.check_codes import code_error, random_pages
from spectral.kernels.choice_files import Entry, make_entry
from spectral.kernels.choices import KINDS, CodeChoices, DecodeChoices, Shape, forced
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.decode import LayerKernels
from spectral.kernels.encode import Tokens, encode
from spectral.kernels.expand import expand
from spectral.kernels.search import Found, Search, Times
from spectral.kernels.timing import microseconds
from spectral.windows import scale_group

STEPS = ((1, 1024), (1, 4096), (8, 1024), (1, 16384), (8, 4096), (1, 32768), (8, 32768))
"""Rows and tokens of the steps that are timed, as far as there is memory for their pages."""

ENCODED, OPENED = (1, 8, 128), (128, 1024)
"""Pages at once: of steps that seal some, and of chunks."""

MOST_PAGES = max(*ENCODED, *OPENED)

MOST_BYTES = 256 << 20
"""Of the pages of one step."""

DECODE_SHARE = 2 / 3
"""Of the time that there is for both; codes have what is left."""

EACH = 0.02
"""Seconds for which one step is repeated."""

Progress = Callable[[str, float], None]


class Bench(Protocol):
    """Something whose choices can be measured."""

    device: torch.device
    shape: Shape

    def start(self) -> DecodeChoices | CodeChoices:
        """The defaults."""

    def times(self, choices: Any) -> Times:
        """Of all steps, in microseconds."""

    def wrong(self, choices: Any) -> str:
        """What is wrong with the answers; "" if nothing."""


class _Timed:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        nbytes = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        self._filler = torch.empty(2 * nbytes, dtype=torch.uint8, device=device)

    def _time(self, call: Callable[[], Any]) -> float:
        return microseconds(call, EACH, before=self._filler.zero_, fall_back=False)


class DecodeBench(_Timed):
    """Decode steps of a layer with `group` query heads to a KV head."""

    def __init__(self, kernels: LayerKernels, group: int, dtype: torch.dtype) -> None:
        super().__init__(kernels.key_basis.device)
        self.shape = kernels.shape(group)
        self._kernels, self._group, self._dtype = kernels, group, dtype
        codec = kernels.codec
        most = min(MOST_BYTES, free_bytes(self.device) // 4)
        self._cases = {
            f"{rows} x {context}": Case(kernels, rows, context, group, dtype)
            for rows, context in STEPS
            if rows * context // codec.page_tokens * codec.page_nbytes <= most
        }
        if not self._cases:
            raise RuntimeError(f"{most >> 20} MiB of memory are too few to measure in")

    def start(self) -> DecodeChoices:
        return DecodeChoices()

    def times(self, choices: Any) -> Times:
        with forced(**dataclasses.asdict(choices)):
            return {name: self._time(case.run) for name, case in self._cases.items()}

    def wrong(self, choices: Any) -> str:
        with forced(**dataclasses.asdict(choices)):
            return wrong(self._kernels, self._group, self._dtype)


class CodeBench(_Timed):
    """Encoding and opening pages of a layer."""

    def __init__(self, layer: CodeLayer, dtype: torch.dtype) -> None:
        super().__init__(layer.device)
        self.shape, self._layer = layer.shape, layer
        codec = layer.codec
        rng = torch.Generator(self.device).manual_seed(0)
        self._ids = torch.randperm(MOST_PAGES, generator=rng, device=self.device).int()
        self._pool, self._own = random_pages(codec, MOST_PAGES), random_pages(codec, MOST_PAGES)
        self._pages = torch.arange(MOST_PAGES, dtype=torch.int32, device=self.device)
        count = MOST_PAGES * codec.page_tokens
        self._keys, self._values = (
            torch.randn((codec.kv_heads, count, dim), generator=rng, device=self.device).to(dtype)
            for dim in (codec.key_dim, codec.value_dim)
        )
        self._sides = [
            torch.empty((codec.kv_heads, count, dim), dtype=torch.float16, device=self.device)
            for dim in (codec.key_dim, codec.value_dim)
        ]
        self._scale = scale_group(codec.key_dim, codec.value_dim)
        self._none = torch.empty((codec.kv_heads, 0, codec.key_dim + codec.value_dim), device=self.device)

    def start(self) -> CodeChoices:
        return CodeChoices()

    def times(self, choices: Any) -> Times:
        with forced(**dataclasses.asdict(choices)):
            found = {f"encode {count}": self._time(partial(self._encode, count)) for count in ENCODED}
            return found | {f"open {count}": self._time(partial(self._open, count)) for count in OPENED}

    def _encode(self, count: int) -> None:
        codec = self._layer.codec
        keys, values = (x[:, : count * codec.page_tokens] for x in (self._keys, self._values))
        tokens = Tokens(self._none, keys, values, 127, self._scale)  # as a window of 8 bits would keep them
        encode(self._layer, tokens, self._pages[:count], codec.frame.blocks(MOST_PAGES), self._own, self._ids[:count])

    def _open(self, count: int) -> None:
        keys, values = (side[:, : count * self._layer.codec.page_tokens] for side in self._sides)
        expand(self._layer, self._pool, self._ids[:count], 0, keys, values)

    def wrong(self, choices: Any) -> str:
        with forced(**dataclasses.asdict(choices)):
            return code_error(self._layer)


def free_bytes(device: torch.device) -> int:
    """What a process could still take on a device, its allocator's reserve included."""
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + spare


def tune(bench: Bench, seconds: float, progress: Progress | None = None) -> Found:
    """Search for what is fastest, in about so many seconds. Raises what the defaults raise."""
    with launching(bench.device):
        start = bench.start()
        fault = bench.wrong(start)  # compiles them, too
        if fault:
            raise RuntimeError(fault)
        return Search(bench.times, bench.wrong, seconds=seconds, progress=progress).run(start)


def entry_of(name: str, shape: Shape, found: Found) -> Entry:
    """As it is kept in files; name: the GPU's."""
    return make_entry(
        name, KINDS[type(found.choices)], str(shape), dataclasses.asdict(found.choices),
        left_out=found.left_out,
        relative_times={step: round(found.after[step] / found.before[step], 3) for step in found.before},
    )  # fmt: skip


def summary(what: str, found: Found) -> str:
    """One line of what was found."""
    ratios = [found.after[step] / found.before[step] for step in found.before]
    gain = 1 - sum(ratios) / len(ratios)
    changes = ", ".join(f"{name} {value}" for name, value in found.changed.items())
    text = f"tuned {what} in {found.seconds:.1f} s: "
    text += f"{changes}, {gain:.1%} less time" if changes else "the defaults are as fast as anything tried"
    failed = [f"{one.name}={one.value}" for one in found.trials if one.verdict.startswith(("wrong", "does not run"))]
    if failed:
        text += f"; wrong or not running: {', '.join(failed)}"
    if found.left_out:
        text += f"; not tried for want of time: {', '.join(found.left_out)} (`spectral tune` has more)"
    return text
