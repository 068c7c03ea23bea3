"""Turns, what is read for them, and what is dropped: the story model and its tokenizer, and for
the logic of long dialogues a model that recites what it is told to."""

import numpy as np
import pytest

from gguf_tools.errors import ContextFullError, GGUFError, TemplateError
from gguf_tools.reader import GGUFFile
from runtime.answer import Piece, Thought, ThoughtEnd
from runtime.chat import ANSWER_LIMIT, end_note, no_answer
from runtime.conversation import Conversation, Notice, Progress
from runtime.model import Model
from runtime.sampling import Sampler, SamplingOptions
from runtime.templates import ChatTemplate
from runtime.tokenizer import Tokenizer
from runtime.turns import continuation_ids, joined

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def file(stories260k_gguf):
    with GGUFFile(stories260k_gguf) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(file):
    return Tokenizer(file.metadata)


@pytest.fixture(scope="module")
def stories(file):
    with Model.load(file, threads=1) as model:
        yield model


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


def test_an_answer_ends_with_the_end_token(tokenizer):
    conversation = make(Reciting(tokenizer, "Once there was a dog."), tokenizer)
    assert heard(conversation.say("Tell")) == ("Once there was a dog.", [])
    assert conversation.stats.reason == "end of generation"
    assert conversation.turns[0].answer == "Once there was a dog."


def test_only_new_tokens_are_read(tokenizer):
    model = Reciting(tokenizer, "Once there was a dog.", "And a cat.", "The end.")
    conversation = make(model, tokenizer)
    for message in ("Tell", "More", "And then?"):
        held = len(model.tokens)
        _, notices = heard(conversation.say(message))
        assert notices == []
        assert conversation.turns[-1].prompt_ids[:held] == model.tokens[:held]
        assert conversation.stats.n_read == len(conversation.turns[-1].prompt_ids) - held
    assert model.n_read == len(model.tokens)


def test_what_is_read_is_what_the_template_renders(tokenizer):
    model = Reciting(tokenizer, "Once there was a dog.", "And a cat.")
    conversation = make(model, tokenizer, system="Be brief.")
    heard(conversation.say("Tell"))
    heard(conversation.say("More"))
    rendered = (
        "<s>[system]Be brief.</s>[user]Tell</s>[assistant]Once there was a dog.</s>"
        "[user]More</s>[assistant]"
    )
    ids = conversation.turns[-1].prompt_ids
    assert ids.count(tokenizer.bos_id) == 1
    said = b"".join(tokenizer.token_bytes(i, special=True) for i in ids).decode()
    assert said.replace("> ", ">") == rendered  # this tokenizer puts a space after a control token


def test_the_second_turn_reads_like_a_fresh_start(stories, tokenizer):
    """A dialogue turn by turn leaves the same logits as its text read at once."""
    stories.truncate(0)
    conversation = make(stories, tokenizer, chat=None, max_tokens=12)
    heard(conversation.say("Once upon a time"))
    second, notices = heard(conversation.say("Lily"))
    assert notices == []
    ids = list(conversation.turns[-1].prompt_ids)
    stories.truncate(0)
    again = make(stories, tokenizer, chat=None, max_tokens=12)
    fresh = []
    logits = stories.forward(ids)
    for _ in range(12):
        fresh.append(again.sampler.pick(logits, stories.tokens))
        logits = stories.forward([fresh[-1]])
    assert conversation.turns[-1].answer_ids == fresh
    assert second == tokenizer.decode(ids + fresh)[len(tokenizer.decode(ids)) :]


def test_plain_text_goes_on(tokenizer):
    model = Reciting(tokenizer, " there was a dog", ". It ran", " away")
    conversation = make(model, tokenizer, chat=None)
    heard(conversation.say("Once upon a time"))
    _, notices = heard(conversation.say("named Tim"))
    assert notices == []
    heard(conversation.say(""))
    text = tokenizer.decode(model.tokens)
    assert text.strip() == "Once upon a time there was a dog named Tim. It ran away"
    assert model.n_read == len(model.tokens) + 1  # the last one again, for the empty message


