"""Layers on several devices: pages and windows lie where their layer is, and every index tensor with them.

Torch's "meta" device stands in for a second GPU: it holds no numbers, but operations that mix it with the CPU fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers.modeling_outputs import BaseModelOutputWithPast

from spectral import dispatch
from spectral.attention import attend
from spectral.engine.engine import Engine
from spectral.engine.graphs import decode_choice
from spectral.engine.runner import Runner
from spectral.errors import ModelError
from spectral.hf import _placement, load_model, wrap_model
from spectral.pages import LayerShape, ModelShape, PageStore, exact_codebook
from spectral.parking import host_store, park, regrouped, snapshot_tensors, unpark
from spectral.pools import squeezed
from spectral.residency import synchronize
from spectral.sessions import load_row, save_row
from tests.spectral.engine.engine_helpers import ask, request, tiny_engine
from tests.spectral.helpers import random_codebook, random_model

CPU, OTHER = torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).resolve().parents[2]


def split_store() -> PageStore:
    shape = ModelShape((LayerShape(2, 16, 16), LayerShape(2, 16, 16), LayerShape(2, 16, 16, sliding=12)), 4, 32)
    book = random_codebook(shape, [4, 2], sinks=4, window=16, page=8, block=0)
    assert book.layers[1] is not None
    for unit in book.layers[1].units:  # type: ignore[union-attr]
        for name, value in vars(unit).items():
            if isinstance(value, torch.Tensor):
                setattr(unit, name, value.to(OTHER))
            elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                setattr(unit, name, [x.to(OTHER) for x in value])
    return PageStore(shape, book, devices=[CPU, OTHER, OTHER])


def layer_step(store: PageStore, row: object, count: int) -> None:
    batch = store.begin([(row, count)])  # type: ignore[list-item]
    for layer, device in enumerate(store.devices):
        q, k, v = (torch.randn(1, heads, count, 16, device=device) for heads in (4, 2, 2))
        out = attend(batch.on(device), layer, q, k, v, scaling=0.25)
        assert out.device.type == device.type and out.shape == (1, count, 4, 16)
    batch.commit()


def test_each_layers_numbers_lie_on_its_device() -> None:
    store = split_store()
    row = store.open()
    for count in (21, 9, *[1] * 12):  # chunks with and without a past, and steps that seal a page
        layer_step(store, row, count)
    assert len(row.pages) == 2
    assert [pool.device.type for pool in store.pools if pool is not None] == ["cpu", "meta"]
    assert [window.store.device.type for window in store.windows] == ["cpu", "meta", "meta"]
    store.trim()
    store.check()
    layer_step(store, row, 1)
    assert store.pools[1] is not None and store.pools[1].device == OTHER


def test_a_row_of_a_split_model_is_saved_and_read_in_host_memory(tmp_path: Path) -> None:
    """Its windows lie in groups by device, and in host memory all together."""
    shape = ModelShape((LayerShape(2, 16, 16), LayerShape(2, 16, 16), LayerShape(2, 16, 16, sliding=12)), 4, 32)
    book = random_codebook(shape, [4, 2], sinks=4, window=16, page=8, block=0)
    other = torch.device("cpu:0")  # another device for whoever compares them, with memory of the first
    store = PageStore(shape, book, devices=[other, CPU, CPU])
    row = store.open()
    for count in (21, 9, *[1] * 12):
        layer_step(store, row, count)
    parked = park(store, row)
    host = host_store(store, book, torch.bfloat16)
    assert len(store.groups) == 3 and len(host.groups) == 2
    moved = regrouped(parked, store, host)
    save_row(host, unpark(host, moved), range(row.length), tmp_path / "row", model="m")
    read, _ = load_row(host, tmp_path / "row", model="m")
    back = regrouped(park(host, read), host, store)
    assert [torch.equal(a, b) for a, b in zip(parked.pages, back.pages, strict=True) if a is not None and b is not None]
    mine, theirs = (snapshot_tensors(p.windows) for p in (parked, back))
    assert len(mine) == len(theirs) == 3 and all(map(torch.equal, mine, theirs))
    assert back.check == parked.check and unpark(store, back).length == row.length


def test_a_batch_elsewhere_shares_all_but_its_index_tensors() -> None:
    store = split_store()
    batch = store.begin([(store.open(), 1)])
    other = batch.on(OTHER)
    assert other is batch.on(OTHER) and other.store.device == OTHER
    assert other.kept is batch.kept and other.plans is not batch.plans
    assert batch.on(CPU) is batch
    assert exact_codebook(store.shape).setting == "exact"


def test_a_model_with_accelerates_hooks_gives_the_same_tokens() -> None:
    wanted = ask(tiny_engine(), request("a", list(range(3, 60)), 20))["a"]
    loaded = random_model("qwen3")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(3)}
    model = dispatch_model(loaded.model, places, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[1], "_hf_hook")
    hooked = wrap_model("hooked", model, loaded.tokenizer)
    plain = tiny_engine()
    hooked.eos_token_ids, hooked.tokenizer = set(), plain.loaded.tokenizer
    engine = Engine(hooked, codebook=plain.store.codebook, setting="test", limits=plain.limits, checked=True)
    assert ask(engine, request("a", list(range(3, 60)), 20))["a"] == wanted


def test_a_split_model_is_told_which_logits_where_its_last_states_are() -> None:
    """accelerate takes every tensor of a call to the first device; here that is one that cannot index the last's."""
    engine = tiny_engine()
    whole = random_model("qwen3")
    assert isinstance(whole.kept([1]), torch.Tensor), "an index that is there already, where one device has all"
    model = whole.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # not the embedding's any more
    for module in (model.model.embed_tokens, model.model.layers[0]):
        module.to(OTHER)
    add_hook_to_module(model, AlignDevicesHook(execution_device=OTHER, io_same_device=True))  # as dispatch_model does
    split = replace(whole, device=OTHER)
    assert split.split and {device.type for device in split.layer_devices} == {"cpu", "meta"}
    states: list[torch.Tensor] = []

    def layers(input_ids: torch.Tensor, **_: object) -> BaseModelOutputWithPast:
        states.append(torch.randn(1, input_ids.shape[1], whole.shape.hidden_size))
        return BaseModelOutputWithPast(last_hidden_state=states[-1])

    asked: list[torch.Tensor] = []
    model.model.forward = layers
    model.lm_head.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]))
    engine.scheduler._divide = lambda work: [work]  # as on GPUs
    engine.submit(request("a", list(range(3, 30)), 4))
    engine.submit(request("b", list(range(3, 12)), 4))
    (part,) = engine.scheduler.schedule()
    _, logits = Runner(split).run(part)
    part.batch.abort()
    assert logits.shape == (2, whole.model.config.vocab_size)
    assert torch.equal(asked[0], states[0][:, [26, 35]])


