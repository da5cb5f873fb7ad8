"""Predictions from headers alone: weights by quantization, the cache's shape, the ladder; measures of earlier loads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from server.config import ModelSettings, load_settings
from server.scheduler import facts
from server.scheduler.facts import Measured, facts_for, folder_of, header, predict, rungs_for, weights_nbytes
from spectral import resources


def write(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file's header, without data."""
    body = json.dumps({name: {"dtype": kind, "shape": shape} for name, (kind, shape) in tensors.items()}).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body)


@pytest.mark.parametrize("name", ["gpt2", "gemma4", "cohere2", "qwen3", "phi3", "gpt_bigcode"])
def test_a_tokens_bytes_are_those_of_the_layers_that_see_everything(name: str, tmp_path: Path) -> None:
    from spectral.own_answer import probed_shape
    from tests.spectral.helpers import FAMILIES, made
    from tests.spectral.test_families import small_config
    from tests.spectral.test_own_answer import OTHERS, PLAIN

    known = OTHERS | PLAIN | FAMILIES
    model = made(known[name] if name in known else small_config(name))
    model.config.save_pretrained(tmp_path)
    wanted = sum(layer.token_nbytes() for layer in probed_shape(model).layers if layer.sliding is None)
    assert facts.shape_of(tmp_path) == (wanted, 512)


def test_gemma_4_as_its_makers_write_it(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
        "head_dim": 256, "global_head_dim": 512, "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert facts.shape_of(tmp_path) == (2 * 2 * 2 * 512, 131072)


@pytest.mark.parametrize("broken", [{"3": []}, {"x": {}}, [1], {"0": {"head_dim": -2}}])
def test_layers_of_their_own_that_are_none_are_refused(broken: Any, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 8, "per_layer_config": broken}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not predict(ModelSettings(name="m", path=str(tmp_path)), "cpu").known


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path / "model.safetensors",
        {
            "model.embed_tokens.weight": ("BF16", [1000, 64]),
            "layers.0.q_proj.weight": ("BF16", [64, 64]),
            "layers.0.norm.weight": ("BF16", [64]),
            "packed": ("U8", [10, 10]),
        },
    )
    config: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    config |= {"hidden_size": 64, "max_position_embeddings": 4096}
    config["layer_types"] = ["full_attention", "sliding_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    return tmp_path


def test_weights_follow_dtype_and_quantization(folder: Path) -> None:
    plain = 2 * (64_000 + 4096 + 64) + 100
    assert weights_nbytes(folder, "none", None) == plain
    assert weights_nbytes(folder, "none", 4) == 4 * (64_000 + 4096 + 64) + 100
    assert weights_nbytes(folder, "nf4", None) == pytest.approx(plain - 4096 * (2 - 0.5625), abs=2)
    assert weights_nbytes(folder, "int8", None) < plain


def test_headers_are_read_once_and_again_when_their_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = Path.open

    def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    monkeypatch.setattr(facts, "KNOWN_HEADERS", 2)
    path = folder / "model.safetensors"
    first = header(path)
    assert header(path) == first and opened == ["model.safetensors"]
    write(path, {"one": ("BF16", [3, 5])})
    assert list(header(path)) == ["one"] == list(header(path))
    for name in ("b", "c"):
        write(folder / name, {name: ("BF16", [1])})
        header(folder / name)
    opened.clear()
    assert list(header(path)) == ["one"] and list(header(folder / "c")) == ["c"] and opened == ["model.safetensors"]
    monkeypatch.setattr(facts, "KNOWN_BYTES", 8)
    write(folder / "large", {"a name longer than that": ("BF16", [1])})
    opened.clear()
    assert header(folder / "large") == header(folder / "large") and opened == ["large", "large"]


def test_the_caches_shape_counts_full_attention_only(folder: Path) -> None:
    found = predict(ModelSettings(name="m", path=str(folder), limits={"context_length": 1000}), "cuda:0")  # type: ignore[arg-type]
    assert (found.token_nbytes, found.context, found.known) == (2 * 2 * 2 * 8 * 2, 1000, True)
    assert [rung.name for rung in rungs_for("auto", found)] == ["exact"]


def test_the_demo_is_predicted_as_it_is_and_its_ladder_begins_at_the_default() -> None:
    model = ModelSettings(name="demo-7m")
    found = predict(model, "cpu")
    assert found.known and found.weights > 20_000_000 and found.default == "8x"
    names = [rung.name for rung in rungs_for("auto", found)]
    assert names[0] == "8x" and len(names) > 1 and "3.5x" not in names
    assert [rung.name for rung in rungs_for("5x", found)] == ["5x"]
    assert [rung.name for rung in rungs_for("exact", found)] == ["exact"]
    kls = [rung.kl for rung in found.rungs]
    assert kls == sorted(kls) and found.rungs[0].token_bytes > found.rungs[-1].token_bytes
    on_cpu, on_gpu = facts_for(model, "cpu", "auto"), facts_for(model, "cuda:0", "auto")
    assert on_cpu.weights == 2 * on_gpu.weights and on_gpu.can_sleep and not on_cpu.can_sleep


def test_what_is_not_here_is_not_known(tmp_path: Path) -> None:
    assert folder_of("nobody/nothing-at-all") is None
    assert not predict(ModelSettings(name="nobody/nothing-at-all"), "cpu").known
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "config.json").write_text("{}")
    assert not predict(ModelSettings(name="m", path=str(tmp_path)), "cpu").known
    with pytest.raises(ValueError, match="no safetensors"):
        header(tmp_path / "model.safetensors")
    assert header(resources.profile_path("demo-7m") or Path())["__metadata__"]


def test_measures_are_kept_and_used(tmp_path: Path) -> None:
    model, path = ModelSettings(name="demo-7m"), tmp_path / "state" / "measured.json"
    measured = Measured(path)
    key = Measured.key(model, "card")
    measured.put(key, weights=123, load_s=2.5)
    measured.put(key, wake_s=0.5)
    measured.save()
    facts = facts_for(model, "cuda:0", "auto", measured=Measured(path).get(key))
    assert (facts.weights, facts.load_s, facts.wake_s, facts.measured) == (123, 2.5, 0.5, True)
    path.write_text("[1]")
    assert Measured(path).get(key) is None
    path.unlink()
    path.mkdir()
    Measured(None).save()
    Measured(path).save()  # a disk that refuses is no error
    assert Measured(path).get(key) is None


def test_the_example_of_the_document_is_a_configuration(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "memory.md").read_text(encoding="utf-8")
    path = tmp_path / "config.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    found = load_settings(path)
    assert (found.memory.max_vram, found.models[0].keep_alive) == (10 * 2**30, 1800.0)
    assert found.memory.devices["cuda:1"].max_vram == 6 * 2**30
