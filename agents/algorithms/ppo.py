"""PPO over texts: collect, score, estimate, learn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import TensorDict

from agents.algorithms.advantages import estimate_advantages, shape_rewards
from agents.algorithms.kl_control import KLController
from agents.algorithms.numbers import Average, batch_metrics, update_metrics
from agents.algorithms.optimizer import Optimizer
from agents.algorithms.scoring import GRAPH, by_length, score
from agents.config import OptimizerConfig, TrainConfig
from agents.losses import TokenKLPenaltyLoss, TokenPPOLoss
from agents.losses.ops import importance_weights, token_weights
from agents.networks.network import Network
from agents.report.warnings import StepGuard
from agents.rollouts.collector import Batch, Collector
from agents.rollouts.packing import trim
from rewards import RewardError

Tensor = torch.Tensor


@dataclass(frozen=True)
class Pass:
    """One pass over a batch: which parts learn, and in what portions."""

    number: int
    actor: bool
    critic: bool
    settings: OptimizerConfig


class PPO:
    """The algorithm. Others are subclasses that change the loss, the advantages, or do without a critic.

    An iteration collects a batch, computes the old log-probs, values and reference log-probs of its tokens in one pass,
    estimates advantages, and takes optimizer steps. Randomness is a function of the seed and the iteration, so that
    with `state` a run goes on as if it had never stopped.

    Args:
        config: see `agents.config`.
        network: actor, critic, reference.
        collector: gives batches.
        trusted: the collector's log-probs are the network's own (its engine shares the weights and rounds alike), so
            there is nothing to correct for.

    Attributes:
        iteration: how many have been done.
        tokens: how many the policy has written so far.
        batch: what the last iteration has learned from; None if there was nothing.
    """

    has_critic: ClassVar[bool] = True

    def __init__(self, config: TrainConfig, network: Network, collector: Collector, *, trusted: bool = True) -> None:
        self.config = config
        self.network = network
        self.collector = collector
        self.trusted = trusted
        self.loss = self.make_loss()
        self.kl = KLController(config.kl)
        self.guard = StepGuard(config.out, config.guard.max_skipped)
        self.actor_optimizer = self._optimizer(network.actor_parameters(), config.actor)
        self.critic_optimizer = self._optimizer(network.critic_parameters(), config.critic) if self.has_critic else None
        self.iteration = 0
        self.tokens = 0
        self.batch: Batch | None = None
        if config.kl.beta and not network.has_reference:
            raise ValueError(f"kl.beta={config.kl.beta} needs a reference model: set model.reference='initial'")

    # What an algorithm decides.

    def make_loss(self) -> Any:
        """The objective."""
        config = self.config.loss
        options: dict[str, Any] = {
            "clip": (config.clip_low, config.clip_high),
            "dual_clip": config.dual_clip,
            "entropy": config.entropy,
            "value": config.value if self.has_critic else None,
            "value_clip": config.value_clip if self.has_critic else None,
            "kl_estimator": self.config.kl.estimator,
        }
        if config.kind == "penalty":
            return TokenKLPenaltyLoss(self.network, target=config.penalty_target, **options)
        return TokenPPOLoss(self.network, **options)

    def advantages(self, data: TensorDict, reward: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T]` advantages and `[B, T]` value targets."""
        return estimate_advantages(data, reward, self.config.advantage)

    # An iteration.

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Iterate until the configured number; gives the metrics of each."""
        while self.iteration < self.config.iterations:
            yield self.step()

    def step(self) -> dict[str, float]:
        """One iteration; its metrics."""
        start = time.perf_counter()
        try:
            batch = self.collector.collect()
        except RewardError as error:  # not a number: what cannot be learned from is left out, and said
            self.guard.check(torch.tensor(torch.nan), [], TensorDict(), self.iteration + 1, f"reward: {error}")
            self.iteration += 1
            self.collector.iteration = self.iteration
            self.batch = None
            return {"iteration": self.iteration, "tokens": self.tokens, "guard/skipped": self.guard.skipped}
        collected = time.perf_counter()
        data = self.score(batch)
        scored = time.perf_counter()
        metrics = self.learn(data)
        learned = time.perf_counter()
        self.iteration += 1
        self.tokens += batch.written_tokens
        self.batch = batch
        real = int(data["mask"].sum())
        metrics |= batch_metrics(data, batch.episodes)
        metrics |= {
            "iteration": self.iteration,
            "episodes": len(batch.episodes),
            "tokens": self.tokens,
            "rollout/refilled": batch.refilled,
            "reward/failures": self.collector.writer.mdp.reward.num_failures,
            "kl/beta": self.kl.beta,
            "time/rollout": collected - start,
            "time/score": scored - collected,
            "time/update": learned - scored,
            "time/total": learned - start,
            "speed/rollout_tokens_per_s": batch.written_tokens / (collected - start),
            "speed/update_tokens_per_s": real / (learned - collected),
            "guard/skipped": self.guard.skipped,
        }
        if "kl/sequence" in metrics:
            self.kl.update(metrics["kl/sequence"], len(batch.episodes))
        every = self.config.model.refresh_reference
        if every and self.network.has_reference and self.iteration % every == 0:
            self.network.refresh_reference()
        return metrics

    def score(self, batch: Batch) -> TensorDict:
        """Add old log-probs, values, reference log-probs, rewards to learn from, advantages and value targets."""
        config, network = self.config, self.network
        rows = len(batch.data)
        reuse = self._reuses_forward(rows)
        # Asked of the configuration: an adaptive beta may touch 0 and come back.
        compares = network.has_reference and (config.kl.beta > 0 or config.kl.target is not None)
        network.train(reuse)
        data = score(
            network,
            batch.data.to(config.device),
            size=config.actor.micro_batch_size or max(1, rows // config.actor.minibatches),
            actor=not self.trusted and (network.shared or config.loss.importance_cap is not None),
            critic=self.has_critic,
            reference=compares,
            keep_graph=reuse,
        )
        if "trainer_log_prob" in data:
            data["action_log_prob"] = data["trainer_log_prob"]
            cap = config.loss.importance_cap
            if cap is not None and not self.trusted:
                data["importance_weight"] = importance_weights(
                    data["trainer_log_prob"], data["behaviour_log_prob"], data["mask"], cap
                )
        in_reward = self.kl.beta if compares and config.kl.where == "reward" else 0.0
        data["shaped_reward"] = shape_rewards(data, config.reward, in_reward)
        advantage, target = self.advantages(data, data["shaped_reward"])
        data["advantage"], data["value_target"] = advantage[..., None], target[..., None]
        return data

    def _reuses_forward(self, rows: int) -> bool:
        """Whether the first optimizer step of each part will see the whole batch at once, with the present weights."""
        first = [turn.settings for turn in self._passes() if turn.number == 0]
        whole = all(turn.minibatches == 1 and (turn.micro_batch_size or rows) >= rows for turn in first)
        return whole and self.config.model.lora.dropout == 0

    def _passes(self) -> Iterator[Pass]:
        actor, critic = self.config.actor, self.config.critic
        warming_up = self.has_critic and self.iteration < self.config.critic_warmup
        actor_epochs = 0 if warming_up else actor.epochs
        critic_epochs = critic.epochs if self.has_critic and self.config.loss.value > 0 else 0
        if self.network.shared:  # one backward pass serves both; where only one learns, its own settings count
            for number in range(max(actor_epochs, critic_epochs)):
                learns = number < actor_epochs
                yield Pass(number, learns, number < critic_epochs, actor if learns else critic)
        else:
            for number in range(actor_epochs):
                yield Pass(number, True, False, actor)
            for number in range(critic_epochs):
                yield Pass(number, False, True, critic)

    def learn(self, data: TensorDict) -> dict[str, float]:
        """The epochs: optimizer steps over random mini-batches, their gradients summed over micro-batches."""
        self.network.train()
        self.loss.kl = self.kl.beta if self.config.kl.where == "loss" and "ref_log_prob" in data else 0.0
        average, actor_epochs, stopped = Average(), 0.0, False
        limit = self.config.loss.target_kl
        for turn in self._passes():
            if turn.actor and stopped:
                continue
            graph = "hidden" if turn.actor or self.network.shared else "critic_hidden"
            for indices in self._minibatches(data, turn):
                encoded = graph in data  # from the scoring pass, good for one step
                means = self._optimize(data if encoded else data[indices], turn, encoded, average)
                data = data.exclude(graph, "distribution")
                if turn.actor and limit is not None and means.get("kl_old", 0.0) > 1.5 * limit:
                    stopped = True
                    break
            actor_epochs += turn.actor
        self.network.eval()
        means = average.means()
        if isinstance(self.loss, TokenKLPenaltyLoss) and "kl_old" in means:
            self.loss.adapt(means["kl_old"])
        metrics = update_metrics(means) | {"policy/epochs": actor_epochs}
        metrics["policy/learning_rate"] = self.actor_optimizer.rate_at(max(0, self.actor_optimizer.steps - 1))
        if self.critic_optimizer is not None:
            metrics["value/learning_rate"] = self.critic_optimizer.rate_at(max(0, self.critic_optimizer.steps - 1))
        return metrics

    def _minibatches(self, data: TensorDict, turn: Pass) -> list[Tensor]:
        kind = 2 * turn.number + (not turn.actor)
        random = np.random.default_rng([self.config.seed, self.iteration, kind])
        order = torch.from_numpy(random.permutation(len(data)))
        return [part for part in order.tensor_split(turn.settings.minibatches) if len(part)]

    def _optimize(self, minibatch: TensorDict, turn: Pass, encoded: bool, average: Average) -> dict[str, float]:
        """One optimizer step of the parts that learn in this pass."""
        optimizers = {
            "actor_norm": self.actor_optimizer if turn.actor else None,
            "critic_norm": self.critic_optimizer if turn.critic else None,
        }
        everyone = [self.actor_optimizer, *([self.critic_optimizer] if self.critic_optimizer else [])]
        for each in everyone:
            each.zero_grad()
        most = self.collector.writer.mdp.max_new_tokens
        minibatch["weight"] = token_weights(minibatch["mask"], self.config.loss.aggregate, most)
        total, here = 0.0, Average()
        size = turn.settings.micro_batch_size or len(minibatch)
        parts = [slice(None)] if encoded else by_length(minibatch, size)
        for part in parts:
            micro = minibatch if encoded else trim(minibatch[part])
            out = self.loss(micro, actor=turn.actor, critic=turn.critic, encoded=encoded)
            losses = {name: value for name, value in out.items() if name.startswith("loss_")}
            loss = sum(losses.values())
            loss.backward()
            total = total + loss.detach()
            tokens = float(micro["mask"].sum())
            here.add({name: value for name, value in out.items() if name not in losses}, tokens)
            # Losses add up over micro-batches, whatever the tokens in them; all else is a mean.
            here.add({name: value.detach() * len(parts) for name, value in losses.items()}, 1.0)
        norms = {name: optimizer.clip() for name, optimizer in optimizers.items() if optimizer is not None}
        names = " and ".join(name.removesuffix("_norm") for name in norms)
        clean = minibatch.exclude(*GRAPH)
        if not self.guard.check(torch.as_tensor(total), list(norms.values()), clean, self.iteration + 1, names):
            return {}
        for optimizer in optimizers.values():
            if optimizer is not None:
                optimizer.step()
        means = here.means()
        tokens = float(minibatch["mask"].sum())
        average.add(means | {name: float(norm) for name, norm in norms.items()}, tokens)
        return means

    def _optimizer(self, weights: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> Optimizer:
        return Optimizer(
            weights,
            config.learning_rate,
            total_steps=self.config.iterations * config.epochs * config.minibatches,
            warmup=config.warmup,
            decay=config.decay,
            weight_decay=config.weight_decay,
            betas=config.betas,
            max_gradient_norm=config.max_gradient_norm,
        )

    # Going on after a stop.

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that decides how the run goes on: tensors by file, and JSON."""
        actor_tensors, actor = self.actor_optimizer.state()
        tensors = {"weights": self.network.weights(), "actor_optimizer": actor_tensors}
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "tokens": self.tokens,
            "collector": self.collector.state_dict(),
            "kl": self.kl.state_dict(),
            "guard": self.guard.state_dict(),
            "actor_optimizer": actor,
            "reward_failures": self.collector.writer.mdp.reward.num_failures,
        }
        if self.critic_optimizer is not None:
            tensors["critic_optimizer"], state["critic_optimizer"] = self.critic_optimizer.state()
        if isinstance(self.loss, TokenKLPenaltyLoss):
            state["penalty"] = self.loss.beta
        return tensors, state

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        self.network.load_weights(tensors["weights"])
        self.actor_optimizer.load_state(tensors["actor_optimizer"], state["actor_optimizer"])
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state(tensors["critic_optimizer"], state["critic_optimizer"])
        self.iteration, self.tokens = state["iteration"], state["tokens"]
        self.collector.load_state_dict(state["collector"])
        self.collector.writer.mdp.reward.num_failures = state["reward_failures"]
        self.kl.load_state_dict(state["kl"])
        self.guard.load_state_dict(state["guard"])
        if isinstance(self.loss, TokenKLPenaltyLoss):
            self.loss.beta = state["penalty"]
