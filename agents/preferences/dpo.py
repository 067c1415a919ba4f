"""Direct preference optimisation: a policy learns from pairs what a reward model would have taught it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from agents.config.preferences import DPOConfig
from agents.networks.distribution import TokenDistribution
from agents.networks.network import Network
from agents.preferences.pairs import Pair
from agents.preferences.steps import PairTrainer
from agents.preferences.together import Rows, alike, apart, moved, together
from llm_env.tokens.vocabulary import Vocabulary


def preference_loss(log_ratio: Tensor, config: DPOConfig) -> Tensor:
    """`[B]` the loss of pairs whose log-ratio, of the chosen to the rejected, has grown by `log_ratio`.

    Examples:
        >>> from pathlib import Path
        >>> preference_loss(torch.zeros(1), DPOConfig(Path("pairs.jsonl")))
        tensor([0.6931])
    """
    if config.loss == "ipo":
        return (log_ratio - 1 / (2 * config.beta)) ** 2
    odds = config.beta * log_ratio
    return -(1 - config.smoothing) * logsigmoid(odds) - config.smoothing * logsigmoid(-odds)


class Text(NamedTuple):
    """A prompt and an answer: all tokens, and how many of them are the prompt's."""

    tokens: list[int]
    prompt: int

    @property
    def answer(self) -> list[int]:
        """Its tokens."""
        return self.tokens[self.prompt :]


class DPOTrainer(PairTrainer):
    """Trains a policy.

    What the model of the beginning thinks of the pairs is computed once, before the first step.

    Args:
        config: how.
        network: whose policy learns.
        vocabulary: its tokens.
        train: pairs to learn from.
        test: pairs that are held out.
    """

    config: DPOConfig
    model: Network

    def __init__(
        self, config: DPOConfig, network: Network, vocabulary: Vocabulary, train: Sequence[Pair], test: Sequence[Pair]
    ) -> None:
        self._vocabulary = vocabulary
        self._max_length = config.max_length
        self._pad = vocabulary.pad_token
        self._train, self._test = ([self._texts(pair) for pair in pairs] for pairs in (train, test))
        super().__init__(config, network, [_length(pair) for pair in self._train])
        network.eval()
        self._rows = together
        longest = [max(self._train + self._test, key=_length)]
        if not alike(lambda: self._log_probs(longest), lambda: self._log_probs(longest, apart)):
            self._rows = apart
        self._before = {"train": self._log_probs_of(self._train), "test": self._log_probs_of(self._test)}

    def losses(self, indices: Sequence[int]) -> Tensor:
        """`[B]` the losses of some of the pairs to learn from."""
        now = self._log_probs([self._train[index] for index in indices])
        return preference_loss(_ratio(now) - _ratio(self._before["train"][indices].to(now.device)), self.config)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """What the held-out pairs say.

        The mean "loss"; "accuracy", how often the chosen has become likelier compared with the rejected, and half of
        its 95% "interval"; and by how many nats the "chosen" and the "rejected" have become likelier.
        """
        now, before = self._log_probs_of(self._test), self._before["test"]
        grown = now - before
        ratio, count = _ratio(grown), max(1, len(grown))
        accuracy = float(((ratio > 0) + 0.5 * (ratio == 0)).sum() / count)
        return {
            "loss": float(preference_loss(ratio, self.config).sum() / count),
            "accuracy": accuracy,
            "interval": 1.96 * math.sqrt(accuracy * (1 - accuracy) / count),
            "chosen": float(grown[:, 0].sum() / count),
            "rejected": float(grown[:, 1].sum() / count),
        }

    def _texts(self, pair: Pair) -> tuple[Text, Text]:
        vocabulary = self._vocabulary
        if isinstance(pair.prompt, str) and not vocabulary.has_chat_template:
            prompt = vocabulary.encode(pair.prompt)
        else:
            asked = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
            prompt = vocabulary.encode_chat(asked)
        chosen, rejected = (self._text(prompt, answer) for answer in (pair.chosen, pair.rejected))
        return chosen, rejected

    def _text(self, prompt: np.ndarray, answer: str) -> Text:
        tokens = np.append(self._vocabulary.encode(answer, add_special_tokens=False), self._vocabulary.eos_tokens[:1])
        tokens = tokens[: self._max_length - 1]  # one token of the prompt must be left to go on from
        begin = prompt[-(self._max_length - len(tokens)) :]
        return Text([*begin.tolist(), *tokens.astype(int).tolist()], len(begin))

    @torch.no_grad()
    def _log_probs_of(self, pairs: Sequence[tuple[Text, Text]]) -> Tensor:
        """`[n, 2]` of many pairs."""
        order = sorted(range(len(pairs)), key=lambda index: _length(pairs[index]))
        found = torch.zeros(len(pairs), 2)
        for begin in range(0, len(order), self.config.micro_batch_size):
            part = order[begin : begin + self.config.micro_batch_size]
            with self.autocast():
                found[part] = self._log_probs([pairs[index] for index in part]).float().cpu()
        return found

    def _log_probs(self, pairs: Sequence[tuple[Text, Text]], kind: Callable[..., Rows] | None = None) -> Tensor:
        """`[B, 2]` the log-probs of the chosen and the rejected answers."""
        steps = max(len(text.answer) for pair in pairs for text in pair)
        action, place = np.zeros((2, len(pairs), 2, steps), np.int64)
        mask = np.zeros((len(pairs), 2, steps), bool)
        for row, pair in enumerate(pairs):
            for which, text in enumerate(pair):
                count = len(text.answer)
                action[row, which, :count] = text.answer
                place[row, which, :count] = np.arange(text.prompt - 1, len(text.tokens) - 1)
                mask[row, which, :count] = True
        texts = [(chosen.tokens, rejected.tokens) for chosen, rejected in pairs]
        rows = moved((kind or self._rows)(texts, self._pad), self.device)
        real = torch.from_numpy(mask).to(self.device)
        hidden = rows.states(self.model.backbone.read, torch.from_numpy(place).to(self.device))
        here = TokenDistribution(
            hidden, self.model.head, real, dtype=self.model.compute_dtype, vocabulary=self._vocabulary
        )
        return (here.log_prob(torch.from_numpy(action).to(self.device)) * real).sum(-1)


def _ratio(log_probs: Tensor) -> Tensor:
    return log_probs[:, 0] - log_probs[:, 1]


def _length(pair: tuple[Text, Text]) -> int:
    return max(len(text.tokens) for text in pair)