@pytest.mark.parametrize(
    "before, text, result",
    [
        ("", "Once", "Once"),
        ("a dog", "named Tim", "a dog named Tim"),
        ("a dog", ", a cat", "a dog, a cat"),
        ("a dog ", "named", "a dog named"),
        ("a dog", "\nThen", "a dog\nThen"),
        ("a dog", "", "a dog"),
    ],
)
def test_how_texts_are_joined(before, text, result):
    assert joined(before, text) == result


@pytest.mark.parametrize(
    "text, said",
    [
        (" named Tim", " named Tim"),
        ("named Tim", "named Tim"),
        ("\nThen", "\nThen"),
        ("\u2603", "\u2603"),
        ("", ""),
        ("<s>x", "<s> x"),  # as anywhere: this tokenizer puts a space after a control token
    ],
)
def test_continuation_ids_say_the_text(tokenizer, text, said):
    ids = continuation_ids(tokenizer, text)
    assert b"".join(tokenizer.token_bytes(i, special=True) for i in ids).decode() == said


@pytest.mark.parametrize(
    "text", [" a dog", "a dog", "  a  dog ", "\n\nx", "<|im_end|>\nx", "", " "]
)
def test_continuation_ids_of_a_byte_level_tokenizer(smollm2_gguf, text):
    with GGUFFile(smollm2_gguf) as file:
        tokenizer = Tokenizer(file.metadata)
    ids = continuation_ids(tokenizer, text)
    assert tokenizer.decode(ids, special=True) == text


def test_stop_strings_end_the_answer_and_are_not_part_of_it(tokenizer):
    model = Reciting(tokenizer, "One dog.Two cats.Three birds.")
    conversation = make(model, tokenizer, stop=["Two", "Three"])
    assert heard(conversation.say("Count")) == ("One dog.", [])
    assert conversation.stats.reason == "stop string"
    model._script = [tokenizer.eos_id]
    _, notices = heard(conversation.say("More"))
    assert notices == []  # what was written before the stop string is not read again
    said = tokenizer.decode(conversation.turns[-1].prompt_ids)
    assert "One dog." in said and "Two" not in said


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(tokenizer):
    conversation = make(Reciting(tokenizer, "One Tw"), tokenizer, stop=["Two"])
    assert heard(conversation.say("Count"))[0] == "One Tw"


def test_the_limit_of_tokens(tokenizer):
    conversation = make(Reciting(tokenizer, "One dog. Two cats."), tokenizer, max_tokens=3)
    heard(conversation.say("Count"))
    assert conversation.stats.reason == "token limit"
    assert conversation.stats.n_written == len(conversation.turns[0].answer_ids) == 3


def test_what_is_said_about_the_end_of_an_answer(tokenizer):
    long = "There was a dog." * 300
    for options, said in (
        ({"max_tokens": ANSWER_LIMIT}, "cut at 1024 tokens"),
        ({"max_tokens": None}, "the context of 1500 tokens is full"),
        ({"max_tokens": 9}, ""),  # what the user has asked for needs no remark
    ):
        conversation = make(Reciting(tokenizer, long, n_ctx=1500), tokenizer, **options)
        heard(conversation.say("Tell"))
        assert said in end_note(conversation) and bool(said) == bool(end_note(conversation))


def interrupt(events, after):
    """Take events until the answer has some text, then no more."""
    text = ""
    for event in events:
        text += event.text if isinstance(event, Piece) else ""
        if len(text) >= after:
            break
    events.close()
    return text


def test_an_interrupted_answer_stays(tokenizer):
    model = Reciting(tokenizer, "Once there was a dog. It ran away.")
    conversation = make(model, tokenizer)
    text = interrupt(conversation.say("Tell"), after=6)
    assert conversation.stats.reason == "interrupted"
    assert conversation.turns[0].answer == text
    model._script = [tokenizer.eos_id]
    _, notices = heard(conversation.say("More"))
    assert notices == []
    assert f"[assistant]{text}" in tokenizer.decode(model.tokens)


def test_a_message_interrupted_before_its_answer_is_taken_back(tokenizer):
    conversation = make(Reciting(tokenizer, "Hm"), tokenizer)
    events = conversation.say("Tell")
    assert isinstance(next(events), Progress)
    events.close()
    assert conversation.turns == []


