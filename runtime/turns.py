"""One turn of a conversation, and how its text and its tokens go on into the next."""

from dataclasses import dataclass, field

from runtime.tokenizer import GUARD, Tokenizer

NO_SPACE_BEFORE = ",.;:!?)]}%"


@dataclass
class Turn:
    """One message and its answer. The ids stand for `prompt_text`, then `covered`."""

    user: str
    prompt_text: str  # all text before the answer, earlier turns included
    prompt_ids: list[int]
    answer: str = ""
    reasoning: str = ""  # what was written before the answer and is no part of it
    written: str = ""  # all of it as it came: reasoning, answer and the marks around them
    answer_ids: list[int] = field(default_factory=list)
    covered: str = ""  # what answer_ids say; more or less than `written` only when cut short


def joined(before: str, text: str) -> str:
    """`text` as it goes on after `before`, with a space between two words."""
    if not before or not text or before[-1].isspace() or text[0].isspace():
        return before + text
    return before + ("" if text[0] in NO_SPACE_BEFORE else " ") + text


def continuation_ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids of `text` where it follows other text; None when they can't be told.

    A tokenizer that puts a space before a text would put one in the middle here, so several ways
    to encode are tried, and the one with the fewest wrong spaces is taken.
    """
    wanted = text.replace(GUARD, "").encode()
    found: list[tuple[int, list[int]]] = []
    for before, rest in (("", text), ("", text.removeprefix(" ")), ("\n", text)):
        anchor = tokenizer.encode(before, add_special=False)
        ids = tokenizer.encode(before + rest, add_special=False, parse_special=True)
        if ids[: len(anchor)] == anchor:
            ids = ids[len(anchor) :]
            n_wrong = _n_wrong_spaces(tokenizer, ids, wanted)
            if n_wrong is not None:
                found.append((n_wrong, ids))
    return min(found, key=lambda way: way[0])[1] if found else None


def held_part(text: str, last: Turn, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """The ids of the last turn that `text` begins with, and the text behind them.

    White space around the answer may be missing there; the ids then keep what was written. Where
    the answer is another one, as it is when the reasoning is left out, only the prompt is held.
    """
    if not text.startswith(last.prompt_text):
        return [], text
    after = text[len(last.prompt_text) :]
    variants = [last.covered]
    if last.covered == last.written:
        variants += [last.written.rstrip(), last.written.lstrip(), last.written.strip()]
    for variant in variants:
        for answer in (variant, tokenizer.guarded(variant)):
            if after.startswith(answer):
                return last.prompt_ids + last.answer_ids, after[len(answer) :]
    return last.prompt_ids, after


def cut_back(turn: Turn, pieces: list[bytes]) -> None:
    """Drop the last ids of an answer that was cut short, until they say no more than its text.

    `pieces` are what the ids say, one by one.
    """
    answer = turn.written.encode()
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


def _n_wrong_spaces(tokenizer: Tokenizer, ids: list[int], text: bytes) -> int | None:
    """How many spaces `ids` say too many or too few, or None when they say something else.

    Tokenizers do so in a text encoded at once, too: some put a space after an added token, some
    make one of several.
    """
    place, n_wrong = 0, 0
    for n, token_id in enumerate(ids):
        piece = tokenizer.token_bytes(token_id, special=True)
        while not text.startswith(piece, place):
            if text.startswith(b" ", place):
                place += 1
            elif n > 0 and piece.startswith(b" "):
                piece = piece[1:]
            else:
                return None
            n_wrong += 1
        place += len(piece)
    rest = text[place:]
    return None if rest.strip(b" ") else n_wrong + len(rest)
