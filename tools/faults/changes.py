"""What an administrator changes while faults happen: a fault can be aimed at a model that is in the middle of it."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tools.faults.rig import ROOT, Rig

PROFILE = ROOT / "profiles" / "demo-7m.safetensors"
PHASES = ("squeeze", "activation", "sleep", "wake")
COARSER = "16x"
REFUSALS = (404, 409, 429, 503, 504)
"""What an administrator may be told: not found, not now in this state, too many, the worker is gone, too late."""
TAKES_S = {"squeeze": 0.3, "activation": 1.5, "sleep": 0.1, "wake": 0.1}
"""About how long a change takes: a fault comes at a random moment of it."""


def variants(count: int, folder: Path) -> list[bytes]:
    """Profiles that encode as the shipped one does and are other files."""
    import dataclasses

    from spectral.profile import SpectralProfile

    shipped = SpectralProfile.load(PROFILE)
    made = []
    for number in range(count):
        other = dataclasses.replace(shipped, provenance={**shipped.provenance, "corpus": f"variant {number}"})
        made.append(other.save(folder / f"variant-{number}.safetensors").read_bytes())
    return made


class Changes:
    """Changes of models. `busy`: those that clients ask; `resting`: one that nobody asks, the only one that can sleep.

    `answers`: what the server said; `wrong`: what was neither done nor refused with a reason.
    """

    def __init__(self, rig: Rig, busy: list[str], resting: str, seed: int) -> None:
        self.resting = resting
        self._rig, self._busy, self._random = rig, busy, random.Random(seed)
        self._profiles: dict[str, str] = {}
        self._on: Counter[str] = Counter()
        self._squeezed: dict[str, list[tuple[float, float]]] = {}
        self.answers: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []

    async def prepare(self, folder: Path) -> None:
        """Upload a second profile for every model."""
        (data,) = variants(1, folder)
        headers = {"Content-Type": "application/octet-stream"}
        for name in self._busy:
            answer = await self._rig.client.put(f"/admin/profiles/{name}", content=data, headers=headers, timeout=120)
            answer.raise_for_status()
            self._profiles[name] = answer.json()["sha256"]

    def model_for(self, phase: str) -> str:
        """Which model a phase is tried with."""
        return self.resting if phase in ("sleep", "wake") else self._random.choice(self._busy)

    async def rouse(self, state: str) -> None:
        """Wake the model that rests, where a fault met it asleep and it was let go of."""
        if state in ("asleep", "cold"):
            await self._send(self.resting, "wake", f"/admin/models/{self.resting}/wake")

    async def begin(self, phase: str, name: str) -> asyncio.Task[None]:
        """Start a change and wait until it is somewhere in its course; the rest of it, to be awaited."""
        if phase == "wake":
            await self._send(name, "sleep", f"/admin/models/{name}/sleep")
        task = asyncio.ensure_future(self._change(phase, name))
        await asyncio.sleep(self._random.uniform(0, TAKES_S[phase]))
        return task

    async def _change(self, phase: str, name: str) -> None:
        if phase == "squeeze":
            times = self._squeezed.setdefault(name, [])
            times.append((time.monotonic(), math.inf))
            await self._send(name, phase, f"/admin/models/{name}/setting", {"setting": COARSER, "live": True})
            times[-1] = times[-1][0], time.monotonic()
            await self._send(name, "relax", f"/admin/models/{name}/setting", {"setting": "auto"})
        elif phase == "activation":
            self._on[name] += 1
            profile = self._profiles[name] if self._on[name] % 2 else "shipped"
            await self._send(name, phase, f"/admin/profiles/{name}/activate", {"profile": profile})
        elif phase == "sleep":
            await self._send(name, phase, f"/admin/models/{name}/sleep")
            await self._send(name, "wake", f"/admin/models/{name}/wake")
        else:
            await self._send(name, phase, f"/admin/models/{name}/wake")

    def squeezed_in(self, name: str, began: float, ended: float) -> bool:
        """Whether what a model's requests held was re-encoded between two times (monotonic seconds)."""
        return any(first < ended and began < last for first, last in self._squeezed.get(name, []))

    async def restore(self) -> None:
        """Every model as configured, and hot."""
        for name in self._busy:
            await self._send(name, "relax", f"/admin/models/{name}/setting", {"setting": "auto"})
            await self._send(name, "activation", f"/admin/profiles/{name}/activate", {"profile": "shipped"})
        await self._send(self.resting, "wake", f"/admin/models/{self.resting}/wake")

    async def _send(self, name: str, what: str, path: str, body: dict[str, Any] | None = None) -> None:
        try:
            answer = await self._rig.client.post(path, json=body, timeout=180)
            status, text = answer.status_code, answer.text
            said = "" if status < 300 else str(answer.json()["error"]["message"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            status, text, said = 0, f"{type(error).__name__}: {error}", ""
        self.answers[f"{what} {status}"] += 1
        if status not in (*range(200, 300), *REFUSALS) or (status >= 300 and not said):
            self.wrong.append({"model": name, "what": what, "status": status, "body": text[:500]})
