"""What is done with a batch: epochs of optimizer steps over random mini-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from agents.algorithms.optimizer import Optimizer
from agents.algorithms.scoring import GRAPH, by_length, score
from agents.algorithms.steps import StepCheck
from agents.algorithms.trust import TrustRegion, distance
from agents.config import OptimizerConfig, TrainConfig
from agents.config.switches import critic_steps
from agents.losses import TokenLoss
from agents.losses.base import logged_name
from agents.losses.ops import masked_mean, token_weights, typical_error
from agents.metrics import Average
from agents.networks.network import Network
from agents.networks.ranks import Ranks, together
from agents.rollouts.packing import trim

Tensor = torch.Tensor

ATTEMPTS = 5  # a KL grows with the square of the way only nearly
NORMS = {"actor": "policy/gradient_norm", "critic": "value/gradient_norm"}


@dataclass(frozen=True)
class Pass:
    """One pass over a batch: which parts learn, and in what portions."""

    number: int
    actor: bool
    critic: bool
    settings: OptimizerConfig


class Learner:
    """Minimises a loss on one batch after the other, with an optimizer for the actor and one for the critic.

    Args:
        config: epochs, mini-batches, learning rates, ... of both.
        network: what learns.
        loss: what is minimised.
        check: asked before each step.
        critic: whether there is one to teach.
        longest: how many tokens a text may have at most.

    Attributes:
        actor_optimizer: the policy's.
        critic_optimizer: the critic's; None if there is none.
        trust: how far a batch may move the policy, and what that makes of its learning rate.
    """

    def __init__(
        self, config: TrainConfig, network: Network, loss: TokenLoss, check: StepCheck, *, critic: bool, longest: int
    ) -> None:
        self.config = config
        self.network = network
        self.loss = loss
        self.check = check
        self.longest = longest
        self.has_critic = critic
        self.steps_critic = critic and critic_steps(config)
        self.trust = TrustRegion(config.loss.target_kl)
        if self.ranks.size > 1:
            self.ranks.parts["learner"] = self
        of_actor, of_critic = self.steps_before(config.iterations)
        self.actor_optimizer = self._optimizer(network.actor_parameters(), config.actor, of_actor)
        self.critic_optimizer = (
            self._optimizer(network.critic_parameters(), config.critic, of_critic) if self.steps_critic else None
        )

    @property
    def ranks(self) -> Ranks:
        """The processes that learn together."""
        return self.network.ranks

    def passes(self, iteration: int) -> Iterator[Pass]:
        """The passes over an iteration's batch."""
        actor, critic = self.config.actor, self.config.critic
        warming_up = self.has_critic and iteration < self.config.critic_warmup
        actor_epochs = 0 if warming_up else actor.epochs
        critic_epochs = critic.epochs if self.steps_critic else 0
        if self.network.shared:  # one backward pass serves both; where only one learns, its own settings count
            for number in range(max(actor_epochs, critic_epochs)):
                learns = number < actor_epochs
                yield Pass(number, learns, number < critic_epochs, actor if learns else critic)
        else:
            for number in range(actor_epochs):
                yield Pass(number, True, False, actor)
            for number in range(critic_epochs):
                yield Pass(number, False, True, critic)

    def steps_before(self, iteration: int) -> tuple[int, int]:
        """How many steps the schedules of actor and critic have when an iteration begins: all that its passes take.

        Those that are left out, as something was not finite or the policy had moved far enough, count as well: so a
        learning rate that falls has come to 0 at the last iteration, and not before.
        """
        warmup = min(iteration, self.config.critic_warmup)
        actor = critic = 0
        for count, like in ((warmup, 0), (iteration - warmup, self.config.critic_warmup)):
            for turn in self.passes(like):
                actor += count * turn.actor * turn.settings.minibatches
                critic += count * turn.critic * turn.settings.minibatches
        return actor, critic

    def reuses_forward(self, rows: int, iteration: int) -> bool:
        """Whether the first optimizer step of each part will see the whole batch at once, with the present weights."""
        first = [turn.settings for turn in self.passes(iteration) if turn.number == 0]
        whole = all(turn.minibatches == 1 and (turn.micro_batch_size or rows) >= rows for turn in first)
        return whole and self.config.model.lora.dropout == 0 and self.ranks.size == 1

    @together
    def score(self, data: TensorDict, **how: Any) -> TensorDict:
        """Add what the present weights make of a batch, see `agents.algorithms.scoring.score`.

        Several processes share the texts, and each gets all that is found.
        """
        data = data.to(self.network.head.weight.device)
        if self.ranks.size == 1:
            return score(self.network, data, **how)
        mine = self.ranks.share(data["length"])
        found = self.network.compute(score, data[mine], **how).exclude(*data.keys())
        order = torch.cat(self.ranks.gather(mine.cpu())).argsort()
        parts = self.ranks.gather(found.cpu())
        return data.update(torch.cat(parts)[order].to(mine.device))

    @together
    def learn(self, data: TensorDict, iteration: int, **weights: float) -> dict[str, float]:
        """The epochs: optimizer steps over random mini-batches, their gradients summed over micro-batches.

        Args:
            data: the batch, scored.
            iteration: its number, which decides the order of the texts.
            **weights: of parts of the loss that may change from batch to batch: `kl`, `entropy`.

        Returns:
            Metrics: means over the mini-batches.
        """
        self.loss.kl, self.loss.entropy = weights.get("kl", self.loss.kl), weights.get("entropy", self.loss.entropy)
        data = data.to(self.network.head.weight.device)
        self._set_schedules(iteration)
        self.network.train()
        average, actor_epochs, far = Average(), 0.0, False
        if self.has_critic and self.network.fits_values and self.config.loss.value > 0:
            error = typical_error(data["state_value"][..., 0], data["value_target"][..., 0], data["mask"])
            average.add({"value/loss": self.config.loss.value * error**2}, 1.0)
        begun = self.actor_optimizer.steps
        self._set_bound(data)
        for turn in self.passes(iteration):
            if turn.actor and far:
                continue
            graph = "hidden" if turn.actor or self.network.shared else "critic_hidden"
            portions = self._minibatches(data, turn, iteration)
            for indices in portions:
                encoded = graph in data  # from the scoring pass, good for one step
                # Until it has taken a step the policy is the old one: what a KL shows then is rounding, or dropout.
                moved = turn.actor and self.actor_optimizer.steps > begun
                limit = self.trust.limit if moved else math.inf
                stop = self._step(data if encoded else data[indices], turn, encoded, iteration, average, limit)
                data = data.exclude(graph, "distribution")
                if stop:
                    far = True
                    break
                actor_epochs += turn.actor / len(portions)
        self.network.eval()
        metrics = average.means()
        if self.trust.widest is not None and self.actor_optimizer.steps > begun:
            metrics |= self._stay_near(data)
        self.actor_optimizer.forget()
        self._zero_grad()  # no memory for them while texts are written and scored
        if "ratio/square" in metrics:  # the effective share of the samples, were they weighted by their ratios
            metrics["ratio/ess"] = metrics["ratio/mean"] ** 2 / metrics.pop("ratio/square")
        metrics["policy/epochs"] = actor_epochs
        metrics["policy/learning_rate"] = self.actor_optimizer.rate_at(max(0, self.actor_optimizer.steps - 1))
        if self.critic_optimizer is not None:
            metrics["value/learning_rate"] = self.critic_optimizer.rate_at(max(0, self.critic_optimizer.steps - 1))
        self.loss.after_batch(metrics)
        return metrics

    def _set_bound(self, data: TensorDict) -> None:
        """Decide how far this batch may move the policy, and at which rate; keep the weights as they are before it."""
        entropy = -float(masked_mean(data["action_log_prob"], data["mask"]))  # as the texts themselves show it
        # It narrows as the rate falls, or it would call for a higher one.
        self.trust.begin(entropy, self.actor_optimizer.share_at(self.actor_optimizer.steps))
        self.actor_optimizer.scale = self.trust.scale
        if self.trust.widest is not None:
            self.actor_optimizer.remember()

    def _stay_near(self, data: TensorDict) -> dict[str, float]:
        """Measure how far the policy has moved, and take back what is too far."""
        moved, kept = self._distance(data), 1.0
        self.trust.moved(moved)
        for _ in range(ATTEMPTS):
            if (share := self.trust.share_allowed(moved)) == 1:
                break
            self.actor_optimizer.pull_back(share)
            moved, kept = self._distance(data), kept * share
        return {"kl/moved": moved, "policy/step_kept": kept}

    def _distance(self, data: TensorDict) -> float:
        return self.network.compute(distance, data)

    @together
    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What `load_state` needs: tensors by file, and JSON."""
        tensors: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Any] = {"rate_scale": self.trust.scale, "loss": self.loss.state()}
        tensors["actor_optimizer"], state["actor_optimizer"] = self.actor_optimizer.state(self.ranks)
        if self.critic_optimizer is not None:
            tensors["critic_optimizer"], state["critic_optimizer"] = self.critic_optimizer.state(self.ranks)
        return tensors, state

    @together
    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        self.trust.scale = state["rate_scale"]
        self.loss.load_state(state["loss"])
        self.actor_optimizer.load_state(tensors["actor_optimizer"], state["actor_optimizer"], self.ranks)
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state(tensors["critic_optimizer"], state["critic_optimizer"], self.ranks)

    def _minibatches(self, data: TensorDict, turn: Pass, iteration: int) -> list[Tensor]:
        kind = 2 * turn.number + (not turn.actor)
        random = np.random.default_rng([self.config.seed, iteration, kind])
        order = torch.from_numpy(random.permutation(len(data)))
        return [part for part in order.tensor_split(turn.settings.minibatches) if len(part)]

    def _step(
        self, minibatch: TensorDict, turn: Pass, encoded: bool, iteration: int, average: Average, limit: float
    ) -> bool:
        """One optimizer step of the parts that learn in this pass; its metrics go to the average.

        It is left out if something is not finite; and if the policy is further than `limit` from the old one already,
        which is what is returned.
        """
        optimizers = {
            part: optimizer
            for part, optimizer, learns in (
                ("actor", self.actor_optimizer, turn.actor),
                ("critic", self.critic_optimizer, turn.critic),
            )
            if optimizer is not None and learns
        }
        self._zero_grad()  # of both, for a shared backbone gets gradients from either
        minibatch["weight"] = token_weights(minibatch["mask"], self.config.loss.aggregate, self.longest)
        total, here = torch.zeros((), device=minibatch.device), Average()
        mine = minibatch if self.ranks.size == 1 else minibatch[self.ranks.share(minibatch["length"])]
        size = turn.settings.micro_batch_size or len(mine)
        parts = [slice(None)] if encoded else by_length(mine, size)
        for part in parts:
            micro = mine if encoded else trim(mine[part])
            out = self.network.compute(self._losses, micro, actor=turn.actor, critic=turn.critic, encoded=encoded)
            losses = {name: value for name, value in out.items() if name.startswith("loss_")}
            loss: Any = sum(losses.values())
            loss.backward()
            total = total + loss.detach()
            here.add({name: value for name, value in out.items() if name not in losses}, float(micro["mask"].sum()))
            # Losses add up over micro-batches, whatever the tokens in them; all else is a mean.
            count = len(parts) * self.ranks.size
            here.add({logged_name(name): value.detach() * count for name, value in losses.items()}, 1.0)
        if self.ranks.size > 1:
            total, here = self._of_all(total, here)
        means, tokens = here.means(), float(minibatch["mask"].sum())
        if means.get("kl/old", 0.0) > limit:
            average.add(means, tokens)  # what has ended the passes is to be seen
            return True
        norms = {part: optimizer.clip() for part, optimizer in optimizers.items()}
        clean = minibatch.exclude(*GRAPH)
        if not self.check.allows(torch.as_tensor(total), norms, clean, iteration + 1):
            return False
        for optimizer in optimizers.values():
            optimizer.step()
        average.add(means | {NORMS[part]: float(norm) for part, norm in norms.items()}, tokens)
        return False

    def _zero_grad(self) -> None:
        self.actor_optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()

    def _losses(self, network: Network, /, micro: TensorDict, **how: bool) -> dict[str, Tensor]:
        return dict(self.loss(micro, **how).items())

    def _of_all(self, total: Tensor, here: Average) -> tuple[Tensor, Average]:
        """The loss and the metrics of all processes."""
        whole, everywhere = torch.zeros_like(total), Average()
        for loss, found in self.ranks.gather((total.cpu(), here)):
            whole += loss.to(whole.device)
            everywhere.join(found)
        return whole, everywhere

    def _set_schedules(self, iteration: int) -> None:
        actor_steps, critic_steps = self.steps_before(iteration)
        self.actor_optimizer.steps = actor_steps
        if self.critic_optimizer is not None:
            self.critic_optimizer.steps = critic_steps

    def _optimizer(
        self, weights: Mapping[str, torch.nn.Parameter], config: OptimizerConfig, total_steps: int
    ) -> Optimizer:
        return Optimizer(
            weights,
            config.learning_rate,
            total_steps=total_steps,
            warmup=config.warmup,
            decay=config.decay,
            weight_decay=config.weight_decay,
            betas=config.betas,
            max_gradient_norm=config.max_gradient_norm,
            state_bits=config.state_bits,
        )
