"""The engine's figures on a GPU, on a model of Qwen3-8B's shape with random weights: rows of bench/engine.py.

The model is built on the device from a configuration (nothing is downloaded). Its cache's setting is synthetic: the
spectrum and bits of bench/kernels.py, the same for every layer. Speed and bytes do not depend on what numbers are held,
so caches of long contexts are filled with random codes instead of being computed.

step1x1k    one stream, 1,024 tokens held: a whole engine step against the byte floor: the weights that it reads and
            the cache, at the copy bandwidth of the same run
eager       the same step by transformers' own forward with a DynamicCache
step8x32k   eight streams of 32,768 tokens, against the bf16 cache's byte floor
prefill     8,192 tokens: time to the first token, against SDPA without a cache
prefix      time to the first token of a second request with the same 4,096-token prefix, against the first's
held        requests of 4,096 tokens held at once in 24 GiB, against bf16 pages
*-speed     the same with settings of a profile that prefers speed: keys and values apart, fewer fields
batch       tokens/s of the same requests, against transformers' generate_batch
memory      of the device and the process after many requests, against after a third of them
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.engine_scene import (
    SETTING,
    Scene,
    counts,
    decode_times,
    dense,
    finish,
    greedy,
    hold,
    make_scene,
    ours,
    plain,
    random_request,
    read_nbytes,
    replayed,
    stock,
)  # fmt: skip
from bench.keeping import Cut
from spectral.engine.types import GenerateRequest
from spectral.errors import OutOfPages
from spectral.pages import PageStore

Row = dict[str, Any]


def step1x1k(scene: Scene) -> Row:
    sizes = scene.sizes
    engine = scene.engine()
    hold(engine, 1, sizes.short, 10 * sizes.steps)
    mean, median = decode_times(engine, sizes.warm, sizes.steps)
    floor = (read_nbytes(scene) + engine.store.used_nbytes) / scene.bandwidth
    launched = scene.engine(decode="static")
    hold(launched, 1, sizes.short, 10 * sizes.steps)
    uncaptured, _ = decode_times(launched, 4, max(8, sizes.steps // 8))
    return row(
        "step1x1k", f"a decode step of 1 x {sizes.short}, seconds, against the byte floor", "<= 1.35x", mean, floor,
        lambda ratio: ratio <= 1.35, median=median, replay_ms=replayed(scene, engine), dense_ms=dense(scene, 1),
        uncaptured=uncaptured, **counts(engine),
    )  # fmt: skip


def eager(scene: Scene) -> Row:
    """transformers' own decode step, DynamicCache and SDPA, against ours in the same run."""
    from transformers import DynamicCache

    sizes = scene.sizes
    engine = scene.engine()
    hold(engine, 1, sizes.short, 10 * sizes.steps)
    ours, _ = decode_times(engine, sizes.warm, sizes.steps)
    with stock(scene) as model, plain(scene):
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        cache, times = DynamicCache(config=model.config), []
        ids = torch.tensor([scene.tokens(sizes.short, 1)], device=scene.device)
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
            for _ in range(max(6, sizes.steps // 4)):
                scene.wait()
                began = time.perf_counter()
                out = model(input_ids=ids[:, -1:], use_cache=True, **{name: cache})
                int(out.logits[0, -1].argmax())
                times.append(time.perf_counter() - began)
    theirs = statistics.median(times)
    return row(
        "eager", "the same step by transformers, seconds, against ours", ">= 10x", theirs, ours,
        lambda ratio: ratio >= 10,
    )  # fmt: skip


def step8x32k(scene: Scene) -> Row:
    sizes = scene.sizes
    engine = scene.engine()
    hold(engine, sizes.rows, sizes.long, 10 * sizes.steps)
    mean, median = decode_times(engine, sizes.warm, sizes.steps)
    tokens = sizes.rows * sizes.long * scene.loaded.shape.token_nbytes()
    floor = (read_nbytes(scene) + tokens) / scene.bandwidth
    return row(
        "step8x32k", f"a decode step of {sizes.rows} x {sizes.long} at {SETTING}, seconds, against bf16's byte floor",
        "< 1x", mean, floor, lambda ratio: ratio < 1, median=median, replay_ms=replayed(scene, engine),
        dense_ms=dense(scene, sizes.rows), cache_bytes=engine.store.used_nbytes, **counts(engine),
    )  # fmt: skip


def prefill(scene: Scene) -> Row:
    sizes = scene.sizes
    engine = scene.engine(prefill_chunk=sizes.prompt)
    ours, theirs = [], []
    with stock(scene) as model:
        for number in range(4):
            prompt = scene.tokens(sizes.prompt, number)
            engine.submit(GenerateRequest(f"p{number}", "", greedy(1)), prompt)
            ours.append(finish(engine))
            ids = torch.tensor([prompt], device=scene.device)
            scene.wait()
            began = time.perf_counter()
            with plain(scene), torch.inference_mode():
                int(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
            theirs.append(time.perf_counter() - began)
    return row(
        "prefill", f"prefill of {sizes.prompt} tokens, seconds, against SDPA without a cache", "<= 1.1x",
        min(ours[1:]), min(theirs[1:]), lambda ratio: ratio <= 1.1, first=ours[0],
    )  # fmt: skip


def prefix(scene: Scene) -> Row:
    sizes = scene.sizes
    engine = scene.engine(prefill_chunk=sizes.prefix // 2, prefix_bytes=None)
    pairs = []
    for number in range(3):
        same = scene.tokens(sizes.prefix, 100 + number)
        times = []
        for end in (1, 2):
            prompt = [*same, *scene.tokens(20, end)]
            engine.submit(GenerateRequest(f"{number}-{end}", "", greedy(4)), prompt)
            times.append(finish(engine))
        pairs.append(times)
    first, second = (statistics.median(x) for x in zip(*pairs[1:], strict=True))
    return row(
        "prefix", f"TTFT of a second request with the same {sizes.prefix}-token prefix, seconds, against the first's",
        "<= 0.15x", second, first, lambda ratio: ratio <= 0.15, **counts(engine),
    )  # fmt: skip


def held(scene: Scene) -> Row:
    sizes, found = scene.sizes, {}
    for setting in ("exact", SETTING, "16x"):
        dtype = torch.bfloat16
        store = PageStore(
            scene.loaded.shape, scene.book(setting), device=scene.device, max_bytes=sizes.held_bytes, window_dtype=dtype
        )
        count = 0
        while True:
            try:
                store.admit(sizes.prefix, store.pages_at(sizes.prefix))
            except OutOfPages:
                break
            count += 1
        found[setting] = count
        del store
        scene.free()
    return row(
        "held", f"requests of {sizes.prefix} tokens held at once in {sizes.held_bytes >> 20} MiB, against bf16 pages",
        ">= 6.5x", found[SETTING], max(1, found["exact"]), lambda ratio: ratio >= 6.5, at_16x=found["16x"],
    )  # fmt: skip


def batch(scene: Scene) -> Row:
    """The same prompts and answer lengths; both warmed up by a round of their own."""
    from transformers import GenerationConfig

    count, length, answer = scene.sizes.batch
    engine = scene.engine(prefill_chunk=length, token_budget=8 * length + 64)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(2):
        prompts = [scene.tokens(length, 1000 * number + i) for i in range(count)]
        for i, prompt in enumerate(prompts):
            engine.submit(GenerateRequest(f"b{number}-{i}", "", greedy(answer)), prompt)
        began = time.perf_counter()
        finish(engine)
        times["ours"].append(time.perf_counter() - began)
    engine.trim(prefixes=True)
    config = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    error, more = "", {}
    if scene.device.type == "cpu":  # by itself it takes most of the machine's memory
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        more["continuous_batching_config"] = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64)
    with stock(scene) as model, plain(scene), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(2):
            prompts = [scene.tokens(length, 1000 * number + i) for i in range(count)]
            began = time.perf_counter()
            answers = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False, **more)
            whole = time.perf_counter() - began
            spans = [found.lifespan for found in answers.values()]
            # From the first request's begin to the last one's end: captures and set-up are not counted.
            times["theirs"].append(max(end for _, end in spans) - min(begin for begin, _ in spans))
            made = sum(len(found.generated_tokens) for found in answers.values())
            if made != count * answer:
                error = f"generate_batch made {made} of {count * answer} tokens"
    ours, theirs = (count * answer / times[who][-1] for who in ("ours", "theirs"))
    return row(
        "batch", f"tokens/s of {count} requests of {length} + {answer} tokens, against generate_batch", ">= 3x",
        ours, theirs, lambda ratio: ratio >= 3, error=error, their_whole_call_s=whole, **counts(engine),
    )  # fmt: skip


def memory(scene: Scene) -> Row:
    """Requests of random lengths, a tenth cancelled."""
    import psutil

    sizes, process = scene.sizes, psutil.Process()
    engine = scene.engine(max_concurrency=32, prefix_bytes=64 << 20)
    rng = torch.Generator().manual_seed(1)

    def now() -> tuple[int, int, int]:
        finish(engine)
        engine.trim(prefixes=True)
        scene.free()
        reserved = torch.cuda.memory_reserved(scene.device) if scene.device.type == "cuda" else 0
        return reserved, process.memory_info().rss, engine.lanes.nbytes

    early, series, began = (0, 0, 0), [], time.perf_counter()
    for number in range(sizes.requests):
        random_request(engine, scene, number, rng)
        if number % max(1, sizes.requests // 16) == 0:
            graphs = engine.runner.graphs.replayer.graphs if engine.runner.graphs is not None else {}
            series.append([number, process.memory_info().rss, len(graphs)])
            spent = time.perf_counter() - began
            print(f"memory: {number} requests in {spent:.0f} s, process {series[-1][1] >> 20} MiB", flush=True)
        if number + 1 == sizes.requests // 3:
            early = now()
    late = now()
    figure, against = (late[0], early[0]) if late[0] else (late[1], early[1])
    host = late[1] / early[1]
    return row(
        "memory", f"memory after {sizes.requests} requests, bytes, against after a third of them", "within 1 %",
        figure, against, lambda ratio: max(abs(ratio - 1), abs(host - 1)) <= 0.01, host_ratio=host, host=late[1],
        host_early=early[1], cache=late[2], cache_early=early[2], host_and_graphs=series, **counts(engine),
    )  # fmt: skip


def row(
    name: str, what: str, wanted: str, figure: float, against: float, reached: Callable[[float], bool], **more: Any
) -> Row:
    """One line of the table."""
    ratio = figure / against if against else float("nan")
    return {
        "row": name, "what": what, "to_reach": wanted, "reached": reached(ratio), "figure": figure, "against": against,
        "ratio": ratio, "setting": SETTING, **more,
    }  # fmt: skip


def for_speed(measure: Callable[[Scene], Row]) -> Callable[[Scene], Row]:
    """A row with settings that prefer speed."""

    def measured(scene: Scene) -> Row:
        scene.prefer = "speed"
        try:
            found = measure(scene)
        finally:
            scene.prefer = "quality"
        return found | {"row": f"{found['row']}-speed", "prefer": "speed"}

    return measured


ROWS: dict[str, Callable[[Scene], Row]] = {
    "step1x1k": step1x1k, "step1x1k-speed": for_speed(step1x1k), "step8x32k": step8x32k,
    "step8x32k-speed": for_speed(step8x32k), "eager": eager, "prefill": prefill, "prefill-speed": for_speed(prefill),
    "prefix": prefix, "held": held, "batch": batch, "memory": memory,
}  # fmt: skip


def run(options: argparse.Namespace, names: list[str], keep: Callable[[Row], None], seed: int) -> None:
    """The named rows; `keep` gets each as soon as it is there. A row that fails says why, and the others go on;
    one that leaves the model other than it was ends the run: the next would be measured on something else."""
    scene = make_scene(options.check, seed, options.layers)
    if options.requests:
        scene.sizes = replace(scene.sizes, requests=options.requests)
    for name in names:
        began = time.perf_counter()
        try:
            result = ROWS[name](scene)
        except Cut:
            raise
        except Exception as error:  # a row's figure is missing then; the run is not
            if options.check:
                raise
            result = {"row": name, "error": f"{type(error).__name__}: {error}", "reached": False}
        if options.layers:
            result["layers"] = options.layers
        result["took_s"] = round(time.perf_counter() - began, 1)
        keep(result)
        scene.free()
        ours(scene)
