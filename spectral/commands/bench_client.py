"""Sends a load to an OpenAI-compatible server and times every token that comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spectral.commands.bench_load import Planned, prompt_text
from spectral.commands.client import ServerError

if TYPE_CHECKING:
    import httpx

PROBE_WORDS = 200


@dataclass
class Measured:
    """One request as it went. Times in seconds since the start of the load; `chunks`: when text came.

    `error`: why it failed, "" if it did not. Tokens are the server's count, else the number of chunks.
    """

    planned: Planned
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """From sending to the first text."""
        return self.chunks[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for answers of one token."""
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True)
class Target:
    """Where and how. `chat`: /v1/chat/completions, else /v1/completions; `usage`: ask for token counts in streams."""

    url: str
    model: str
    api_key: str | None = None
    chat: bool = True
    usage: bool = True
    timeout_s: float = 600.0

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, prompt: str, output_tokens: int, stream: bool) -> dict[str, Any]:
        """A request's body."""
        text: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        options = {"stream_options": {"include_usage": True}} if stream and self.usage else {}
        return {"model": self.model, "max_tokens": output_tokens, "temperature": 0, "stream": stream, **text, **options}


class Load:
    """One run. `concurrency`: None follows the plan's times; a number keeps so many requests going and ignores them."""

    def __init__(self, target: Target, concurrency: int | None = None, *, shared: int = 0, seed: int = 0) -> None:
        self.target, self.concurrency, self.shared, self.seed = target, concurrency, shared, seed
        self.words_per_token = 1.0
        self._began = 0.0

    async def run(self, planned: Sequence[Planned]) -> list[Measured]:
        """Send everything; raises ServerError if the server cannot be reached at all or refuses a small request."""
        import httpx

        headers = {"Authorization": f"Bearer {self.target.api_key}"} if self.target.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.target.timeout_s, connect=10.0)
        async with httpx.AsyncClient(
            base_url=self.target.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
        ) as client:
            await self._probe(client)
            self._began = time.monotonic()
            if self.concurrency is None:
                return list(await asyncio.gather(*[self._timed(client, i, p) for i, p in enumerate(planned)]))
            gate = asyncio.Semaphore(self.concurrency)
            return list(await asyncio.gather(*[self._gated(client, i, p, gate) for i, p in enumerate(planned)]))

    async def _probe(self, client: httpx.AsyncClient) -> None:
        """A first request, which also shows how many tokens the server makes of a word."""
        import httpx

        text = prompt_text(PROBE_WORDS, 1.0, f"probe {self.seed}")
        try:
            answer = await client.post(self.target.path, json=self.target.body(text, 1, stream=False))
        except httpx.HTTPError as error:
            raise ServerError(f"no server answers at {self.target.url} ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise ServerError(f"the server answered {answer.status_code}: {_message(answer.text)}")
        try:
            tokens = int(answer.json()["usage"]["prompt_tokens"])
        except (ValueError, LookupError, TypeError):
            return
        if tokens > 0:
            self.words_per_token = PROBE_WORDS / tokens

    async def _timed(self, client: httpx.AsyncClient, index: int, planned: Planned) -> Measured:
        await asyncio.sleep(max(0.0, self._began + planned.at - time.monotonic()))
        return await self._one(client, index, planned)

    async def _gated(
        self, client: httpx.AsyncClient, index: int, planned: Planned, gate: asyncio.Semaphore
    ) -> Measured:
        async with gate:
            return await self._one(client, index, planned)

    async def _one(self, client: httpx.AsyncClient, index: int, planned: Planned) -> Measured:
        import httpx

        text = prompt_text(planned.prompt_tokens, self.words_per_token, f"{self.seed}:{index}", self.shared)
        out = Measured(planned, sent=self._now())
        try:
            body = self.target.body(text, planned.output_tokens, stream=True)
            async with client.stream("POST", self.target.path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    out.error = f"{response.status_code}: {_message(response.text)}"
                else:
                    async for line in response.aiter_lines():
                        if self._take(out, line):
                            break
        except httpx.HTTPError as error:
            out.error = type(error).__name__
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            out.error = f"not an OpenAI stream: {error}"
        out.ended = self._now()
        if not out.error and not out.chunks:
            out.error = "an empty answer"
        out.output_tokens = out.output_tokens or len(out.chunks)
        return out

    def _take(self, out: Measured, line: str) -> bool:
        """One line of a stream; True at its end."""
        if not line.startswith("data:"):
            return False
        data = line[5:].strip()
        if data == "[DONE]":
            return True
        event = json.loads(data)
        if "error" in event:
            out.error = f"broke off: {event['error'].get('message', 'unknown error')}"
            return True
        if event.get("usage"):
            out.prompt_tokens = int(event["usage"].get("prompt_tokens") or 0)
            out.output_tokens = int(event["usage"].get("completion_tokens") or 0)
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
                out.chunks.append(self._now())
        return False

    def _now(self) -> float:
        return time.monotonic() - self._began


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text.strip()[:200]
