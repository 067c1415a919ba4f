"""What every loss over texts does the same way: leave padding out, run the backbone once, weigh the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import PPOLoss

from agents.config import LossConfig
from agents.losses.ops import Estimator, kl_estimate, masked_mean, token_weights, zero_padding
from agents.losses.terms import Term, kl_to_reference, loss_term, negative_entropy
from agents.networks.network import Network

Tensor = torch.Tensor

# Whatever padding holds in these would reach the gradient as 0 * NaN.
PER_STEP = ("action_log_prob", "ref_log_prob", "importance_weight", "advantage", "value_target", "state_value")


class TokenLoss(PPOLoss):  # type: ignore[misc]
    """A loss of policy and critic for batches of texts of different lengths, on TorchRL's PPOLoss.

    A loss of your own is a subclass with a `gain`, registered with `register_loss`. All else is here, for all losses:
    the entropy bonus, the KL to the reference, registered terms, the critic, padding, and the weights of tokens.

    On batches without padding the losses are TorchRL's own (with `loss_critic_type="l2"`); padding changes no loss,
    gradient or metric; actor and critic that share a backbone cost one pass of it. The input holds

        tokens, state_position, mask, action, action_log_prob, advantage [B, T, 1]; with a critic value_target and
        state_value [B, T, 1]; with a KL term ref_log_prob; optionally weight and importance_weight [B, T], and
        value_scale [B]

    and the output scalars: `loss_objective`, `loss_critic`, `loss_entropy`, `loss_kl` and `loss_NAME` of each
    registered term (what was asked for), to be summed; and metrics under the names they are logged by. A loss is the
    sum over tokens of `weight` (by default one over their number) times what each token costs. The weights are made
    once for an optimizer step, so the losses of its micro-batches add up; metrics are means over real tokens, to be
    averaged as `agents.metrics` says.

    Args:
        network: actor and critic.
        config: the weights of the parts, and what else the loss reads.
        critic: whether there is a critic to teach.
        value_clip: how far a new value may move from the old one, as a multiple of the batch's `value_scale` (1 where
            it has none); the loss does not reward moving further.
        kl_estimator: of the KL to the reference, "k2" or "k3"; see `agents.losses.terms.kl_to_reference`.
        **options: of the TorchRL loss that a subclass builds on.

    Attributes:
        settings: the settings that this class itself reads, by their dotted names (those of its bases are added). A
            setting that nothing reads is refused, so a loss must list all that it looks at.
        entropy: the weight of the entropy bonus; it may be changed while training.
        kl: the weight of the KL to the reference; so may it.

    Examples:
        >>> from agents.config import ModelConfig
        >>> from llm_env.models import load_model
        >>> class Likelihood(TokenLoss):
        ...     def gain(self, log_prob, old_log_prob, advantage):
        ...         return log_prob * advantage, {}
        >>> loss = Likelihood(Network(load_model("tiny"), ModelConfig()), critic=False)
        >>> text = {"tokens": torch.tensor([[5, 6, 7]]), "mask": torch.tensor([[True]])}
        >>> step = {"action": torch.tensor([[7]]), "state_position": torch.tensor([[1]])}
        >>> old = {"action_log_prob": torch.tensor([[-4.0]]), "advantage": torch.tensor([[[1.0]]])}
        >>> out = loss(TensorDict({**text, **step, **old}, [1]))
        >>> bool(out["loss_objective"] > 0), "ratio/mean" in out
        (True, True)
    """

    settings: ClassVar[tuple[str, ...]] = ("loss.entropy", "loss.entropy_decay", "loss.value", "loss.terms")

    def __init__(
        self,
        network: Network,
        config: LossConfig = LossConfig(),  # noqa: B008
        *,
        critic: bool = True,
        value_clip: float | None = None,
        kl_estimator: Estimator = "k2",
        **options: Any,
    ) -> None:
        super().__init__(
            network.actor_head,
            network.critic_head if critic else None,
            critic_coeff=1.0 if critic else None,
            entropy_bonus=False,  # it is one of the terms
            loss_critic_type="l2",
            log_explained_variance=False,
            functional=False,
            device=network.head.weight.device,
            **options,
        )
        self.network = network
        self.config = config
        self.critic_weight = config.value if critic else 0.0
        self.value_clip = value_clip if critic else None
        self.entropy = config.entropy
        self.kl = 0.0
        self._kl_term = kl_to_reference(kl_estimator)

    # What a loss decides.

    def gain(self, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How much each token is worth: what the loss makes large.

        Args:
            log_prob: `[B, T]` of the actions, now.
            old_log_prob: `[B, T]` under the policy that chose them.
            advantage: `[B, T]`.

        Returns:
            `[B, T]` the gain of each token, and metrics of its own `[B, T]`, whose means over real tokens are logged.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gain: say what each token is worth")

    def after_batch(self, metrics: Mapping[str, float]) -> None:
        """Called after the last step on each batch with its metrics: the place for a schedule."""

    def state(self) -> dict[str, Any]:
        """What `load_state` needs, as JSON can hold it (`state_dict` is PyTorch's, and has the network's weights)."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another loss was."""

    # What all share.

    def prepare(
        self, data: TensorDictBase, *, actor: bool = True, critic: bool = True, encoded: bool = False
    ) -> TensorDictBase:
        """A shallow copy whose padding is clean, with weights and the hidden states that the heads need.

        Args:
            data: the batch.
            actor: whether the actor's are needed.
            critic: whether the critic's are needed.
            encoded: they are there already, with their graph, from the weights as they are now.
        """
        data = data.clone(False)
        mask = data["mask"]
        for key in PER_STEP:
            if (values := data.get(key, None)) is not None:
                data.set(key, zero_padding(values, mask[..., None] if values.ndim == 3 else mask))
        if "weight" not in data:
            data.set("weight", token_weights(mask, "token"))
        if "importance_weight" in data:
            data.set("advantage", data["advantage"] * data["importance_weight"][..., None])
        return data if encoded else self.network.encode(data, actor=actor, critic=critic)

    def forward(
        self, data: TensorDictBase, *, actor: bool = True, critic: bool = True, encoded: bool = False
    ) -> TensorDict:
        """The losses of a batch, or of one of the two parts; `encoded`: see `prepare`."""
        critic = critic and self.critic_weight > 0
        data = self.prepare(data, actor=actor, critic=critic, encoded=encoded)
        out = TensorDict()
        if actor:
            out.update(self.actor_losses(data))
        if critic:
            out.update(self.critic_losses(data))
        return out

    def critic_losses(self, data: TensorDictBase) -> TensorDict:
        """The critic's squared error; of a value that has moved too far, its error as if it had stopped on the way."""
        new = data.copy()  # the new values take the place of the old ones there
        per_token = self.loss_critic(new)[0][..., 0]
        out = TensorDict()
        if self.value_clip is not None:
            old, moved = data["state_value"][..., 0], (new["state_value"] - data["state_value"])[..., 0]
            limit = self.value_clip * data.get("value_scale", torch.ones_like(old[:, 0]))[:, None]
            stopped = old + torch.maximum(torch.minimum(moved, limit), -limit)
            per_token = torch.maximum(per_token, (stopped - data["value_target"][..., 0]) ** 2)
            out["value/clip_fraction"] = masked_mean((moved.abs() > limit).float(), data["mask"])
        out["loss_critic"] = weighted_sum(per_token, data) * self.critic_weight
        return out

    def actor_losses(self, data: TensorDictBase) -> TensorDict:
        """The objective, the other terms, and the metrics of the policy."""
        distribution = self.actor_network.get_dist(data)
        log_prob = distribution.log_prob(data["action"])
        gain, own = self.gain(log_prob, data["action_log_prob"], data["advantage"][..., 0])
        out = TensorDict({"loss_objective": -weighted_sum(gain, data)})
        for name, weight, term in self._terms():
            out[f"loss_{name}"] = weight * weighted_sum(term(log_prob, distribution, data), data)
        out.update(policy_metrics(data["mask"], log_prob - data["action_log_prob"], distribution.entropy()))
        for name, values in own.items():
            if name in out or name.startswith("loss_"):
                raise ValueError(
                    f"the loss {type(self).__name__} has a metric {name!r}, a name that is taken (those that begin "
                    "with loss_ are losses): give it another, such as 'policy/my_share'"
                )
            out[name] = masked_mean(values.detach(), data["mask"])
        return out

    def _terms(self) -> Iterator[tuple[str, float, Term]]:
        """Names, weights and costs of what is added to the objective."""
        if self.entropy:
            yield "entropy", self.entropy, negative_entropy
        if self.kl:
            yield "kl", self.kl, self._kl_term
        for name, weight in self.config.terms.items():
            yield name, weight, loss_term(name)


