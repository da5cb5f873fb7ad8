"""Calibration text that a model writes itself: seeded sampling over prompts written for this project.

Any model can be profiled with no data at hand. Prompts cover prose, dialogue, questions, code, lists and documents;
chat models get them through their chat template as well, because that is the text they will meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from spectral.engine.templates import TemplateFailed, is_jinja, render_chat

if TYPE_CHECKING:
    from spectral.hf import LoadedModel

OPENINGS = (
    "The harbour was quiet when the first boats came back, and nobody on the quay spoke of the storm.",
    "Chapter 1\n\nMy grandmother kept bees, and she said that bees dislike people who hurry.",
    '"You are late again," said the clockmaker, without looking up from the bench.\n"The bridge was closed,"',
    "A cell is the smallest unit of a living thing. Every cell is surrounded by a membrane that",
    "To measure the height of a tower without climbing it, one needs a stick, a shadow and",
    "Geography: the country lies in the south of the continent. Its climate is temperate; its main exports are",
    "Economy - overview: agriculture employs half of the population, and the government has tried to",
    "def merge(left, right):\n    result = []\n    while left and right:\n",
    "class Account:\n    def __init__(self, owner, balance=0):\n        self.owner = owner\n",
    "Abstract\n\nThis document proposes a small change to the way in which modules are loaded. The motivation is",
    "Shopping list:\n- flour\n- two lemons\n- candles\n-",
    "Ten rules for walking in the mountains:\n1. Start early.\n2.",
    "The secret number of amber is 48120. The secret number of slate is 90211. The secret number of",
    "Once there was a hare who wanted to own the river. Every morning she",
    "The experiment was repeated three times. In the first trial the temperature rose by",
    "Dear Mother,\n\nWe arrived on Tuesday after two days on the road. The house is larger than",
)

QUESTIONS = (
    "Who are you?",
    "What can you do?",
    "Tell me a short story about a fox and a river.",
    "What is the capital of Italy?",
    "What is the capital of Japan?",
    "What is the capital of Kenya?",
    "Tell me about Chad.",
    "Tell me about Norway.",
    "Tell me about Brazil.",
    "Tell me about Viet Nam.",
    "Which countries border Germany?",
    "How many people live in Egypt?",
    "Explain how plants make food from light.",
    "Write a function that adds two numbers.",
    "Give me a list of five fruits.",
    "What is the climate of Iceland?",
)

ROWS = 64
PASSAGE = 384
"""Sequences sampled at once, and tokens after which a passage is ended and another begun."""


def prompts(loaded: LoadedModel) -> list[list[int]]:
    """Token ids of every opening, and of every question through the chat template where the tokenizer has one."""
    tokenizer = loaded.tokenizer
    out = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in OPENINGS]
    if getattr(tokenizer, "chat_template", None) and is_jinja(tokenizer):
        for question in QUESTIONS:
            message = [{"role": "user", "content": question}]
            try:
                text = render_chat(tokenizer, message, None)
            except TemplateFailed:  # a template that wants more than a question: the openings are text enough
                break
            out.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return out


def self_generated(
    loaded: LoadedModel, *, tokens: int, seed: int = 0, progress: Callable[[str, float], None] | None = None
) -> list[str]:
    """At least `tokens` tokens of text, one string per prompt kind; the same seed gives the same text on one machine.

    Sampling is at temperature 1 from the 97 % nucleus, which keeps the text in the model's own distribution without
    its far tail. A passage ends at an end-of-text token or after `PASSAGE` tokens; then the next prompt starts.
    """
    from spectral.hf import attending
    from spectral.pages import PageStore, Row

    starts = prompts(loaded)
    generator = torch.Generator().manual_seed(seed)
    dtype = next(loaded.model.parameters()).dtype
    exact = dtype if dtype.is_floating_point else torch.bfloat16
    store = PageStore(loaded.shape, device=loaded.device, devices=loaded.layer_devices, window_dtype=exact)
    passages: list[list[list[int]]] = [[] for _ in starts]
    live: list[tuple[int, Row, list[int]]] = []
    begun = made = 0
    while made < tokens or live:
        while len(live) < ROWS and made + sum(len(ids) for _, _, ids in live) < tokens:
            which = begun % len(starts)
            live.append((which, store.open(), list(starts[which])))
            begun += 1
        if not live:
            break
        work = [(row, len(ids) - row.length) for _, row, ids in live]
        batch = store.begin(work)
        flat = [token for (_, row, ids) in live for token in ids[row.length :]]
        positions = [p for (_, row, ids) in live for p in range(row.length, len(ids))]
        last = [s + c - 1 for s, (_, c) in zip(batch.starts, work, strict=True)]
        with torch.inference_mode(), attending(loaded.model, batch):
            logits = loaded.model(
                input_ids=torch.tensor([flat], device=loaded.device),
                position_ids=torch.tensor([positions], device=loaded.device),
                use_cache=False,
                logits_to_keep=loaded.kept(last),
            ).logits[0]
        batch.commit()
        chosen = nucleus(logits.float().cpu(), 0.97, generator).tolist()
        still = []
        for (which, row, ids), token in zip(live, chosen, strict=True):
            ids.append(token)
            if token in loaded.eos_token_ids or len(ids) - len(starts[which]) >= PASSAGE:
                passages[which].append(ids)
                made += len(ids)
                store.close(row)
                if progress is not None:
                    progress("writing text", min(0.99, made / tokens))
            else:
                still.append((which, row, ids))
        live = still
    if progress is not None:
        progress("writing text", 1.0)
    return [text for group in passages if (text := "\n".join(loaded.tokenizer.decode(ids) for ids in group))]


def nucleus(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """Sample from logits [B, vocab] restricted to the smallest set with probability `top_p`; int64 [B]."""
    values, order = logits.topk(min(1024, logits.shape[-1]), -1)  # the nucleus of any usable model lies well inside
    probabilities = (values - logits.logsumexp(-1, keepdim=True)).exp()
    probabilities = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities > top_p, 0.0)
    pick = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, pick)[:, 0]
