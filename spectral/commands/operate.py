"""Operating a running server: `spectral load`, `unload`, `sleep`, `wake`, `pin`, `unpin`, `set`, `reload`, `events`.

They are the administrator's interface (docs/admin.md) for the terminal. A server with keys wants an administrator's, in
SPECTRAL_API_KEY.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import typer

from spectral.commands import client as http

if TYPE_CHECKING:
    import httpx

POLL_S = 0.1
PATIENCE_S = 660.0
"""How long an order may take: a model sleeps or changes its setting when its requests let it."""
MODEL = typer.Argument(help="The model, by name or alias.", autocompletion=http.model_names)
URL = typer.Option(None, "--url", help=f"Server (default: SPECTRAL_URL or {http.DEFAULT_URL}).")
JSON = typer.Option(False, "--json", help="Print the server's answer as JSON.")
WAIT = typer.Option(True, "--wait/--no-wait", help="Wait until it is hot, or has failed.")


def order(client: httpx.Client, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """POST to the administrator's interface. Raises ServerError."""
    import httpx

    try:
        response = client.post(f"/admin/{path}", json=body or {}, timeout=PATIENCE_S)
    except httpx.HTTPError as error:
        raise http.unreachable(client, error) from error
    if response.is_error:
        raise http.refusal(response)
    answer: dict[str, Any] = response.json()
    return answer


def model_path(model: str, action: str) -> str:
    """The path of an order; a name's slashes stay."""
    return f"models/{quote(model, safe='/:@')}/{action}"


def say(answer: dict[str, Any], text: str, as_json: bool) -> None:
    """The outcome, for people or for programs."""
    typer.echo(json.dumps(answer, indent=2) if as_json else text)


def wait_until_hot(client: httpx.Client, name: str) -> dict[str, Any]:
    """The model's facts once it is hot. Raises ServerError where it fails."""
    while True:
        facts: dict[str, Any] = http.get_json(client, "/ready", allowed=(200, 503))["models"].get(name, {})
        if facts.get("state") == "hot":
            return {"model": name, **facts}
        if facts.get("state") not in ("loading", "asleep", "cold"):
            raise http.ServerError(f"{name} is {facts.get('state', 'gone')}: {facts.get('error') or 'see the log'}")
        time.sleep(POLL_S)


def bring(model: str, action: str, url: str | None, wait: bool, as_json: bool) -> None:
    """Load or wake a model."""
    with http.open_client(url) as client:
        answer = order(client, model_path(model, action))
        if wait:
            answer = wait_until_hot(client, answer["model"])
    setting = (answer.get("setting") or {}).get("setting")
    at = f" on {answer['device']}, setting {setting}" if setting else ""
    say(answer, f"{answer['model']} is {answer['state']}{at}", as_json)


def load(model: str = MODEL, wait: bool = WAIT, url: str | None = URL, as_json: bool = JSON) -> None:
    """Load a model."""
    bring(model, "load", url, wait, as_json)


def wake(model: str = MODEL, wait: bool = WAIT, url: str | None = URL, as_json: bool = JSON) -> None:
    """Bring a sleeping model back to its device."""
    bring(model, "wake", url, wait, as_json)


def unload(
    model: str = MODEL,
    drain: float | None = typer.Option(
        None, "--drain", min=0, max=3600, help="Seconds that running requests get (default: as configured)."
    ),
    force: bool = typer.Option(False, "--force", help="Also a pinned model."),
    url: str | None = URL,
    as_json: bool = JSON,
) -> None:
    """End a model's worker; the next request that names it loads it again."""
    with http.open_client(url) as client:
        answer = order(client, model_path(model, "unload"), {"drain_seconds": drain, "force": force})
    say(answer, f"{answer['model']} is {answer['state']}", as_json)


def sleep(model: str = MODEL, url: str | None = URL, as_json: bool = JSON) -> None:
    """Move a model's weights to host memory; its next request wakes it."""
    with http.open_client(url) as client:
        answer = order(client, model_path(model, "sleep"))
    say(answer, f"{answer['model']} sleeps", as_json)


def pin(model: str = MODEL, url: str | None = URL, as_json: bool = JSON) -> None:
    """Keep a model where it is, whatever else is asked for."""
    with http.open_client(url) as client:
        answer = order(client, model_path(model, "pin"))
    say(answer, f"{answer['model']} is pinned", as_json)


