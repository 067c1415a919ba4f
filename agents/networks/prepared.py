"""What a language model must be before it is a policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prepare(model: Any) -> None:
    """Let it compute the same whenever it reads the same, and refuse it where that would not give its log-probs.

    A model on the device "meta", which has no weights, is taken for one whose sibling was let through.
    """
    model.eval()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear output layer: it is not a causal language model")
    if not head.weight.is_meta:
        _check_head(model, head)
    # With dropout the same weights would give two policies, and their ratio would measure noise.
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0


@torch.no_grad()
def _check_head(model: Any, head: Any) -> None:
    """Refuse a model whose logits are not simply its output layer applied to its hidden states."""
    tokens = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    logits = model(tokens, use_cache=False).logits.float()
    ours = head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state).float()
    if not torch.allclose(logits, ours, atol=1e-3 * float(logits.abs().max())):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output layer (a soft cap, a scale): not supported, "
            "for log-probs are computed from hidden states and the output layer's weights"
        )
