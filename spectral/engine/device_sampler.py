"""Choosing tokens on the device, without asking it anything: the same choices as spectral.engine.sampler.

A kind says what a batch needs: draws from the whole vocabulary, draws from a shortlist, penalties. Greedy rows cost an
argmax. What is not here (grammars, log probabilities, typical_p, a top_k beyond the shortlist) takes the sampler's way,
and so does a row whose shortlist turns out too short, with the same random number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from spectral.engine import sampler
from spectral.engine.sampler import SamplerState, counted, draw, nucleus, repeated
from spectral.engine.static_step import Numbers


@dataclass(frozen=True)
class Kind:
    """What the rows of a batch need beyond an argmax."""

    free: bool = False
    filtered: bool = False
    penalised: bool = False


def kind_of(states: list[SamplerState]) -> Kind | None:
    """What these rows need; None for what the device's sampler cannot do."""
    for state in states:
        params = state.params
        if state.grammar is not None or params.logprobs is not None:
            return None
        if not state.greedy and (params.typical_p < 1.0 or params.top_k > sampler.SHORTLIST):
            return None
    return Kind(
        any(not s.greedy and not s.filtered for s in states),
        any(not s.greedy and s.filtered for s in states),
        any(not s.plain for s in states),
    )


def numbers_of(state: SamplerState) -> tuple[list[int], list[float]]:
    """A row's fields: top_k and choice; temperature, top_p, min_p, uniform, and the penalties."""
    p = state.params
    if state.greedy:
        integers, floats = [0, 0], [1.0, 1.0, 0.0, 0.0]
    else:
        integers = [p.top_k, 2 if state.filtered else 1]
        floats = [max(p.temperature, 1e-4), p.top_p, p.min_p, state.uniform()]
    return integers, [*floats, p.repetition_penalty, p.frequency_penalty, p.presence_penalty]


class Memory:
    """What penalties need to know of each row: [rows, V] counts in the answer, tokens seen, and biases.

    `follow` brings the rows up to their sequences; the step itself counts the tokens that it chooses.
    """

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        self.count = torch.zeros((rows, size), device=device)
        self.seen = torch.zeros((rows, size), dtype=torch.bool, device=device)
        self.bias = torch.zeros((rows, size), device=device)
        self._known: list[tuple[SamplerState | None, int]] = [(None, 0)] * rows

    def follow(self, states: dict[int, SamplerState]) -> None:
        """Rows are these sequences' now, the others nobody's. What the last step counted is not counted again."""
        for row, (owner, length) in enumerate(self._known):
            state = states.get(row)
            if state is None:
                self._known[row] = None, 0  # what spare rows choose is counted too
                continue
            if owner is not state or length != len(state.answer):
                self._write(row, state)
            self._known[row] = state, len(state.answer) + (not state.plain)  # with the token that is chosen now

    def forget(self) -> None:
        """The rows are not what was told."""
        self._known = [(None, 0)] * len(self._known)

    def _write(self, row: int, state: SamplerState) -> None:
        device, size = self.count.device, self.count.shape[1]
        for tensor in (self.count, self.seen, self.bias):
            tensor[row].zero_()
        answer = torch.tensor(state.answer, dtype=torch.long, device=device)
        self.count[row].index_add_(0, answer, torch.ones_like(answer, dtype=torch.float32))
        self.seen[row, answer] = True
        self.seen[row, torch.tensor(state.prompt, dtype=torch.long, device=device)] = True
        pairs = {t: b for t, b in state.params.logit_bias.items() if t < size}
        if pairs:
            ids = torch.tensor(list(pairs), dtype=torch.long, device=device)
            self.bias[row, ids] = torch.tensor(list(pairs.values()), dtype=torch.float32, device=device)

    def adjusted(self, logits: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        """Logits [rows, V] with every row's penalties and bias."""
        names = ("repetition", "frequency", "presence")
        repetition, frequency, presence = (numbers.field[name].float()[:, None] for name in names)
        return repeated(logits, self.seen, repetition) - counted(self.count, frequency, presence) + self.bias

    def add(self, tokens: torch.Tensor) -> None:
        """Count chosen tokens [rows]."""
        self.count.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.float32))
        self.seen.scatter_(1, tokens[:, None], True)


def choose(numbers: Numbers, kind: Kind, memory: Memory | None, out: torch.Tensor) -> None:
    """Tokens of a step's logits into out int64 [2, rows]: the token, or BROKEN, and 1 where it is the right one (else
    the shortlist was too short). The rows are told of their next step. Launches only."""
    logits = numbers.logits
    assert logits is not None
    field, size = numbers.field, logits.shape[1]
    if kind.penalised and memory is not None:
        logits = memory.adjusted(logits, numbers)
    largest, token = logits.max(-1)
    good = largest.abs() < math.inf  # and not NaN, as `sampler.sound` has it
    out[1].fill_(1)
    if kind.free or kind.filtered:
        uniform, choice = field["uniform"][:, None], field["choice"]
        tempered = logits / field["temperature"].float()[:, None]
        if kind.free:
            token = torch.where(choice == 1, draw(tempered.softmax(-1), uniform), token)
        if kind.filtered:
            values, ids = tempered.topk(min(size, sampler.SHORTLIST), -1)
            top_k = field["top_k"][:, None]
            top_k = torch.where(top_k > 0, top_k.clamp_max(size), size)
            top_p, min_p = (field[name].float()[:, None] for name in ("top_p", "min_p"))
            kept, enough = nucleus(values, tempered.logsumexp(-1, keepdim=True), size, top_k, top_p, min_p)
            drawn = ids.gather(1, draw(kept, uniform)[:, None]).squeeze(-1)
            token = torch.where(choice == 2, drawn, token)
            out[1].copy_((choice != 2) | enough.squeeze(-1) | ~good)
    if kind.penalised and memory is not None:
        memory.add(token)
    torch.where(good, token, numbers.broken, out=out[0])
    numbers.go_on(token)
