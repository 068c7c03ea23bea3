"""One turn of a conversation, and how its text and its tokens go on into the next."""

from dataclasses import dataclass, field

from runtime.tokenizer import Tokenizer

NO_SPACE_BEFORE = ",.;:!?)]}%"


@dataclass
class Turn:
    """One message and its answer. The ids stand for `prompt_text`, then `covered`."""

    user: str
    prompt_text: str  # all text before the answer, earlier turns included
    prompt_ids: list[int]
    answer: str = ""
    answer_ids: list[int] = field(default_factory=list)
    covered: str = ""  # what answer_ids say; more or less than `answer` only when cut short


def joined(before: str, text: str) -> str:
    """`text` as it goes on after `before`, with a space between two words."""
    if not before or not text or before[-1].isspace() or text[0].isspace():
        return before + text
    return before + ("" if text[0] in NO_SPACE_BEFORE else " ") + text


def continuation_ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of `text` where it follows other text; None when they can't be told.

    A tokenizer that puts a space before a text would put one in the middle here. So ids count
    only when their bytes are those of `text`.
    """
    wanted = text.encode()
    anchor = tokenizer.encode("\n", add_special=False)
    for prefix, n_prefix, start in (("", 0, 0), ("", 0, 1), ("\n", len(anchor), 0)):
        if start and not text.startswith(" "):
            continue
        ids = tokenizer.encode(prefix + text[start:], add_special=False, parse_special=True)
        if prefix and ids[:n_prefix] != anchor:
            continue
        ids = ids[n_prefix:]
        if b"".join(tokenizer.token_bytes(i, special=True) for i in ids) == wanted:
            return ids
    return None


def rest_of(text: str, last: Turn) -> str | None:
    """What `text` adds to the last turn, or None when it does not begin with that turn.

    Templates may strip the white space around an answer; the ids then keep what was written.
    """
    if not text.startswith(last.prompt_text):
        return None
    after = text[len(last.prompt_text) :]
    variants = [last.covered]
    if last.covered == last.answer:
        variants += [last.answer.rstrip(), last.answer.lstrip(), last.answer.strip()]
    for answer in variants:
        if after.startswith(answer):
            return after[len(answer) :]
    return None


def cut_back(turn: Turn, tokenizer: Tokenizer) -> None:
    """Drop the last ids of an answer that was cut short, until they say no more than its text."""
    answer = turn.answer.encode()
    pieces = [tokenizer.token_bytes(i) for i in turn.answer_ids]
    said = b"".join(pieces)
    while pieces and not (answer.startswith(said) and _is_whole(said)):
        said = said[: len(said) - len(pieces.pop())]
    del turn.answer_ids[len(pieces) :]
    turn.covered = said.decode()


def _is_whole(data: bytes) -> bool:
    """Whether UTF-8 `data`, cut off anywhere, ends with a whole character."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
