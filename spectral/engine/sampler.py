"""Choosing tokens from logits: greedy rows with one argmax, the others in two batches, each with its own randomness.

A row's choice depends on its logits, its parameters and its own random stream only, whatever else is in the batch.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from spectral.aside import fetch
from spectral.engine.grammar import GrammarState
from spectral.engine.types import Logprob, SamplingParams

if TYPE_CHECKING:
    from spectral.engine.sequence import Sequence as EngineSequence

BROKEN = -1
"""In place of a token: the row's logits are not finite."""
SHORTLIST = 1024
"""Candidates that nucleus sampling sorts first; the whole vocabulary is sorted only where they do not suffice."""


class SamplerState:
    """One sequence's randomness and token history. `prompt`: ids, for the repetition penalty; `grammar`: its place in
    the grammar that it must follow, if any."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], index: int = 0, grammar: GrammarState | None = None
    ) -> None:
        self.params, self.grammar = params, grammar
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.random = random.Random(f"{seed}:{index}")  # a string seed goes through SHA-512: streams are unrelated
        self.greedy = params.temperature == 0
        self.filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0 or params.typical_p < 1.0
        self.plain = not params.penalised and grammar is None
        self.prompt = list(prompt) if params.repetition_penalty != 1.0 else []
        self.answer: list[int] = []
        """Tokens chosen so far, kept where a penalty or a grammar asks for them."""
        self._held: float | None = None
        self._noted = 0  # tokens of the answer that the tensors below know of
        self._counts: torch.Tensor | None = None  # [V] float32: occurrences in the answer
        self._seen: torch.Tensor | None = None  # [V] bool: occurs in prompt or answer
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply penalties, bias and grammar to float32 logits [V], in place."""
        params = self.params
        self._note(logits)
        if self._seen is not None:
            logits.copy_(repeated(logits, self._seen, params.repetition_penalty))
        if self._counts is not None:
            logits -= counted(self._counts, params.frequency_penalty, params.presence_penalty)
        if params.logit_bias:
            if self._bias is None:
                pairs = [(t, b) for t, b in params.logit_bias.items() if t < logits.shape[0]]
                ids = torch.tensor([t for t, _ in pairs], dtype=torch.long, device=logits.device)
                self._bias = ids, torch.tensor([b for _, b in pairs], dtype=torch.float32, device=logits.device)
            logits.index_add_(0, *self._bias)
        if self.grammar is not None:
            self.grammar.forbid(logits)

    def _note(self, logits: torch.Tensor) -> None:
        """Bring the tensors that penalties need up to the answer, wherever its tokens were chosen."""
        params, size, device = self.params, logits.shape[0], logits.device
        fresh = torch.tensor(self.answer[self._noted :], dtype=torch.long, device=device)
        if params.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros(size, dtype=torch.bool, device=device)
                self._seen[torch.tensor(self.prompt, dtype=torch.long, device=device)] = True
            self._seen[fresh] = True
        if params.frequency_penalty or params.presence_penalty:
            if self._counts is None:
                self._counts = torch.zeros(size, device=device)
            self._counts.index_add_(0, fresh, torch.ones_like(fresh, dtype=torch.float32))
        self._noted = len(self.answer)

    def record(self, token: int) -> None:
        """Remember a chosen token; BROKEN is none."""
        self._held = None
        if self.plain or token == BROKEN:
            return
        if self.grammar is not None:
            self.grammar.accept(token)
        self.answer.append(token)

    def uniform(self) -> float:
        """The next number of its random stream, the same one until a token is recorded."""
        if self._held is None:
            self._held = self.random.random()
        return self._held


def repeated(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor | float) -> torch.Tensor:
    """Logits with the repetition penalty on seen tokens: positive ones divided by it, others multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def counted(count: torch.Tensor, frequency: torch.Tensor | float, presence: torch.Tensor | float) -> torch.Tensor:
    """What the frequency and presence penalties take off the logits of tokens that the answer holds `count` times."""
    return count * frequency + (count > 0).float() * presence


def sound(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Whether rows of logits [rows, V] can be chosen from, bool [rows]; `best` [rows]: their argmax, which is where a
    NaN or +inf is. -inf is no fault: it forbids a token."""
    return logits.gather(-1, best[:, None]).squeeze(-1).isfinite()


