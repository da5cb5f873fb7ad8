"""What wrappers of kernels refuse, by the name of what is wrong, and the strides that they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from spectral.kernels import check_codes
from spectral.kernels.check import Case
from spectral.kernels.chunk import TILES, attend_chunk, part_attention, tiled
from spectral.kernels.code_layer import CodeLayer
from spectral.kernels.decode import LayerKernels, decode_attention
from spectral.kernels.encode import Tokens, encode
from spectral.kernels.expand import expand
from spectral.kernels.recent import read_recent, write_recent, write_step
from spectral.kernels.squeeze import SqueezeLayer
from spectral.shapes import LayerShape
from spectral.windows import ExactWindow, WindowGroup, make_window
from tests.spectral.helpers import random_codec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXED = [8, 6, 4, 3, 2, 1, 0]
HEADS, DIM, PAGE = 2, 16, 16

Inputs = dict[str, Any]
Change = Callable[[Inputs], Inputs]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same, with something between any two numbers of the last dimension."""
    return torch.stack([x, x], -1)[..., 0]


def turned(x: torch.Tensor) -> torch.Tensor:
    """The same, with the first two dimensions the other way round in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """The same as a part of something twice as wide."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same bytes, four bytes behind a multiple of 8."""
    return torch.cat([x.new_zeros(4), x.flatten()])[4:].view(x.shape)


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


