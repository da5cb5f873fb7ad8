"""Prompts to token ids: the model's own chat template, and plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from spectral.engine.templates import RENDERER, TemplateFailed, is_jinja, render_chat
from spectral.engine.types import GenerateRequest, Message
from spectral.errors import RequestError
from spectral.thought_forms import TAGS as THOUGHTS
from spectral.thought_forms import form_of as thought_form_of
from spectral.tool_forms import form_of

_READS_OWN = re.compile(r"""(?<![\w.'"])tools(?!['"\w])""")
"""`tools` as a variable, and not as what a message has."""
ROLES = ("system", "developer", "user", "assistant", "tool")


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def tool_format(tokenizer: Any) -> str:
    """How the template makes a model write its calls of tools (a key of spectral.tool_forms.TAGS); "" where it does not
    know tools."""
    return form_of(str(getattr(tokenizer, "chat_template", None) or ""))


def thought_format(tokenizer: Any) -> str:
    """How the model marks its thoughts (a key of spectral.thought_forms.TAGS); "" where neither its template nor its
    added tokens have such marks."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return thought_form_of(
        str(getattr(tokenizer, "chat_template", None) or ""), {str(token.content) for token in added.values()}
    )


def opens_thoughts(tokenizer: Any, form: str, ids: Sequence[int]) -> bool:
    """True where a prompt ends with the mark that begins thoughts: the answer then has no such mark."""
    return bool(form) and str(tokenizer.decode(list(ids[-8:]))).rstrip().endswith(THOUGHTS[form][0])


def encode_chat(
    tokenizer: Any, messages: list[Message], tools: Sequence[dict[str, Any]] = (), thinking: bool | None = None
) -> list[int]:
    """Token ids of a conversation with the opening of the answer. Raises RequestError naming what the template refused.

    "developer" is what newer clients call "system"; it becomes that where the template does not know it. `thinking`
    goes to templates that ask for it (`enable_thinking`, or `thinking`); False is refused where the template opens
    thoughts anyway.
    """
    if not has_template(tokenizer):
        raise RequestError(
            "this model has no chat template; use the completions endpoint", param="messages", code="no_chat_template"
        )
    if tools and not tool_format(tokenizer):
        raise RequestError(
            "this model's chat template does not know tools; remove them, or choose a model trained with tools",
            param="tools",
            code="tools_not_supported",
        )
    knows_developer = "developer" in str(tokenizer.chat_template)
    turns = []
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise RequestError(
                f"messages[{i}].role must be one of {', '.join(ROLES)}, got {message.role!r}",
                param=f"messages[{i}].role",
            )
        role = "system" if message.role == "developer" and not knows_developer else message.role
        turns.append({"role": role, "content": message.content, **message.extra})
    if tools and _READS_OWN.search(str(tokenizer.chat_template)) is None:
        _add_to_system(turns, tools)
    try:
        switch = {} if thinking is None else dict.fromkeys(_SWITCHES, thinking)
        ids = _template_ids(tokenizer, turns, list(tools) or None, switch)
    except TemplateFailed as error:
        bounded = error.kind in ("Timeout", "TooLong", "MemoryError", "Died")
        what = "was ended" if bounded else "refuses these messages"
        raise RequestError(
            f"the model's chat template {what}: {error}",
            param="messages",
            code="chat_template_failed" if bounded else "invalid_messages",
        ) from None
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise RequestError(
            f"the model's chat template refuses these messages: {error}", param="messages", code="invalid_messages"
        ) from error
    if thinking is False and opens_thoughts(tokenizer, thought_format(tokenizer), ids):
        raise RequestError(
            "this model's chat template makes it think and has no switch for that; leave this out", param="thinking"
        )
    return [int(i) for i in ids]


_SWITCHES = ("enable_thinking", "thinking")
"""Names of the template's variable: Qwen3, GLM and SmolLM3 have the first, DeepSeek and Granite the second."""


def _add_to_system(turns: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> None:
    """For templates that read no `tools` of their own but those of the system's message, as a text (Phi-4-mini's)."""
    if not turns or turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": ""})
    turns[0]["tools"] = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)


def _template_ids(
    tokenizer: Any, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, switch: dict[str, bool]
) -> list[int]:
    if is_jinja(tokenizer):
        text = render_chat(tokenizer, turns, tools, switch)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    found: list[int] = tokenizer.apply_chat_template(
        turns, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return found


def prepare(tokenizer: Any) -> None:
    """Start what rendering needs, so that the first chat does not wait for it."""
    if has_template(tokenizer) and is_jinja(tokenizer):
        RENDERER.start()


def check_length(request: GenerateRequest, context_length: int, longest_token: int) -> None:
    """Refuse a text that cannot fit whatever its tokens are: tokenizing megabytes takes seconds. Raises RequestError.

    `longest_token`: characters that a token has at most.
    """
    prompt = request.prompt
    size = len(prompt) if isinstance(prompt, str) else sum(len(m.content) for m in prompt if isinstance(m, Message))
    least = size // longest_token
    if least >= context_length:
        raise RequestError(
            f"the prompt has {size} characters, which is more than {least} tokens, and this model's context is "
            f"{context_length} tokens; shorten the prompt",
            param=request.prompt_field,
            code="context_length_exceeded",
        )


def encode_prompt(tokenizer: Any, request: GenerateRequest, vocab_size: int) -> list[int]:
    """Token ids of any kind of prompt, at least one. Raises RequestError."""
    prompt = request.prompt
    if isinstance(prompt, str):
        ids = [int(i) for i in tokenizer(prompt, verbose=False)["input_ids"]]
        if not ids:  # an empty text: begin as the model's texts begin
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            ids = [] if start is None else [int(start)]
    elif request.is_chat:
        ids = encode_chat(tokenizer, [m for m in prompt if isinstance(m, Message)], request.tools, request.thinking)
    else:
        ids = [i for i in prompt if isinstance(i, int) and not isinstance(i, bool)]
        if len(ids) != len(prompt):
            raise RequestError("prompt must be text or a list of token ids", param="prompt")
        bad = next((i for i in ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"prompt holds token id {bad}; this model's ids are 0 to {vocab_size - 1}", param="prompt"
            )
    if not ids:
        raise RequestError("the prompt is empty", param=request.prompt_field)
    return ids