def weighted_sum(per_token: Tensor, data: TensorDictBase) -> Tensor:
    """`[B, T]` to a scalar, by the weights of the tokens."""
    weight: Tensor = data["weight"]
    return (zero_padding(per_token, data["mask"]) * weight).sum()


def logged_name(loss: str) -> str:
    """What a loss of the output is logged under.

    Examples:
        >>> [logged_name(name) for name in ("loss_objective", "loss_critic", "loss_entropy")]
        ['policy/loss', 'value/loss', 'policy/entropy_loss']
    """
    names = {"loss_objective": "policy/loss", "loss_critic": "value/loss"}
    return names.get(loss, f"policy/{loss.removeprefix('loss_')}_loss")


@torch.no_grad()
def policy_metrics(mask: Tensor, log_ratio: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """The scalars to log of `[B, T]` log-ratios to the old policy, and of entropies.

    `ratio/square` is what `ratio/ess` is made of, once the micro-batches are put together.
    """
    ratio = log_ratio.exp()
    real = ratio[mask] if mask.any() else torch.ones(1, device=ratio.device)
    return {
        "policy/entropy": masked_mean(entropy, mask),
        "kl/approx": masked_mean(-log_ratio, mask),
        "kl/old": masked_mean(kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3"), mask),
        "ratio/mean": masked_mean(ratio, mask),
        "ratio/square": masked_mean(ratio**2, mask),
        "ratio/max": real.max(),
        "ratio/min": real.min(),
    }
