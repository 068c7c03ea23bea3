"""Turns, what is read for them, and what is dropped: the story model and its tokenizer, and for
the logic of long dialogues a model that recites what it is told to."""

import numpy as np
import pytest

from gguf_tools.errors import ContextFullError, GGUFError, TemplateError
from gguf_tools.reader import GGUFFile
from runtime.answer import Piece
from runtime.chat import ANSWER_LIMIT, end_note
from runtime.conversation import Progress
from runtime.model import Model
from runtime.tokenizer import Tokenizer
from runtime.turns import continuation_ids, joined
from tests.reciting import CHAT, Reciting, heard, interrupt, make


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
