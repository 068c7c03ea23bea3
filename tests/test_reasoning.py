"""Reasoning found in the text of an answer, however it is cut into pieces."""

import pytest

from runtime.reasoning import MAX_HEADER, TAGS, Splitter

HARMONY = "{{ '<|start|>assistant<|channel|>final<|message|>' }}"


def split(text, *, template="", prompt="", size=1):
    """Reasoning and answer of `text`, given in pieces of `size` characters."""
    splitter = Splitter(template, prompt)
    spans = []
    for start in range(0, len(text), size):
        spans += splitter.feed(text[start : start + size])
    spans.append(splitter.finish())
    assert "".join(span.text for span in spans) == text  # nothing is lost
    said = {"reasoning": "", "answer": ""}
    for span in spans:
        if not span.is_mark:
            said[span.part] += span.text
    return said["reasoning"], said["answer"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("Hi!", "", "Hi!"),
        ("<think>Hm.</think>Hi!", "Hm.", "Hi!"),
        ("\n<think>\nHm.\n</think>\n\nHi!", "\nHm.\n", "\n\n\nHi!"),
        ("<think></think>Hi!", "", "Hi!"),
        ("<think>One.</think>\n<think>Two.</think>Hi!", "One.Two.", "\nHi!"),
        ("<think>no end", "no end", ""),
        ("<think>a </thin b</think>c", "a </thin b", "c"),
        ("<think>[/THINK]</thought></think>c", "[/THINK]</thought>", "c"),
        ("<thin", "", "<thin"),
        ("<thinker>", "", "<thinker>"),
        ("a <think>b</think>", "", "a <think>b</think>"),  # an answer about tags
        ("<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
        ("a</think>b", "", "a</think>b"),
        ("", "", ""),
    ],
)
def test_tags(text, reasoning, answer, size):
    assert split(text, size=size) == (reasoning, answer)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(("opening", "closing"), TAGS)
def test_every_tag(opening, closing, size):
    assert split(f"{opening}Hm.{closing}Hi!", size=size) == ("Hm.", "Hi!")
    assert split(f"Hm.{closing}Hi!", prompt=f"<|assistant|>{opening}\n", size=size) == (
        "Hm.",
        "Hi!",
    )


@pytest.mark.parametrize(
    "prompt", ["", "<think>\n\n</think>\n\n", "I like <think> tags.\n<|assistant|>"]
)
def test_prompts_that_leave_nothing_open(prompt):
    assert split("Hi!</think>", prompt=prompt) == ("", "Hi!</think>")


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("template", "prompt", "text", "reasoning", "answer"),
    [
        (
            HARMONY,
            "<|start|>assistant",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi",
            "Hm.",
            "Hi",
        ),
        (HARMONY, "", "<|channel|>final <|constrain|>json<|message|>{}", "", "{}"),
        (
            HARMONY,
            "",
            "<|channel|>commentary<|message|>First.<|end|><|start|>assistant"
            "<|channel|>analysis<|message|>Hm.<|end|>",
            "Hm.",
            "First.",
        ),
        (
            "<|START_THINKING|>",
            "<|CHATBOT_TOKEN|><|START_THINKING|>",
            "Hm.<|END_THINKING|><|START_TEXT|>Hi<|END_TEXT|>",
            "Hm.",
            "Hi",
        ),
        (
            "between <response></response>",
            "",
            "<think>Hm.</think><response>Hi</response>",
            "Hm.",
            "Hi",
        ),
        (
            "'[BEGIN FINAL RESPONSE]'",
            "\nHere are my reasoning steps:\n",
            "One.\n[BEGIN FINAL RESPONSE]Hi",
            "One.\n",
            "Hi",
        ),
        (
            "'<|begin|>assistant<|think|><|end|>'",
            "<|begin|>assistant",
            "<|think|>Hm.<|end|><|begin|>assistant<|content|>Hi",
            "Hm.",
            "Hi",
        ),
        (
            "' to=self'",
            "<|start|>assistant",
            " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>Hi to=me",
            "Hm.",
            "Hi to=me",
        ),
        (
            "'<|open|>'",
            "<|open|>think<|sep|>",
            "Hm.<|close|>think<|sep|><|open|>response<|sep|>Hi<|close|>response<|sep|>",
            "Hm.",
            "Hi",
        ),
        (
            "<|begin_of_thought|>",
            "",
            "<|begin_of_thought|>Hm.<|end_of_thought|>\n<|begin_of_solution|>Hi",
            "Hm.",
            "\nHi",
        ),
    ],
)
def test_dialects(template, prompt, text, reasoning, answer, size):
    assert split(text, template=template, prompt=prompt, size=size) == (reasoning, answer)


def test_a_header_without_end_is_text():
    text = "<|channel|>" + "x" * (MAX_HEADER + 50)
    assert split(text, template=HARMONY) == ("", text)


def test_text_is_not_held_back_longer_than_needed():
    splitter = Splitter("", "<think>")
    assert [span.text for span in splitter.feed("a < b </thi")] == ["a < b "]
    assert [span.text for span in splitter.feed("s")] == ["</this"]
    assert [span.text for span in splitter.feed("</think>")] == ["</think>"]
    assert [span.text for span in splitter.feed("So <")] == ["So <"]  # tags are over


def test_control_tokens_count_only_where_they_are_marks():
    splitter = Splitter("", "")
    assert splitter.is_mark("[THINK]") and not splitter.is_mark("[/THINK]")
    assert not splitter.is_mark("<|tool|>")
    list(splitter.feed("[THINK]"))
    assert splitter.is_mark("[/THINK]")
    list(splitter.feed("[/THINK]Hi"))
    assert not splitter.is_mark("[THINK]")
    assert Splitter(HARMONY, "").is_mark("<|message|>")