def test_regenerate_reads_one_token(tokenizer):
    model = Reciting(tokenizer, "One dog.", "Two cats.")
    conversation = make(model, tokenizer)
    heard(conversation.say("Tell"))
    assert heard(conversation.regenerate())[0] == "Two cats."
    assert conversation.stats.n_read == 1
    assert [turn.answer for turn in conversation.turns] == ["Two cats."]
    with pytest.raises(ValueError, match="no answer yet"):
        list(make(model, tokenizer).regenerate())


def test_undo_takes_the_last_turn_back(tokenizer):
    model = Reciting(tokenizer, "One dog.", "Two cats.", "Three birds.")
    conversation = make(model, tokenizer)
    heard(conversation.say("Tell"))
    heard(conversation.say("More"))
    assert conversation.undo() == "More"
    _, notices = heard(conversation.say("Less"))
    assert notices == []
    said = tokenizer.decode(model.tokens)
    assert "Less" in said and "More" not in said and "One dog." in said
    conversation.clear()
    assert conversation.undo() is None


def test_a_new_system_prompt_is_read_and_said(tokenizer):
    model = Reciting(tokenizer, "One dog.", "Two cats.", "Three birds.")
    conversation = make(model, tokenizer)
    heard(conversation.say("Tell"))
    conversation.system = "Be brief."
    _, notices = heard(conversation.say("More"))
    assert len(notices) == 1 and "because the system prompt changed" in notices[0]
    n_read = conversation.stats.n_read
    assert notices[0].startswith(f"re-read {n_read} of {len(conversation.turns[-1].prompt_ids)}")
    assert heard(conversation.say("Again"))[1] == []


def test_a_template_that_rewrites_answers_is_named(tokenizer):
    rewriting = CHAT.replace("m['content']", "m['content'] | replace('dog', 'wolf')")
    model = Reciting(tokenizer, "One dog.", "Two cats.")
    conversation = make(model, tokenizer, chat=rewriting)
    heard(conversation.say("Tell"))
    _, notices = heard(conversation.say("More"))
    assert len(notices) == 1 and "does not repeat the earlier turns" in notices[0]
    assert "One wolf." in tokenizer.decode(model.tokens)


def test_a_template_that_strips_answers_costs_nothing(tokenizer):
    stripping = CHAT.replace("m['content']", "m['content'] | trim")
    model = Reciting(tokenizer, " One dog.\n", "Two cats.")
    conversation = make(model, tokenizer, chat=stripping)
    heard(conversation.say("Tell"))
    assert heard(conversation.say("More"))[1] == []


def test_a_template_without_system_role_gets_it_in_the_first_message(tokenizer):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model = Reciting(tokenizer, "One dog.", "Two cats.")
    conversation = make(model, tokenizer, chat=strict + CHAT, system="Be brief.")
    _, notices = heard(conversation.say("Tell"))
    assert len(notices) == 1 and "takes no system prompt" in notices[0]
    assert heard(conversation.say("More"))[1] == []
    assert "[user]Be brief.\n\nTell" in tokenizer.decode(model.tokens)


def test_a_template_that_refuses_changes_nothing(tokenizer):
    conversation = make(
        Reciting(tokenizer), tokenizer, chat="{{ raise_exception('never') }}", system="Be brief."
    )
    with pytest.raises(TemplateError, match="never"):
        list(conversation.say("Tell"))
    assert conversation.turns == []


def test_the_oldest_turns_are_dropped_for_a_new_message(tokenizer):
    answers = [f"There are {n} dogs in the big house." for n in ("one", "two", "six", "ten")]
    model = Reciting(tokenizer, *answers, n_ctx=150)
    conversation = make(model, tokenizer, system="Count.")
    notices = []
    for message in ("First", "Second", "Third", "Fourth"):
        text, said = heard(conversation.say(message))
        assert text == answers.pop(0)
        notices += said
    assert any("the context of 150 tokens is full: the oldest" in notice for notice in notices)
    assert any("because the oldest turns were dropped" in notice for notice in notices)
    read = tokenizer.decode(model.tokens)
    assert "Count." in read and "First" not in read and "Fourth" in read
    assert len(conversation.turns) < 4


