"""Reasoning in a conversation: told apart from the answer, and what later turns have of it.

The vocabulary of the story model spells tags with several tokens.
"""

import numpy as np
import pytest

from gguf_tools.reader import GGUFFile
from runtime.answer import Thought
from runtime.chat import no_answer
from runtime.tokenizer import Tokenizer
from runtime.turns import continuation_ids
from tests.reciting import CHAT, Reciting, heard, make, thoughts

THOUGHTS = "<think>\n{}\n</think>\n\n{}"
WRITTEN = {  # as the models of these templates write
    "Qwen-Qwen3-0.6B": THOUGHTS,
    "GLM-4.6": THOUGHTS,
    "Qwen3.5-4B": THOUGHTS.removeprefix("<think>\n"),
    "llama-cpp-deepseek-r1": THOUGHTS.removeprefix("<think>\n"),
    "MiniMax-M3": "<mm:think>{}</mm:think>{}",
    "ByteDance-Seed-OSS": "<seed:think>{}</seed:think>{}",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[THINK]{}[/THINK]{}",
    "google-gemma-4-31B-it": "<|channel>thought\n{}<channel|>{}",
    "Apriel-1.6-15b-Thinker-fixed": "{}\n[BEGIN FINAL RESPONSE]\n{}",
    "openai-gpt-oss-120b": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
    "<|channel|>final<|message|>{}",
    "Kimi-K3": "{}<|close|>think<|sep|><|open|>response<|sep|>{}<|close|>response<|sep|>",
    "muse-glimmer": " to=self<|message|>{}<|eom|><|start|>assistant to=user<|message|>{}",
}


@pytest.fixture(scope="module")
def file(stories260k_gguf):
    with GGUFFile(stories260k_gguf) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(file):
    return Tokenizer(file.metadata)


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


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    with GGUFFile(smollm2_gguf) as file:
        return Tokenizer(file.metadata)


@pytest.mark.parametrize("name", WRITTEN)
def test_three_turns_through_a_real_template(smollm2, llama_cpp_models, name):
    """What is held and what is read make up the text that the template renders."""
    source = (llama_cpp_models / "templates" / f"{name}.jinja").read_text()
    said = [(f"Hm, {n}?", f"Answer {n}  is fine.") for n in ("one", "two", "three")]
    model = Reciting(smollm2, *(WRITTEN[name].format(*pair) for pair in said), n_ctx=4000)
    conversation = make(model, smollm2, chat=source, system="Be brief.")
    for n, pair in enumerate(said):
        reasoning, answer, _, ends = thoughts(conversation.say(f"Question {n}?"))
        assert ((reasoning.strip(), answer), len(ends)) == (pair, 1)
        prompt = conversation.turns[-1]
        assert smollm2.decode(prompt.prompt_ids, special=True) == prompt.prompt_text
