"""`spectral chat`: talk to a model in the terminal."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import typer

from spectral.commands import client as http
from spectral.errors import SpectralError

HELP = """\
/help          this text
/clear         forget the conversation
/model [NAME]  show the models, or go on with another
/exit          leave (Ctrl-D does the same; Ctrl-C stops an answer)"""


@dataclass
class Answer:
    """One streamed answer and what was measured on it. Times in seconds."""

    text: str = ""
    thoughts: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    spectral: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False
    first_token_s: float | None = None
    total_s: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first by the time after it: the speed of reading along, without the prompt."""
        tokens = self.usage.get("completion_tokens")
        if not tokens or tokens < 2 or self.first_token_s is None or self.total_s <= self.first_token_s:
            return None
        return (tokens - 1) / (self.total_s - self.first_token_s)


@dataclass
class Session:
    """A conversation with one model."""

    client: Any
    model: str
    system: str | None
    max_tokens: int | None
    temperature: float | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": system + self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body

    def ask(self, text: str, on_text: Any, on_thought: Any = None) -> Answer:
        """Send one message and stream the answer to `on_text`, and the thoughts before it to `on_thought`. Ctrl-C stops
        this answer only. Raises ServerError."""
        self.messages.append({"role": "user", "content": text})
        answer = Answer()
        started = time.monotonic()
        stream = http.stream_chat(self.client, self.body())
        try:
            for chunk in stream:
                take_chunk(answer, chunk, started, on_text, on_thought)
        except KeyboardInterrupt:
            answer.stopped = True
        except SpectralError:
            self.messages.pop()
            raise
        finally:
            stream.close()
        answer.total_s = time.monotonic() - started
        if answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            self.messages.pop()
        return answer


def take_chunk(answer: Answer, chunk: dict[str, Any], started: float, on_text: Any, on_thought: Any = None) -> None:
    """Add one chunk to an answer."""
    answer.usage = chunk.get("usage") or answer.usage
    answer.spectral = {**answer.spectral, **(chunk.get("spectral") or {})}
    for choice in chunk.get("choices") or []:
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        delta = choice.get("delta") or {}
        piece, thought = delta.get("content"), delta.get("reasoning_content")
        if (piece or thought) and answer.first_token_s is None:
            answer.first_token_s = time.monotonic() - started
        if thought:
            answer.thoughts += thought
            if on_thought is not None:
                on_thought(thought)
        if piece:
            answer.text += piece
            on_text(piece)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def summary(answer: Answer) -> str:
    """The line under an answer: tokens, speed, cache bytes, setting, ratio; what the server did not say is left out."""
    parts = []
    if tokens := answer.usage.get("completion_tokens"):
        parts.append(f"{tokens} tokens")
    if (speed := answer.tokens_per_second) is not None:
        parts.append(f"{speed:.0f} tokens/s")
    if (cache := answer.spectral.get("cache_bytes")) is not None:
        parts.append(f"cache {human_bytes(float(cache))}")
    if setting := answer.spectral.get("setting"):
        parts.append(f"setting {setting}")
    if (ratio := answer.spectral.get("ratio")) is not None and float(ratio) > 1:
        parts.append(f"{float(ratio):.1f}x smaller than bf16")
    if answer.stopped:
        parts.append("stopped")
    elif answer.finish_reason == "length":
        parts.append("cut at the token limit")
    return " · ".join(parts)


def as_record(session: Session, question: str, answer: Answer) -> str:
    """One JSON line per answer for `--json`."""
    speed = answer.tokens_per_second
    return json.dumps({
        "model": session.model, "question": question, "answer": answer.text, "thoughts": answer.thoughts,
        "finish_reason": answer.finish_reason,
        "stopped": answer.stopped, "usage": answer.usage, "spectral": answer.spectral,
        "first_token_s": answer.first_token_s, "total_s": answer.total_s, "tokens_per_second": speed,
    })


def command(session: Session, line: str) -> bool:
    """Obey a line that starts with a slash; False when it is time to leave."""
    name, _, argument = line.partition(" ")
    if name in {"/exit", "/quit"}:
        return False
    if name == "/clear":
        session.messages.clear()
        typer.echo("The conversation is forgotten.")
    elif name == "/model":
        names = [str(model["id"]) for model in http.get_json(session.client, "/v1/models").get("data", [])]
        wanted = argument.strip()
        if wanted in names:
            session.model = wanted
        elif wanted:
            typer.echo(f"There is no model {wanted!r}.", err=True)
        typer.echo("  ".join(f"[{item}]" if item == session.model else item for item in names))
    else:
        typer.echo(HELP)
    return True


def answer_line(session: Session, line: str, as_json: bool) -> None:
    """Ask, stream to the terminal, and show what was measured."""

    thinking = False

    def on_text(piece: str) -> None:
        nonlocal thinking
        if thinking:
            typer.echo("\n", err=True)
            thinking = False
        sys.stdout.write(piece)
        sys.stdout.flush()

    def on_thought(piece: str) -> None:
        nonlocal thinking
        thinking = True
        typer.secho(piece, dim=True, nl=False, err=True)  # not among what a pipe reads

    if as_json:
        answer = session.ask(line, lambda piece: None)
    else:
        answer = session.ask(line, on_text, on_thought)
    if as_json:
        typer.echo(as_record(session, line, answer))
        return
    typer.echo("")
    if text := summary(answer):
        typer.secho(text, dim=True, err=True)


def interactive(session: Session, as_json: bool) -> None:
    """Read lines from a terminal until /exit or Ctrl-D."""
    where = str(session.client.base_url).rstrip("/")
    typer.secho(f"{session.model} at {where}; /help lists commands", dim=True, err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo("")
            return
        except KeyboardInterrupt:
            typer.echo("\n(/exit or Ctrl-D leaves)", err=True)
            continue
        try:
            if line.startswith("/"):
                if not command(session, line):
                    return
            elif line:
                answer_line(session, line, as_json)
        except SpectralError as error:
            typer.secho(f"error: {error}", fg="red", err=True)


def chat(
    model: str | None = typer.Argument(
        None, help="Model to talk to (default: the server's first).", autocompletion=http.model_names
    ),
    url: str | None = typer.Option(None, "--url", help=f"Server (default: SPECTRAL_URL or {http.DEFAULT_URL})."),
    system: str | None = typer.Option(None, "--system", help="System message."),
    max_tokens: int | None = typer.Option(None, "--max-tokens", min=1, help="Most tokens in one answer."),
    temperature: float | None = typer.Option(None, "--temperature", min=0.0, max=2.0, help="0 is greedy."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per answer, nothing streamed."),
) -> None:
    """Chat with a model of a running server. Piped lines are asked one after another in one conversation."""
    with http.open_client(url) as client:
        session = Session(client, model or http.first_model(client), system, max_tokens, temperature)
        if sys.stdin.isatty():
            interactive(session, as_json)
            return
        for raw in sys.stdin:
            line = raw.strip()
            if line.startswith("/"):
                if not command(session, line):
                    return
            elif line:
                answer_line(session, line, as_json)
