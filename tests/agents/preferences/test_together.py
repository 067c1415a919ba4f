"""Pairs read as one row, beside each text read by itself: on several kinds of models, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from agents.config.preferences import RewardModelConfig
from agents.preferences.pairs import Pair
from agents.preferences.reward import RewardTrainer
from agents.preferences.together import alike, apart, shared_by, together
from llm_env.models import load_tokenizer
from tests.agents.preferences.test_reward import CONFIG

SIZES = {"vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
LLAMAS = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**LLAMAS, num_labels=1),
    "qwen2": lambda: Qwen2Config(**LLAMAS, num_labels=1),
    "gemma": lambda: GemmaConfig(**LLAMAS, num_labels=1),
    "gpt2": lambda: GPT2Config(vocab_size=1000, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, num_labels=1),
    "neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=32, num_labels=1),
    "mistral": lambda: MistralConfig(**LLAMAS, sliding_window=4, num_labels=1),  # its window is as wide as a mask says
    "bert": lambda: BertConfig(**SIZES, intermediate_size=32, num_labels=1),  # reads what comes after, too
}
AS_ONE = {"llama", "qwen2", "gemma", "gpt2", "neox"}
PAIRS = [Pair("say " * (1 + n % 3), f"{n} yes" + "!" * (n % 5), f"{n} no" + "?" * (n % 4)) for n in range(12)]


def trainer(kind: str, config: RewardModelConfig = CONFIG) -> RewardTrainer:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(KINDS[kind]())
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)  # so that a token that reads what it should not is seen
    return RewardTrainer(config, model.eval(), load_tokenizer("tiny"), PAIRS, PAIRS[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_decides_how_pairs_are_read(kind: str) -> None:
    """What is read as one row has the values and gradients of texts read by themselves; other models are not."""
    one = trainer(kind)
    assert one._together == (kind in AS_ONE)
    values, gradients = [], []
    for read in (lambda: torch.stack(one._values(one._train), -1), lambda: one._each(one._train)):
        one.model.zero_grad()
        value = read()
        (value[:, 0] - 2 * value[:, 1]).sum().backward()
        values.append(value.detach())
        gradients.append(torch.cat([w.grad.flatten() for w in one.model.parameters() if w.grad is not None]))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=float(gradients[0].abs().max()) * 1e-4)


texts = st.lists(st.integers(1, 3), min_size=1, max_size=6)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_every_token_is_there_and_reads_its_own_text(pairs: list[tuple[list[int], list[int]]]) -> None:
    rows = together(pairs, pad=0)
    mask, position = rows.reading["attention_mask"], rows.reading["position_ids"]
    for row, pair in enumerate(pairs):
        for which, text in enumerate(pair):
            columns = rows.column[row, which, : len(text)]
            assert rows.tokens[row, columns].tolist() == text
            assert position[row, columns].tolist() == list(range(len(text)))
            for place, column in enumerate(columns):
                assert mask[row, 0, column].nonzero().flatten().tolist() == columns[: place + 1].tolist()
        used = len(pair[0]) + len(pair[1]) - shared_by(*pair)
        assert set(rows.column[row, 0, : len(pair[0])].tolist()) | set(
            rows.column[row, 1, : len(pair[1])].tolist()
        ) == set(range(used))


def test_states_of_both_kinds_of_rows() -> None:
    """A body that gives each token its own number; places are asked for in any order."""
    pairs = [([5, 6, 7], [5, 8]), ([1], [1, 2])]

    def body(tokens: Tensor, **_: Tensor) -> Tensor:
        return tokens[..., None].float()

    places = torch.tensor([[[2, 0], [1, 0]], [[0, 0], [1, 0]]])
    for kind in (together, apart):
        found = kind(pairs, pad=0).states(body, places)
        assert found[..., 0].tolist() == [[[7, 5], [8, 5]], [[1, 1], [2, 1]]]


def test_a_model_that_refuses_is_read_text_by_text() -> None:
    def refuses() -> Tensor:
        raise TypeError("no such argument")

    assert not alike(refuses, lambda: torch.ones(1))
    assert not alike(lambda: torch.tensor([np.nan]), lambda: torch.ones(1))
    assert alike(lambda: torch.ones(1) * 1.0001, lambda: torch.ones(1))
