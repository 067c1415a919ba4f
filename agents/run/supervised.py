"""Learning to write given texts, in one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from agents.algorithms.optimizer import Optimizer
from agents.config import SFTConfig
from agents.losses.ops import token_weights
from agents.networks.distribution import TokenDistribution
from agents.networks.network import Network
from agents.networks.ranks import Ranks, together


class Supervised:
    """A policy and its optimizer: the loss is the mean negative log-likelihood of a token.

    It is the likelihood at temperature 1, whatever the temperature is at which the policy is to write later.

    Args:
        config: learning rate, and how many steps there are.
        network: whose policy learns.
    """

    def __init__(self, config: SFTConfig, network: Network) -> None:
        self.network = network
        if self.ranks.size > 1:
            self.ranks.parts["supervised"] = self
        self.optimizer = Optimizer(
            network.actor_parameters(),
            config.learning_rate,
            total_steps=config.steps,
            warmup=min(config.warmup, config.steps // 2),
            decay="cosine",
            weight_decay=config.weight_decay,
        )

    @property
    def ranks(self) -> Ranks:
        """The processes that learn together."""
        return self.network.ranks

    @together
    def learn(self, data: TensorDict) -> float:
        """One optimizer step; the loss before it. Several processes share the texts."""
        network, ranks = self.network, self.ranks
        data = data.to(network.head.weight.device)
        data["weight"] = token_weights(data["mask"], "token")
        if ranks.size > 1:
            data = data[ranks.share(data["length"])]
        network.train()
        self.optimizer.zero_grad()
        loss = network.compute(_loss, data)
        loss.backward()  # type: ignore[no-untyped-call]
        network.eval()
        self.optimizer.clip()
        self.optimizer.step()
        return sum(ranks.gather(float(loss.detach())))

    @together
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's tensors, and JSON."""
        return self.optimizer.state(self.ranks)

    @together
    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        self.optimizer.load_state(tensors, state, self.ranks)


def _loss(network: Network, data: TensorDict) -> Tensor:
    hidden = network.encode(data, critic=False)["hidden"]
    policy = TokenDistribution(
        hidden, network.head, data["mask"], dtype=network.compute_dtype, vocabulary=network.vocabulary
    )
    log_prob: Tensor = policy.log_prob(data["action"])
    loss: Tensor = -(log_prob * data["weight"]).sum()
    return loss
