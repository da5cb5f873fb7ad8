"""A small HTTP client for a running server, shared by the commands that talk to one.

Torch-free; httpx is imported when a client is opened, because importing it takes longer than showing the help.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from spectral.errors import SpectralError

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"


class ServerError(SpectralError):
    """The server cannot be reached, or it refused; the message is fit to be shown."""


def resolve_url(url: str | None) -> str:
    """The server's address: the option, else SPECTRAL_URL, else the default."""
    return (url or os.environ.get("SPECTRAL_URL") or DEFAULT_URL).rstrip("/")


def check_address(address: str) -> str:
    """The same address. Raises ServerError for one that is none."""
    import httpx

    try:
        url = httpx.URL(address)
        fits = url.scheme in ("http", "https") and bool(url.host) and (url.port or 0) < 2**16
    except httpx.InvalidURL:
        fits = False
    if not fits:
        raise ServerError(f"{address!r} is no address of a server; write it as {DEFAULT_URL}")
    return address


def check_key(key: str, named: str) -> str:
    """The same key. `named`: where it was given. Raises ServerError, without the key, for what no header can carry."""
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ServerError(
            f"{named} has characters that no key has (letters with accents, or spaces and line ends around it); "
            "give the key as the server's owner wrote it"
        )
    return key


def open_client(url: str | None, timeout: float = 10.0) -> httpx.Client:
    """A client for one server. Proxies of the environment are not used: the server is usually on this machine. Raises
    ServerError for an address that is none."""
    import httpx

    address = check_address(resolve_url(url))
    headers = {}
    if key := os.environ.get("SPECTRAL_API_KEY"):
        headers["Authorization"] = f"Bearer {check_key(key, 'SPECTRAL_API_KEY')}"
    return httpx.Client(base_url=address, timeout=timeout, headers=headers, trust_env=False)


def unreachable(client: httpx.Client, error: Exception) -> ServerError:
    """The message for a server that does not answer."""
    return ServerError(
        f"no server answers at {str(client.base_url).rstrip('/')} ({type(error).__name__}). "
        "Start one with `spectral serve`, or name another with --url."
    )


def refusal(response: httpx.Response) -> ServerError:
    """The message for an answer that is not a success."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = response.text.strip()[:300] or response.reason_phrase
    hint = ""
    if response.status_code in (401, 403):
        sent = "SPECTRAL_API_KEY is set" if os.environ.get("SPECTRAL_API_KEY") else "SPECTRAL_API_KEY is not set"
        hint = f" ({sent}; it is the key that this command sends)"
    return ServerError(f"the server answered {response.status_code}: {message}{hint}")


def model_names(incomplete: str) -> list[str]:
    """For shell completion: models of the server that answers at the usual address; none where none does."""
    try:
        with open_client(None, timeout=0.5) as client:
            data = get_json(client, "/v1/models").get("data") or []
    except SpectralError:
        return []
    return [str(model["id"]) for model in data if str(model.get("id", "")).startswith(incomplete)]


def get_json(client: httpx.Client, path: str, allowed: tuple[int, ...] = (200,)) -> Any:
    """GET a path and parse its JSON. Raises ServerError."""
    import httpx

    try:
        response = client.get(path)
    except httpx.HTTPError as error:
        raise unreachable(client, error) from error
    if response.status_code not in allowed:
        raise refusal(response)
    try:
        return response.json()
    except ValueError as error:
        raise ServerError(f"{path} did not answer with JSON; is this a Spectral server?") from error


def first_model(client: httpx.Client) -> str:
    """The first model that the server offers."""
    data = get_json(client, "/v1/models").get("data") or []
    if not data:
        raise ServerError("the server offers no model; add one to its configuration.")
    return str(data[0]["id"])


def stream_chat(client: httpx.Client, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Chunks of a streamed chat completion. Raises ServerError for refusals and for errors in mid-stream."""
    import httpx
    from httpx_sse import connect_sse

    timeout = httpx.Timeout(10.0, read=600.0)
    try:
        with connect_sse(client, "POST", "/v1/chat/completions", json=body, timeout=timeout) as source:
            if source.response.status_code != 200:
                source.response.read()
                raise refusal(source.response)
            for event in source.iter_sse():
                if event.data == "[DONE]":
                    return
                if not event.data:
                    continue
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise ServerError(f"the answer broke off: {chunk['error'].get('message', 'unknown error')}")
                yield chunk
        raise ServerError("the answer broke off: the server closed the connection.")
    except httpx.ConnectError as error:
        raise unreachable(client, error) from error
    except httpx.HTTPError as error:
        raise ServerError(f"the connection was lost: {error}") from error
