"""What launches choose and answers do not depend on, beyond the order of sums: which programs, tiles and warps.

Which choice is fastest depends on the GPU and on the shape of a layer, and is the same for all settings of a model: a
squeeze must not wait for a compiler. For a GPU by its name and a shape the choices are, in this order,

    1. those that were measured on this machine (spectral.kernels.tune), from the user's cache
    2. those that are shipped (choices.json)
    3. the defaults below

They are looked up once and stay for the process; only a worker's warming up, before any step is captured, puts measured
ones in their place.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

from spectral.codec import LayerCodec
from spectral.errors import SettingError
from spectral.kernels.choice_files import Entry, EntryError, cached_entry, entry_path, shipped_entries, unfinished

log = logging.getLogger("spectral.tune")

VARIABLE = "SPECTRAL_TUNE"


def _knob(default: Any, *values: Any, seconds: float = 0.0) -> Any:
    """A choice and all values that it may have; seconds: about how long the kernels compile for another one."""
    return dataclasses.field(default=default, metadata={"values": values, "seconds": seconds})


@dataclass(frozen=True)
class DecodeChoices:
    """Of one step of a layer (spectral.kernels.decode), best first to try.

    Attributes:
        shared_blocks: blocks of a step, by unit and head group, up to which each has several programs: more fill a
            GPU alone.
        split_blocks: parts of a sequence have a multiple of so many blocks. A program's warps take turns with blocks:
            where there are fewer than warps, some have nothing to do.
        mix_programs: programs of a mix launch that fill a GPU: with fewer, sequences are split.
        few_splits, most_splits: parts of a sequence up to which they are put together four at a time, and from which
            32, instead of eight.
        many_queries: blocks, by row and KV head, from which one program turns a query to four of them.
        piece_programs, score_programs: of the launches for pages whose rows are tokens: with fewer, sequences are
            split, and one program does several blocks.
        window_programs: programs of a launch over the window up to which each row's is read in parts.
        window_early: whether the window is read beside what turns queries, or after that, beside the scores.
        hold, hold_share: whether the programs of blocks, and of shares of them, keep the block's projected query in
            shared memory where it fits. There it is near; without, more programs are on a multiprocessor that has
            little.
    """

    shared_blocks: int = _knob(48, 0, 8, 16, 32, 48, 64, 96, 128)
    split_blocks: int = _knob(4, 1, 2, 4, 8)
    mix_programs: int = _knob(1024, 256, 512, 1024, 2048, 4096)
    hold: bool = _knob(True, True, False, seconds=15)
    hold_share: bool = _knob(False, True, False, seconds=10)
    window_warps: int = _knob(4, 2, 4, 8, seconds=2)
    window_tile: int = _knob(64, 16, 32, 64, seconds=2)
    window_programs: int = _knob(256, 1, 128, 256, 1024, seconds=4)
    window_early: bool = _knob(True, True, False)
    few_splits: int = _knob(4, 0, 4)
    most_splits: int = _knob(64, 32, 64, 128)
    many_queries: int = _knob(4096, 1024, 4096, 16384)
    piece_programs: int = _knob(512, 256, 512, 1024, 2048)
    score_programs: int = _knob(1024, 512, 1024, 2048, 4096)
    combine_warps: int = _knob(1, 1, 2, 4, 8, seconds=2)
    query_warps: int = _knob(1, 1, 2, 4, seconds=1)
    value_warps: int = _knob(4, 1, 2, 4, seconds=2)


@dataclass(frozen=True)
class CodeChoices:
    """Of making and opening pages (spectral.kernels.encode, expand), best first to try.

    Attributes:
        slice_tokens: tokens between the three steps of opening at once: what lies between them should fit the
            second-level cache.
        restore_rounds: tiles of tokens that a program of `restore_kernel` does.
        open_lanes, open_pages, pack_lanes, pack_pages: what a program has in hand at once.
    """

    slice_tokens: int = _knob(8192, 2048, 4096, 8192)
    restore_rounds: int = _knob(2, 1, 2, 4, 8)
    open_lanes: int = _knob(128, 64, 128, 256, seconds=3)
    open_pages: int = _knob(8, 4, 8, 16, seconds=3)
    open_warps: int = _knob(4, 2, 4, 8, seconds=3)
    restore_warps: int = _knob(4, 2, 4, 8, seconds=2)
    pack_lanes: int = _knob(128, 64, 128, 256, seconds=5)
    pack_pages: int = _knob(4, 4, 8, 16, seconds=5)
    pack_warps: int = _knob(4, 2, 4, 8, seconds=5)
    prepare_warps: int = _knob(8, 2, 4, 8, seconds=3)


C = TypeVar("C", DecodeChoices, CodeChoices)

KINDS: dict[type[Any], str] = {DecodeChoices: "decode", CodeChoices: "codes"}


class Shape(NamedTuple):
    """Of a layer, whatever its setting. query_heads: 0 where nothing depends on them; block_pages: that share a
    projected query."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page_tokens: int
    block_pages: int

    def __str__(self) -> str:
        return "x".join(map(str, filter(None, self[:4]))) + f"-{self.page_tokens}x{self.block_pages}"


