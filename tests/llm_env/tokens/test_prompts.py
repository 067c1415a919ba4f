"""Prompts: reading them, encoding them, and the order in which they are dealt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_env.models import load_tokenizer
from llm_env.tokens.prompts import Prompt, PromptSampler, TokenizedPrompts, read_prompts
from llm_env.tokens.vocabulary import Vocabulary


@given(
    num_prompts=st.integers(1, 7), seed=st.integers(0, 99), group=st.integers(1, 3), cuts=st.lists(st.integers(0, 9))
)
def test_every_epoch_deals_every_prompt_once_per_group(
    num_prompts: int, seed: int, group: int, cuts: list[int]
) -> None:
    """In pieces of any size, resumed after each of them."""
    sampler = PromptSampler(num_prompts, seed, completions_per_prompt=group)
    indices: list[int] = []
    groups: list[int] = []
    for cut in [*cuts, 3 * num_prompts * group]:
        resumed = PromptSampler(num_prompts, seed=12345, completions_per_prompt=group)
        resumed.load_state_dict(sampler.state_dict())
        some, their_groups = sampler.deal(cut)
        assert resumed.deal(cut)[0].tolist() == some.tolist()
        indices += some.tolist()
        groups += their_groups.tolist()
    assert groups == [i // group for i in range(len(groups))]
    whole = num_prompts * group
    for start in range(0, len(indices) - whole + 1, whole):
        epoch = indices[start : start + whole]
        assert sorted(epoch[::group]) == list(range(num_prompts))
        assert all(len(set(epoch[i : i + group])) == 1 for i in range(0, whole, group))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = PromptSampler(50, seed=0).deal(100)[0]
    assert first[:50].tolist() != first[50:].tolist()
    assert first.tolist() == PromptSampler(50, seed=0).deal(100)[0].tolist()
    assert first.tolist() != PromptSampler(50, seed=1).deal(100)[0].tolist()
    assert PromptSampler(3, shuffle=False).deal(5)[0].tolist() == [0, 1, 2, 0, 1]


def test_bad_samplers() -> None:
    with pytest.raises(ValueError, match="no prompts to deal"):
        PromptSampler(0)
    with pytest.raises(ValueError, match="completions_per_prompt must be at least 1, got 0"):
        PromptSampler(2, completions_per_prompt=0)
    with pytest.raises(ValueError, match="they are not the same deck"):
        PromptSampler(4).load_state_dict(PromptSampler(3).state_dict())


def test_reading(tmp_path: Path) -> None:
    rows = [{"q": "1+1=", "answer": "2"}, {"q": [{"role": "user", "content": "hi"}], "answer": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for source in (path, str(path), rows, iter(rows)):
        prompts = read_prompts(source, "q")
        assert [prompt.metadata for prompt in prompts] == [{"answer": "2"}, {"answer": "x"}]
        assert prompts[0].text == "1+1="
    with pytest.raises(KeyError, match=r"no field 'prompt'; its fields are \['answer', 'q'\]"):
        read_prompts(rows)
    for wrong in ([3], [{"prompt": 12}], [{"prompt": None}], {"prompt": "a"}):
        with pytest.raises(TypeError, match="prompt"):
            read_prompts(wrong)
    path.write_text('{"prompt": "a"}\n{"prompt": "b",\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: Expecting"):
        read_prompts(path)


class FakeChat:
    """A vocabulary that writes down which way it was asked."""

    bos_token = 1

    def __init__(self, has_chat_template: bool) -> None:
        self.has_chat_template = has_chat_template

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(c) for c in text], dtype=np.int64) for text in texts]

    def encode_chat(self, messages: list[dict[str, str]], tools: object) -> np.ndarray:
        return np.array([-1, *(ord(c) for m in messages for c in m["content"])], dtype=np.int64)


@pytest.mark.parametrize(
    ("chat", "template", "plain", "messages"),
    [(False, True, [97], [-1, 98]), (True, True, [-1, 97], [-1, 98]), (None, True, [-1, 97], [-1, 98]),
     (None, False, [97], [-1, 98])],
)  # fmt: skip
def test_chat_templates(chat: bool | None, template: bool, plain: list[int], messages: list[int]) -> None:
    prompts = [Prompt("a"), Prompt([{"role": "user", "content": "b"}])]
    tokenized = TokenizedPrompts.encode(prompts, FakeChat(template), chat, longest=9)  # type: ignore[arg-type]
    assert [tokens.tolist() for tokens in tokenized.tokens] == [plain, messages]


def test_an_empty_prompt_begins_with_the_beginning_of_sequence() -> None:
    vocabulary = Vocabulary(load_tokenizer("tiny"))
    tokenized = TokenizedPrompts.encode([Prompt(""), Prompt("b")], vocabulary, longest=9)
    assert tokenized.tokens[0].tolist() == [vocabulary.bos_token]
    assert tokenized.tokens[1].tolist() == vocabulary.encode("b").tolist()


def test_a_key_sets_prompts_with_the_same_text_apart() -> None:
    one, other, plain = Prompt("begin", key="1"), Prompt("begin", key="2"), Prompt("begin")
    assert len({one.identity, other.identity, plain.identity}) == 3
    assert one.written == plain.identity == "begin"
