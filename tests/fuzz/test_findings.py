"""What fuzzing found, each as a test of its own."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server import schemas
from server.config import ConfigError, ModelSettings, load_settings
from server.errors import ApiError
from server.scheduler.facts import predict
from server.schemas.ollama import OllamaChatRequest
from server.toolcalls import Call, ToolParser
from server.worker import messages as wire
from spectral.errors import ProfileError
from spectral.profile import SpectralProfile
from spectral.profile_file import digest
from tests.fuzz.targets.profiles import Structured, seal

# -- messages between gateway and workers ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xed\xa0\x80"])
def test_text_that_is_no_utf8_is_a_bad_frame(text: bytes) -> None:
    for message, decode in (
        (wire.Failed("r", "xx"), wire.decode_to_parent),
        (wire.Cancel("xx"), wire.decode_to_worker),
    ):
        body = wire.encode(message)[4:]
        broken = body.replace(b"\xa2xx", bytes([0xA0 + len(text)]) + text)
        assert broken != body
        with pytest.raises(wire.BadFrame, match="not a message"):
            decode(broken)


def test_nesting_without_end_is_a_bad_frame() -> None:
    submit = msgspec.to_builtins(wire.Submit("r", "chat", wire.Sampling(), tools=[{"deep": 1}]))
    body = msgspec.msgpack.encode(submit).replace(msgspec.msgpack.encode({"deep": 1}), b"\x81\xa4deep" + b"\x91" * 9999)
    with pytest.raises(wire.BadFrame):
        wire.decode_to_worker(body + b"\x01")


# -- calls of tools in a model's text ----------------------------------------------------------------------------------


def parsed(form: str, pieces: list[str]) -> list[str | Call]:
    """Everything that comes out."""
    parser = ToolParser(form, ["weather"])
    return [part for piece in pieces for part in parser.push(piece)] + parser.finish()


def test_markers_without_end_are_no_endless_recursion() -> None:
    assert parsed("mistral", ["[TOOL_CALLS]"] * 5000) == ["[TOOL_CALLS]" * 5000]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_no_arguments(value: str) -> None:
    text = f'{{"name": "weather", "arguments": {{"a": {value}}}}}'
    assert parsed("json", [text]) == [text]


def test_half_a_surrogate_pair_is_sent_as_its_escape() -> None:
    (call,) = parsed("json", ['{"name": "weather", "arguments": {"a": "\\ud800"}}'])
    assert isinstance(call, Call) and call.arguments.encode() and json.loads(call.arguments) == {"a": "\ud800"}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("form", "pieces"),
    [
        ("hermes", ["<tool_call>"] + ["x" * 50] * 20_000),
        ("hermes", ["<tool_call><function=weather>" + " " * 30_000 + "</tool_call>"]),
        ("hermes", ["<tool_call><function=weather>" + "<parameter=a>" * 20_000 + "</function></tool_call>"]),
        ("json", ["{"] + ["x" * 50] * 20_000),
        ("json", ["[]" * 200_000]),
        ("mistral", ["weather"] + ["x" * 50] * 20_000),
    ],
)
def test_the_time_to_find_calls_grows_with_the_text_and_not_its_square(form: str, pieces: list[str]) -> None:
    began = time.monotonic()
    assert "".join(part for part in parsed(form, pieces) if isinstance(part, str)).strip() in ("".join(pieces), "")
    assert time.monotonic() - began < 2.0  # they took from five seconds to hours


# -- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"p{number}": {} for number in range(2001)}},
        {"anyOf": [{"properties": {f"p{number}": {} for number in range(2001)}}]},
        {"enum": ["x" * 1000] * 300},
    ],
)
def test_a_schema_that_takes_minutes_to_compile_is_refused(schema: dict[str, Any]) -> None:
    """Compiling takes the square of an object's names, and every request of the model waits for it."""
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    turns = [{"role": "user", "content": "x"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for kind, body, param in (
        (schemas.ChatRequest, {"response_format": asked}, "response_format"),
        (schemas.ChatRequest, {"tools": [tool], "tool_choice": "required"}, "tools"),
        (OllamaChatRequest, {"format": schema}, "format"),
    ):
        with pytest.raises(ApiError) as caught:
            schemas.parse(kind, {"model": "m", "messages": turns, **body}).submit("r")
        assert (caught.value.status, caught.value.param) == (400, param)
    small = {"type": "object", "properties": {f"p{number}": {} for number in range(2000)}}
    asked["json_schema"] = {"name": "n", "schema": small}
    assert schemas.parse(schemas.ChatRequest, {"model": "m", "messages": turns, "response_format": asked}).submit("r")


def test_a_reason_does_not_repeat_the_body() -> None:
    with pytest.raises(ApiError) as caught:
        schemas.parse(schemas.ChatRequest, {"model": "m", "messages": [], "response_format": {"type": ["x" * 5000]}})
    assert len(caught.value.message) < 400


# -- profiles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid() -> Iterator[Structured]:
    with contextlib.closing(Structured()) as target:
        yield target


def changed(valid: Structured, path: tuple[Any, ...], value: Any) -> Path:
    """A profile with one value of its document changed, and the right checksum."""
    document, tensors = valid.parts[0]
    document = json.loads(json.dumps(document))
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    text = json.dumps(document)
    file = valid.folder / "changed.safetensors"
    file.write_bytes(seal(tensors, json.dumps({"document": text, "sha256": digest(text, tensors)})))
    return file


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("ladder", 0, "page_tokens"), 0),  # ZeroDivisionError
        (("ladder", 0, "page_tokens"), 2**40),  # a transform of 2^80 numbers
        (("ladder", 0, "kl_mean"), "<img src=x onerror=alert(1)>"),  # text where pages and clients expect a number
        (("ladder", 0, "kl_mean"), float("nan")),
        (("ladder", 0, "top1"), {"a": 1}),
        (("ladder", 0, "energy"), float("inf")),
        (("ladder", 0, "window"), 2**63),
        (("ladder", 0, "sinks"), 1.5),
        (("ladder", 0, "rank"), None),
        (("ladder", 0, "name"), "a\nb"),
        (("ladder", 0, "name"), ["x"]),
        (("ladder", 0, "extra"), 1),
        (("ladder",), []),
        (("layers", 0, "key_dim"), True),
        (("layers", 0, "heads"), [[0, 2], [2, 10**6]]),
        (("layers", 0, "heads"), [[0.0, 1.0]]),
        (("layers", 0, "sides"), ["key"] * 5000),
        (("layers", 0, "sides"), ["key", {"value": 1}]),
        (("layers", 0, "sides"), 2),
        (("transform",), "dct"),
        (("transform",), None),
        (("transform",), ["none"]),
        (("layers",), [None] * 5000),
        (("model",), "x" * 5000),
        (("model",), "\x1b[31m"),
        (("token_nbytes",), -1),
        (("block_tokens",), 2**62),
        (("default",), 5),
        (("sliding",), [None, "24", None]),
        (("provenance",), []),
        (("provenance", "deep"), json.loads("[" * 100 + "]" * 100)),
        (("provenance", "wide"), [0] * 30_000),
        (("provenance", "long"), "x" * 30_000),
        (("provenance", "big"), 10**40),
    ],
)
def test_a_sealed_profile_is_checked_field_by_field(valid: Structured, path: tuple[Any, ...], value: Any) -> None:
    file = changed(valid, path, value)
    with pytest.raises(ProfileError) as caught:
        SpectralProfile.load(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 600
    named = [part for part in path if isinstance(part, str) and part not in ("extra", "deep", "wide", "long", "big")]
    assert named[-1] in str(caught.value) or "no JSON" in str(caught.value)


def test_the_valid_one_is_read(valid: Structured) -> None:
    document, _ = valid.parts[0]
    assert SpectralProfile.load(changed(valid, ("model",), "other")).model == "other" and document["model"] == "tensors"


def test_a_reason_does_not_repeat_the_file(valid: Structured, tmp_path: Path) -> None:
    header = json.dumps({"x" * 100_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 40]}}).encode()
    file = tmp_path / "long.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ProfileError) as caught:
        SpectralProfile.load(file)
    assert len(str(caught.value)) < 1000


