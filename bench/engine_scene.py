"""What the rows of bench/engine_gpu.py share: the model, its synthetic setting, engines, and how steps are timed."""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from spectral.bits import gaussian_tables
from spectral.codec import Codebook, LayerCodec
from spectral.engine.engine import Engine
from spectral.engine.types import Delta, EngineLimits, Failed, GenerateRequest, SamplingParams
from spectral.frames import BlockFrame
from spectral.hf import NAME, LoadedModel, wrap_model
from spectral.kernels.synthetic import BITS, BLOCK, PAGE, RECENT, SINKS, synthetic_parts

SETTING = "8x"


@dataclass(frozen=True)
class Sizes:
    """What is measured; small ones for a check without a GPU."""

    shape: dict[str, int]
    short: int = 1024
    rows: int = 8
    long: int = 32768
    prompt: int = 8192
    prefix: int = 4096
    held_bytes: int = 24 << 30
    batch: tuple[int, int, int] = (32, 512, 128)
    requests: int = 900
    steps: int = 96
    warm: int = 64
    """Steps before those that are timed: pages are sealed four times, captured the second time."""


QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
}  # fmt: skip
FULL = Sizes(QWEN3_8B)
CHECK = Sizes(TINY, 256, 3, 512, 384, 256, 8 << 20, (4, 24, 8), 24, 8, 8)


class Letters:
    """A tokenizer that needs no file: token i is one letter."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@dataclass
class Scene:
    """One model, its settings, and the device's bandwidth in bytes (read and written) per second."""

    loaded: LoadedModel
    device: torch.device
    sizes: Sizes
    bandwidth: float = 0.0
    books: dict[tuple[str, str], Codebook] = field(default_factory=dict)
    prefer: str = "quality"
    """What the settings are made for (spectral.fit.PREFERENCES)."""
    rotates: bool = False
    """Whether rotations were ours when a row had ended."""

    def book(self, setting: str) -> Codebook | None:
        """A synthetic setting; None for exact. Made once: its kernels' tables take seconds."""
        if setting == "exact":
            return None
        if (setting, self.prefer) not in self.books:
            self.books[setting, self.prefer] = self._make_book(setting)
        return self.books[setting, self.prefer]

    def _make_book(self, setting: str) -> Codebook:
        shape = self.loaded.shape.layers[0]
        parts = synthetic_parts(shape.kv_heads, shape.key_dim, BITS[setting], self.prefer)
        layers: list[Any] = []
        for _ in self.loaded.shape.layers:
            frequencies = 1e6 ** (-torch.arange(0, shape.key_dim, 2).double() / shape.key_dim)
            frame = BlockFrame(
                frequencies.numpy(), block_tokens=BLOCK, page_tokens=PAGE, sinks=SINKS, device=self.device
            )
            layers.append(
                LayerCodec(
                    parts, gaussian_tables(), frame, key_dim=shape.key_dim, value_dim=shape.value_dim,
                    page_tokens=PAGE, device=self.device,
                )  # fmt: skip
            )
        return Codebook(setting, "synthetic", SINKS, RECENT, PAGE, layers, window_bits=8)

    def engine(self, setting: str = SETTING, *, decode: str | None = None, **limits: Any) -> Engine:
        """An engine that is warm; on a CPU its steps are those of graphs, uncaptured."""
        mode = decode or ("graph" if self.device.type == "cuda" else "static")
        values: dict[str, Any] = {"max_concurrency": 64, "max_queue": 4096, "prefix_bytes": 0, **limits}
        values.setdefault("token_budget", values.get("prefill_chunk", 256) + values["max_concurrency"])
        engine = Engine(
            self.loaded, codebook=self.book(setting), setting=setting, limits=EngineLimits(**values), decode=mode
        )
        engine.warm_up()
        return engine

    def tokens(self, count: int, seed: int) -> list[int]:
        """Random token ids."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randint(10, self.sizes.shape["vocab_size"], (count,), generator=rng).tolist()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give unused memory back, also what garbage holds: engines refer to themselves."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def make_scene(check: bool, seed: int, layers: int | None = None) -> Scene:
    """The model on the GPU, with fewer layers if wanted; with `check` a tiny one on the CPU."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    device, sizes = (torch.device("cpu"), CHECK) if check else (torch.device("cuda:0"), FULL)
    if layers is not None:
        sizes = replace(sizes, shape={**sizes.shape, "num_hidden_layers": layers})
    torch.manual_seed(seed)
    began = time.perf_counter()
    with torch.device(device):
        config = Qwen3Config(**sizes.shape, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
        dtype = torch.float32 if check else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=dtype).eval()
    model.requires_grad_(False)
    scene = Scene(wrap_model("qwen3-8b-shape", model, Letters()), device, sizes)
    scene.loaded.eos_token_ids = set()
    ours(scene)
    scene.bandwidth = copy_bandwidth(scene)
    gib = scene.loaded.weights_nbytes / 2**30
    print(f"model of {gib:.2f} GiB in {time.perf_counter() - began:.1f} s; copies at {scene.bandwidth / 1e12:.2f} TB/s",
          flush=True)  # fmt: skip
    return scene


@contextmanager
def stock(scene: Scene) -> Iterator[Any]:
    """A model of the same shape as transformers has it; it runs with nothing of ours within `plain`."""
    from transformers import AutoModelForCausalLM

    mine = scene.loaded.model
    try:
        with torch.device(scene.device):
            dtype = next(mine.parameters()).dtype
            config = copy.deepcopy(mine.config)  # a model takes its attention's name into the configuration it is given
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
        yield model.requires_grad_(False)
    finally:
        del model
        scene.free()