def test_the_oldest_turns_are_dropped_in_the_middle_of_an_answer(tokenizer):
    long = "There was a big dog and a little cat, and " * 6 + "they were happy."
    model = Reciting(tokenizer, "One dog ran to the house.", long, n_ctx=120)
    conversation = make(model, tokenizer, max_tokens=None)
    heard(conversation.say("First"))
    n_first = len(model.tokens)
    assert n_first + len(continuation_ids(tokenizer, long)) > 120
    script = model._script
    forward = model.forward

    def keep_reciting(ids):
        """Reading the shortened text again must not use up the script."""
        before = list(script)
        logits = forward(ids)
        if len(ids) > 1 and len(conversation.turns[-1].answer_ids) > 0:
            script[:] = before
            logits = np.zeros_like(logits)
            logits[script.pop(0)] = 1.0
        return logits

    model.forward = keep_reciting
    text, notices = heard(conversation.say("Second"))
    assert text == long and conversation.stats.reason == "end of generation"
    assert len(notices) == 1 and "the oldest turn is dropped" in notices[0]
    assert [turn.user for turn in conversation.turns] == ["Second"]


def test_with_one_turn_a_full_context_stops_the_answer(stories, tokenizer):
    stories.truncate(0)
    small = make(Reciting(tokenizer, "There was a dog." * 9, n_ctx=40), tokenizer)
    heard(small.say("Tell"))
    assert small.stats.reason == "context full"
    assert small.stats.n_context == 40


def test_the_policy_stop_keeps_everything(tokenizer):
    model = Reciting(tokenizer, "There was a big dog in the house.", n_ctx=70)
    conversation = make(model, tokenizer, policy="stop")
    heard(conversation.say("First"))
    with pytest.raises(ContextFullError, match="/undo or /clear"):
        list(conversation.say("Tell me much more about that dog and the house and the garden."))
    assert [turn.user for turn in conversation.turns] == ["First"]


def test_a_prompt_longer_than_the_context(tokenizer):
    conversation = make(Reciting(tokenizer, n_ctx=16), tokenizer)
    with pytest.raises(ContextFullError, match="the context holds 16"):
        list(conversation.say("There was a dog." * 9))
    assert conversation.turns == []


def test_scores_that_are_no_numbers_leave_no_turn(tokenizer):
    class Broken(Reciting):
        def forward(self, ids):
            self.tokens.extend(ids)
            return np.full(tokenizer.n_tokens, np.nan, np.float32)

    conversation = make(Broken(tokenizer), tokenizer)
    with pytest.raises(GGUFError, match="usable score"):
        list(conversation.say("Tell"))
    assert conversation.turns == []


def test_characters_are_never_broken(tokenizer):
    model = Reciting(tokenizer, "a \u2603 and \U0001f600!")
    conversation = make(model, tokenizer)
    pieces = [event.text for event in conversation.say("Tell") if isinstance(event, Piece)]
    assert "".join(pieces) == "a \u2603 and \U0001f600!"
    assert "\ufffd" not in "".join(pieces)


# Reasoning. This vocabulary spells tags with several tokens.


def thoughts(events):
    """The reasoning, the answer, the notices, and the ends of blocks of reasoning."""
    events = list(events)
    reasoning = "".join(event.text for event in events if isinstance(event, Thought))
    ends = [event for event in events if isinstance(event, ThoughtEnd)]
    return reasoning, *heard(events), ends


def test_reasoning_is_told_apart_and_not_sent_back(tokenizer):
    written = "<think>\nWho is it?\n</think>\n\nA dog."
    model = Reciting(tokenizer, written, "<think>Hm.</think>A cat.", "<think></think>No.")
    conversation = make(model, tokenizer)
    reasoning, answer, notices, ends = thoughts(conversation.say("Tell"))
    assert (reasoning, answer, notices) == ("Who is it?\n", "A dog.", [])
    assert len(ends) == 1 and 3 < ends[0].n_tokens < conversation.stats.n_written
    assert ends[0].seconds > 0
    turn = conversation.turns[0]
    assert turn.written == turn.covered == written
    n_prompt = len(turn.prompt_ids)
    _, answer, notices, _ = thoughts(conversation.say("More"))
    assert answer == "A cat."
    assert len(notices) == 1 and "leaves earlier reasoning out" in notices[0]
    prompt = tokenizer.decode(conversation.turns[1].prompt_ids)
    assert "Who is it?" not in prompt and "[assistant]A dog." in prompt
    assert conversation.turns[1].prompt_ids[:n_prompt] == turn.prompt_ids  # read once
    assert conversation.stats.n_read == len(conversation.turns[1].prompt_ids) - n_prompt
    reasoning, answer, notices, ends = thoughts(conversation.say("And?"))
    assert (reasoning, answer, notices, ends) == ("", "No.", [], [])  # said once, and nothing empty


