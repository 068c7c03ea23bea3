import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gguf_tools.errors import TemplateError
from runtime.template_worker import make_environment
from runtime.templates import ChatTemplate, Traits, named_templates
from tests.renderings import render_all

DATA = Path(__file__).parent / "data" / "chat_templates"

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Who are you?"},
]

CHATML = """\
{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nDefault.<|im_end|>\\n' }}
    {%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

INSTRUCT = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] | trim + '\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}"""

TURNS = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' ~ role ~ '\\n' ~ (message.content | trim) ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'assistant' and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|' ~ message.role ~ '|>' ~ text }}
    {%- if not loop.last and loop.index0 > ns.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>' }}
{%- endif %}"""


def test_chatml() -> None:
    template = ChatTemplate(CHATML)
    assert template.render(DIALOGUE) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render(DIALOGUE[1:2], add_generation_prompt=False) == (
        "<|im_start|>system\nDefault.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    )


def test_instruct() -> None:
    template = ChatTemplate(INSTRUCT, bos_token="<s>", eos_token="</s>")
    assert template.render(DIALOGUE) == (
        "<s>[INST] Be brief.\n\nHello [/INST] Hi!</s>[INST] Who are you? [/INST]"
    )
    with pytest.raises(TemplateError, match="refuses this conversation: roles must alternate"):
        template.render([DIALOGUE[1], DIALOGUE[1]])
    assert template.render(DIALOGUE[1:2]) == "<s>[INST] Hello [/INST]"  # it goes on afterwards


def test_turns() -> None:
    template = ChatTemplate(TURNS, bos_token="<bos>")
    assert template.render(DIALOGUE[1:3]) == (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    with pytest.raises(TemplateError, match="System role not supported"):
        template.render(DIALOGUE)


def test_thinking_and_variables() -> None:
    template = ChatTemplate(THINKING)
    messages = [
        DIALOGUE[1],
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi!"},
        DIALOGUE[3],
    ]
    expected = "<|user|>Hello<|assistant|>Hi!<|user|>Who are you?<|assistant|>"
    assert template.render(messages) == expected
    assert template.render(messages, variables={"enable_thinking": False}) == (
        expected + "<think>\n\n</think>"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ ('[1, 2]' | from_json)[1] }} {{ from_json('{\"a\": 3}').a }}", "2 3"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
         "{% if i == 4 %}{% break %}{% endif %}{% endfor %}", "0134"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ '<b>' }}{{ missing }}{{ messages | length }}", "<b>4"),
        ("{% if tools %}a{% elif tools is none %}b{% endif %}", "b"),
        ("{% for t in tools %}{{ t }}{% endfor %}none", "none"),
        ("{{ messages[1].content.upper().startswith('HE') }}", "True"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) }}{{ caller is defined }}", "[1]False"),
    ],
)  # fmt: skip
def test_what_templates_find(source: str, expected: str) -> None:
    year = datetime.now().year
    rendered = ChatTemplate(source).render(DIALOGUE)
    assert rendered == expected or str(year) not in expected


def test_any_text_passes_unchanged() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    for text in ("\0\x1b[31m\n\r\n\u2028", "\U0001f680\ud800", "{{ 1 + 1 }}", "x" * 3_000_000, ""):
        assert template.render([{"role": "user", "content": text}]) == text


# Contents, as texts and as parts.

ONLY_PARTS = """\
{%- for message in messages %}<|{{ message.role }}|>
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{%- endfor %}"""


def test_a_template_that_goes_through_parts_gets_them() -> None:
    template = ChatTemplate(ONLY_PARTS)
    assert template.traits.text == frozenset()
    assert template.render(DIALOGUE[1:3]) == "<|user|>Hello<|assistant|>Hi!"


def test_parts_are_joined_where_a_template_wants_text() -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]
    template = ChatTemplate("{{ messages[0].content + '!' }}")
    assert template.render([{"role": "user", "content": parts}]) == "Hello\nyou!"
    with pytest.raises(TemplateError, match=r"takes only text, .* of the type 'image\\x1b'"):
        template.render([{"role": "user", "content": [{"type": "image\x1b"}]}])
    with pytest.raises(TemplateError, match="takes only text"):
        template.render([{"role": "user", "content": ["Hello"]}])


def test_a_role_may_want_text_where_another_has_parts() -> None:
    mixed = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + ':' }}
{%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{%- endfor %}"""
    template = ChatTemplate(mixed)
    assert template.render(DIALOGUE[:2]) == "Be brief.:Hello"


def test_templates_for_tools_do_without() -> None:
    source = "{% for tool in tools %}x{% endfor %}{{ 'f' + functions }} {{ datetime + '' }}"
    assert ChatTemplate(source).render(DIALOGUE).startswith("f ")
    with pytest.raises(TemplateError, match="'other' is undefined"):
        ChatTemplate("{{ 'x' + other }}").render(DIALOGUE)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {}),
        ({"tokenizer.chat_template": "a"}, {"default": "a"}),
        (
            {
                "tokenizer.chat_templates": ["tool_use", "rag", 3, "absent"],
                "tokenizer.chat_template.tool_use": "b",
                "tokenizer.chat_template.rag": "c",
                "tokenizer.chat_template.absent": 4,
                "tokenizer.chat_template": "a",
            },
            {"default": "a", "tool_use": "b", "rag": "c"},
        ),
        (
            {
                "tokenizer.chat_templates": ["rag", "default"],
                "tokenizer.chat_template.default": "a",
                "tokenizer.chat_template.rag": "c",
            },
            {"default": "a", "rag": "c"},
        ),
        ({"tokenizer.chat_template": 7, "tokenizer.chat_templates": "x"}, {}),
    ],
)
def test_templates_by_name(metadata: dict[str, Any], expected: dict[str, str]) -> None:
    found = named_templates(metadata)
    assert found == expected and list(found)[:1] == list(expected)[:1]