def remember_soundness(sequences: Sequence[EngineSequence], ends: torch.Tensor) -> None:
    """After chunks that do not end their prompts: whether all their numbers were finite, from the logits of their last
    tokens [sequences, V], and from the chunks before. Does not wait for the device."""
    for sequence, good in zip(sequences, sound(ends, ends.argmax(-1)), strict=True):
        sequence.sound = good if sequence.sound is None else sequence.sound & good


def spoil(sequences: Sequence[EngineSequence], logits: torch.Tensor) -> None:
    """Make logits [sequences, V] NaN where an earlier chunk of a prompt was not finite, in place."""
    for at, sequence in enumerate(sequences):
        if sequence.sound is not None:
            logits[at] = logits[at].where(sequence.sound, float("nan"))


def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> tuple[list[int], list[Logprob | None]]:
    """Choose one token for each row.

    Args:
        logits: [rows, V], any float dtype; not changed. states: one for each row.

    Returns:
        token ids, BROKEN where a row's logits are not finite, and a Logprob for each row that asked for one.
    """
    if all(s.greedy and s.plain and s.params.logprobs is None for s in states):
        best = logits.argmax(-1)
        return fetch(torch.where(sound(logits, best), best, BROKEN)).tolist(), [None] * len(states)
    raw = logits.float()
    good = fetch(sound(raw, raw.argmax(-1))).tolist()
    work = raw
    if not all(s.plain for s in states):
        work = raw.clone()
        for i, state in enumerate(states):
            if not state.plain:
                state.adjust(work[i])
    tokens = [0] * len(states)
    greedy = [i for i, s in enumerate(states) if s.greedy]
    free = [i for i, s in enumerate(states) if not s.greedy and not s.filtered]
    filtered = [i for i, s in enumerate(states) if not s.greedy and s.filtered]
    if greedy:
        _fill(tokens, greedy, _pick(work, greedy).argmax(-1))
    if free:
        probabilities = _tempered(work, free, states).softmax(-1)
        _fill(tokens, free, _draw(probabilities, [states[i] for i in free]))
    if filtered:
        _fill(tokens, filtered, _nucleus(_tempered(work, filtered, states), [states[i] for i in filtered]))
    tokens = [token if fine else BROKEN for token, fine in zip(tokens, good, strict=True)]
    wanted = [s.params.logprobs for s in states]
    logprobs = [_logprob(raw[i], token, most) for i, (token, most) in enumerate(zip(tokens, wanted, strict=True))]
    for state, token in zip(states, tokens, strict=True):  # last: a step that breaks off before is made once more
        state.record(token)
    return tokens, logprobs


def _fill(tokens: list[int], rows: list[int], chosen: torch.Tensor) -> None:
    for row, token in zip(rows, fetch(chosen).tolist(), strict=True):
        tokens[row] = token


