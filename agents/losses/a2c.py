"""A2C over texts."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import A2CLoss

from agents.losses.base import TokenLoss, Watched, policy_metrics, value_metrics
from agents.network import Network


class TokenA2CLoss(TokenLoss, A2CLoss):  # type: ignore[misc]
    """TorchRL's A2CLoss: log-prob times advantage, a value loss and an entropy bonus; see `TokenPPOLoss` for the input.

    Args:
        network: actor and critic.
        entropy: the weight of the entropy bonus.
        value: the weight of the value loss.
    """

    def __init__(self, network: Network, *, entropy: float = 0.0, value: float = 0.5) -> None:
        super().__init__(
            Watched(network.actor_head),
            network.critic_head,
            entropy_bonus=entropy != 0,
            entropy_coeff=entropy,
            critic_coeff=value,
            loss_critic_type="l2",
            functional=False,
            device=network.head.weight.device,
        )
        self.network = network

    def forward(
        self, data: TensorDictBase, *, actor: bool = True, critic: bool = True, encoded: bool = False
    ) -> TensorDict:
        """The losses of a batch, or of one of the two parts; `encoded`: see `TokenLoss.prepare`."""
        data = self.prepare(data, encoded=encoded)
        computed = super().forward(data)
        out = TensorDict()
        if actor:
            distribution = self.actor_network.distribution
            out.update(computed.select("loss_objective", "loss_entropy", strict=False))
            log_ratio = distribution.log_prob(data["action"]).detach() - data["action_log_prob"]
            out.update(policy_metrics(data, log_ratio, distribution.entropy(), None))
        if critic:
            out["loss_critic"] = computed["loss_critic"]
            out.update(value_metrics(data, self.network.value_of(data), None))
        return out
