"""Chat templates that would escape, never end, or take all memory, and those that are broken."""

import time
from pathlib import Path

import psutil
import pytest

from gguf_tools.errors import TemplateError
from runtime.templates import ChatTemplate
from tests.test_templates import DIALOGUE

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['sys'].exit() }}",
    "{{ strftime_now.__globals__['sys'].exit() }}",
    "{{ messages.append(1) }}",
    "{% set x = messages.clear() %}",
    "{{ (messages | attr('append'))(1) }}",
    "{{ '{0.__class__.__mro__}'.format(1) | length + undefined_name.x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ ('{0.__class__' ~ '.__init__}').format(cycler) ~ nothing.x }}",
    "{{ (['{0.__globals__}'] | map('format', lipsum) | first) ~ nothing.x }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) ~ nothing.x }}",
    "{{ ([''] | map(attribute='__class__') | first).__mro__[0] ~ nothing.x }}",
    "{{ from_json.__globals__['sys'].exit() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ dict.__subclasses__() }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ ''.__class__.__base__.__subclasses__() | map('string') | join }}",
]

BOMBS = {
    "repeat": "{{ 'x' * 10 ** 10 }}",
    "repeat a list": "{{ ([0] * 10 ** 10) | length }}",
    "power": "{{ 7 ** (9 ** 9) }}",
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "percent width": "{{ '%09999999999d' % 3 }}",
    "format width": "{{ '{:>9999999999}'.format(1) }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "replace": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set n.x = n.x.replace('a', 'aaaa') %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "two to the sixty": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}"
    "{% endfor %}",
    "json": "{{ [[0] * 9999] * 999999 | tojson }}",
    "json numbers": "{{ from_json('[' ~ '9' * 5000 ~ ']') }}",
    "json depth": "{{ from_json('[' * 100000) }}",
    "strftime": "{{ strftime_now('%c' * 10 ** 8) }}",
    "sort": "{{ (range(99999) | list * 99999) | sort }}",
    "wordwrap": "{{ ('x ' * 10 ** 8) | wordwrap(1) | length }}",
    "namespaces": "{% set n = namespace() %}{% set n.n = n %}{{ n | tojson }}",
    "join": "{{ range(99999) | join('x' * 1000000) }}",
    "slices": "{{ [1] | slice(10 ** 9) | list | length }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list | length }}",
    "indent": "{{ [1] | tojson(indent=10 ** 10) }}",
    "lipsum": "{{ lipsum(n=99999) | length }}",
    "nested blocks": "{% if true %}" * 20_000 + "{% endif %}" * 20_000,
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "sum": "{{ " + "1+" * 200_000 + "1 }}",
}


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render(DIALOGUE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    before = psutil.Process().memory_info().rss
    start = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(BOMBS[name]).render(DIALOGUE)
    assert time.monotonic() - start < 10  # two seconds on a quiet machine
    assert psutil.Process().memory_info().rss - before < 100 << 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{% endfor %}", "{{ messages['a']['b'] }}",
     "{% for %}", "{{ 'a' + 1 }}", "{{ undefined_function() }}", "{{ messages[0].content.x.y }}"],
)  # fmt: skip
def test_broken_templates(source: str) -> None:
    with pytest.raises(TemplateError, match="does not work"):
        ChatTemplate(source).render(DIALOGUE)


def test_messages_are_escaped() -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("{{ raise_exception('\x1b[31mred\\nline\x07') }}").render(DIALOGUE)
    assert str(caught.value).endswith(r"\x1b[31mred\nline\x07")


def test_rendering_goes_on_after_a_bomb() -> None:
    template = ChatTemplate("{{ 7 ** messages[0].content | int }}")
    with pytest.raises(TemplateError, match="runs for too long"):
        template.render([{"role": "user", "content": "400000000"}])
    assert template.render([{"role": "user", "content": "2"}]) == "49"


def test_a_template_that_is_too_long() -> None:
    with pytest.raises(TemplateError, match="more than"):
        ChatTemplate("x" * (5 << 20))


def test_processes_end_with_their_templates() -> None:
    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children()}

    before = children()
    template = ChatTemplate("{{ 1 }}")
    assert template.render([]) == "1"
    (pid,) = children() - before
    del template
    assert not psutil.pid_exists(pid)


def test_modules_in_the_working_directory_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jinja2", "json", "runtime", "datetime"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    assert ChatTemplate("{{ strftime_now('x') }}").render([]) == "x"
    assert not (tmp_path / "ran").exists()
