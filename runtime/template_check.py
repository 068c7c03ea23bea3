"""Whether a file's chat template and its special tokens fit each other.

A short dialogue is rendered and encoded as `run` would. The token that the template writes after an
answer is what the model learned to end with: unless it is in the stop set, answers never end. A
second BOS at the start is something that no model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf_tools.errors import TemplateError, printable
from gguf_tools.self_check import Finding
from runtime.templates import ChatTemplate, named_templates
from runtime.tokenizer import Tokenizer, encode_chat

QUESTION, ANSWER = "How many legs has a spider?", "A spider has eight legs."


def check_template(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> Finding:
    """What the file's usual template does; nothing wrong where there is none."""
    templates = named_templates(metadata)
    if not templates:
        return Finding("no chat template")
    source = next(iter(templates.values()))
    bos, eos = (
        "" if token is None else tokenizer.token_text(token)
        for token in (tokenizer.bos_id, tokenizer.eos_id)
    )
    dialogue = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    try:
        template = ChatTemplate(source, bos_token=bos, eos_token=eos)
        once = template.render(dialogue, add_generation_prompt=False)
        twice = template.render([*dialogue, dialogue[0]])
    except TemplateError as error:
        return Finding("the chat template fails", (str(error),))
    end, starts = _end(tokenizer, once, twice), _start(tokenizer, twice)
    stops = ", ".join(_shown(tokenizer, token) for token in sorted(tokenizer.eog_ids)) or "none"
    details = (f"end tokens of the file: {stops}", *starts.details)
    problems = (*end.problems, *starts.problems)
    return Finding(", ".join((end.text, starts.text)), problems, details)


def _end(tokenizer: Tokenizer, once: str, twice: str) -> Finding:
    """The token after the last answer or, where there is none, after one that is followed."""
    last, followed = (_marks_behind(tokenizer, rendered) for rendered in (once, twice))
    if last is None or followed is None:
        return Finding("template leaves the answer out")
    # What follows an answer may begin the next turn: it counts only if it ends something.
    ends = last[:1] or [token for token in followed[:1] if token in tokenizer.eog_ids]
    if not ends:
        return Finding("template ends answers with no token")
    shown = _shown(tokenizer, ends[0])
    if ends[0] in tokenizer.eog_ids:
        return Finding(f"template ends with {shown}")
    return Finding(
        f"template ends with {shown}, which stops nothing",
        (
            f"the chat template ends an answer with {shown}, which is not in the file's stop set: "
            "answers would not end; set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json to it",
        ),
    )


def _marks_behind(tokenizer: Tokenizer, rendered: str) -> list[int] | None:
    """The marks after the answer; None where it is not there."""
    _, found, behind = rendered.partition(ANSWER)
    if not found:
        return None
    ids = tokenizer.encode(behind, add_special=False, parse_special=True)
    return [token for token in ids if tokenizer.is_mark(token)]


def _start(tokenizer: Tokenizer, rendered: str) -> Finding:
    """How often BOS stands at the beginning."""
    bos = tokenizer.bos_id
    ids = [token for token in encode_chat(tokenizer, rendered) if not _is_space(tokenizer, token)]
    if bos is None or ids[:1] != [bos]:
        return Finding("no BOS")
    if ids[1:2] == [bos]:
        shown = _shown(tokenizer, bos)
        return Finding(
            "BOS doubled",
            (
                f"a chat begins with {shown} twice: the template writes it "
                f"{'and add_bos_token adds it, too' if _adds(tokenizer, rendered) else 'twice'}",
            ),
        )
    writes = rendered.startswith(tokenizer.token_text(bos))
    both = "the template writes BOS and add_bos_token is set, too: programs must not add a second"
    return Finding("BOS once", details=(both,) if writes and tokenizer.add_bos else ())


def _adds(tokenizer: Tokenizer, rendered: str) -> bool:
    ids = tokenizer.encode(rendered, add_special=False, parse_special=True)
    return tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]


def _is_space(tokenizer: Tokenizer, token: int) -> bool:
    return not tokenizer.is_mark(token) and not tokenizer.token_bytes(token, special=True).strip()


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return printable(tokenizer.token_text(token), 40)
