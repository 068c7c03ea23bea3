"""Digests of what a compiled template makes of some dialogues, to compare two environments."""

import hashlib
import json
from typing import Any

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SWITCHES = ({}, *({"enable_thinking": on, "thinking": on} for on in (True, False)))


def render_all(template: Any, dialogues: dict[str, Any]) -> dict[str, str]:
    """A digest for each dialogue."""
    digests = {}
    for name, dialogue in dialogues.items():
        texts = [
            _render(template, dialogue, {**switch, "add_generation_prompt": prompt})
            for switch in SWITCHES
            for prompt in (True, False)
        ]
        digests[name] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
    return digests


def _render(template: Any, dialogue: dict[str, Any], variables: dict[str, Any]) -> str:
    values = json.loads(json.dumps(dialogue))  # a template may not change it for the next
    try:
        return template.render(
            **TOKENS, documents=None, strftime_now=_strftime_now, **values, **variables
        )
    except Exception as error:
        # The template's own refusals are compared; Python's words for mistakes change.
        refused = type(error).__name__ in ("TemplateError", "Refusal")
        return f"refused: {error}" if refused else "failed"


def _strftime_now(form: str) -> str:
    return f"[{form}]"