def test_a_template_opens_the_reasoning(tokenizer):
    opening = CHAT.replace("[assistant]", "[assistant]<think>\n")
    model = Reciting(tokenizer, "Who?</think>A dog.", "Hm.</think>A cat.")
    conversation = make(model, tokenizer, chat=opening)
    assert thoughts(conversation.say("Tell"))[:2] == ("Who?", "A dog.")
    assert thoughts(conversation.say("More"))[:2] == ("Hm.", "A cat.")
    assert "[assistant]A dog." in tokenizer.decode(conversation.turns[1].prompt_ids)
    assert conversation.turns[0].answer == "A dog." and conversation.turns[0].reasoning == "Who?"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_that_keeps_reasoning_gets_it(tokenizer, name):
    keeping = CHAT.replace(
        "{{ m['content'] }}", f"{{% if m.{name} %}}<think>{{{{ m.{name} }}}}</think>{{% endif %}}"
        "{{ m['content'] }}",
    )  # fmt: skip
    model = Reciting(tokenizer, "<think>Who?</think>A dog.", "A cat.", "A cow.")
    conversation = make(model, tokenizer, chat=keeping)
    heard(conversation.say("Tell"))
    held = len(model.tokens)
    assert heard(conversation.say("More"))[1] == []
    assert conversation.stats.n_read == len(conversation.turns[-1].prompt_ids) - held
    assert "<think>Who?</think>A dog." in tokenizer.decode(model.tokens)
    assert heard(conversation.say("And?"))[1] == []


def test_stop_strings_end_the_answer_and_not_the_reasoning(tokenizer):
    model = Reciting(tokenizer, "<think>One dog. Two.</think>One dog. Two cats.", "Yes.")
    conversation = make(model, tokenizer, stop=[" Two"])
    assert thoughts(conversation.say("Count"))[:2] == ("One dog. Two.", "One dog.")
    turn = conversation.turns[0]
    assert turn.written == turn.covered == "<think>One dog. Two.</think>One dog."
    assert tokenizer.decode(turn.answer_ids).strip() == turn.written


def test_interrupted_reasoning_stays(tokenizer):
    model = Reciting(tokenizer, "<think>Who is it? What do they want?</think>A dog.")
    conversation = make(model, tokenizer)
    events = conversation.say("Tell")
    for event in events:
        if isinstance(event, Thought) and event.n_tokens > 5:
            break
    events.close()
    turn = conversation.turns[0]
    assert turn.answer == "" and turn.reasoning.startswith("Who") and turn.covered == turn.written
    model._script = [*continuation_ids(tokenizer, "Yes."), tokenizer.eos_id]
    assert heard(conversation.say("More"))[0] == "Yes."


def test_a_turn_without_answer_is_left_out_where_the_template_wants_one(tokenizer):
    strict = "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}"
    chat = strict + "{% endif %}{% endfor %}" + CHAT
    model = Reciting(tokenizer, "<think>Who is it?", "Yes.", "No.")
    conversation = make(model, tokenizer, chat=chat)
    heard(conversation.say("Tell"))
    assert conversation.turns[0].answer == ""
    answer, notices = heard(conversation.say("More"))
    assert answer == "Yes." and any("no empty answer" in notice for notice in notices)
    assert "Tell" not in tokenizer.decode(conversation.turns[-1].prompt_ids)
    assert heard(conversation.say("And?"))[0] == "No."


def test_an_answer_that_is_cut_in_its_reasoning(tokenizer):
    model = Reciting(tokenizer, "<think>Who is it? What do they want?</think>A dog.")
    conversation = make(model, tokenizer, max_tokens=12)
    reasoning, answer, _, ends = thoughts(conversation.say("Tell"))
    assert reasoning and not answer and len(ends) == 1
    assert conversation.stats.reason == "token limit"
    assert "only reasoning" in no_answer(conversation)