def test_kernels_are_launched_on_their_pages_device(monkeypatch: pytest.MonkeyPatch) -> None:
    within: list[torch.device] = []

    @contextmanager
    def launching(device: torch.device) -> Iterator[None]:
        within.append(device)
        yield
        within.pop()

    launched: list[torch.device] = []
    monkeypatch.setattr("spectral.dispatch.launching", launching)
    monkeypatch.setattr("spectral.code_dispatch.squeezer", lambda a, b: lambda pages, out: launched.append(within[-1]))
    codec = split_store().codebook.layers[0]
    assert codec is not None
    squeezed(torch.zeros((3, codec.page_nbytes), dtype=torch.uint8, device=OTHER), codec, codec)
    assert launched == [OTHER]
    assert dispatch.trusted(OTHER, "a test of it", lambda: launched.append(within[-1]) or "")
    assert launched == [OTHER, OTHER] and not within
    del dispatch._trusted[OTHER, "a test of it"]


def test_a_model_on_the_second_gpu_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched on the thread's current device, whatever their tensors' is."""
    current: list[torch.device] = []
    model = random_model("qwen3").model
    monkeypatch.setattr("spectral.hf.choose_device", torch.device)
    monkeypatch.setattr("spectral.hf.AutoModelForCausalLM.from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    load_model("demo-7m", device="cuda:1")
    assert current == [torch.device("cuda:1")]
    engine, within = tiny_engine(), []

    @contextmanager
    def launching(device: torch.device) -> Iterator[None]:
        within.append(device)
        yield
        within.pop()

    ran: list[list[torch.device]] = []
    engine.loaded.model.register_forward_pre_hook(lambda *_: ran.append([*within]))
    monkeypatch.setattr("spectral.engine.runner.launching", launching)
    ask(engine, request("a", [3, 4, 5], 2))
    assert ran == [[CPU]] * 2 and not within


def test_a_sleep_waits_for_the_copies_of_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize([torch.device("cuda:0"), torch.device("cuda:1"), CPU])
    assert waited == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_limits_become_accelerates() -> None:
    assert _placement(CPU, None) == {"device_map": None}
    assert _placement(torch.device("cuda:1"), None) == {"device_map": {"": torch.device("cuda:1")}}
    limits = {"cuda:0": 400, "cuda:1": 300, "cuda:2": 300}  # ten layers of 100: half of one more, and one to spare
    found = _placement(torch.device("cuda:0"), limits, 10)
    assert found == {"device_map": "sequential", "max_memory": {0: 550, 1: 350, 2: 1000}}
    with pytest.raises(ModelError, match="cuda"):
        load_model("demo-7m", max_memory={"cuda:0": 1 << 30, "cuda:1": 1 << 30})
    assert decode_choice(torch.device("cuda"), split=True) == "eager"


def test_weights_are_never_spilled_to_the_host_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen3").model
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": "cpu"}
    monkeypatch.setattr("spectral.hf.choose_device", lambda device: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("spectral.hf.AutoModelForCausalLM.from_pretrained", lambda *_, **__: model)
    with pytest.raises(ModelError, match=r"does not fit on cuda:0 1\.0 GiB, cuda:1 1\.0 GiB: quantize it"):
        load_model("demo-7m", max_memory={"cuda:0": 1 << 30, "cuda:1": 1 << 30})


@pytest.mark.parametrize("parts", [(0.3, 0.7), (0.5, 0.5), (0.72, 0.28), (0.2, 0.5, 0.3)])
def test_layers_are_spread_as_they_were_planned(parts: tuple[float, ...]) -> None:
    """accelerate's own division of a model of twelve layers, under the limits of a plan: within a layer of it."""
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=128, tie_word_embeddings=False,
    )  # fmt: skip
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    wanted = {f"cuda:{number}": int(part * total) for number, part in enumerate(parts)}
    limits = _placement(torch.device("cuda:0"), wanted, 12)["max_memory"]
    places = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=["Qwen3DecoderLayer"])
    held = dict.fromkeys(limits, 0)
    for name, size in sizes.items():
        home = next(place for prefix, place in places.items() if name == prefix or name.startswith(f"{prefix}."))
        held[home] += size
    for device, size in held.items():
        assert abs(size - wanted[f"cuda:{device}"]) <= 1.01 * layer, (held, wanted, layer)


def test_the_script_that_compares_divides_the_embedded_model() -> None:
    """Both GPUs have layers: limits of 0.7 and 0.9 of the model left all of them on the first."""
    from accelerate import infer_auto_device_map

    from bench.split_gpus import limits_of

    model = load_model("demo-7m", device="cpu").model
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    limits = _placement(torch.device("cuda:0"), limits_of(size), model.config.num_hidden_layers)["max_memory"]
    places = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=list(model._no_split_modules))
    layers = [place for name, place in places.items() if name.startswith("model.layers.")]
    assert len(layers) == model.config.num_hidden_layers and min(layers.count(0), layers.count(1)) >= 2


def test_the_script_that_compares_one_gpu_with_two_runs(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    command = [sys.executable, str(ROOT / "bench" / "split_gpus.py"), "--check", "--tokens", "24", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert [(row["setting"], row["equal"]) for row in rows] == [("exact", True), ("8x", True)]
