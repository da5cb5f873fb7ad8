"""`spectral plan`, which runs this as a program of its own: the library does not import the server."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from server.config import ConfigError, ModelSettings, Settings, load_settings
from server.config_memory import parse_bytes
from server.scheduler.demand import HOST, HOT
from server.scheduler.dry_run import DryRun, dry_run
from server.scheduler.facts import Measured
from server.scheduler.nvml import Devices, Reading
from server.scheduler.words import human, nats

FITS, DOES_NOT_FIT, WRONG = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit status: 0 everything fits, 1 something does not, 2 that cannot be known."""
    options = _parser().parse_args(argv)
    try:
        settings = load_settings(options.config)
        extra = _extra(settings, options.model, options.quantization)
        devices = Devices()
        readings = _readings(options.gpu, options.host) if options.gpu else devices.read()
        state = Path(settings.server.state_dir or ".spectral") / "measured.json"
        measured = None if options.gpu else Measured(state)
        found = dry_run(settings, readings, extra=extra, context=options.context, measured=measured)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    notes = [] if options.gpu else devices.knowledge(readings)
    if options.json:
        print(json.dumps({**found.as_dict(), "notes": notes}, indent=2))
    else:
        show(found, notes, explain=options.explain)
    if found.plan.unmet:
        return DOES_NOT_FIT
    return WRONG if found.unknown else FITS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spectral plan", description="Does it fit, and at what KL?")
    parser.add_argument("--config", help="configuration file")
    parser.add_argument("--with", dest="model", metavar="MODEL", help="plan for this model as well")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none", help="of --with")
    parser.add_argument("--context", type=int, help="tokens of cache that every model must have")
    parser.add_argument(
        "--gpu", action="append", default=[], help="plan for a GPU of this size, not this machine's"
    )
    parser.add_argument("--host", default="32GiB", help="host memory beside --gpu")
    parser.add_argument("--explain", action="store_true", help="say why")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _extra(settings: Settings, name: str | None, quantization: str) -> ModelSettings | None:
    if name is None or settings.find(name) is not None:  # a configured model is planned for anyway
        return None
    if quantization not in ("none", "nf4", "int8"):
        raise ValueError(f"quantization must be none, nf4 or int8, got {quantization!r}")
    defaults = settings.defaults.model_dump(exclude_none=True)
    try:
        return ModelSettings(
            **{**defaults, "name": name.strip("/").replace(" ", "-"), "path": name, "quantization": quantization}
        )
    except ValidationError as error:
        raise ValueError(f"--with {name}: {error.errors()[0]['msg']}") from error


def _readings(gpus: Sequence[str], host: str) -> list[Reading]:
    """GPUs that are not here, empty."""
    sizes = [size for given in gpus for size in given.split(",")]
    readings = [Reading(HOST, "host memory", int(parse_bytes(host)), 0)]
    for index, size in enumerate(sizes):
        total = parse_bytes(size)
        if not isinstance(total, int) or total < 2**20:
            raise ValueError(f"--gpu {size}: write a size with its unit, such as 12GiB")
        readings.append(Reading(f"cuda:{index}", f"GPU of {size}", total, 0))
    return readings


def show(found: DryRun, notes: Sequence[str], *, explain: bool) -> None:
    """The plan as a table, with reasons where they are asked for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, plan = Console(), found.plan
    table = Table(box=box.SIMPLE)
    for column in ("model", "where", "setting", "KL", "weights", "cache"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("KL", "weights", "cache") else "left")
    for demand in found.demands:
        choice = plan.choices[demand.name]
        hot = choice.residency == HOT
        where = ", ".join(choice.devices) if hot else choice.residency
        cells = (choice.setting, nats(choice.kl)) if hot else ("", "")
        table.add_row(demand.name, where, *cells, human(demand.weights), human(choice.lease) if hot else "")
    console.print(table)
    for name, budget in found.budgets.items():
        used = sum(dict(choice.shares).get(name, 0) for choice in plan.choices.values())
        console.print(f"{name}: {human(used)} of {human(budget)} given away", markup=False, highlight=False)
    verdict = "Everything fits" if not found.unknown else "What is known fits"
    verdict = verdict if not plan.unmet else f"Does not fit: {', '.join(plan.unmet)}"
    console.print(f"{verdict}. Mean KL of the hot models: {nats(plan.kl)} nats.", markup=False, highlight=False)
    if explain or plan.unmet:
        for name, reason in plan.reasons.items():
            if explain or name in plan.unmet:
                console.print(f"  {name}: {reason}", markup=False, highlight=False)
    for name in found.unknown:
        console.print(f"{name} is not on this machine, so its size is not known; load it once", markup=False)
    for note in notes if explain else ():
        console.print(f"note: {note}", markup=False, highlight=False)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `spectral plan | head` ends as other programs do
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