def test_marks_that_are_control_tokens(file):
    marks = [
        "<|START_THINKING|>", "<|END_THINKING|>", "<|START_TEXT|>", "<|END_TEXT|>", "<|tool|>"
    ]  # fmt: skip
    metadata = dict(file.metadata)
    tokens = metadata["tokenizer.ggml.tokens"][: -len(marks)] + marks
    types = np.array(metadata["tokenizer.ggml.token_type"])
    types[-len(marks) :] = 3
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    tokenizer = Tokenizer(metadata)
    model = Reciting(
        tokenizer,
        "<|START_THINKING|>Who?<|END_THINKING|><|START_TEXT|>A <|tool|>dog.<|END_TEXT|>",
        "<|START_TEXT|>A cat.<|END_TEXT|>",
    )
    chat = (
        "{% for m in messages %}[{{ m['role'] }}]<|START_TEXT|>{{ m['content'] }}<|END_TEXT|>"
        "{% endfor %}[assistant]{% if false %}<|START_THINKING|>{% endif %}"
    )
    conversation = make(model, tokenizer, chat=chat)
    reasoning, answer, _, _ = thoughts(conversation.say("Tell"))
    assert (reasoning, answer.replace("  ", " ")) == ("Who?", "A dog.")
    assert heard(conversation.say("More"))[0] == "A cat."
    prompt = conversation.turns[1].prompt_ids
    said = b"".join(tokenizer.token_bytes(i, special=True) for i in prompt).decode()
    assert "Who?" not in said and "dog.<|END_TEXT|>" in said
    assert "<|tool|>" not in said


SWITCHED = CHAT.replace(
    "[assistant]{% endif %}",
    "[assistant]{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% endif %}",
)


def test_reasoning_is_switched(tokenizer):
    model = Reciting(tokenizer, "<think>Who?</think>A dog.", "A cat.", "<think>Hm.</think>A cow.")
    conversation = make(model, tokenizer, chat=SWITCHED)
    heard(conversation.say("Tell"))
    n_prompt = len(conversation.turns[0].prompt_ids)
    conversation.thinking = "off"
    reasoning, answer, notices, _ = thoughts(conversation.say("More"))
    assert (reasoning, answer) == ("", "A cat.")
    assert len(notices) == 1 and "because reasoning was set to off" in notices[0]
    assert conversation.turns[1].prompt_text.endswith("[assistant]<think></think>")
    assert conversation.turns[1].prompt_ids[:n_prompt] == conversation.turns[0].prompt_ids
    conversation.thinking = "on"
    assert thoughts(conversation.say("And?"))[:2] == ("Hm.", "A cow.")
    assert conversation.turns[2].prompt_text.endswith("[assistant]")


def test_raw_text_has_no_reasoning(tokenizer):
    model = Reciting(tokenizer, "<think>Who?</think>A dog.")
    conversation = make(model, tokenizer, chat=None)
    assert thoughts(conversation.say("Tell"))[:2] == ("", "<think>Who?</think>A dog.")


def test_a_template_that_ignores_the_system_prompt_gets_it_in_the_first_message(tokenizer):
    deaf = CHAT.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    model = Reciting(tokenizer, "One dog.", "Two cats.")
    conversation = make(model, tokenizer, chat=deaf, system="Be brief.")
    _, notices = heard(conversation.say("Tell"))
    assert len(notices) == 1 and "takes no system prompt" in notices[0]
    assert heard(conversation.say("More"))[1] == []
    assert "[user]Be brief.\n\nTell" in tokenizer.decode(model.tokens)


@pytest.mark.parametrize("first", ["{{ bos_token }}", "", "<s>"])
def test_bos_is_never_doubled(tokenizer, first):
    model = Reciting(tokenizer, "One dog.", "Two cats.")
    conversation = make(model, tokenizer, chat=first + CHAT.removeprefix("{{ bos_token }}"))
    heard(conversation.say("Tell"))
    heard(conversation.say("More"))
    assert tokenizer.add_bos and model.tokens[0] == tokenizer.bos_id
    assert model.tokens.count(tokenizer.bos_id) == 1
