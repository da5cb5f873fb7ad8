"""Chat templates are strangers' programs: rendered as transformers renders them, and bounded whatever they do."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spectral.engine import child_process
from spectral.engine.chat import encode_chat
from spectral.engine.templates import Renderer, TemplateFailed, render_chat
from spectral.engine.types import Message
from spectral.errors import RequestError
from tests.spectral.test_chat_tools import HERMES, TOOL

TURNS = [
    {"role": "system", "content": "Be brief. <b>&</b>"},
    {"role": "user", "content": "héllo 日本\n"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"é": [1, None]}}}]},
    {"role": "tool", "content": "7", "tool_call_id": "c1"},
]
# Shapes that templates of well-known families have: namespaces, loop controls, macros, generation, filters.
TEMPLATES = [
    HERMES,
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% set ns.found = true %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}{{ ns.found }}",
    "{% macro show(x) %}[{{ x }}]{% endmacro %}{% for m in messages %}{{ show(m.content) }}"
    "{% generation %}g{% endgeneration %}{% endfor %}",
    "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}{{ messages | tojson }}",
    "{% for m in messages[1:] %}{{ loop.index0 }}{{ m.content | upper | replace('H', 'J') }}{% break %}{% endfor %}",
    "{{ dict(a=1) }}{{ dict.fromkeys([1, 2]) }}{% if add_generation_prompt %}go{% endif %}{{ undefined_thing }}",
    "{%- if documents %}docs{%- endif %}\n"
    "  {%- for m in messages if m.tool_calls %}\n  {{- m.tool_calls[0] }}\n{% endfor %}",
]
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "string": "{{ 'x' * (10 ** 12) }}",
    "list": "{{ [0] * (10 ** 11) }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "width": "{{ '%0999999999999d' | format(1) }}",
    "format": "{{ '{:999999999999}'.format(1) }}",
    "center": "{{ 'x' | center(10 ** 12) }}",
    "indent": "{{ ('x\\n' * 100000) | indent(10 ** 7) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for i in range(99999) %}{{ 'y' * 1000 }}{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested": "{% if 1 %}" * 3000,
    "expression": "{{ " + "-" * 20000 + "1 }}",
    "os": "{{ cycler.__init__.__globals__.os.system('touch ' + path) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format-map": "{{ '{0.__class__.__mro__}'.format('') }}",
    "attr": "{{ '' | attr('__class__') | attr('__base__') }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "mutation": "{{ messages.append(1) }}",
    "surrogate": "{{ '\\ud800' }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "strftime": "{{ strftime_now('%' * 100000 + 'Y' * 1000000) | length * 0 + 9 ** (9 ** 9) }}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(seconds=1.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_path)


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_template_renders_as_in_transformers(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str | None, tools: Any
) -> None:
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    wanted = tokenizer.apply_chat_template(TURNS[:2], tools=tools, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, TURNS[:2], tools) == wanted
    if template is not None:
        wanted = tokenizer.apply_chat_template(TURNS, tools=tools, tokenize=False, add_generation_prompt=True)
        assert render_chat(tokenizer, TURNS, tools) == wanted


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_ended(renderer: Renderer, name: str, tmp_path: Path) -> None:
    left = tmp_path / "was-here"
    assert renderer.render("begun", {}) == "begun"  # after another one was ended: its start is not the template's time
    began = time.monotonic()
    with pytest.raises(TemplateFailed) as caught:
        text = renderer.render(HOSTILE[name], {"messages": [{"role": "user"}], "path": str(left)})
        assert "__" not in text and "root:" not in text and len(text) < 1000, "the sandbox gave something away"
        raise TemplateFailed("Harmless", "it wrote nothing of use")
    assert time.monotonic() - began < 4.0 and not left.exists()
    assert len(str(caught.value)) < 600
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


def test_the_process_sees_no_environment_and_no_files(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_SERVER__ADMIN_KEY", "a-secret-of-this-process")
    own = Renderer()
    try:
        assert own.render("ok", {}) == "ok"
        assert own._child._process is not None
        environment = Path(f"/proc/{own._child._process.pid}/environ").read_bytes()
        opened = [os.readlink(entry) for entry in Path(f"/proc/{own._child._process.pid}/fd").iterdir()]
    finally:
        own.close()
    assert b"secret" not in environment
    assert len(opened) == 3 and sum(name.startswith("pipe:") for name in opened) >= 2


def test_a_request_is_told_and_the_next_one_served(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, contextlib.closing(Renderer(seconds=0.5)) as quick:
        patch.setattr("spectral.engine.templates.RENDERER", quick)
        patch.setattr(tokenizer, "chat_template", HOSTILE["power"])
        with pytest.raises(RequestError, match="chat template was ended: it took more than 0.5 s") as caught:
            encode_chat(tokenizer, [Message("user", "hi", {})])
        assert caught.value.code == "chat_template_failed"
        patch.setattr(tokenizer, "chat_template", "{{ 1 / 0 }}")
        with pytest.raises(RequestError, match="refuses these messages: division by zero"):
            encode_chat(tokenizer, [Message("user", "hi", {})])
    assert encode_chat(tokenizer, [Message("user", "hi", {})])


def test_a_slow_start_is_not_the_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    begin = f"runpy.run_path({str(child_process._CHILD)!r}, run_name='__main__')"
    child.write_text(f"import runpy, time\ntime.sleep(1.5)\n{begin}\n")
    monkeypatch.setattr(child_process, "_CHILD", child)
    with contextlib.closing(Renderer(seconds=0.5)) as late:
        assert late.render("{{ 1 + 1 }}", {}) == "2" and not late.slow
        late.close()
        monkeypatch.setattr(child_process, "START_SECONDS", 0.2)
        with pytest.raises(TemplateFailed, match=r"its process did not start within 0\.2 s"):
            late.render("{{ 1 + 1 }}", {})


def test_slow_renderings_are_noticed_and_forgotten(renderer: Renderer) -> None:
    with pytest.raises(TemplateFailed, match="took more than"):
        renderer.render(HOSTILE["loops"], {})
    assert renderer.slow
    for _ in range(60):
        renderer.render("{{ 1 }}", {})
    assert not renderer.slow


def test_large_conversations_pass(renderer: Renderer) -> None:
    turns = [{"role": "user", "content": "word é " * 20_000}] * 20
    text = renderer.render("{% for m in messages %}{{ m.content }}{% endfor %}", {"messages": turns})
    assert text == turns[0]["content"] * 20 and json.dumps(text)
