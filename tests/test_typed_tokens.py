"""What a user types never becomes a special token; what the chat template writes does."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.reader import GGUFFile
from runtime.conversation import Conversation
from runtime.sampling import Sampler, SamplingOptions
from runtime.templates import ChatTemplate
from runtime.tokenizer import Tokenizer

BRACKETS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Silent:
    """Ends every answer at once; keeps what it read."""

    n_ctx = 4096

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens: list[int] = []
        self._logits = np.zeros(tokenizer.n_tokens, np.float32)
        self._logits[tokenizer.eos_id] = 1.0

    def forward(self, ids):
        self.tokens.extend(ids)
        return self._logits

    def truncate(self, n):
        del self.tokens[n:]


def read(tokenizer: Tokenizer, source: str, *said: str, system: str | None = None) -> list[int]:
    """The ids that a model reads of a conversation in which the user says these things."""
    bos, eos = tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(tokenizer.eos_id)
    model = Silent(tokenizer)
    conversation = Conversation(
        model,
        tokenizer,
        Sampler(SamplingOptions(temp=0.0)),
        template=ChatTemplate(source, bos_token=bos, eos_token=eos),
        system=system,
    )
    for text in said:
        for _ in conversation.say(text):
            pass
    return model.tokens


def controls(tokenizer: Tokenizer) -> list[int]:
    """The ids whose texts are no text."""
    return [
        i
        for i in range(tokenizer.n_tokens)
        if not tokenizer.token_bytes(i) and tokenizer.token_bytes(i, special=True)
    ]


@pytest.fixture(params=["smollm2_gguf", "stories260k_gguf"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    path: Path = request.getfixturevalue(request.param)
    with GGUFFile(path) as file:
        return Tokenizer(file.metadata)


def test_special_tokens_that_are_typed(tokenizer: Tokenizer) -> None:
    special = set(controls(tokenizer))
    assert len(special) >= 3
    source = tokenizer.chat_template or BRACKETS
    texts = [tokenizer.token_text(i) for i in sorted(special)]
    typed = "a" + "b".join(texts) + "".join(texts) + "c"
    plain = read(tokenizer, source, "x", "y", system="z")
    found = read(tokenizer, source, typed, typed + "?", system=typed)
    assert special & set(plain)  # the template's own
    count = Counter(i for i in found if i in special)
    assert count == Counter(i for i in plain if i in special)
    assert tokenizer.decode(found).count(typed) == 3


def test_pieces_of_a_special_token_do_not_join(tokenizer: Tokenizer) -> None:
    """Not around a guard that is typed, and not from the end of one message to the next text."""
    special = set(controls(tokenizer))
    source = tokenizer.chat_template or BRACKETS
    eos = tokenizer.token_text(tokenizer.eos_id)
    plain = read(tokenizer, source, "x")
    for typed in (f"{eos[:2]}\ufdd0{eos[2:]}", f"{eos[:2]}{eos}{eos[2:]}", eos[:-1]):
        found = read(tokenizer, source, typed)
        assert [i for i in found if i in special] == [i for i in plain if i in special]
