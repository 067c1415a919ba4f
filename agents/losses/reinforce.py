"""REINFORCE with a learned baseline, over texts."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import ReinforceLoss

from agents.losses.base import TokenLoss, policy_metrics, weighted_sum
from agents.networks.network import Network


class TokenReinforceLoss(TokenLoss, ReinforceLoss):  # type: ignore[misc]
    """TorchRL's ReinforceLoss for batches of texts; see `TokenPPOLoss` for the input.

    Args:
        network: actor and critic.
        value: the weight of the value loss.
    """

    def __init__(self, network: Network, *, value: float = 0.5) -> None:
        super().__init__(network.actor_head, network.critic_head, loss_critic_type="l2", functional=False)
        self.network = network
        self.critic_weight = value

    def actor_losses(self, data: TensorDictBase) -> TensorDict:
        """Log-prob times advantage."""
        distribution = self.actor_network.get_dist(data)
        log_prob = distribution.log_prob(data["action"])
        out = TensorDict({"loss_objective": -weighted_sum(log_prob * data["advantage"][..., 0], data)})
        return out.update(policy_metrics(data, log_prob - data["action_log_prob"], distribution.entropy(), None))
