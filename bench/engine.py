"""The engine's figures, beside what each has to reach.

    python bench/engine.py [--json FILE] [--rows cpu|gpu|all|leak,streams,...] [--requests 10000] [--rounds 3] [--check]
        [--limit SECONDS]

Every row has the figure, what it was compared with in the same run, and the ratio; the file is written after each row.
When --limit has passed, the row that runs is cut off and none is begun; "cut" in the file names them.
Rows of an earlier file that are not measured again stay in it, each with where it comes from.
Rows of a GPU (bench/engine_gpu.py says which) need one, or run small on the CPU with --check. Those of a CPU run with
the embedded demo model:

streams  eight streams through the engine against transformers' `generate` for one prompt after another, tokens/s
prefix   time to the first token of a second request with the same 4,096 tokens at its beginning, against the first's
held     sequences of 4,096 tokens held at once in a budget of cache, against bf16 pages; reserved, not computed
leak     memory of the process and of the cache after many requests, against after a tenth of them; first, because what
         the other rows have allocated would hide it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
# Not this folder: transformers would take its kernels.py for the package of that name.
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "bench")]

import torch  # noqa: E402

from bench import engine_gpu  # noqa: E402
from bench.keeping import Cut, Limit, write_json  # noqa: E402
from spectral.engine.build import build_engine, find_profile  # noqa: E402
from spectral.engine.engine import Engine  # noqa: E402
from spectral.engine.types import Delta, EngineLimits, Failed, GenerateRequest, SamplingParams  # noqa: E402
from spectral.errors import OutOfPages  # noqa: E402
from spectral.hf import LoadedModel, load_model  # noqa: E402
from spectral.pages import PageStore  # noqa: E402
from spectral.provenance import provenance  # noqa: E402

SETTING = "8x"
SEED = 1
Row = dict[str, Any]


def make(loaded: LoadedModel, setting: str = SETTING, **limits: Any) -> Engine:
    """An engine of the demo model, warmed up."""
    engine = build_engine(loaded, find_profile(loaded), setting=setting, limits=EngineLimits(**limits)).engine
    engine.warm_up()
    return engine


def greedy(count: int) -> SamplingParams:
    """Answers of exactly `count` tokens."""
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def tokens(count: int, seed: int, size: int) -> list[int]:
    """Random token ids, special ones left out."""
    return torch.randint(10, size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def finish(engine: Engine) -> float:
    """Step to the end; the seconds until the first text."""
    began, first = time.perf_counter(), 0.0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta) and not first:
                first = time.perf_counter() - began
    return first


def row(name: str, text: str, wanted: str, reached: bool, **figures: Any) -> Row:
    """One line of the table."""
    return {"row": name, "what": text, "to_reach": wanted, "reached": reached, **figures}


def streams(loaded: LoadedModel, options: argparse.Namespace) -> Row:
    """Eight at once against one after another, alternating; medians over rounds."""
    from transformers import AutoModelForCausalLM

    from spectral.resources import model_path

    plain = AutoModelForCausalLM.from_pretrained(model_path("demo"), dtype=torch.float32).eval()
    prompts = [tokens(64, seed, loaded.model.config.vocab_size) for seed in range(8)]
    count, engine = 128, make(loaded, prefix_bytes=0)
    ours, theirs = [], []
    for number in range(options.rounds):
        for i, prompt in enumerate(prompts):
            engine.submit(GenerateRequest(f"{number}-{i}", prompt, greedy(count)))
        began = time.perf_counter()
        finish(engine)
        ours.append(8 * count / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.inference_mode():
            for prompt in prompts:
                ids = torch.tensor([prompt])
                mask = torch.ones_like(ids)
                plain.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        theirs.append(8 * count / (time.perf_counter() - began))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return row(
        "streams", "8 streams against generate one after another, tokens/s", ">= 3x", ratio >= 3,
        figure=statistics.median(ours), against=statistics.median(theirs), ratio=ratio, setting=SETTING,
    )  # fmt: skip


def prefix(loaded: LoadedModel, options: argparse.Namespace) -> Row:
    """A fresh prefix every round; the second request ends differently."""
    size = loaded.model.config.vocab_size
    firsts, seconds = [], []
    engine = make(loaded)
    for number in range(options.rounds):
        same = tokens(4096, 100 + number, size)
        times = []
        for end in (1, 2):
            engine.submit(GenerateRequest(f"{number}-{end}", [*same, *tokens(20, end, size)], greedy(4)))
            times.append(finish(engine))
        firsts.append(times[0])
        seconds.append(times[1])
    ratio = statistics.median(b / a for a, b in zip(firsts, seconds, strict=True))
    return row(
        "prefix", "TTFT of a second request with the same 4,096-token prefix, seconds", "<= 0.15x", ratio <= 0.15,
        figure=statistics.median(seconds), against=statistics.median(firsts), ratio=ratio, setting=SETTING,
    )  # fmt: skip


def count_rows(store: PageStore, length: int) -> int:
    """Sequences of this length that the store has room for; their pages and windows are really allocated."""
    count = 0
    while True:
        try:
            store.admit(length, store.pages_at(length))
        except OutOfPages:
            return count
        count += 1


def held(loaded: LoadedModel, options: argparse.Namespace) -> Row:
    """The whole budget is allocated for each of the two."""
    profile = find_profile(loaded)
    assert profile is not None
    budget = options.budget_mib << 20
    counts = {}
    for setting in ("exact", SETTING, "16x"):
        book = None if setting == "exact" else profile.codebook(setting)
        counts[setting] = count_rows(PageStore(loaded.shape, book, max_bytes=budget), 4096)
    ratio = counts[SETTING] / counts["exact"]
    return row(
        "held", f"requests of 4,096 tokens held at once in {options.budget_mib} MiB, against bf16 pages", ">= 6.5x",
        ratio >= 6.5, figure=counts[SETTING], against=counts["exact"], ratio=ratio, setting=SETTING,
        ratio_16x=counts["16x"] / counts["exact"],
    )  # fmt: skip


def leak(loaded: LoadedModel, options: argparse.Namespace) -> Row:
    """Requests of random lengths, a tenth cancelled, settings changed now and then; the prefix cache is full early."""
    import gc

    import psutil

    size, process = loaded.model.config.vocab_size, psutil.Process()
    engine = make(loaded, prefix_bytes=1 << 20)
    generator = torch.Generator().manual_seed(SEED)

    def memory() -> tuple[int, int]:
        engine.trim(prefixes=True)
        gc.collect()
        return process.memory_info().rss, engine.lanes.nbytes

    after_warm_up, count = (0, 0), options.requests or 10_000
    for number in range(count):
        length = int(torch.randint(2, 24, (1,), generator=generator))
        engine.submit(GenerateRequest(f"r{number}", tokens(length, number, size), greedy(3)))
        if number % 10 == 0:
            engine.cancel(f"r{number}")
        if number % 500 == 499:
            engine.set_setting("16x" if engine.setting == SETTING else SETTING)
        while engine.scheduler.room() <= 56:
            engine.step()
        if number + 1 == max(1, count // 10):
            finish(engine)
            after_warm_up = memory()
    finish(engine)
    end = memory()
    engine.check()
    ratio = end[0] / after_warm_up[0]
    return row(
        "leak", f"memory after {count} requests against after a tenth of them, bytes", "within 1 %",
        abs(ratio - 1) <= 0.01 and end[1] == after_warm_up[1], figure=end[0], against=after_warm_up[0], ratio=ratio,
        cache_bytes=end[1], finished=dict(engine.finished),
    )  # fmt: skip


ROWS: dict[str, Callable[[LoadedModel, argparse.Namespace], Row]] = {
    "leak": leak, "streams": streams, "prefix": prefix, "held": held,
}  # fmt: skip


def show(result: Row) -> None:
    """A line for people."""
    if "error" in result and "figure" not in result:
        print(f"{result['row']:10} failed: {result['error']}", flush=True)
        return
    mark = "reached" if result["reached"] else "NOT reached"
    numbers = f"{result['figure']:.5g} against {result['against']:.5g}: {result['ratio']:.4g}x"
    print(f"{result['row']:10} {result['what']:84} {numbers}, to reach {result['to_reach']}: {mark}", flush=True)
    known = {"row", "what", "to_reach", "reached", "figure", "against", "ratio", "setting"}
    more = {name: value for name, value in result.items() if name not in known}
    if more:
        print(" " * 11 + ", ".join(f"{name} {value}" for name, value in more.items()), flush=True)


def choose(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Names of the rows of a CPU and of a GPU that are asked for. `all`: those that this machine can run."""
    device = options.check or torch.cuda.is_available()
    if options.rows == "all":
        return [] if options.check else [*ROWS], [*engine_gpu.ROWS] if device else []
    names = {"cpu": [*ROWS], "gpu": [f"gpu-{name}" for name in engine_gpu.ROWS]}.get(options.rows)
    names = options.rows.split(",") if names is None else names
    known = [*ROWS, *(f"gpu-{name}" for name in engine_gpu.ROWS)]
    unknown = sorted({*names} - {*known})
    if unknown:
        parser.error(f"--rows: {', '.join(unknown)} is not among cpu, gpu, all, {', '.join(known)}")
    of_gpu = [name.removeprefix("gpu-") for name in names if name.startswith("gpu-")]
    if of_gpu and not device:
        parser.error("--rows: rows of a GPU need one; --check runs them small on the CPU")
    return [name for name in names if name in ROWS], of_gpu


