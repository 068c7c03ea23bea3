"""The process that renders chat templates: jinja2 in its sandbox, under limits of its own.

It reads a line of JSON for each request and answers with one: `{"text": ...}`, or `{"error": ...,
"refused": bool}`. `runtime.templates` starts it, watches it and ends it.
"""

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

MEMORY_ROOM = 160 << 20  # bytes above what the process needs before any template
MAX_ERROR = 400  # characters


def main(_arguments: Sequence[str]) -> int:
    """Answer requests until there are no more."""
    environment = make_environment()
    _limit_resources()
    template: Any = None
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "source" in request:
                template = environment.from_string(request["source"])
                answer: dict[str, Any] = {"text": ""}
            else:
                answer = {"text": _render(template, request["variables"], request["max_output"])}
        except Refusal as error:
            answer = {"error": str(error)[:MAX_ERROR], "refused": True}
        except MemoryError:
            answer = {"error": "it needs too much memory", "refused": False}
        except RecursionError:
            answer = {"error": "it is nested too deeply", "refused": False}
        except Exception as error:
            message = f"{type(error).__name__}: {str(error)[:MAX_ERROR]}"
            answer = {"error": message, "refused": False}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


class Refusal(Exception):
    """The template itself calls the conversation wrong."""


def make_environment() -> Any:
    """What templates written for transformers find there."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_extension()],
    )
    environment.filters["tojson"] = _to_json
    environment.filters["from_json"] = json.loads
    environment.globals["from_json"] = json.loads
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _generation_extension() -> type[Any]:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote, for training; here it is only its text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own `tojson` escapes HTML; templates want plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _render(template: Any, variables: dict[str, Any], max_output: int) -> str:
    parts = []
    length = 0
    for part in template.generate(**variables):
        length += len(part)
        if length > max_output:
            raise ValueError(f"it writes more than {max_output:,} characters")
        parts.append(part)
    return "".join(parts)


def _limit_resources() -> None:
    """Bound the memory, where the system can; no core files, no files at all."""
    try:
        import resource
    except ImportError:  # Windows: the parent watches
        return
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    size = _address_space()
    if size is not None:
        limits[resource.RLIMIT_AS] = size + MEMORY_ROOM
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(kind, (limit, hard))


def _address_space() -> int | None:
    """The bytes of address space in use, where /proc tells."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except (OSError, ValueError):
        return None
    import resource

    return pages * resource.getpagesize()
