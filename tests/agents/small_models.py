"""Random models that are made in no time."""

from __future__ import annotations

from typing import Any

import torch

from llm_env.models import load_tokenizer


def character_model(*, width: int = 32, layers: int = 1, seed: int = 0, spread: float = 0.02, surplus: int = 0) -> Any:
    """A random Llama over the built-in tokenizer's characters.

    Args:
        width: of its hidden states.
        layers: how many.
        seed: of its weights.
        spread: their standard deviation. By default its texts are all but uniform noise; from 0.2 on they are not.
        surplus: how many rows its output layer has beyond the tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(load_tokenizer("tiny")) + surplus,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=spread,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
