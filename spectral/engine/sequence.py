"""One choice of one request, from the queue to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class Sequence:
    """What scheduler, runner and engine know of one choice.

    Attributes:
        order: place in the order of arrival, unique; ties of age are broken by it.
        tokens: prompt and answer so far; prompt_length: how many of them are the prompt.
        priority: higher ones go first; tenant: who shares the engine fairly with others; salt: only prompts with the
            same one share a prefix; max_kl: the setting must be at least that good (None: any); setting: the
            one to begin at (None: the engine's).
        lane: its spectral.engine.lane.Lane, from its first step on.
        row: its row in the lane's store, None while it waits. The row holds tokens[: row.length].
        parked: its row in host memory, to go on from; keep: tokens of it that are still right (None: all).
        cached: tokens of the prompt that were not computed for it.
        started: it has left the queue once; resumed: its row did not begin as a prompt, so it makes no prefix entries.
        scores: log probabilities of the prompt's tokens by position, as far as they are computed; None: not wanted.
        sound: bool on the device: the numbers of its chunks so far are finite; None: it has no chunk behind it.
        keys: what spectral.engine.prefix knows it by; sampler: its SamplerState; answer: its Answer.
    """

    request_id: str
    index: int
    order: int
    tokens: list[int]
    prompt_length: int
    sampler: Any = None
    answer: Any = None
    priority: int = 0
    tenant: str = ""
    salt: str = ""
    max_kl: float | None = None
    setting: str | None = None
    lane: Any = None
    row: Any = None
    parked: Any = None
    keep: int | None = None
    cached: int = 0
    started: bool = False
    resumed: bool = False
    scores: dict[int, Any] | None = None
    sound: Any = None
    keys: tuple[bytes, list[bytes]] | None = None

    @property
    def pending(self) -> int:
        """Tokens that the row does not hold yet; 1 while decoding."""
        return len(self.tokens) - (self.row.length if self.row is not None else 0)