@contextmanager
def plain(scene: Scene) -> Iterator[None]:
    """Within: rotations of this architecture are transformers' own, for our model too."""
    home = sys.modules[type(scene.loaded.model).__module__]
    changed = home.apply_rotary_pos_emb
    home.apply_rotary_pos_emb = getattr(changed, "original", changed)
    try:
        yield
    finally:
        home.apply_rotary_pos_emb = changed


def ours(scene: Scene) -> None:
    """Raises AssertionError where a row has left our model with transformers' attention or rotations."""
    model = scene.loaded.model
    found = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert found == {NAME}, f"attention is {', '.join(sorted(found))}"
    rotates = hasattr(sys.modules[type(model).__module__].apply_rotary_pos_emb, "original")
    assert rotates or not scene.rotates, "rotations are transformers'"
    scene.rotates = rotates


def copy_bandwidth(scene: Scene) -> float:
    """Bytes read and written per second by a copy on the device, best of ten."""
    size = 1 << (30 if scene.device.type == "cuda" else 22)
    a = torch.empty(size, dtype=torch.uint8, device=scene.device)
    b = torch.empty_like(a)
    best = float("inf")
    for _ in range(10):
        scene.wait()
        began = time.perf_counter()
        b.copy_(a)
        scene.wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def step(engine: Engine) -> bool:
    """One step; whether text came. Raises what a request failed with."""
    events = engine.step()
    for event in events:
        if isinstance(event, Failed):
            raise event.error
    return any(isinstance(event, Delta) for event in events)


def finish(engine: Engine) -> float:
    """Step to the end; the seconds until the first text."""
    began, first = time.perf_counter(), 0.0
    while engine.has_work:
        if step(engine) and not first:
            first = time.perf_counter() - began
    return first


def hold(engine: Engine, rows: int, context: int, answer: int) -> None:
    """Sequences that decode with `context` tokens held, their caches full of random codes."""
    for number in range(rows):
        engine.submit(GenerateRequest(f"held-{number}", "", greedy(answer)), [11] * context)
        sequence = engine.scheduler.waiting.pop()
        store = engine.lanes.join(sequence).store
        sequence.row = store.admit(context - 1, store.pages_at(context - 1))
        sequence.resumed = True
        engine.scheduler.running.append(sequence)
    for pool in engine.store.pools:
        if pool is not None:
            pool.random_(0, 256)
    for window in engine.store.windows:
        for name, tensor in zip(window.names, window.tensors(), strict=True):
            if name == "scale":
                tensor.fill_(0.01)
            elif tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.random_(0, 100)


def decode_times(engine: Engine, warm: int, steps: int) -> tuple[float, float]:
    """Mean and median seconds of an engine step that decodes. The mean has its share of sealed pages."""
    for _ in range(warm):
        step(engine)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step(engine)
        times.append(time.perf_counter() - began)
    return statistics.fmean(times), statistics.median(times)


def read_nbytes(scene: Scene) -> int:
    """Bytes of weights that a decode step reads: all but the input embedding."""
    embedding = scene.loaded.model.get_input_embeddings().weight
    return scene.loaded.weights_nbytes - embedding.numel() * embedding.element_size()


def random_request(engine: Engine, scene: Scene, number: int, rng: torch.Generator) -> None:
    """Submit one of 2 to 199 random tokens, of which every tenth is cancelled, and step while more than 32 wait."""
    length = int(torch.randint(2, 200, (1,), generator=rng))
    engine.submit(GenerateRequest(f"m{number}", "", greedy(6)), scene.tokens(length, number))
    if number % 10 == 0:
        engine.cancel(f"m{number}")
    while len(engine.scheduler.waiting) > 32:
        step(engine)


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Mean device milliseconds of ten replays."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 10


def replayed(scene: Scene, engine: Engine) -> float:
    """Device milliseconds of the last captured decode step by itself; 0 where nothing was captured."""
    graphs = engine.runner.graphs
    kept = {} if graphs is None else graphs.replayer.graphs
    now = engine.store.generation  # others point to memory that is gone
    found = [graph for (what, key), graph in kept.items() if what == "decode step" and key[0] == now]
    if not found:
        return 0.0
    return replay_ms(found[-1])


def dense(scene: Scene, rows: int) -> float:
    """Device milliseconds of the model's forward without any attention, as a graph: what the other parts cost."""
    from spectral.few_rows import captured
    from spectral.hf import observing

    if scene.device.type != "cuda":
        return 0.0
    model = scene.loaded.model
    ids = torch.full((1, rows), 11, device=scene.device)
    mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=scene.device)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), captured(), observing(lambda layer, q, k, v, scale, cap: q):
        def forward() -> None:
            model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
        forward()
        with torch.cuda.graph(graph):
            forward()
    return replay_ms(graph)


def counts(engine: Engine) -> dict[str, Any]:
    """How an engine's steps ran."""
    graphs = engine.runner.graphs
    if graphs is None:
        return {}
    replayer = graphs.replayer
    return {
        "captures": replayer.captures, "replays": replayer.replays, "not_captured": replayer.refused,
        "decode_steps": graphs.steps, "chunk_steps": graphs.chunk_steps,
    }  # fmt: skip
