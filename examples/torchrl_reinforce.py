"""REINFORCE with TorchRL: its collector, its advantages, its loss, and a language model as the policy.

    python examples/torchrl_reinforce.py

The policy is the built-in tiny Llama, from scratch; it reads the text again at every step, which is the simplest thing
that works with any TorchRL component. The baseline is a small network of its own.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.modules import MaskedCategorical, ValueOperator
from torchrl.objectives import ReinforceLoss
from torchrl.objectives.value import GAE

from llm_env import TorchRLTokenEnv
from llm_env.models import load_model


class NextToken(nn.Module):
    """The logits of the next token, from a causal language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """`[..., V]` from `tokens` `[..., context]` and `length` `[..., 1]`; what follows a text cannot change it."""
        last = (length - 1).flatten()
        hidden = self.model.model(tokens.flatten(0, -2)).last_hidden_state
        logits = self.model.lm_head(hidden[torch.arange(len(last)), last])
        return logits.unflatten(0, tokens.shape[:-1])


class Baseline(nn.Module):
    """The return to expect of a text."""

    def __init__(self, vocab_size: int, context: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.body = nn.Sequential(nn.Linear(context * width, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[..., 1]` from `tokens` `[..., context]`."""
        return self.body(self.embedding(tokens).flatten(-2))


def train(batches: int, num_envs: int, learning_rate: float, seed: int, task_kwargs: dict[str, Any]) -> list[float]:
    """Train; the mean return of each batch."""
    torch.manual_seed(seed)
    env = TorchRLTokenEnv("Reverse", num_envs, seed=seed, task_kwargs=task_kwargs)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(NextToken(load_model("tiny", seed=seed)), ["tokens", "length"], ["logits"]),
        ProbabilisticTensorDictModule(
            in_keys={"logits": "logits", "mask": "action_mask"},
            out_keys=["action"],
            distribution_class=MaskedCategorical,
            return_log_prob=True,
        ),
    )
    critic = ValueOperator(Baseline(env.mdp.vocabulary.size, env.mdp.context), in_keys=["tokens"])
    advantages = GAE(gamma=1.0, lmbda=1.0, value_network=critic, average_gae=True)
    loss_module = ReinforceLoss(actor, critic)
    optimizer = torch.optim.AdamW(
        [
            {"params": actor.parameters(), "lr": learning_rate},
            {"params": critic.parameters(), "lr": 10 * learning_rate},
        ]
    )
    steps = num_envs * 2 * env.mdp.max_new_tokens
    collector = Collector(
        env, actor, frames_per_batch=steps, total_frames=steps * batches, auto_register_policy_transforms=False
    )
    history: list[float] = []
    for index, batch in enumerate(collector):
        advantages(batch)
        losses = loss_module(batch)
        loss = losses["loss_actor"] + losses["loss_value"]
        ended = batch["next", "done"]
        history.append(batch["next", "reward"][ended].mean().item())  # this task pays at the end only
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        optimizer.step()
        if index % 20 == 0:
            print(f"batch {index:4d}   mean return {history[-1]:.3f}", flush=True)
    collector.shutdown()
    print(f"mean return of the last 20 batches: {sum(history[-20:]) / len(history[-20:]):.3f}")
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(**vars(args), task_kwargs={"length": 2, "alphabet": "abcd", "dense": True})


if __name__ == "__main__":
    main()
