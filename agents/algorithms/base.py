"""What an algorithm is: the loop that all share, and what each decides."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from tensordict import TensorDict

from agents.algorithms.advantages import advantage_estimator
from agents.algorithms.kl_control import KLController
from agents.algorithms.learner import Learner
from agents.algorithms.numbers import batch_metrics, reply_metrics
from agents.algorithms.schedules import share_left
from agents.algorithms.scoring import FEATURES, LAST_FEATURES
from agents.algorithms.shaping import shape_rewards
from agents.algorithms.steps import StepCheck
from agents.config import TrainConfig
from agents.losses import TokenLoss, loss_class
from agents.losses.ops import importance_weights, typical_error
from agents.networks.network import Network
from agents.networks.value import FOLDS
from agents.rollouts.collector import Batch, Collector
from agents.rollouts.hints import pack_hints
from agents.rollouts.masks import INDEX, TABLE
from rewards import RewardError

Tensor = torch.Tensor

SEEN = (
    *("tokens", "state_position", "mask", "action", "total", INDEX, TABLE, "behaviour_log_prob", "action_log_prob"),
    *(("next", "reward"), "ref_log_prob", "shaped_reward", "state_value", "value_target", "advantage"),
)
"""What is kept of a batch that was learned from, to be looked at."""


class Algorithm:
    """The loop, of which each algorithm is a subclass that says what is its own.

    An iteration collects a batch, computes the old log-probs, values and reference log-probs of its tokens in one pass,
    estimates advantages, and takes optimizer steps. Randomness is a function of the seed and the iteration, so that
    with `state` a run goes on as if it had never stopped.

    A subclass says which loss and which advantages it has, by their names, and whether a critic learns along; or it
    overrides `make_loss`, `advantages`, `learn`. It is made known by `register_algorithm`. Keyword arguments of its own
    constructor are settings of its own: `--algo-args NAME VALUE`.

    Args:
        config: see `agents.config`.
        network: actor, critic, reference.
        collector: gives batches.
        trusted: the collector's log-probs are the network's own (its engine shares the weights and rounds alike), so
            there is nothing to correct for.

    Attributes:
        loss_kind: the registered loss; None: that of `loss.kind`.
        advantage_kind: the registered advantage estimator; None: that of `advantage.kind`.
        has_critic: whether there is one.
        settings: the settings among those that are an algorithm's choice which this class reads, by dotted names or as
            "part.*"; those of its bases, its loss and its estimator are added. What is not read is refused.
        iteration: how many have been done.
        tokens: how many the policy has written so far.
        batch: what the last iteration has learned from; None if there was nothing.
        scored: the same with what was made of it: rewards, values, advantages.

    Examples:
        >>> from agents import build, register_algorithm
        >>> @register_algorithm("imitate_the_best")
        ... class ImitateTheBest(Algorithm):
        ...     loss_kind = "policy_gradient"
        ...     has_critic = False
        ...     def advantages(self, data, reward):
        ...         total = reward.sum(1, keepdim=True)
        ...         return (total == total.max()) * data["mask"].float(), None
        >>> config = TrainConfig(algo="imitate_the_best", iterations=1)
        >>> run = build(config.replace(task__args={"length": 2}, rollout__batch_size=8))
        >>> run.algorithm.step()["iteration"]
        1
        >>> run.close()
    """

    loss_kind: ClassVar[str | None] = None
    advantage_kind: ClassVar[str | None] = None
    has_critic: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = (
        *("loss.aggregate", "loss.importance_cap", "loss.target_kl", "kl.*"),
        *("critic.*", "critic_warmup", "model.critic", "model.hints"),
    )

    def __init__(self, config: TrainConfig, network: Network, collector: Collector, *, trusted: bool = True) -> None:
        self.config = config
        tokens = collector.writer.mdp.vocabulary.size
        if network.num_tokens != tokens:
            raise ValueError(
                f"the network chooses among {network.num_tokens} tokens, but the texts are made of {tokens}: their "
                "log-probs would differ. Make it with Network(model, vocabulary=mdp.vocabulary)"
            )
        if config.kl.beta and not network.has_reference:
            raise ValueError(f"kl.beta={config.kl.beta} needs a reference: make the network with reference=True")
        if network.config.critic != config.model.critic and self.has_critic:
            raise ValueError(
                f"the network has a critic of the kind {network.config.critic!r}, but model.critic is "
                f"{config.model.critic!r}: make it with Network(model, config.model)"
            )
        task = collector.writer.mdp.task
        if network.num_hints not in (0, len(task.hint_names)):
            raise ValueError(
                f"the network's critic is told {network.num_hints} numbers about each state, but the task {task.name} "
                f"has the hints {tuple(task.hint_names)}: make it with Network(..., hints={len(task.hint_names)}), or 0"
            )
        self.network = network
        self.collector = collector
        self.trusted = trusted
        self.loss = self.make_loss()
        self.kl = KLController(config.kl)
        self.step_check = StepCheck(config.out, config.guard.max_skipped)
        self.learner = Learner(
            config,
            network,
            self.loss,
            self.step_check,
            critic=self.has_critic,
            longest=collector.writer.mdp.max_new_tokens,
        )
        self.iteration = 0
        self.tokens = 0
        self.batch: Batch | None = None
        self.scored: TensorDict | None = None

    # What an algorithm decides.

    @classmethod
    def problems(cls, config: TrainConfig) -> Iterator[str]:
        """What it cannot work with, a line each: the flag, its value, what was expected, what to do."""
        yield from ()

    def make_loss(self) -> TokenLoss:
        """The objective."""
        loss = loss_class(self.loss_kind or self.config.loss.kind)
        kl, in_loss = self.config.kl, self.config.kl.where == "loss"
        estimator = (kl.estimator if in_loss else None) or "k2"
        return loss(self.network, self.config.loss, critic=self.has_critic, kl_estimator=estimator)

    def advantages(self, data: TensorDict, reward: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, T]` advantages and, for a critic, `[B, T]` value targets.

        It may be asked twice about a batch, as a critic that is fitted learns from the targets first.
        """
        estimate = advantage_estimator(self.advantage_kind or self.config.advantage.kind)
        return estimate(data, reward, self.config.advantage)

    def learn(self, data: TensorDict) -> dict[str, float]:
        """Learn from a batch that is scored; gives the metrics of that."""
        in_loss = self.config.kl.where == "loss" and "ref_log_prob" in data
        bonus, progress = self.config.loss, self.iteration / max(1, self.config.iterations)
        entropy = bonus.entropy * share_left(bonus.entropy_decay, progress)
        return self.learner.learn(data, self.iteration, kl=self.kl.beta if in_loss else 0.0, entropy=entropy)

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
            self.step_check.reward_failed(error, self.iteration + 1)
            self.iteration += 1
            self.collector.iteration = self.iteration
            self.batch = self.scored = None
            return {"iteration": self.iteration, "tokens": self.tokens} | self._guarded()
        self.step_check.reward_is_fine()
        collected = time.perf_counter()
        data = self.score(batch)
        scored = time.perf_counter()
        metrics = self.learn(data)
        learned = time.perf_counter()
        self.iteration += 1
        self.tokens += batch.written_tokens
        self.batch, self.scored = batch, data.select(*SEEN, strict=False).detach()
        real = int(data["mask"].sum())
        mdp = self.collector.writer.mdp
        metrics |= batch_metrics(data, batch.episodes)
        if mdp.task.overrides("reply"):
            metrics |= reply_metrics(mdp.task.replies, batch.episodes)
        metrics |= {
            "iteration": self.iteration,
            "episodes": len(batch.episodes),
            "tokens": self.tokens,
            "rollout/refilled": batch.refilled,
            "rollout/refused": batch.refused / batch.written,
            "reward/failures": mdp.reward.num_failures,
            "kl/beta": self.kl.beta,
            "time/rollout": collected - start,
            "time/score": scored - collected,
            "time/update": learned - scored,
            "time/total": learned - start,
            "speed/rollout_tokens_per_s": batch.written_tokens / (collected - start),
            "speed/update_tokens_per_s": real / (learned - collected),
        }
        if self.collector.workers is not None:
            metrics |= {"rollout/behind": batch.behind, "rollout/lost": self.collector.workers.lost}
        if self.collector.stream is not None:
            metrics["rollout/behind"] = batch.behind
        metrics |= self._guarded()
        if "kl/sequence" in metrics:
            self.kl.update(metrics["kl/sequence"], len(batch.episodes))
        every = self.config.model.refresh_reference
        if every and self.network.has_reference and self.iteration % every == 0:
            self.network.refresh_reference()
        return metrics

    def _guarded(self) -> dict[str, float]:
        """What was left out so far."""
        return {"guard/skipped": self.step_check.skipped, "guard/unscored": self.step_check.unscored}

    def score(self, batch: Batch) -> TensorDict:
        """Add old log-probs, values, reference log-probs, rewards to learn from, advantages and value targets."""
        config, network = self.config, self.network
        rows = len(batch.data)
        reuse = self.learner.reuses_forward(rows, self.iteration)
        network.train(reuse)
        data = batch.data
        if self.has_critic and network.num_hints:
            data = data.copy().update(pack_hints(self.collector.writer.mdp.task, batch.episodes))
        data = self.learner.score(
            data,
            size=config.actor.micro_batch_size or max(1, rows // config.actor.minibatches),
            # One rule: the old policy is the trained model as it was. Of an engine that rounds otherwise, the ratio to
            # its log-probs would not begin at 1: clipping and --loss.target-kl would take rounding for learning. What
            # the engine wrote with is for the importance weights.
            actor=not self.trusted,
            critic=self.has_critic,
            reference=network.has_reference,
            keep_graph=reuse,
        )
        if "trainer_log_prob" in data:
            data["action_log_prob"] = data["trainer_log_prob"]
            cap = config.loss.importance_cap
            if cap is not None and not self.trusted:
                data["importance_weight"] = importance_weights(
                    data["trainer_log_prob"], data["behaviour_log_prob"], data["mask"], cap
                )
        in_reward = self.kl.beta if config.kl.where == "reward" else 0.0
        data["shaped_reward"] = shape_rewards(data, config.reward, in_reward)
        if FEATURES in data:
            data = self._foreseen(data)
        advantage, target = self.advantages(data, data["shaped_reward"])
        data["advantage"] = advantage[..., None]
        if target is not None:
            data["value_target"] = target[..., None]
            if "state_value" in data:  # of the whole batch, whatever the mini-batches
                error = typical_error(data["state_value"][..., 0], target, data["mask"])
                data["value_scale"] = error.expand(len(data))
        return data

    def _foreseen(self, data: TensorDict) -> TensorDict:
        """Let a critic that is fitted learn from the batch first, and predict each part of it from the others."""
        read, last = data[FEATURES], data[LAST_FEATURES]
        data = data.exclude(FEATURES, LAST_FEATURES)
        _, target = self.advantages(data, data["shaped_reward"])
        if target is None or self.config.loss.value == 0:
            return data
        mask = data["mask"]
        fold = data["group"].unique(return_inverse=True)[1] % FOLDS  # texts after one prompt are in the same
        weights = self.network.fit_values(read[mask], target[mask], fold[:, None].expand_as(mask)[mask])[fold]
        linear, constant = weights[:, :-1, None], weights[:, -1]
        data["state_value"] = read @ linear + constant[:, None, None]
        data["last_value"] = (last[:, None] @ linear)[:, 0, 0] + constant
        return data

    # Going on after a stop.

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that decides how the run goes on: tensors by file, and JSON."""
        tensors, state = self.learner.state()
        mdp = self.collector.writer.mdp
        tensors["weights"] = self.network.weights()
        tensors |= self.collector.tensors()
        state |= {
            "iteration": self.iteration,
            "tokens": self.tokens,
            "collector": self.collector.state_dict(),
            "kl": self.kl.state_dict(),
            "step_check": self.step_check.state_dict(),
            "failures": {"reward": mdp.reward.state_dict(), "reply": mdp.task.replies.state_dict()},
        }
        return tensors, state

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        self.network.load_weights(tensors["weights"])
        self.learner.load_state(tensors, state)
        self.iteration, self.tokens = state["iteration"], state["tokens"]
        self.collector.load_state_dict(state["collector"], tensors)
        mdp = self.collector.writer.mdp
        mdp.reward.load_state_dict(state["failures"]["reward"])
        mdp.task.replies.load_state_dict(state["failures"]["reply"])
        self.kl.load_state_dict(state["kl"])
        self.step_check.load_state_dict(state["step_check"])
