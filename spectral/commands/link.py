"""`spectral profile link`: what the small level of the cold tier needs, fitted and put beside a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spectral.commands.evaluate import split_settings
from spectral.commands.profile import DEVICE, QUANTIZE, Progress
from spectral.commands.texts import read_texts

if TYPE_CHECKING:
    from spectral.hf import LoadedModel
    from spectral.link_profile import LinkReport
    from spectral.profile import SpectralProfile


def link(
    model: str = typer.Argument(..., help="Folder, hub name, or `demo`."),
    profile: Path | None = typer.Option(
        None, "--profile", help="Profile, with its file's folder for the links (default: the shipped or saved one)."
    ),
    settings: str | None = typer.Option(
        None, "--settings", help="Settings, with commas between, or `all` (default: the profile's default)."
    ),
    text: list[Path] | None = typer.Option(
        None, "--text", help="Text to fit on, UTF-8; may be repeated (default: text by the model itself)."
    ),
    tokens: int = typer.Option(49_152, "--tokens", min=1024, help="Tokens to fit on; a few more are for measuring."),
    quantize: str | None = QUANTIZE,
    device: str = DEVICE,
    seed: int = typer.Option(0, "--seed", min=0, help="Same seed, same kind of machine: the same links."),
    replace: bool = typer.Option(
        False, "--replace", help="Fit links anew that are there; sessions saved with them are lost."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Fit links, with which saved sessions take less room (level small), and write them beside the profile.

    A setting's links are the file PROFILE.SETTING.links. Whoever loads what was saved with them needs that very file.
    """
    from spectral.errors import SpectralError
    from spectral.link_profile import link_profile

    texts = read_texts(text)
    loaded, opened = _open(model, profile, quantize, device)
    assert opened.file is not None
    names = split_settings(settings) or [opened.default]
    if names == ["all"]:
        names = [row.name for row in opened.ladder]
    if "exact" in names:
        raise SpectralError("--settings: the exact setting has no codes to link; choose rows of the ladder, or all.")
    reports: list[LinkReport] = []
    try:
        for report in link_profile(
            loaded, opened, names, texts=texts, tokens=tokens, seed=seed, replace=replace, progress=Progress()
        ):
            reports.append(report)
            if not as_json:
                typer.echo(("" if len(reports) > 1 else f"{HEADINGS}\n") + _line(report))
    except OSError as error:
        raise SpectralError(
            f"the links cannot be written beside {opened.file}: {error.strerror or error}; "
            "copy the profile to a folder that you can write, and name it with --profile."
        ) from error
    if as_json:
        facts = {"model": opened.model, "profile": str(opened.file), "profile_hash": opened.content_hash}
        typer.echo(json.dumps({**facts, "settings": [report.to_dict() for report in reports]}, indent=2))


HEADINGS = f"{'setting':>8} {'seconds':>8} {'links, MB':>10} {'fast':>6} {'small':>6} {'pays from':>10}  file"


def _line(report: LinkReport) -> str:
    where = report.file or "not written: level fast is as small on this text; try more tokens"
    pays = "-" if report.pays_from is None else f"{report.pays_from:,}"
    return (
        f"{report.setting:>8} {report.seconds:8.1f} {report.links_nbytes / 1e6:10.2f} {report.fast:6.3f} "
        f"{report.small:6.3f} {pays:>10}  {where}"
    )


def _open(model: str, profile: Path | None, quantize: str | None, device: str) -> tuple[LoadedModel, SpectralProfile]:
    """The model and its profile. Raises ModelError, ProfileError."""
    from spectral.engine.build import find_profile
    from spectral.errors import ModelError, ProfileError
    from spectral.hf import load_model
    from spectral.inference import QUANTIZATION

    if quantize not in QUANTIZATION:
        raise ModelError(f"--quantize must be 4bit or 8bit, got {quantize!r}")
    loaded = load_model(model, quantization=QUANTIZATION[quantize], device=device)
    opened = find_profile(loaded, profile)
    if opened is None:
        raise ProfileError(
            f"no profile is known for {model!r}; make one with `spectral profile build {model} --output FILE` "
            "and name it with --profile."
        )
    return loaded, opened
