"""How families of models write calls of tools: which form a chat template asks for, and the marks around a call (pure).

The marks are special tokens of some models and plain text of others; the engine leaves them in the text of answers, so
that they look alike. Who reads the calls: server/toolcalls.py.
"""

from __future__ import annotations

TAGS = {
    "hermes": ("<tool_call>", "</tool_call>"),  # Hermes, Qwen, GLM
    "mistral": ("[TOOL_CALLS]", ""),
    "phi": ("<|tool_call|>", "<|/tool_call|>"),  # Phi-4-mini, Granite
    "gemma": ("<start_function_call>", "<end_function_call>"),  # FunctionGemma
    "gemma4": ("<|tool_call>", "<tool_call|>"),
    "json": ("<|python_tag|>", ""),  # Llama 3 and others: most answers are the call's JSON and nothing else
}
"""What begins and ends a call in the text, by form; "": the end of the answer ends it."""

INSIDE = ("[ARGS]", "[CALL_ID]", "<escape>", '<|"|>')
"""Marks within a call."""

MARKS = (*(mark for tags in TAGS.values() for mark in tags if mark), *INSIDE)

_NAMED_BY = {  # words of a template that tell the form, the telling ones first
    "[TOOL_CALLS]": "mistral",
    "<start_function_call>": "gemma",
    "<|tool_call>": "gemma4",
    "<|tool_call|>": "phi",
    "<|tool|>": "phi",
    "<tool_call>": "hermes",
}


def form_of(template: str) -> str:
    """The form that a chat template asks for; "" where it does not know tools."""
    if "tools" not in template:
        return ""
    return next((form for words, form in _NAMED_BY.items() if words in template), "json")