# -- what the planner reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        b"[]",
        b"{}",
        b'{"num_attention_heads": 0, "hidden_size": 5}',
        b"[" * 5000,
        b'{"head_dim": 1e999}',
        b'{"head_dim": -4}',
    ],
)
def test_a_prediction_never_raises_for_a_model(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    weights = json.dumps({"w": {"dtype": "F32", "shape": [-5, 10**30], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(weights)) + weights)
    found = predict(ModelSettings(name="m", path=str(tmp_path)), "cpu")
    assert not found.known and found.weights == 0


@pytest.mark.parametrize(
    "row", [{"page_tokens": 0}, {"kl_mean": []}, {"page_nbytes": -1}, {"name": 5}, {"window_nbytes": 1e400}]
)
def test_a_prediction_never_raises_for_a_profile(tmp_path: Path, row: dict[str, Any]) -> None:
    ladder = [{"name": "8x", "kl_mean": 0.1, "page_nbytes": 8, "page_tokens": 16, "window_nbytes": 1, **row}]
    document = json.dumps({"ladder": ladder, "default": "8x"})
    header = json.dumps({"__metadata__": {"spectral": json.dumps({"document": document})}}).encode()
    file = tmp_path / "p.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    assert predict(ModelSettings(name="m", path=str(tmp_path)), "cpu", str(file)).rungs == ()


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("? [a, b]\n: c\n", "must be a text"),
        ("? {a: b}\n: c\n", "must be a text"),
        ("models: 2001-99-99\n", "cannot be read"),
        ("models: 0x_\n", "cannot be read"),
        ("models: !!timestamp x\n", "cannot be read"),
        ("[" * 5000, "too deeply"),
        ("&a {<<: *a}\n", "stand for more than"),
        ("models: &a [*a]\n", "stand for more than"),
        (
            "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)),
            "stand for more",
        ),
        (
            "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9) if i else ''}]}}" for i in range(12)),
            "more than",
        ),
        ("#" + "x" * 5_000_000, "more than"),
        ("models: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
    ],
)
def test_a_configuration_that_is_none_is_an_error_of_the_configuration(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_settings(file)


@pytest.mark.parametrize(
    "line", ["  host: 1 admin_key: {}", "server8\n  admin_key: {}", "  admin_key: '{}", "  admin_key: !x {}"]
)
def test_no_line_of_the_configuration_is_repeated(tmp_path: Path, line: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"server:\n{line.format('the-secret-key')}\nmodels: []\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert "the-secret-key" not in str(caught.value) and "line" in str(caught.value)