def test_a_rendering_is_quick() -> None:
    template = ChatTemplate(CHATML)
    messages = DIALOGUE[:1] + DIALOGUE[1:3] * 500
    start = time.monotonic()
    for _ in range(10):
        template.render(messages)
    assert time.monotonic() - start < 5  # 0.1 s on a quiet machine


# The templates of real models, in llama.cpp's source package.


@pytest.fixture(scope="module")
def real_templates(llama_cpp_models: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted((llama_cpp_models / "templates").glob("*.jinja"))}


def test_renderings_are_those_of_transformers(real_templates: dict[str, str]) -> None:
    """Twelve dialogues, six ways each; the expected ones were made by make.py beside them."""
    dialogues = json.loads((DATA / "dialogues.json").read_text())
    expected = json.loads((DATA / "renderings.json").read_text())
    environment = make_environment()
    found = {
        name: render_all(environment.from_string(real_templates[name]), dialogues)
        for name in expected
    }
    assert found == expected and len(found) == 70


def test_real_templates_say_everything(real_templates: dict[str, str]) -> None:
    """All render the dialogue, as texts and as parts, or refuse it by themselves."""
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in DIALOGUE]
    refused, deaf = {}, []
    for name, source in real_templates.items():
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
        if not template.takes_system:
            deaf.append(name)
        try:
            texts = [template.render(DIALOGUE), template.render(parts)]
        except TemplateError as error:
            refused[name] = str(error)
            continue
        assert texts[0] == texts[1], name
        assert all(message["content"] in texts[0] for message in DIALOGUE), name
        assert texts[0].count("<s>") <= 1 and texts[0].find("<s>") <= 0, name
    (name,) = refused
    assert [name] == deaf == ["google-gemma-2-2b-it.jinja"]
    assert refused[name].endswith("refuses this conversation: System role not supported")


def test_what_templates_do(real_templates: dict[str, str]) -> None:
    def traits(name: str) -> Traits:
        return ChatTemplate(real_templates[f"{name}.jinja"]).traits

    assert traits("Qwen-Qwen3-0.6B").switches == {"on", "off"}
    assert traits("openai-gpt-oss-120b").switches == {"low", "medium", "high"}
    assert not traits("Qwen-Qwen2.5-7B-Instruct").switches
    assert not traits("mistralai-Ministral-3-14B-Reasoning-2512").empty
    assert traits("google-gemma-4-31B-it").parts == {"user", "assistant"}


def test_templates_of_checkpoints_at_hand(smollm2_checkpoint: Path) -> None:
    config: dict[str, Any] = json.loads((smollm2_checkpoint / "tokenizer_config.json").read_text())
    text = ChatTemplate(config["chat_template"]).render(DIALOGUE)
    assert text == ChatTemplate(CHATML).render(DIALOGUE)
