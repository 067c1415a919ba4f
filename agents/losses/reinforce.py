"""REINFORCE with a learned baseline, over texts."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import ReinforceLoss

from agents.losses.base import TokenLoss, Watched, policy_metrics, value_metrics
from agents.network import Network


class TokenReinforceLoss(TokenLoss, ReinforceLoss):  # type: ignore[misc]
    """TorchRL's ReinforceLoss; see `TokenPPOLoss` for the input.

    Args:
        network: actor and critic.
        value: the weight of the value loss.
    """

    def __init__(self, network: Network, *, value: float = 0.5) -> None:
        super().__init__(
            Watched(network.actor_head), network.critic_head, loss_critic_type="l2", functional=False
        )
        self.network = network
        self.value = value

    def forward(
        self, data: TensorDictBase, *, actor: bool = True, critic: bool = True, encoded: bool = False
    ) -> TensorDict:
        """The losses of a batch, or of one of the two parts; `encoded`: see `TokenLoss.prepare`."""
        data = self.prepare(data, encoded=encoded)
        computed = super().forward(data)
        out = TensorDict()
        if actor:
            out["loss_objective"] = computed["loss_actor"]
            distribution = self.actor_network.distribution
            log_ratio = distribution.log_prob(data["action"]).detach() - data["action_log_prob"]
            out.update(policy_metrics(data, log_ratio, distribution.entropy(), None))
        if critic:
            out["loss_critic"] = self.value * computed["loss_value"]
            out.update(value_metrics(data, self.network.value_of(data), None))
        return out
