"""What all that learn from pairs do alike: deal them, step, and go on where they were stopped."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents.algorithms.optimizer import Optimizer
from agents.config.preferences import PairConfig
from llm_env.tokens.prompts import PromptSampler


class PairTrainer(ABC):
    """Learns from pairs by a loss for each of them.

    Args:
        config: how.
        model: what learns; those of its weights that ask for gradients.
        lengths: of each pair to learn from: pairs of like lengths are read together.
    """

    def __init__(self, config: PairConfig, model: nn.Module, lengths: Sequence[int]) -> None:
        self.config = config
        self.model = model
        self._lengths = lengths
        self._sampler = PromptSampler(len(lengths), config.seed)
        self.total = math.ceil(config.epochs * len(lengths) / config.batch_size)
        self.optimizer = Optimizer(
            self._trained(),
            config.learning_rate,
            total_steps=self.total,
            warmup=self.total // 10,
            decay="cosine",
            weight_decay=config.weight_decay,
        )

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self.optimizer.steps

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    @abstractmethod
    def losses(self, indices: Sequence[int]) -> Tensor:
        """`[B]` the losses of some of the pairs to learn from."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """What the held-out pairs say, the mean "loss" among it."""

    def step(self) -> float:
        """One step; the mean loss of its pairs."""
        left = self.config.epochs * len(self._lengths) - self._sampler.dealt
        indices, _ = self._sampler.deal(min(self.config.batch_size, left))
        by_length = sorted(indices.tolist(), key=lambda index: self._lengths[index])
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        for begin in range(0, len(by_length), self.config.micro_batch_size):
            part = by_length[begin : begin + self.config.micro_batch_size]
            with self.autocast():
                loss = self.losses(part).sum() / len(by_length)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.optimizer.clip()
        self.optimizer.step()
        self.model.eval()
        return total

    def autocast(self) -> torch.autocast:
        """In which precision it computes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that decides how it goes on: tensors by file, and JSON."""
        tensors, optimizer = self.optimizer.state()
        weights = {name: weight.detach() for name, weight in self._trained().items()}
        return {"weights": weights, "optimizer": tensors}, {
            "optimizer": optimizer,
            "sampler": self._sampler.state_dict(),
        }

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        weights = self._trained()
        with torch.no_grad():
            for name, saved in tensors["weights"].items():
                weights[name].copy_(saved)
        self.optimizer.load_state(tensors["optimizer"], state["optimizer"])
        self._sampler.load_state_dict(state["sampler"])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
