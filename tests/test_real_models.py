"""Files that llama.cpp made of real models of other architectures than llama."""

from pathlib import Path

import pytest

from gguf_tools.reader import GGUFFile
from runtime.generation import generate
from runtime.model import Model
from runtime.sampling import Sampler, SamplingOptions
from runtime.templates import ChatTemplate
from runtime.tokenizer import Tokenizer, encode_chat
from tests.oracle import agreement, logits

PROSE = Path(__file__).parent / "data" / "prose.txt"
LAST = 12  # positions compared


def test_gemma3_beyond_its_window(gemma3_gguf: Path) -> None:
    """530 tokens, where the window is 512: the last positions see less than all."""
    text = "\n".join([PROSE.read_text()] * 2)
    check(gemma3_gguf, text, n_tokens=530)


def test_qwen2_beside_an_independent_pass(qwen2_gguf: Path) -> None:
    check(qwen2_gguf, PROSE.read_text(), n_tokens=32)


def check(path: Path, text: str, *, n_tokens: int) -> None:
    """The last logits beside those of an independent pass of the same weights."""
    with GGUFFile(path) as file:
        ids = Tokenizer(file.metadata).encode(text)[:n_tokens]
        assert len(ids) == n_tokens
        with Model.load(file, threads=2, n_ctx=600) as model:
            model.forward(ids[:-LAST])
            got = model.forward(ids[-LAST:], all_logits=True)
    cosine, same = agreement(got, logits(path, ids, last=LAST))
    assert cosine > 0.999
    assert same >= 1 - 1 / LAST


@pytest.mark.parametrize("model", ["gemma3_gguf", "qwen2_gguf"])
def test_they_know_capitals(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    with GGUFFile(path) as file, Model.load(file, n_ctx=64) as loaded:
        tokenizer = Tokenizer(file.metadata)
        for country, capital in (("Italy", " Rome"), ("Japan", " Tokyo")):
            loaded.truncate(0)
            text = f"Paris is the capital of France. The capital of {country} is"
            following = loaded.forward(tokenizer.encode(text))
            assert tokenizer.decode([int(following.argmax())]) == capital


def test_qwen2_answers_in_its_own_template(qwen2_gguf: Path) -> None:
    with GGUFFile(qwen2_gguf) as file, Model.load(file, n_ctx=128) as model:
        tokenizer = Tokenizer(file.metadata)
        template = ChatTemplate(file.metadata["tokenizer.chat_template"])
        question = {"role": "user", "content": "What is the capital of Italy? One sentence."}
        ids = encode_chat(tokenizer, template.render([question]))
        end = file.metadata["tokenizer.ggml.eos_token_id"]
        greedy = Sampler(SamplingOptions(temp=0.0))
        answer = generate(model, ids, greedy, stop_ids={end}, max_tokens=24)
        assert tokenizer.decode(list(answer)) == "The capital of Italy is Rome."