class Report:
    """The document, written after every row. `path`: None for nowhere."""

    def __init__(self, path: Path | None, facts: Row) -> None:
        self._path, self._facts, self._earlier = path, facts, earlier_rows(path)
        self._rows: list[Row] = []

    def keep(self, result: Row) -> None:
        """One more row."""
        self._rows.append(result)
        show(result)
        self.write()

    def write(self) -> None:
        """What was measured, and rows of an earlier file that were not."""
        done = {row["row"] for row in self._rows}
        earlier = [row for row in self._earlier if row["row"] not in done]
        write_json(self._path, self._facts | {"rows": [*self._rows, *earlier]}, indent=2)

    def cut(self, wanted: list[str], seconds: float) -> None:
        """The limit has passed: say which rows there are not."""
        done = {row["row"] for row in self._rows}
        self._facts["cut"] = {"after_s": round(seconds, 1), "rows": [name for name in wanted if name not in done]}
        print(f"cut off after {seconds:.0f} s, without {', '.join(self._facts['cut']['rows'])}", flush=True)
        self.write()


def earlier_rows(path: Path | None) -> list[Row]:
    """The rows of an earlier file, each with its own provenance; none where there is no file."""
    if path is None or not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    origin = {name: value for name, value in before.items() if name != "rows"}
    return [{"from": origin, **found} for found in before["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--rows", default="all", help=f"cpu, gpu, all, or some of {','.join(ROWS)} and gpu-*")
    parser.add_argument("--requests", type=int, help="of the rows leak (10,000) and gpu-memory (900)")
    parser.add_argument("--layers", type=int, help="of the model of a GPU's rows (36); with fewer, memory alone counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-mib", type=int, default=256, help="of the row held")
    parser.add_argument("--check", action="store_true", help="rows of a GPU, tiny, on the CPU: do they run?")
    parser.add_argument("--limit", type=float, default=None, help="seconds after which no row is begun and one is cut")
    options = parser.parse_args()
    if options.layers is not None and (options.layers < 1 or options.check):
        parser.error("--layers must be 1 or more, and --check has a shape of its own")
    limit = Limit(options.limit)
    of_cpu, of_gpu = choose(options, parser)
    torch.set_num_threads(1)
    facts: Row = {"seed": SEED, "rounds": options.rounds}
    report = Report(options.json, facts | provenance("cuda:0" if of_gpu and not options.check else "cpu"))
    try:
        with limit.enforced():
            if of_gpu:
                engine_gpu.run(options, of_gpu, report.keep, SEED)
            if of_cpu:
                loaded = load_model("demo-7m", device="cpu")
                for name in of_cpu:
                    report.keep(ROWS[name](loaded, options))
    except Cut:
        report.cut([*of_gpu, *of_cpu], limit.used)
        sys.stdout.flush()
        os._exit(0)  # threads of what was cut off may still run


if __name__ == "__main__":
    main()
