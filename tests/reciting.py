"""A model that says what it is told to, and conversations with it."""

import numpy as np

from runtime.answer import Piece, Thought, ThoughtEnd
from runtime.conversation import Conversation, Notice
from runtime.sampling import Sampler, SamplingOptions
from runtime.templates import ChatTemplate
from runtime.turns import continuation_ids

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Reciting:
    """Says the answers it was given, one after the other; counts what it reads."""

    def __init__(self, tokenizer, *answers, n_ctx=400):
        self.n_ctx = n_ctx
        self.tokens = []
        self.n_read = 0
        self._n_vocab = tokenizer.n_tokens
        self._script = [
            token
            for answer in answers
            for token in (*continuation_ids(tokenizer, answer), tokenizer.eos_id)
        ]

    def forward(self, ids):
        assert len(ids) > 0 and len(self.tokens) + len(ids) <= self.n_ctx
        self.tokens.extend(ids)
        self.n_read += len(ids)
        logits = np.zeros(self._n_vocab, np.float32)
        logits[self._script.pop(0)] = 1.0
        return logits

    def truncate(self, n):
        assert n <= len(self.tokens)
        del self.tokens[n:]


def make(model, tokenizer, *, chat=CHAT, **options):
    template = None
    if chat is not None:
        bos, eos = tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(tokenizer.eos_id)
        template = ChatTemplate(chat, bos_token=bos, eos_token=eos)
    sampler = Sampler(SamplingOptions(temp=0.0))
    return Conversation(model, tokenizer, sampler, template=template, **options)


def heard(events):
    """The text of an answer, and the notices about it."""
    events = [event for event in events if not isinstance(event, (Thought, ThoughtEnd))]
    text = "".join(event.text for event in events if isinstance(event, Piece))
    return text, [event.text for event in events if isinstance(event, Notice)]


def thoughts(events):
    """The reasoning, the answer, the notices, and the ends of blocks of reasoning."""
    events = list(events)
    reasoning = "".join(event.text for event in events if isinstance(event, Thought))
    ends = [event for event in events if isinstance(event, ThoughtEnd)]
    return reasoning, *heard(events), ends


def interrupt(events, after):
    """Take events until the answer has some text, then no more."""
    text = ""
    for event in events:
        text += event.text if isinstance(event, Piece) else ""
        if len(text) >= after:
            break
    events.close()
    return text
