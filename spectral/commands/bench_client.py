"""Sends a load to an OpenAI-compatible server and times every token that comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from spectral.commands import bench_stream
from spectral.commands.bench_load import Planned, prompt_text
from spectral.commands.client import ServerError

if TYPE_CHECKING:
    import httpx

PROBE_WORDS = 200
MOST_START = 2**16
"""Bytes that are kept of an answer without events, which may be a document that says why."""

CONNECT_S = 10.0
LIST_S = 10.0
"""A list of models comes at once, where the first answer may have to wait for a model's load."""


@dataclass
class Measured:
    """One request as it went. Times in seconds since the start of the load; `chunks`: when text came.

    `heard`: when the last event came, `sent` before the first. `error`: why it failed, "" if it did not. Tokens are
    the server's count, else the number of chunks.
    """

    planned: Planned
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    heard: float = 0.0
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
    """Where and how. `model`: None is the first one that the server lists. `chat`: /v1/chat/completions, else
    /v1/completions; `usage`: ask for token counts in streams; `timeout_s`: most seconds without an event."""

    url: str
    model: str | None = None
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
    """One run. `concurrency`: None follows the plan's times; a number keeps so many requests going and ignores them.

    What has been measured stays here while the run goes on, so that a run that is stopped loses nothing.
    """

    def __init__(self, target: Target, concurrency: int | None = None, *, shared: int = 0, seed: int = 0) -> None:
        self.target, self.concurrency, self.shared, self.seed = target, concurrency, shared, seed
        self.words_per_token = 1.0
        self.begun = 0
        self._ended: dict[int, Measured] = {}
        self._began = 0.0

    @property
    def measured(self) -> list[Measured]:
        """The requests that have ended, in the plan's order."""
        return [self._ended[index] for index in sorted(self._ended)]

    async def run(self, planned: Sequence[Planned]) -> list[Measured]:
        """Send everything; raises ServerError if the server cannot be reached at all or refuses a small request."""
        import httpx

        headers = {"Authorization": f"Bearer {self.target.api_key}"} if self.target.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # No limit on a read: keep-alives would renew it. `_bounded` has the clock that only events set back.
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        async with httpx.AsyncClient(
            base_url=self.target.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
        ) as client:
            if self.target.model is None:
                self.target = replace(self.target, model=await self._first_model(client))
            await self._probe(client)
            self._began = time.monotonic()
            if self.concurrency is None:
                await asyncio.gather(*[self._timed(client, i, p) for i, p in enumerate(planned)])
            else:
                gate = asyncio.Semaphore(self.concurrency)
                await asyncio.gather(*[self._gated(client, i, p, gate) for i, p in enumerate(planned)])
        return self.measured

    async def _first_model(self, client: httpx.AsyncClient) -> str:
        """Raises ServerError."""
        found = await self._ask(client, min(LIST_S, self.target.timeout_s), "GET", "/v1/models")
        try:
            name = str(found["data"][0]["id"])
            name.encode()
        except (LookupError, TypeError, UnicodeError):
            raise ServerError("the server lists no model at /v1/models; name one with --model") from None
        return name

    async def _probe(self, client: httpx.AsyncClient) -> None:
        """A first request, which also shows how many tokens the server makes of a word. Raises ServerError."""
        text = prompt_text(PROBE_WORDS, 1.0, f"probe {self.seed}")
        body = self.target.body(text, 1, stream=False)
        found = await self._ask(client, self.target.timeout_s, "POST", self.target.path, json=body)
        try:
            counts = bench_stream.counts_of(found)
        except ValueError as error:
            raise ServerError(f"the answer to a first small request cannot be used: {error}") from error
        if counts and counts[0] > 0:
            self.words_per_token = PROBE_WORDS / counts[0]

    async def _ask(
        self, client: httpx.AsyncClient, seconds: float, method: str, path: str, **options: Any
    ) -> dict[str, Any]:
        """One answer that is no stream, within so many seconds from its beginning to its end. Raises ServerError."""
        import httpx

        try:
            answer = await asyncio.wait_for(client.request(method, path, **options), seconds)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise ServerError(
                f"no server answers at {self.target.url} ({_named(error)}). Start one with `spectral serve`, or name "
                "another with --url"
            ) from error
        except asyncio.TimeoutError:
            hint = "" if seconds < self.target.timeout_s else "; give it longer with --timeout"
            raise ServerError(f"{self.target.url}{path} did not answer within {seconds:g} s{hint}") from None
        except httpx.HTTPError as error:
            raise ServerError(f"the answer of {self.target.url}{path} broke off: {_named(error)}") from error
        if answer.status_code != 200:
            raise ServerError(f"the server answered {answer.status_code}: {_refusal(answer)}{self._key_hint(answer)}")
        try:
            found = bench_stream.document(answer.text)
        except ValueError as error:
            raise ServerError(f"the answer of {self.target.url}{path} broke off, or is none: {error}") from error
        if message := bench_stream.error_of(found):
            raise ServerError(f"the server answered with an error: {message}")
        return found

    def _key_hint(self, answer: httpx.Response) -> str:
        if answer.status_code not in (401, 403):
            return ""
        return " (to the key that was sent)" if self.target.api_key else "; give a key with --api-key"

    async def _timed(self, client: httpx.AsyncClient, index: int, planned: Planned) -> None:
        await asyncio.sleep(max(0.0, self._began + planned.at - time.monotonic()))
        await self._one(client, index, planned)

    async def _gated(self, client: httpx.AsyncClient, index: int, planned: Planned, gate: asyncio.Semaphore) -> None:
        async with gate:
            await self._one(client, index, planned)

    async def _one(self, client: httpx.AsyncClient, index: int, planned: Planned) -> None:
        """One request, whose end is noted however it ends; a stopped run leaves out what was still going."""
        text = prompt_text(planned.prompt_tokens, self.words_per_token, f"{self.seed}:{index}", self.shared)
        out = Measured(planned, sent=self._now())
        out.heard = out.sent
        self.begun += 1
        try:
            await self._bounded(self._answer(client, text, out), out)
        except Exception as error:  # whatever one answer is made of, the others' figures are not lost with it
            out.error = f"broke off: {_named(error)}" if out.heard > out.sent else _named(error)
        out.ended = self._now()
        if not out.error and not out.chunks:
            out.error = "an empty answer"
        out.output_tokens = out.output_tokens or len(out.chunks)
        self._ended[index] = out

    async def _bounded(self, answer: Coroutine[Any, Any, None], out: Measured) -> None:
        """Run until it ends, or until no event has come for the time that a request has. Raises what it raises."""
        task = asyncio.ensure_future(answer)
        try:
            while not task.done():
                left = out.heard + self.target.timeout_s - self._now()
                if left <= 0:
                    out.error = f"timed out: no event for {self.target.timeout_s:g} s"
                    return
                await asyncio.wait({task}, timeout=left)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _answer(self, client: httpx.AsyncClient, text: str, out: Measured) -> None:
        """Send a request and take its stream to the end. Raises HTTPError."""
        body = self.target.body(text, out.planned.output_tokens, stream=True)
        async with client.stream("POST", self.target.path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                out.error = f"{response.status_code}: {_refusal(response)}"
                return
            try:
                await self._take_all(response, out)
            except ValueError as error:
                out.error = f"not an OpenAI stream: {error}"

    async def _take_all(self, response: httpx.Response, out: Measured) -> None:
        """Every event of a stream. Raises ValueError for one that cannot be read, HTTPError."""
        events, finished, start = bench_stream.Events(), False, b""
        async for data in response.aiter_bytes():
            now = self._now()
            if out.heard == out.sent and len(start) < MOST_START:
                start += data
            for event in events.feed(data):
                said = bench_stream.read_event(event)
                self._take(out, said, now)
                if said.done or out.error:
                    return
                finished = finished or bool(said.reason)
        for event in events.rest():
            try:
                said = bench_stream.read_event(event)
            except ValueError:  # cut off in the middle
                break
            self._take(out, said, self._now())
            finished = finished or said.done or bool(said.reason)
        if not finished and not out.error:
            out.error = bench_stream.unfinished(start if out.heard == out.sent else b"")

    def _take(self, out: Measured, said: bench_stream.Said, now: float) -> None:
        """Note what one event says, which came at `now`."""
        out.heard = now
        if said.error:
            out.error = f"broke off: {said.error}"
        elif said.reason in bench_stream.BROKEN_REASONS:
            out.error = f"broke off: finish_reason is {said.reason}"
        if said.counts is not None:
            out.prompt_tokens, out.output_tokens = said.counts
        if said.text:
            out.chunks.append(now)

    def _now(self) -> float:
        return time.monotonic() - self._began


def _named(error: Exception) -> str:
    """An error as a person can search for it."""
    return bench_stream.shown(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _refusal(response: httpx.Response) -> str:
    return bench_stream.refusal(response.text) or response.reason_phrase
