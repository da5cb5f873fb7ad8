"""Clients that ask known prompts over all interfaces, and check that every request has its end and its own answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tools.faults.prompts import Prompt, References

ANSWER_TOKENS = 24
INTERFACES = ("chat stream", "chat", "responses stream", "ollama")
Squeezed = Callable[[str, float, float], bool]
"""Whether what a model's requests held was re-encoded between two times (monotonic seconds)."""
LEAVES = 0.04
"""Part of the streams whose client goes away after a few events."""


@dataclass
class Tally:
    """What came of all requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    without_end: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def requests(self) -> int:
        """How many were sent."""
        return sum(self.outcomes.values())


@dataclass
class Answer:
    """One request as it went. `end`: "done", "error CODE", or "" where nothing said that it is over."""

    text: str = ""
    setting: str = ""
    end: str = ""
    retry_after: float = 0.0
    left: bool = False
    broke: str = ""


class Client:
    """Asks one prompt after another until it is told to stop."""

    def __init__(
        self, url: str, models: list[str], prompts: list[Prompt], references: References, tally: Tally, seed: int,
        patience_s: float = 180.0, leaves: float = LEAVES, squeezed: Squeezed | None = None,
    ) -> None:  # fmt: skip
        self._http = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(patience_s), trust_env=False)
        self._models, self._prompts, self._references = models, prompts, references
        self._tally, self._random, self._leaves = tally, random.Random(seed), leaves
        self._squeezed = squeezed

    async def run(self, over: asyncio.Event) -> None:
        """Until `over` is set; a request that is under way is waited for."""
        async with self._http:
            while not over.is_set():
                wait = await self.one()
                if wait:
                    try:
                        await asyncio.wait_for(over.wait(), wait)
                    except asyncio.TimeoutError:
                        continue

    async def one(self) -> float:
        """One request, counted and judged; the seconds that the server asks to wait before the next."""
        model, prompt = self._random.choice(self._models), self._random.choice(self._prompts)
        interface = self._random.choice(INTERFACES)
        leave_after = self._random.randint(1, 8) if self._random.random() < self._leaves else 0
        began = time.monotonic()
        answer = await ask(self._http, interface, model, prompt, leave_after)
        took = time.monotonic() - began
        tally, facts = self._tally, {"model": model, "prompt": prompt.number, "interface": interface}
        if answer.left:
            tally.outcomes["left"] += 1
        elif not answer.end:
            tally.outcomes["without end"] += 1
            tally.without_end.append({**facts, "broke": answer.broke, "seconds": round(took, 2), "text": answer.text})
        else:
            tally.outcomes[answer.end] += 1
        if answer.end == "done":
            tally.seconds.append(took)
        if answer.text or answer.end == "done":
            whole = answer.end == "done"
            verdict = self._references.judge(model, answer.setting, prompt.number, answer.text, whole=whole)
            if verdict == "other" and self._squeezed is not None and self._squeezed(model, began, began + took):
                verdict = "re-encoded on its way"
            tally.judged[verdict] += 1
            if verdict in ("crossed", "other"):
                tally.wrong.append({**facts, "verdict": verdict, "setting": answer.setting, "text": answer.text})
        return answer.retry_after


async def ask(
    http: httpx.AsyncClient,
    interface: str,
    model: str,
    prompt: Prompt,
    leave_after: int = 0,
    longest_wait_s: float = 2.0,
) -> Answer:
    """One greedy request over an interface. `leave_after`: close the connection after so many events of a stream;
    `longest_wait_s`: a Retry-After above it is cut to it."""
    path, body = request_for(interface, model, prompt)
    answer = Answer()
    try:
        async with http.stream("POST", path, json=body) as response:
            answer.setting = response.headers.get("x-spectral-setting", "")
            if response.status_code != 200 or not body["stream"]:
                await response.aread()
                _take_whole(answer, response, longest_wait_s)
                return answer
            seen = 0
            async for line in response.aiter_lines():
                if line:
                    _take_line(answer, line)
                    seen += 1
                if leave_after and seen >= leave_after and not answer.end:
                    answer.left = True
                    return answer
    except httpx.HTTPError as error:
        answer.broke = f"{type(error).__name__}: {error}"
    return answer


def request_for(interface: str, model: str, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """Path and body."""
    messages = [{"role": "user", "content": prompt.text}]
    stream = interface.endswith("stream") or interface == "ollama"
    plain = {"model": model, "stream": stream, "temperature": 0}
    if interface.startswith("chat"):
        return "/v1/chat/completions", {**plain, "messages": messages, "max_tokens": ANSWER_TOKENS}
    if interface.startswith("responses"):
        return "/v1/responses", {**plain, "input": prompt.text, "max_output_tokens": ANSWER_TOKENS}
    options = {"temperature": 0, "num_predict": ANSWER_TOKENS}
    return "/api/chat", {"model": model, "messages": messages, "stream": True, "options": options}


def _take_whole(answer: Answer, response: httpx.Response, longest_wait_s: float) -> None:
    try:
        data = response.json()
    except ValueError:
        answer.broke = f"status {response.status_code} with a body that is no JSON"
        return
    if response.status_code == 200:
        answer.text, answer.end = data["choices"][0]["message"]["content"] or "", "done"
        return
    error = data.get("error")
    code = error.get("code") if isinstance(error, dict) else "ollama" if error else None
    if code is None:
        answer.broke = f"status {response.status_code} without an error in its body"
        return
    answer.end = f"error {response.status_code} {code}"
    answer.retry_after = min(longest_wait_s, float(response.headers.get("retry-after", 0)))


def _take_line(answer: Answer, line: str) -> None:
    if line.startswith(("event:", ":")):
        return
    text = line.removeprefix("data: ")
    if text == "[DONE]":
        answer.end = answer.end or "done"
        return
    data = json.loads(text)
    kind = str(data.get("type", ""))
    if "error" in data and data["error"]:
        error = data["error"]
        answer.end = f"error stream {error['code'] if isinstance(error, dict) else 'ollama'}"
    elif kind == "error" or kind == "response.failed":
        failed = data if kind == "error" else data["response"].get("error") or {}
        answer.end = f"error stream {failed.get('code')}"
    elif kind == "response.output_text.delta":
        answer.text += data["delta"]
    elif kind in ("response.completed", "response.incomplete"):
        answer.end = "done"
    elif "choices" in data and data["choices"]:
        answer.text += data["choices"][0]["delta"].get("content") or ""
    elif "message" in data:
        answer.text += data["message"].get("content") or ""
        if data.get("done"):
            answer.end = "done"


async def learn(url: str, models: list[str], prompts: list[Prompt], references: References) -> None:
    """Ask every prompt alone, one after another: the right answers. Raises httpx.HTTPError or ValueError."""
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        for model in models:
            for prompt in prompts:
                answer = await ask(http, "chat", model, prompt)
                if answer.end != "done":
                    why = answer.end or answer.broke
                    raise ValueError(f"no reference for prompt {prompt.number} of {model}: {why}")
                references.answers[(model, answer.setting, prompt.number)] = answer.text