def _pick(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _tempered(logits: torch.Tensor, rows: list[int], states: Sequence[SamplerState]) -> torch.Tensor:
    heat = torch.tensor([[states[i].params.temperature] for i in rows], device=logits.device)
    return _pick(logits, rows) / heat.clamp(min=1e-4)


def _draw(weights: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """Inverse-CDF draw from weights [rows, K]: one uniform number for each row."""
    uniform = torch.tensor([[s.uniform()] for s in states], dtype=torch.float64, device=weights.device)
    return draw(weights, uniform)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Places [rows] drawn from weights [rows, K] (not necessarily normalised) with numbers [rows, 1] in [0, 1)."""
    cumulative = weights.double().cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
    return chosen.clamp(max=weights.shape[1] - 1)


def nucleus(
    values: torch.Tensor, total: torch.Tensor, size: int, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """top-k, then top-p, then min-p, on the largest of `size` tempered logits, without waiting for the device.

    Args:
        values: [rows, K], descending; total: [rows, 1], the logsumexp of all; the others [rows, 1], with `size` for no
            top_k.

    Returns:
        weights [rows, K], 0 for dropped ones; and bool [rows, 1]: the first token that is dropped is among the K.
    """
    short = (values - total).exp()
    bounded = top_k < size
    if values.shape[1] < size:
        among = (top_p < 1.0) & (short.sum(-1, keepdim=True) >= top_p)
        unlikely = short[:, -1:] < min_p * short[:, :1]
        enough = torch.where(bounded, top_k <= values.shape[1], among | unlikely)
    else:
        enough = torch.ones_like(bounded)
    rank = torch.arange(values.shape[1], device=values.device)
    short = short.masked_fill(rank >= top_k, 0.0)
    # Without top_k the mass is 1 by definition, also where only the shortlist was sorted.
    mass = torch.where(bounded, short.sum(-1, keepdim=True), torch.ones_like(total))
    before = (short.cumsum(-1) - short) / mass
    drop = ((before >= top_p) & (top_p < 1.0)) | (short < min_p * short[:, :1])
    drop[:, 0] = False
    return short.masked_fill(drop, 0.0), enough


def _nucleus(logits: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """top-k, then top-p, then min-p, then typical_p, on tempered logits [rows, V]; returns token ids."""
    size = logits.shape[1]
    params = [s.params for s in states]
    values, ids = logits.topk(min(size, max([SHORTLIST, *(p.top_k for p in params)])), -1)
    total = logits.logsumexp(-1, keepdim=True)
    top_k = torch.tensor([[min(p.top_k, size) or size] for p in params], device=logits.device)
    top_p = torch.tensor([[p.top_p] for p in params], device=logits.device)
    min_p = torch.tensor([[p.min_p] for p in params], device=logits.device)
    kept, enough = nucleus(values, total, size, top_k, top_p, min_p)
    if values.shape[1] < size and not bool(enough.all()):
        values, ids = logits.sort(-1, descending=True)
        kept, _ = nucleus(values, total, size, top_k, top_p, min_p)
    if any(p.typical_p < 1.0 for p in params):
        kept = _typical(kept, torch.tensor([[p.typical_p] for p in params], device=logits.device))
    chosen = _draw(kept, states)
    return ids.gather(1, chosen[:, None]).squeeze(-1)


def _typical(weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Of weights [rows, K] keep the fewest whose surprise is nearest to the entropy and that hold a share `mass`
    [rows, 1]; the others become 0. Rows with mass 1 stay as they are."""
    p = weights / weights.sum(-1, keepdim=True)
    surprise = -p.log()
    entropy = (p * surprise).nan_to_num(0.0).sum(-1, keepdim=True)
    order = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    ordered = p.gather(1, order)
    drop = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, (ordered.cumsum(-1) - ordered) >= mass)
    return torch.where(drop & (mass < 1.0), torch.zeros_like(weights), weights)


def score_prompt(sequence: EngineSequence, start: int, logits: torch.Tensor) -> None:
    """Keep the log probabilities of a prompt's tokens start + 1, ...; `logits` [count, V] predict them."""
    values = logits.float().log_softmax(-1)
    tokens = sequence.tokens[start + 1 : start + 1 + values.shape[0]]
    own = values.gather(1, torch.tensor(tokens, device=values.device)[:, None]).squeeze(1).tolist()
    wanted = min(sequence.sampler.params.prompt_logprobs or 0, values.shape[1])
    best = values.topk(wanted) if wanted else None
    ids = best.indices.tolist() if best is not None else [[]] * len(tokens)
    tops = best.values.tolist() if best is not None else [[]] * len(tokens)
    assert sequence.scores is not None
    for place, token in enumerate(tokens):
        top = tuple(zip(ids[place], tops[place], strict=True))
        sequence.scores[start + 1 + place] = Logprob(token, own[place], top)


def _logprob(logits: torch.Tensor, token: int, wanted: int | None) -> Logprob | None:
    if wanted is None or token == BROKEN:
        return None
    values = logits.log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if wanted:
        best = values.topk(min(wanted, values.shape[0]))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Logprob(token, float(values[token]), top)
