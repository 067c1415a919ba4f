"""Direct preference optimisation: a policy learns from pairs what a reward model would have taught it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import logsigmoid

from agents.config.preferences import DPOConfig
from agents.networks.distribution import TokenDistribution
from agents.networks.network import Network
from agents.preferences.pairs import Pair
from agents.preferences.steps import PairTrainer
from agents.rollouts.packing import pack
from llm_env.tokens.episode import Episode
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout, Score


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
        self._train, self._test = ([self._episodes(pair) for pair in pairs] for pairs in (train, test))
        super().__init__(config, network, [max(map(_length, pair)) for pair in self._train])
        network.eval()
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

    def _episodes(self, pair: Pair) -> tuple[Episode, Episode]:
        vocabulary = self._vocabulary
        if isinstance(pair.prompt, str) and not vocabulary.has_chat_template:
            prompt = vocabulary.encode(pair.prompt)
        else:
            asked = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
            prompt = vocabulary.encode_chat(asked)
        chosen, rejected = (self._episode(prompt, answer) for answer in (pair.chosen, pair.rejected))
        return chosen, rejected

    def _episode(self, prompt: np.ndarray, answer: str) -> Episode:
        tokens = np.append(self._vocabulary.encode(answer, add_special_tokens=False), self._vocabulary.eos_tokens[:1])
        tokens = tokens[: self._max_length - 1]  # one token of the prompt must be left to go on from
        rollout = Rollout(prompt[-(self._max_length - len(tokens)) :], tokens.astype(np.int64))
        return Episode(rollout, Score(0.0), np.zeros(len(tokens), np.float32), None, False, 0, 0)

    @torch.no_grad()
    def _log_probs_of(self, pairs: Sequence[tuple[Episode, Episode]]) -> Tensor:
        """`[n, 2]` of many pairs."""
        order = sorted(range(len(pairs)), key=lambda index: max(map(_length, pairs[index])))
        found = torch.zeros(len(pairs), 2)
        for begin in range(0, len(order), self.config.micro_batch_size):
            part = order[begin : begin + self.config.micro_batch_size]
            with self.autocast():
                found[part] = self._log_probs([pairs[index] for index in part]).float().cpu()
        return found

    def _log_probs(self, pairs: Sequence[tuple[Episode, Episode]]) -> Tensor:
        """`[B, 2]` the log-probs of the chosen and the rejected answers."""
        texts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        data: TensorDict = pack(texts, self._vocabulary.pad_token).to(self.model.head.weight.device)
        hidden = self.model.encode(data, critic=False)["hidden"]
        here = TokenDistribution(
            hidden, self.model.head, data["mask"], dtype=self.model.compute_dtype, vocabulary=self._vocabulary
        )
        of_text: Tensor = (here.log_prob(data["action"]) * data["mask"]).sum(-1)
        return of_text.reshape(2, len(pairs)).T


def _ratio(log_probs: Tensor) -> Tensor:
    return log_probs[:, 0] - log_probs[:, 1]


def _length(episode: Episode) -> int:
    return len(episode.rollout.prompt_tokens) + len(episode.rollout.tokens)
