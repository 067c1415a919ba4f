"""A2C over texts."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import A2CLoss

from agents.losses.base import TokenLoss, policy_metrics, weighted_sum
from agents.networks.network import Network


class TokenA2CLoss(TokenLoss, A2CLoss):  # type: ignore[misc]
    """TorchRL's A2CLoss for batches of texts; see `TokenPPOLoss` for the input.

    Args:
        network: actor and critic.
        entropy: the weight of the entropy bonus.
        value: the weight of the value loss.
    """

    def __init__(self, network: Network, *, entropy: float = 0.0, value: float = 0.5) -> None:
        super().__init__(
            network.actor_head,
            network.critic_head,
            entropy_bonus=entropy != 0,
            entropy_coeff=entropy,
            critic_coeff=1.0,
            loss_critic_type="l2",
            functional=False,
            device=network.head.weight.device,
        )
        self.network = network
        self.critic_weight = value

    def actor_losses(self, data: TensorDictBase) -> TensorDict:
        """Log-prob times advantage, and the entropy bonus."""
        log_prob, distribution = self._log_probs(data)
        log_prob, entropy = log_prob[..., 0], distribution.entropy()
        out = TensorDict({"loss_objective": -weighted_sum(log_prob * data["advantage"][..., 0], data)})
        if self.entropy_bonus:
            out["loss_entropy"] = -self.entropy_coeff * weighted_sum(entropy, data)
        return out.update(policy_metrics(data, log_prob - data["action_log_prob"], entropy, None))
