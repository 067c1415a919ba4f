"""A reward model learns from pairs, by Bradley and Terry: the more is one worth, the surer it is preferred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from agents.config.files import ConfigError
from agents.config.preferences import RewardModelConfig
from agents.preferences.pairs import Pair
from agents.preferences.steps import PairTrainer
from agents.preferences.together import alike, moved, together
from rewards.reward_model import tokens_of, values_of, written_out


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    """`[B]` minus the log-probability that the chosen is preferred, and what draws values towards 0.

    Examples:
        >>> zero = torch.zeros(1)
        >>> pair_loss(zero, zero, zero, center=0.0)
        tensor([0.6931])
    """
    return -logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2


class RewardTrainer(PairTrainer):
    """Trains one reward model.

    Args:
        config: how.
        model: for sequence classification, with one value.
        tokenizer: its tokenizer.
        train: pairs to learn from.
        test: pairs that are held out.
    """

    config: RewardModelConfig

    def __init__(
        self, config: RewardModelConfig, model: Any, tokenizer: Any, train: Sequence[Pair], test: Sequence[Pair]
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = config.max_length
        self._pad = int(model.config.pad_token_id or 0)
        self._train = [self._tokens(pair) for pair in train]
        self._test = [self._tokens(pair) for pair in test]
        self._margins = torch.tensor([pair.margin for pair in train])
        self._written = np.array([len(answer) for pair in test for answer in (pair.chosen, pair.rejected)], float)
        super().__init__(config, model, [max(map(len, pair)) for pair in self._train])
        model.eval()
        longest = [max(self._train + self._test, key=lambda pair: max(map(len, pair)))]
        self._together = alike(lambda: self._as_one(longest), lambda: self._each(longest))

    def losses(self, indices: Sequence[int]) -> Tensor:
        """`[B]` the losses of some of the pairs to learn from."""
        chosen, rejected = self._values([self._train[index] for index in indices])
        return pair_loss(chosen, rejected, self._margins[indices].to(chosen.device), self.config.center)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """What the held-out pairs say: see `judged`."""
        order = sorted(range(len(self._test)), key=lambda index: max(map(len, self._test[index])))
        values = np.zeros((len(self._test), 2))
        for begin in range(0, len(order), self.config.micro_batch_size):
            part = order[begin : begin + self.config.micro_batch_size]
            with self.autocast():
                chosen, rejected = self._values([self._test[index] for index in part])
            values[part] = torch.stack([chosen, rejected], -1).cpu().numpy()
        return judged(values, self._written)

    def _tokens(self, pair: Pair) -> tuple[list[int], list[int]]:
        chosen, rejected = (
            tokens_of(written_out(pair.prompt, answer, self._tokenizer), self._tokenizer, self._max_length)
            for answer in (pair.chosen, pair.rejected)
        )
        return chosen, rejected

    def _values(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """`[B]` the values of the chosen and of the rejected, all read together."""
        values = self._as_one(pairs) if self._together else self._each(pairs)
        return values[:, 0], values[:, 1]

    def _each(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """`[B, 2]` values, as the model gives them by itself."""
        values: Tensor = values_of(self.model, [text for pair in pairs for text in pair])
        return values.float().view(-1, 2)

    def _as_one(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """`[B, 2]` values, each pair read as one row."""
        rows = moved(together(pairs, self._pad), self.device)
        last = torch.tensor([[[len(text) - 1] for text in pair] for pair in pairs], device=self.device)
        values: Tensor = last_layer(self.model)(rows.states(self._read, last))
        return values.float().view(-1, 2)

    def _read(self, tokens: Tensor, **reading: Tensor) -> Tensor:
        hidden: Tensor = body_of(self.model)(input_ids=tokens, use_cache=False, **reading).last_hidden_state
        return hidden


def body_of(model: Any) -> nn.Module:
    """What gives hidden states to a model for sequence classification, adapters included."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: nn.Module = whole.base_model
    return body


def last_layer(model: Any) -> nn.Linear:
    """What makes one value of a hidden state; with adapters, the one that is trained."""
    last = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1]
    if not last:
        raise ConfigError(f"{type(model).__name__} has no last layer with one value: use another --model")
    return last[-1]


def judged(values: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How well values tell which of two texts is preferred.

    Args:
        values: `[n, 2]` of the chosen and the rejected.
        lengths: `[2 n]` of those texts, in the same order.

    Returns:
        "accuracy", with half of its 95% "interval"; the "loss"; the "calibration" error, by how much the odds that it
        gives differ from how often it is right, in the mean over ten classes of them; the "length" correlation of
        values; and the "mean" and "deviation" of values.

    Examples:
        >>> found = judged(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([5.0, 3.0, 3.0, 5.0]))
        >>> found["accuracy"], found["length"]
        (0.5, 1.0)
    """
    difference = values[:, 0] - values[:, 1]
    count = max(1, len(difference))
    accuracy = float(((difference > 0) + 0.5 * (difference == 0)).sum() / count)
    sure = 1 / (1 + np.exp(-np.abs(difference)))
    classes = np.minimum((20 * (sure - 0.5)).astype(int), 9)
    gaps = [abs((sure - (difference > 0))[classes == each].sum()) for each in range(10)]
    both = values.reshape(-1)
    varies = both.std() > 0 and lengths.std() > 0
    return {
        "accuracy": accuracy,
        "interval": 1.96 * math.sqrt(accuracy * (1 - accuracy) / count),
        "loss": float(np.logaddexp(0, -difference).sum() / count),
        "calibration": float(sum(gaps) / count),
        "length": float(np.corrcoef(both, lengths)[0, 1]) if varies else 0.0,
        "mean": float(both.mean()) if len(both) else 0.0,
        "deviation": float(both.std()) if len(both) else 1.0,
    }