def block_pages(codec: LayerCodec) -> int:
    """Pages that share a projected query."""
    return codec.frame.pages if codec.frame.turns else 32


def layer_shape(codec: LayerCodec, group: int = 0) -> Shape:
    """A codec's shape; `group` query heads to a KV head."""
    heads = codec.kv_heads
    return Shape(group * heads, heads, codec.key_dim, codec.value_dim, codec.page_tokens, block_pages(codec))


_forced: ContextVar[dict[str, Any] | None] = ContextVar("forced", default=None)


@contextmanager
def forced(**values: Any) -> Iterator[None]:
    """Launches inside take these in place of what is chosen: to compile, compare and time before any request."""
    token = _forced.set({**(_forced.get() or {}), **values})
    try:
        yield
    finally:
        _forced.reset(token)


class Known(NamedTuple):
    """Choices, and where they are from: "measured", "shipped", "default", or "untuned": defaults that are
    not to be measured again in this process."""

    choices: Any
    origin: str


_known: dict[tuple[type[Any], torch.device, Shape], Known] = {}


def chosen(kind: type[C], device: torch.device, shape: Shape) -> C:
    """What launches on a device take for a layer of this shape."""
    found: C = known(kind, device, shape).choices
    values = _forced.get()
    return found if values is None else _with(found, values)


def known(kind: type[C], device: torch.device, shape: Shape) -> Known:
    """The same, whatever is forced, and where it is from."""
    found = _known.get((kind, device, shape))
    if found is None:
        found = _known[kind, device, shape] = _look_up(kind, device, shape)
    return found


def settle(device: torch.device, shape: Shape, choices: DecodeChoices | CodeChoices, origin: str) -> None:
    """From now on launches take these. Before any step is captured: a captured one stays as it was."""
    _known[type(choices), device, shape] = Known(choices, origin)


def forget() -> None:
    """Look everything up again when it is next asked for (tests)."""
    _known.clear()


def tuning_wanted() -> bool:
    """Whether what is not known is measured at first use. Raises SettingError for a wrong word in the environment."""
    choice = os.environ.get(VARIABLE, "auto") or "auto"
    if choice not in ("auto", "off"):
        raise SettingError(f"{VARIABLE} must be auto or off (or unset), got {choice!r}")
    return choice == "auto"


@cache
def gpu_name(device: torch.device) -> str:
    """As the driver has it, "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


def read_choices(kind: type[C], values: dict[str, Any]) -> C:
    """Choices from a file; what it leaves out is as the default. Raises EntryError for anything that is no choice."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            raise EntryError(f"there is no choice {name!r}")
        allowed = fields[name].metadata["values"]
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise EntryError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return kind(**values)


def measured(kind: type[C], name: str, shape: Shape) -> tuple[C, Entry] | None:
    """From the user's cache; None where there are none, none that can be read, or an earlier measurement that did not
    end."""
    path = entry_path(name, KINDS[kind], str(shape))
    try:
        entry = None if path is None else cached_entry(path, name, KINDS[kind], str(shape))
        return None if entry is None or unfinished(entry) else (read_choices(kind, entry["choices"]), entry)
    except EntryError as error:
        log.warning("%s is not used, and will be measured anew: %s", path, error)
        return None


def shipped(kind: type[C], name: str, shape: Shape) -> C | None:
    """From the table that is shipped."""
    for entry in shipped_entries():
        if (entry["gpu"], entry["kind"], entry["shape"]) == (name, KINDS[kind], str(shape)):
            return read_choices(kind, entry["choices"])
    return None


def _look_up(kind: type[C], device: torch.device, shape: Shape) -> Known:
    if device.type != "cuda":  # Triton's interpreter
        return Known(kind(), "default")
    name = gpu_name(device)
    own = measured(kind, name, shape)
    if own is not None:
        return Known(own[0], "measured")
    ours = shipped(kind, name, shape)
    return Known(kind(), "default") if ours is None else Known(ours, "shipped")


def _with(choices: C, values: dict[str, Any]) -> C:
    names = {field.name for field in dataclasses.fields(choices)}
    return dataclasses.replace(choices, **{name: value for name, value in values.items() if name in names})
