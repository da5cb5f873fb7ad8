"""Tools in chat templates: what the template gets, and models whose template does not know tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spectral.engine.chat import encode_chat, opens_thoughts, thought_format, tool_format
from spectral.engine.types import Message
from spectral.errors import RequestError

HERMES = """{% if tools %}{% for tool in tools %}<tool>{{ tool.function.name }}</tool>{% endfor %}{% endif %}
{%- for m in messages %}{{ m.role }}:{{ m.content }}{% for call in m.tool_calls %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}
{% endfor %}"""
PHI = """{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}
{{ m['content'] }}<|tool|>{{ m['tools'] }}<|/tool|>{% else %}{{ m['role'] }}:{{ m['content'] }}{% endif %}
{% endfor %}"""
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_path)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", ""),
        (HERMES, "hermes"),
        ("{% for t in tools %}{% endfor %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "json"),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }}<tool_call>"}, "hermes"),
        (None, ""),
        ("{{ tools }}<start_function_call>", "gemma"),
        ("{% for tool in tools %}<|tool_call|>{% endfor %}", "phi"),
        (PHI, "phi"),
    ],
)
def test_the_format_is_read_from_the_template(template: Any, form: str) -> None:
    holder = type("Holder", (), {"chat_template": template})()
    assert tool_format(holder) == form


def test_tools_and_calls_reach_the_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", HERMES)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        Message("user", "Rain?"),
        Message("assistant", "", {"tool_calls": [call]}),
        Message("tool", "wet", {"tool_call_id": "c1"}),
    ]
    text = tokenizer.decode(encode_chat(tokenizer, turns, [TOOL]))
    assert "<tool>weather</tool>" in text and "tool:wet[c1]" in text
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>' in text


def test_the_embedded_models_template_knows_tools(tokenizer: Any) -> None:
    assert tool_format(tokenizer) == "hermes"
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [Message("system", "Be brief."), Message("user", "Rain?"), Message("assistant", "", {"tool_calls": [call]})]
    with_tools = tokenizer.decode(encode_chat(tokenizer, turns, [TOOL]))
    assert with_tools.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and with_tools.count("Be brief.") == 1
    assert '"name": "weather", "parameters"' in with_tools
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in with_tools
    plain = tokenizer.decode(encode_chat(tokenizer, turns[:2]))
    wanted = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
    assert plain == wanted


def test_a_template_that_reads_the_tools_of_its_system_message_gets_them_there(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", PHI)
    alone = tokenizer.decode(encode_chat(tokenizer, [Message("user", "Rain?")], [TOOL]))
    told = '<|tool|>[{"name": "weather", "parameters": {"type": "object"}}]<|/tool|>'
    assert alone.index(told) < alone.index("user:Rain?")
    turns = [Message("system", "Be brief."), Message("user", "Rain?")]
    assert f"Be brief.{told}" in tokenizer.decode(encode_chat(tokenizer, turns, [TOOL]))
    assert "<|tool|>" not in tokenizer.decode(encode_chat(tokenizer, turns))


def test_a_template_without_tools_refuses_them(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")
    with pytest.raises(RequestError) as refused:
        encode_chat(tokenizer, [Message("user", "Rain?")], [TOOL])
    assert (refused.value.param, refused.value.code) == ("tools", "tools_not_supported")


QWEN = """{% for m in messages %}{{ m.role }}:{{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>
{% endif %}{% endif %}"""


def test_thoughts_are_left_out_where_the_template_has_a_switch(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [Message("user", "Rain?")]

    def written(thinking: bool | None) -> str:
        return str(tokenizer.decode(encode_chat(tokenizer, turns, thinking=thinking)))

    assert written(False) == written(None)  # the embedded model does not think
    monkeypatch.setattr(tokenizer, "chat_template", QWEN)
    assert "<think>" not in written(None) and written(False).endswith("<think>\n\n</think>\n")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }} <think>\n")
    assert written(None).endswith("<think>")
    with pytest.raises(RequestError, match="makes it think") as refused:
        written(False)
    assert refused.value.param == "thinking"


def test_a_prompt_that_ends_within_thoughts_is_known(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [Message("user", "Rain?")]
    assert thought_format(tokenizer) == "" and not opens_thoughts(tokenizer, "", encode_chat(tokenizer, turns))
    for template, opens in (("{{ messages[0].content }}<think>\n", True), (QWEN, False)):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        assert thought_format(tokenizer) == "think"
        assert opens_thoughts(tokenizer, "think", encode_chat(tokenizer, turns)) == opens
    assert not opens_thoughts(tokenizer, "think", encode_chat(tokenizer, turns, thinking=False))


def test_thoughts_of_earlier_answers_reach_the_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}[{{ m.reasoning_content }}]{% endfor %}")
    turns = [Message("assistant", "x", {"reasoning_content": "Hm."}), Message("user", "y")]
    assert tokenizer.decode(encode_chat(tokenizer, turns)) == "[Hm.][]"
