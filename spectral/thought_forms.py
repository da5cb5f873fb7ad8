"""How families of models mark the thoughts before their answers (pure). Who reads them: server/thoughts.py."""

from __future__ import annotations

from collections.abc import Collection

TAGS = {
    "think": ("<think>", "</think>"),  # Qwen3, DeepSeek R1, GLM, SmolLM3 and most others
    "mistral": ("[THINK]", "[/THINK]"),  # Magistral
    "seed": ("<seed:think>", "</seed:think>"),
}
"""What begins and ends a model's thoughts, by form."""

MARKS = tuple(mark for tags in TAGS.values() for mark in tags)


def form_of(template: str, tokens: Collection[str] = ()) -> str:
    """The form that a chat template writes or a vocabulary has tokens for; "" where neither knows thoughts.

    `template`: the text of the template; `tokens`: the texts of the vocabulary's added tokens.
    """
    for form, (begin, end) in TAGS.items():
        if begin in template or end in template or {begin, end} <= set(tokens):
            return form
    return ""
