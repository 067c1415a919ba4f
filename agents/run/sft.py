"""Supervised fine-tuning on a task's own answers, before reinforcement learning begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from agents.algorithms.optimizer import Optimizer
from agents.config import SFTConfig
from agents.losses.ops import token_weights
from agents.networks.network import Network
from agents.rollouts.packing import pack
from llm_env.mdp.core import TokenMDP
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import PromptSampler
from rewards import Rollout, Score


class SFT:
    """Teaches the policy to write the answers: the loss is on the answer and its end-of-sequence token only.

    A task's action mask plays no part here: the model learns to keep to it by itself, and its loss is one of the whole
    vocabulary. Where texts are then written, the mask only takes from what is no answer.

    Args:
        config: steps, batch size, learning rate, where the answers are.
        network: whose policy learns.
        mdp: the task and its prompts.
        seed: of the order of prompts.
    """

    def __init__(self, config: SFTConfig, network: Network, mdp: TokenMDP, seed: int = 0) -> None:
        self.config = config
        self.network = network
        self.mdp = mdp
        if not mdp.vocabulary.eos_tokens:
            raise ValueError("the tokenizer has no end-of-sequence token: the model could not learn where to end")
        self.answers = [self._answer(prompt.metadata) for prompt in mdp.prompts.prompts]
        self.sampler = PromptSampler(len(self.answers), seed)
        self.optimizer = Optimizer(
            network.actor_parameters(),
            config.learning_rate,
            total_steps=config.steps,
            warmup=min(config.warmup, config.steps // 2),
            decay="cosine",
            weight_decay=config.weight_decay,
        )

    @property
    def steps(self) -> int:
        """How many optimizer steps were taken."""
        return self.optimizer.steps

    def run(self, report: Callable[[int, float], None] = lambda step, loss: None) -> float:
        """All steps that are left; `report` is told the number and the loss of each, in nats per token.

        Returns:
            The last loss; NaN if no step was left.
        """
        loss = float("nan")
        self.network.train()
        while self.steps < self.config.steps:
            loss = self.step()
            if not np.isfinite(loss):
                raise ValueError(
                    f"the loss of SFT step {self.steps} is {loss}: try a lower --sft.learning-rate "
                    f"(now {self.config.learning_rate:g})"
                )
            report(self.steps, loss)
        self.network.eval()
        return loss

    def step(self) -> float:
        """One optimizer step; the mean negative log-likelihood of a token."""
        indices, _ = self.sampler.deal(self.config.batch_size)
        data = pack([self._episode(index) for index in indices.tolist()], self.mdp.vocabulary.pad_token)
        data = data.to(self.network.head.weight.device)
        self.optimizer.zero_grad()
        log_prob = self.network.actor.get_dist(data).log_prob(data["action"])
        loss = -(log_prob * token_weights(data["mask"], "token")).sum()
        loss.backward()
        self.optimizer.clip()
        self.optimizer.step()
        return float(loss.detach())

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that decides how it goes on, but the global random generators: tensors by file, and JSON."""
        tensors, optimizer = self.optimizer.state()
        state = {"optimizer": optimizer, "sampler": self.sampler.state_dict()}
        return {"weights": self.network.weights(), "optimizer": tensors}, state

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        self.network.load_weights(tensors["weights"])
        self.optimizer.load_state(tensors["optimizer"], state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])

    def _episode(self, index: int) -> Episode:
        tokens = self.answers[index]
        rollout = Rollout(prompt_tokens=self.mdp.prompts.tokens[index], tokens=tokens)
        return Episode(rollout, Score(0.0), np.zeros(len(tokens), np.float32), None, False, index, index)

    def _answer(self, metadata: Mapping[str, Any]) -> Any:
        key, vocabulary = self.config.answer, self.mdp.vocabulary
        if not isinstance(metadata.get(key), str):
            raise ValueError(
                f"SFT learns from the prompts' {key!r}, but a prompt of {self.mdp.task.name} has only "
                f"{sorted(metadata)}, or something that is no text there: set --sft.answer, or leave SFT out"
            )
        tokens = vocabulary.encode(metadata[key], add_special_tokens=False)
        if len(tokens) + 1 > self.mdp.max_new_tokens:
            raise ValueError(
                f"the answer {metadata[key][:80]!r} has {len(tokens)} tokens and an end, but the policy may write only "
                f"{self.mdp.max_new_tokens}: raise --task.max-new-tokens"
            )
        return np.append(tokens, vocabulary.eos_tokens[0])
