"""`spectral tune`: measure on this GPU what the kernels should choose, and keep it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch

    from spectral.kernels.choice_files import Entry
    from spectral.kernels.search import Found
    from spectral.kernels.tune import Bench

STEPS_OF = {"decode": "decode steps, rows x tokens", "codes": "pages encoded and opened"}


def tune(
    device: str = typer.Option("cuda:0", "--device", help="cuda or cuda:N."),
    shape: str = typer.Option(
        "32x8x128", "--shape", help="Of a model's layers: query heads x KV heads x numbers of a head."
    ),
    seconds: float = typer.Option(120.0, "--seconds", min=1, help="About how long, after the defaults are compiled."),
    output: Path | None = typer.Option(
        None, "--output", help="Add the choices to this table, as it is shipped, and not to this user's cache."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure on this GPU what the kernels should choose for layers of a shape, and keep it for later starts.

    A worker does so by itself at its first start on a GPU and shape that nobody has measured, in half a minute; with
    more time more is tried. Workers that run go on as they are.
    """
    sizes, gpu = _sizes(shape), _gpu(device)
    from spectral.errors import SpectralError
    from spectral.kernels.choices import KINDS, gpu_name
    from spectral.kernels.tune import DECODE_SHARE, entry_of
    from spectral.kernels.tune import tune as search

    name, left = gpu_name(gpu), seconds
    told: list[dict[str, Any]] = []
    for number, bench in enumerate(_benches(gpu, *sizes)):
        kind = KINDS[type(bench.start())]
        own = left * (1.0 if number else DECODE_SHARE)
        typer.echo(f"tuning {kind} of {bench.shape} on {name}: compiling, then up to {own:.0f} s", err=True)
        show = _progress(own)
        try:
            found = search(bench, own, show)
        except Exception as failure:  # whatever a compiler or a driver raises
            raise SpectralError(
                f"{kind} of {bench.shape} cannot be tuned on {name}, where the defaults serve: "
                f"{type(failure).__name__}: {failure}"
            ) from failure
        finally:
            show("", own)
        left = max(0.0, left - found.seconds)
        entry = entry_of(name, bench.shape, found)
        told.append({"kind": kind, "shape": str(bench.shape), "kept_in": str(_keep(entry, output)), **found.to_dict()})
        if not as_json:
            typer.echo(_report(name, str(bench.shape), kind, found, told[-1]["kept_in"]))
    if as_json:
        from spectral.kernels.choice_files import versions

        typer.echo(json.dumps({"gpu": name, "versions": versions(), "tuned": told}, indent=2))


def _sizes(shape: str) -> tuple[int, int, int]:
    """Query heads, KV heads, numbers of a head. Raises BadParameter."""
    parts = shape.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"must be like 32x8x128, got {shape!r}", param_hint="--shape")
    heads, kv_heads, dim = map(int, parts)
    if heads % kv_heads or dim % 8 or dim > 512:
        raise typer.BadParameter(
            f"query heads must be a multiple of KV heads, and a head 8 to 512 numbers in eights, got {shape!r}",
            param_hint="--shape",
        )
    return heads, kv_heads, dim


def _gpu(device: str) -> torch.device:
    """The device with this name, with a number. Raises SpectralError where the kernels cannot run."""
    import torch

    from spectral.dispatch import able, installed
    from spectral.errors import SpectralError

    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("cpu")
    if found.type != "cuda":
        raise SpectralError(
            f"--device must be cuda or cuda:N, got {device!r}: only kernels on NVIDIA GPUs have choices"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = found.index or 0
    if number >= count:
        raise SpectralError(
            f"--device {device}: torch sees {count} NVIDIA GPUs here; run this where the GPU is, and see that "
            "`nvidia-smi` lists it and that torch was installed for CUDA. Without a GPU there is nothing to tune."
        )
    found = torch.device("cuda", number)
    if not installed():
        raise SpectralError("the kernels need triton: install spectral-serve[gpu]")
    if not able(found):
        raise SpectralError(f"--device {device}: the kernels need a GPU of compute capability 8.0 or more")
    return found


def _benches(gpu: torch.device, heads: int, kv_heads: int, dim: int) -> list[Bench]:
    """What is measured: a synthetic layer at 8x."""
    import torch

    from spectral.kernels.code_layer import CodeLayer
    from spectral.kernels.decode import LayerKernels
    from spectral.kernels.synthetic import BITS, synthetic_codec
    from spectral.kernels.tune import CodeBench, DecodeBench

    codec = synthetic_codec(kv_heads, dim, BITS["8x"], str(gpu))
    return [
        DecodeBench(LayerKernels(codec), heads // kv_heads, torch.bfloat16),
        CodeBench(CodeLayer(codec), torch.bfloat16),
    ]


def _keep(entry: Entry, output: Path | None) -> Path:
    """Where the choices are from now on. Raises SpectralError."""
    from spectral.errors import SpectralError
    from spectral.kernels.choice_files import add_to_table, entry_path, write_entry

    path = output or entry_path(entry["gpu"], entry["kind"], entry["shape"])
    if path is None:
        raise SpectralError("this user has no home folder to keep the choices in; set XDG_CACHE_HOME, or give --output")
    try:
        if output is None:
            write_entry(path, entry)
        else:
            add_to_table(path, [entry])
    except OSError as error:
        raise SpectralError(
            f"the choices cannot be written to {path}: {error.strerror or error}; give a file that can be written with "
            "--output, or set XDG_CACHE_HOME"
        ) from error
    return path


def _progress(seconds: float) -> Any:
    """On a terminal one line on standard error that says what is tried, gone at the end; elsewhere nothing."""

    def show(what: str, passed: float) -> None:
        if sys.stderr.isatty():
            text = f"\r\033[K  {what}, {passed:.0f} of {seconds:.0f} s" if what else "\r\033[K"
            print(text, end="", file=sys.stderr, flush=True)

    return show


def _report(gpu: str, shape: str, kind: str, found: Found, kept_in: str) -> str:
    lines = [f"{kind} of {shape} on {gpu}, {found.seconds:.1f} s"]
    lines.append(f"  {STEPS_OF[kind] + ', microseconds':44} {'defaults':>9} {'chosen':>9}")
    for step, before in found.before.items():
        lines.append(f"  {step:44} {before:9.1f} {found.after[step]:9.1f}")
    lines.append(f"  {'tried':28} {'gain':>7} {'seconds':>8}  verdict")
    for trial in found.trials:
        gain = "-" if trial.gain is None else f"{trial.gain:.1%}"
        lines.append(f"  {f'{trial.name} {trial.value}':28} {gain:>7} {trial.seconds:8.1f}  {trial.verdict}")
    if found.left_out:
        lines.append(f"  not tried for want of time: {', '.join(found.left_out)}; --seconds gives more")
    changed = ", ".join(f"{name} {value}" for name, value in found.changed.items()) or "the defaults"
    lines.append(f"  chosen: {changed}; kept in {kept_in}")
    return "\n".join(lines)