def unpin(model: str = MODEL, url: str | None = URL, as_json: bool = JSON) -> None:
    """Let a pinned model be taken away again."""
    with http.open_client(url) as client:
        answer = order(client, model_path(model, "unpin"))
    say(answer, f"{answer['model']} is not pinned", as_json)


def choose(
    model: str = MODEL,
    setting: str = typer.Argument(help="A row of the model's ladder, exact, or auto for the configured one."),
    live: bool = typer.Option(False, "--live", help="Squeeze what running requests hold, too."),
    url: str | None = URL,
    as_json: bool = JSON,
) -> None:
    """Choose a model's setting by hand: another row of its ladder for new requests."""
    with http.open_client(url) as client:
        answer = order(client, model_path(model, "setting"), {"setting": setting, "live": live})
    facts = answer.get("setting") or {}
    cost = f" (KL {facts['kl_mean']:.4f}, {facts['ratio']:.1f} times smaller than bf16)" if facts else ""
    say(answer, f"{answer['model']} runs at {facts.get('setting', setting)}{cost}", as_json)


def reload(url: str | None = URL, as_json: bool = JSON) -> None:
    """Let the server read its configuration again; a faulty one changes nothing."""
    with http.open_client(url) as client:
        answer = order(client, "config/reload")
    parts = {name: value for name, value in answer.items() if value}
    say(answer, "\n".join(f"{name}: {shown(value)}" for name, value in parts.items()) or "nothing has changed", as_json)


def shown(value: Any) -> str:
    """Names, or names with what changed of each."""
    if isinstance(value, dict):
        return "; ".join(f"{name} ({', '.join(fields)})" for name, fields in value.items())
    return ", ".join(value)


def events(
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on as they happen; Ctrl-C ends it."),
    limit: int = typer.Option(20, "--limit", "-n", min=1, max=1000, help="How many of the last ones."),
    model: str | None = typer.Option(None, "--model", help="Of this model only.", autocompletion=http.model_names),
    kind: str | None = typer.Option(None, "--kind", help="Of this kind only: state, setting, squeeze, evict, ..."),
    url: str | None = URL,
    as_json: bool = typer.Option(False, "--json", help="One JSON object per line."),
) -> None:
    """Show what the server did and why, oldest first."""
    wanted = {name: value for name, value in (("model", model), ("kind", kind)) if value is not None}
    with http.open_client(url) as client:
        query = "&".join(f"{name}={quote(value)}" for name, value in {**wanted, "limit": str(limit)}.items())
        rows = http.get_json(client, f"/admin/events?{query}")["events"][::-1]
        for row in rows:
            typer.echo(event_line(row, as_json))
        if follow:
            for row in live_events(client, rows[-1]["id"] if rows else 0):
                if all(row.get(name) == value for name, value in wanted.items()):
                    typer.echo(event_line(row, as_json))


def event_line(row: dict[str, Any], as_json: bool) -> str:
    """One event; its time is this machine's."""
    if as_json:
        return json.dumps(row)
    when = datetime.fromtimestamp(row["at"]).strftime("%Y-%m-%d %H:%M:%S")
    return f"{when}  {row['kind']:<10} {row.get('model') or '-'}  {row['reason']}"


def live_events(client: httpx.Client, after: int) -> Iterator[dict[str, Any]]:
    """Events as they happen. Raises ServerError where the connection ends."""
    import httpx
    from httpx_sse import connect_sse

    try:
        path = f"/admin/events/stream?after={after}"
        with connect_sse(client, "GET", path, timeout=httpx.Timeout(10.0, read=None)) as source:
            if source.response.is_error:
                source.response.read()
                raise http.refusal(source.response)
            for event in source.iter_sse():
                if event.data:
                    yield json.loads(event.data)
    except httpx.HTTPError as error:
        raise http.ServerError(f"the connection was lost: {error or type(error).__name__}") from error
    raise http.ServerError("the server ended")


def register(app: typer.Typer) -> None:
    """Add these commands, in a part of their own of the help."""
    for name, command in (
        ("load", load), ("unload", unload), ("sleep", sleep), ("wake", wake), ("pin", pin), ("unpin", unpin),
        ("set", choose), ("reload", reload), ("events", events),
    ):  # fmt: skip
        app.command(name, rich_help_panel="Operating a running server")(command)
