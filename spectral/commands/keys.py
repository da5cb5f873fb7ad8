"""`spectral keys`: the API keys of a server, in a file that holds only their hashes."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import typer

from spectral.commands.plain import App
from spectral.keyfile import KeyFileError, KeyRecord, hash_secret, load_keys, new_secret, save_keys, utc_now

app = App(help="Make, list and revoke API keys.", no_args_is_help=True)
FILE = typer.Option(
    Path("keys.json"), "--file", "-f", envvar="SPECTRAL_AUTH__KEYS_FILE", help="The file of keys (auth.keys_file)."
)
JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command("create")
def create(
    name: str = typer.Argument(help="What to call the key; it stands in logs."),
    file: Path = FILE,
    admin: bool = typer.Option(False, "--admin", help="The key may also use /admin."),
    model: list[str] = typer.Option([], "--model", help="A model, or a pattern like 'qwen*' (repeat); else all."),
    requests: int | None = typer.Option(None, "--requests-per-minute", min=1, help="Most requests in a minute."),
    tokens: int | None = typer.Option(None, "--tokens-per-minute", min=1, help="Most tokens in a minute."),
    concurrency: int | None = typer.Option(None, "--max-concurrency", min=1, help="Most requests at once."),
    days: int | None = typer.Option(None, "--days", min=1, max=36500, help="Days until the key expires."),
    as_json: bool = JSON,
) -> None:
    """Make a key and show it, once: the file keeps only its hash. The server reads the file again by itself."""
    records = load_keys(file) if file.exists() else []
    if any(record.name == name for record in records):
        raise KeyFileError(f"{file} has a key {name!r} already; choose another name, or revoke it and remove its entry")
    secret = new_secret()
    expires = None
    if days is not None:
        expires = (datetime.now(timezone.utc) + timedelta(days=days)).isoformat(timespec="seconds")
    record = KeyRecord(
        name=name,
        hash=hash_secret(secret),
        role="admin" if admin else "user",
        models=tuple(model) or None,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        max_concurrency=concurrency,
        created=utc_now(),
        expires=expires,
    )
    _save(file, [*records, record])
    if as_json:
        typer.echo(json.dumps({"key": secret, "file": str(file), **_facts(record)}, indent=2))
        return
    typer.echo(secret)
    typer.echo(f"Key {name!r} is in {file}, and is shown only now. The server needs auth.keys_file: {file}", err=True)


@app.command("list")
def list_keys(file: Path = FILE, as_json: bool = JSON) -> None:
    """Show the keys of a file; the keys themselves are not in it."""
    records = load_keys(file)
    if as_json:
        typer.echo(json.dumps({"file": str(file), "keys": [_facts(record) for record in records]}, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for column in ("name", "role", "state", "models", "requests/min", "tokens/min", "at once", "created"):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for record in records:
        limits = (record.requests_per_minute, record.tokens_per_minute, record.max_concurrency)
        shown = ["" if limit is None else str(limit) for limit in limits]
        models = "all" if record.models is None else ", ".join(record.models)
        table.add_row(record.name, record.role, _state(record), models, *shown, record.created or "")
    Console().print(table)


@app.command("revoke")
def revoke(name: str = typer.Argument(help="The key's name."), file: Path = FILE, as_json: bool = JSON) -> None:
    """Make a key useless at once, also for a running server. Its entry stays, so that its name is not used again."""
    records = load_keys(file)
    found = next((record for record in records if record.name == name), None)
    if found is None:
        names = ", ".join(record.name for record in records) or "none"
        raise KeyFileError(f"{file} has no key {name!r}; there are: {names}")
    revoked = found if found.revoked is not None else dataclasses.replace(found, revoked=utc_now())
    _save(file, [revoked if record.name == name else record for record in records])
    text = f"Key {name!r} is revoked since {revoked.revoked}."
    typer.echo(json.dumps(_facts(revoked), indent=2) if as_json else text)


def _save(file: Path, records: list[KeyRecord]) -> None:
    try:
        save_keys(file, records)
    except OSError as error:
        raise KeyFileError(f"{file} cannot be written: {error.strerror or error}") from error


def _state(record: KeyRecord) -> str:
    if record.revoked is not None:
        return "revoked"
    return "valid" if record.valid_at(datetime.now(timezone.utc)) else "expired"


def _facts(record: KeyRecord) -> dict[str, Any]:
    return {**dataclasses.asdict(record), "state": _state(record)}
