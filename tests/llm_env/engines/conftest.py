"""Small models, and an engine that needs no model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llm_env.engines.base import EngineBase
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_tokenizer
from llm_env.tokens.vocabulary import Vocabulary

SMALL = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"initializer_range": 0.2}  # so that the distributions are far from uniform, and mistakes show


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are not faster with two, and much slower beside another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(family: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    llama_like: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **SMALL,
        **WIDE,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**{**llama_like, "tie_word_embeddings": True, **more})).eval()
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**{**llama_like, **more})).eval()
    if family == "gptj":  # writes its attention out itself, so that ours cannot take its place
        gptj_like = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
        return GPTJForCausalLM(GPTJConfig(**{**gptj_like, **SMALL, **WIDE, **more})).eval()
    assert family == "gpt2"
    config = GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SMALL, **WIDE, **more})
    return GPT2LMHeadModel(config).eval()


def make_engine_of(model: Any, num_slots: int = 4, context: int = 24) -> TransformersEngine:
    return TransformersEngine(model, load_tokenizer("tiny"), num_slots=num_slots, context=context)


def full_logits(model: Any, tokens: Any) -> torch.Tensor:
    """`[length, V]` what transformers says about a text, with no cache, no padding and no batch."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None]).logits[0].float()


class AlphabetEngine(EngineBase):
    """Goes on with the next letter of the alphabet, nearly for sure; "z" is followed by <eos>. No model, no wait."""

    def __init__(self, num_slots: int = 2, context: int = 32) -> None:
        super().__init__(num_slots=num_slots, context=context, vocabulary=Vocabulary(load_tokenizer("tiny")))
        self.calls: list[tuple[str, list[int]]] = []

    def _logits(self, last: list[int]) -> torch.Tensor:
        logits = torch.zeros(len(last), self.vocab_size)
        z = self.vocabulary.encode("z")[0]
        following = [2 if token == z else token + 1 for token in last]
        logits[torch.arange(len(last)), following] = 50.0
        return logits

    def _advance(self, slots: Any, token_lists: Any, fresh: Any, prompts: Any) -> torch.Tensor:
        for kind, where in (("step", slots), ("start", fresh)):
            if len(where):
                self.calls.append((kind, where.tolist()))
        return self._logits([int(tokens[-1]) for tokens in (*token_lists, *prompts)])

    def _log_probs(self, sequences: Any) -> Any:
        raise NotImplementedError

    def _load_weights(self, named_tensors: Any) -> None:
        pass