def to(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """One input as `change` makes it."""
    return lambda inputs: {name: change(inputs[name])}


def window_of(*sizes: int, device: torch.device | str = DEVICE, bits: int = 8, slots: int = 2) -> ExactWindow:
    window = make_window(LayerShape(*sizes), 4, 128, torch.bfloat16, torch.device(device), bits)
    WindowGroup([window]).resize(slots)
    return window


def in_pieces(window: Any) -> Any:
    window.high = apart(window.high)
    return window


# Decoding: two rows of ten pages.


@cache
def decoded(flat: bool = False) -> Inputs:
    codec = random_codec(HEADS, DIM, [4, 2] if flat else MIXED, block=256, device=str(DEVICE), flat=flat)
    case = Case(LayerKernels(codec), 2, 116 + 10 * PAGE, 2, torch.float32)
    names = ("pool", "window", "step", "query", "key", "value")
    return {"layer": case.kernels} | {name: getattr(case, name) for name in names}


def decode(inputs: Inputs) -> torch.Tensor:
    return decode_attention(**inputs, scaling=0.25)


def tables(change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Change:
    """The step's tables of these names (none: all) as `change` makes them."""
    some = names or ("pages", "count", "slot", "length", "first", "before")
    return lambda inputs: {
        "step": dataclasses.replace(inputs["step"], **{name: change(getattr(inputs["step"], name)) for name in some})
    }


def sides(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda inputs: {name: change(inputs[name]) for name in ("query", "key", "value")}


DECODE: list[tuple[str, Change]] = [
    *((f"step.{name} must", tables(apart, name)) for name in ("count", "slot", "length", "first", "before")),
    *((f"step.{name} must", tables(torch.Tensor.long, name)) for name in ("pages", "count", "slot")),
    ("step.count must", tables(lambda x: x[:, None].repeat(1, 2), "count")),
    ("step.length must", tables(lambda x: x[:1], "length")),
    ("step.slot must", tables(elsewhere, "slot")),
    ("step.pages must", tables(turned, "pages")),
    ("step.pages must", tables(lambda x: x[:, 0], "pages")),
    ("step must be of 2 rows", tables(lambda x: x[:1])),
    ("step must be of 2 rows", tables(elsewhere)),
    ("query must", sides(torch.Tensor.int)),
    ("query must", to("query", lambda x: x[0])),
    ("query must", to("query", lambda x: x[..., :8])),
    ("query must", to("query", elsewhere)),
    ("query must have a multiple", to("query", lambda x: x[:, :3])),
    ("query must have a multiple", to("query", lambda x: x[:, :0])),
    ("key must", to("key", torch.Tensor.half)),
    ("key must", to("key", elsewhere)),
    ("value must", to("value", lambda x: x[..., :8])),
    ("value must", to("value", lambda x: x[:1])),
    ("pool must", to("pool", lambda x: x[::2])),
    ("pool must", to("pool", lambda x: x.view(torch.int8))),
    ("pool must", to("pool", elsewhere)),
    ("pool must begin at", to("pool", unaligned)),
    (r"window must have .*\(2, 16, 16\).* got \(1, 16, 16\)", lambda inputs: {"window": window_of(1, DIM, DIM)}),
    (r"window must have .* got \(2, 16, 32\)", lambda inputs: {"window": window_of(HEADS, DIM, 32, bits=16)}),
    ("window must have contiguous", lambda inputs: {"window": window_of(HEADS, DIM, DIM, device="meta")}),
    ("window must have contiguous", lambda inputs: {"window": in_pieces(window_of(HEADS, DIM, DIM))}),
]


@pytest.mark.parametrize(("wrong", "change"), DECODE)
def test_decoding_refuses(wrong: str, change: Change) -> None:
    inputs = decoded()
    with pytest.raises(ValueError, match=wrong):
        decode(inputs | change(inputs))


@pytest.mark.parametrize("flat", [False, True])
def test_decoding_reads_queries_and_pages_by_their_strides(flat: bool) -> None:
    inputs = decoded(flat)
    assert inputs["layer"].flat == flat
    wanted = decode(inputs)
    for change in (sides(apart), sides(turned), tables(wide, "pages")):
        assert torch.equal(decode(inputs | change(inputs)), wanted)
    one = sides(lambda x: x[:1])(inputs) | tables(lambda x: x[:1])(inputs)
    alone = decode(inputs | one)
    one |= tables(lambda x: x.repeat_interleave(2, 0)[::2][:1])(one)  # of one row no stride says anything
    assert torch.equal(decode(inputs | one), alone)


@pytest.mark.parametrize("flat", [False, True])
def test_no_rows_have_no_answers(flat: bool) -> None:
    inputs = decoded(flat)
    none = sides(lambda x: x[:0])(inputs) | tables(lambda x: x[:0])(inputs)
    assert decode(inputs | none).shape == (0, 2 * HEADS, DIM)


def test_kernels_of_untransformed_pages_read_no_numbers_of_64_bits() -> None:
    inputs, other = decoded(True), decoded()
    with pytest.raises(ValueError, match="query must be float16 or bfloat16 or float32"):
        decode(inputs | sides(torch.Tensor.double)(inputs))
    if DEVICE.type == "cpu":
        assert torch.allclose(decode(other | sides(torch.Tensor.double)(other)).float(), decode(other), atol=1e-3)


# Chunks, and pages that are opened and made.


@cache
def code_layer() -> CodeLayer:
    return CodeLayer(random_codec(HEADS, DIM, MIXED, block=256, device=str(DEVICE)))


def pages() -> Inputs:
    layer = code_layer()
    return {
        "layer": layer, "pool": check_codes.random_pages(layer.codec, 5), "ids": integers(4, 0, 2, dtype=torch.int32),
    }  # fmt: skip


def chunk_inputs() -> Inputs:
    new = {"query": normal(2 * HEADS, 5, DIM), "key": normal(HEADS, 5, DIM), "value": normal(HEADS, 5, DIM, seed=1)}
    return pages() | {"recent": normal(HEADS, 7, 2 * DIM)} | new


def of_chunk(inputs: Inputs) -> torch.Tensor:
    return attend_chunk(**inputs, scaling=0.25)


CHUNK: list[tuple[str, Change]] = [
    ("query must", to("query", lambda x: x[..., :8])),
    ("query must", to("query", lambda x: x[0])),
    ("query must", to("query", elsewhere)),
    ("query must", sides(torch.Tensor.int)),
    ("query must have a multiple", to("query", lambda x: x[:3])),
    ("key must", to("key", lambda x: x[..., :1])),
    ("key must", to("key", lambda x: x[:1])),
    ("key must", to("key", lambda x: x[:, :1])),
    ("key must", to("key", torch.Tensor.half)),
    ("key must", to("key", elsewhere)),
    ("value must", to("value", lambda x: x[..., :1])),
    ("value must", to("value", lambda x: x[:, :4])),
    ("recent must", to("recent", lambda x: x[..., :-1])),
    ("recent must", to("recent", lambda x: x[..., 0])),
    ("recent must", to("recent", lambda x: x[:1])),
    ("recent must", to("recent", torch.Tensor.half)),
    ("recent must", to("recent", elsewhere)),
    ("ids must", to("ids", torch.Tensor.long)),
    ("ids must", to("ids", apart)),
    ("pool must", to("pool", elsewhere)),
]


@pytest.mark.parametrize(("wrong", "change"), CHUNK)
def test_chunks_refuse(wrong: str, change: Change) -> None:
    inputs = chunk_inputs()
    with pytest.raises(ValueError, match=wrong):
        of_chunk(inputs | change(inputs))


def test_chunks_are_read_by_their_strides() -> None:
    inputs = chunk_inputs()
    wanted = of_chunk(inputs)
    for change in (sides(apart), sides(turned), to("recent", apart), to("recent", turned)):
        assert torch.equal(of_chunk(inputs | change(inputs)), wanted)
    none = {name: inputs[name][:, :0] for name in ("query", "key", "value")}
    assert of_chunk(inputs | none).shape == (2 * HEADS, 0, DIM)


def part() -> Inputs:
    shapes = {"query": (4, 5, 32), "keys": (2, 9, 32), "values": (2, 9, 48)}
    return {name: normal(*shape, seed=number).half() for number, (name, shape) in enumerate(shapes.items())}


PART: list[tuple[str, Change]] = [
    ("query must", to("query", turned)),
    ("query must", to("query", torch.Tensor.float)),
    ("query must", to("query", lambda x: x[0])),
    ("query must have a multiple", to("query", lambda x: x[:3])),
    ("keys must", to("query", lambda x: x[..., :16].contiguous())),
    ("keys must", to("query", elsewhere)),
    ("keys must", to("keys", wide)),
    ("keys must", to("keys", apart)),
    ("keys must", to("keys", torch.Tensor.float)),
    ("values must", to("values", lambda x: x[:, :5])),
    ("values must", to("values", lambda x: x[:1])),
    ("values must", to("values", turned)),
    ("keys must be of 5 tokens", lambda inputs: {name: inputs[name][:, :3] for name in ("keys", "values")}),
]


@pytest.mark.parametrize(("wrong", "change"), PART)
def test_parts_of_a_past_refuse(wrong: str, change: Change) -> None:
    inputs = part()
    for ask in (part_attention, partial(tiled, tiles=TILES["small"])):
        with pytest.raises(ValueError, match=wrong):
            ask(**(inputs | change(inputs)), causal=True, scaling=0.2)


def test_parts_may_be_shorter_than_their_queries_and_heads_lie_anywhere() -> None:
    inputs = part()
    with pytest.raises(ValueError, match="keys must be of 1 tokens"):
        part_attention(inputs["query"], inputs["keys"][:, :0], inputs["values"][:, :0], causal=False, scaling=0.2)
    some = {name: inputs[name][:, :3] for name in ("keys", "values")}  # heads lie nine tokens apart
    found, _ = part_attention(inputs["query"], **some, causal=False, scaling=0.2)
    tight, _ = part_attention(
        inputs["query"], some["keys"].contiguous(), some["values"].contiguous(), causal=False, scaling=0.2
    )
    assert torch.equal(found, tight) and found.isfinite().all()


def opening() -> Inputs:
    out = torch.zeros(HEADS, 3 * PAGE, DIM, dtype=torch.float16, device=DEVICE)
    return pages() | {"first": 3, "keys": out, "values": out.clone()}


EXPAND: list[tuple[str, Change]] = [
    ("pool must", to("pool", lambda x: x[::2])),
    ("pool must begin at", to("pool", unaligned)),
    ("ids must", to("ids", elsewhere)),
    ("first must", lambda inputs: {"first": -1}),
    ("keys must", to("keys", torch.Tensor.float)),
    ("keys must", to("keys", wide)),
    ("keys must", to("keys", lambda x: x[:, :-1])),
    ("keys must have room", to("keys", lambda x: x[:1].expand(HEADS, -1, -1))),
    ("values must", to("values", turned)),
    ("values must", to("values", elsewhere)),
]


@pytest.mark.parametrize(("wrong", "change"), EXPAND)
def test_opening_refuses(wrong: str, change: Change) -> None:
    inputs = opening()
    with pytest.raises(ValueError, match=wrong):
        expand(**(inputs | change(inputs)))


def encoding() -> Inputs:
    tokens = {"held": normal(HEADS, 20, 2 * DIM), "keys": normal(HEADS, 28, DIM), "values": normal(HEADS, 28, DIM)}
    return pages() | tokens | {"page": integers(3, 4, 5, dtype=torch.int32), "blocks": 1, "top": 0, "group": 1}


def encoded(inputs: Inputs) -> torch.Tensor:
    tokens = Tokens(*(inputs[name] for name in ("held", "keys", "values", "top", "group")))
    pool = inputs["pool"].clone() if inputs["pool"].data_ptr() % 8 == 0 else inputs["pool"]
    encode(inputs["layer"], tokens, inputs["page"], inputs["blocks"], pool, inputs["ids"])
    return pool


ENCODE: list[tuple[str, Change]] = [
    ("pool must", to("pool", elsewhere)),
    ("pool must begin at", to("pool", unaligned)),
    ("ids must", to("ids", elsewhere)),
    ("ids must", to("ids", apart)),
    ("page must", to("page", elsewhere)),
    ("page must", to("page", apart)),
    ("page must", to("page", lambda x: x[:2])),
    ("blocks must", lambda inputs: {"blocks": 0}),
    ("held must", to("held", apart)),
    ("held must", to("held", torch.Tensor.half)),
    ("held must be 48 tokens at most", to("held", lambda x: x.repeat(1, 3, 1))),
    ("keys must", to("keys", apart)),
    ("keys must", to("keys", torch.Tensor.int)),
    ("values must", to("values", lambda x: x[:, :-1])),
    ("values must", to("values", elsewhere)),
    ("keys of 16 numbers do not fall", lambda inputs: {"top": 127, "group": 0}),
]


@pytest.mark.parametrize(("wrong", "change"), ENCODE)
def test_encoding_refuses(wrong: str, change: Change) -> None:
    inputs = encoding()
    with pytest.raises(ValueError, match=wrong):
        encoded(inputs | change(inputs))


def test_tokens_are_encoded_by_their_strides() -> None:
    inputs = encoding()
    wanted = encoded(inputs)
    for name in ("held", "keys", "values"):
        for change in (turned, wide):
            assert torch.equal(encoded(inputs | to(name, change)(inputs)), wanted)


# The window.


def reading() -> Inputs:
    return {"window": window_of(HEADS, DIM, DIM, slots=3), "slot": integers(1), "place": integers(0, 5, 35)}


READ: list[tuple[str, Change]] = [
    ("slot must", to("slot", torch.Tensor.int)),
    ("slot must be one", lambda inputs: {"slot": integers(0, 1)}),
    ("slot must be one", lambda inputs: {"slot": integers(0, 1), "place": integers()}),
    ("slot must", to("slot", elsewhere)),
    ("place must", to("place", apart)),
    ("place must", to("place", lambda x: x[None])),
    ("place must", to("place", elsewhere)),
    ("window must", to("window", lambda x: in_pieces(x))),
]


@pytest.mark.parametrize(("wrong", "change"), READ)
def test_reading_a_window_refuses(wrong: str, change: Change) -> None:
    inputs = reading()
    with pytest.raises(ValueError, match=wrong):
        read_recent(**(inputs | change(inputs)))


def writing() -> Inputs:
    tokens = {"key": normal(HEADS, 3, DIM), "value": normal(HEADS, 3, DIM)}
    return reading() | {"place": integers(5, 6, 35), "source": integers(2, 0, 1)} | tokens


WRITE: list[tuple[str, Change]] = [
    ("slot must", lambda inputs: {"slot": integers(0, 1, 2)}),
    ("source must", to("source", apart)),
    ("source must", to("source", elsewhere)),
    ("source must", to("source", torch.Tensor.int)),
    ("key must", to("key", apart)),
    ("key must", to("key", lambda x: x[:, 0])),
    ("key must", to("key", torch.Tensor.int)),
    ("key must", to("key", elsewhere)),
    ("value must", to("value", lambda x: x[:, :2])),
    ("value must", to("value", lambda x: x[:1])),
]


@pytest.mark.parametrize(("wrong", "change"), WRITE)
def test_writing_a_window_refuses(wrong: str, change: Change) -> None:
    inputs = writing()
    with pytest.raises(ValueError, match=wrong):
        write_recent(**(inputs | change(inputs)))


def test_tokens_go_into_a_window_by_their_strides() -> None:
    found = []
    for change in (lambda inputs: {}, to("key", turned), to("value", wide)):
        inputs = writing()
        write_recent(**(inputs | change(inputs)))
        found.append(read_recent(inputs["window"], inputs["slot"], inputs["place"]))
    assert found[0].any() and all(torch.equal(one, found[0]) for one in found)


STEP: list[tuple[str, Change]] = [
    ("slot must", to("slot", apart)),
    ("place must", to("place", lambda x: x[:1])),
    ("tokens must", to("tokens", lambda x: x[0])),
    ("tokens must", to("tokens", torch.Tensor.int)),
    ("tokens must", to("tokens", elsewhere)),
    ("high must", to("tensors", lambda x: [x[0], apart(x[1]), *x[2:]])),  # type: ignore[arg-type,index,return-value]
    ("high must", to("tokens", lambda x: x.repeat(2, 1, 1, 1))),
    ("scale must", to("tensors", lambda x: [*x[:3], x[3][:, :1]])),  # type: ignore[arg-type,index,return-value]
]


@pytest.mark.parametrize(("wrong", "change"), STEP)
def test_a_steps_tokens_are_refused(wrong: str, change: Change) -> None:
    inputs = reading() | {"slot": integers(0, 2), "place": integers(5, 35), "tokens": normal(1, 2, HEADS, 2 * DIM)}
    inputs["tensors"] = [tensor[None] for tensor in inputs["window"].tensors()]
    with pytest.raises(ValueError, match=wrong):
        write_step(**(inputs | change(inputs)))


# Squeezes.


@pytest.mark.parametrize(
    ("other", "sizes"),
    [
        ("page_tokens 16 and 8", {"page": 8}),
        ("classes 5 and 1", {"flat": True}),
        ("key_dim 16 and 32", {"dim": 32}),
        ("units", {"units": 2}),
        ("units", {"apart": True}),
        ("units", {"heads": 4}),
    ],
)
def test_pages_are_squeezed_within_one_layer(other: str, sizes: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"heads": HEADS, "dim": DIM, "widths": MIXED, "device": str(DEVICE)}
    with pytest.raises(ValueError, match=f"both settings must have one page size and the same units, got .*{other}"):
        SqueezeLayer(random_codec(**usual), random_codec(**(usual | sizes)))


def test_a_squeeze_refuses() -> None:
    old, new = (random_codec(HEADS, DIM, widths, device=str(DEVICE)) for widths in ([8, 4, 0, 2], [4, 2, 0, 0]))
    layer = SqueezeLayer(old, new)
    assert check_codes.squeeze_error(layer, old, new) == ""
    found, out = check_codes.random_pages(old, 4), check_codes.random_pages(new, 4)
    for wrong, args in (
        ("pages must be contiguous", (wide(found), out)),
        ("pages must be contiguous", (elsewhere(found), elsewhere(out))),
        ("pages must begin at a multiple of 8", (unaligned(found), out)),
        ("out must be contiguous", (found, out[:3])),
        ("out must be contiguous", (found, elsewhere(out))),
        ("out must begin at a multiple of 8", (found, unaligned(out))),
    ):
        with pytest.raises(ValueError, match=wrong):
            layer(*args)


def test_what_is_wrong_is_said_with_what_there_was() -> None:
    with pytest.raises(ValueError) as failure:
        part_attention(part()["query"], *(apart(part()[name]) for name in ("keys", "values")), causal=True, scaling=1.0)
    assert str(failure.value) == (
        "keys must be float16 [KV heads, tokens, 32] with contiguous tokens of a head "
        f"on {part()['query'].device}, got float16 [2, 9, 32] with strides [576, 64, 2] on {part()['query'].device}"
    )
