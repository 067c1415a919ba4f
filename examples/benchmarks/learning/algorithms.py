"""The algorithms that are compared, and the learning rates that some may choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import learning.tasks  # noqa: F401 - registers them
from agents.algorithms.registry import algorithm_class
from agents.config import TrainConfig
from learning.regimes import Regime


@dataclass(frozen=True)
class Algorithm:
    """One way to learn.

    Attributes:
        name: on the command line and in the report.
        what: it is, in a sentence.
        changes: to TrainConfig, as in `replace`, on top of those of a regime.
        rates: the learning rates that are tried; none keeps the configuration's, which the trust region lowers to what
            suits, whatever the algorithm.
        patience: how many times the regime's tokens it may write: for how long the others' threshold is waited for.
        trl: further settings of TRL's trainer (`Setup` in trl_worker.py), where it is that which learns.
    """

    name: str
    what: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    patience: int = 1
    trl: Mapping[str, Any] | None = None

    @property
    def critic(self) -> bool:
        """Whether a critic learns along."""
        if self.trl is not None:
            return True
        config = TrainConfig().replace(**self.changes)
        return algorithm_class(config.algo).has_critic and config.loss.value > 0

    def can_run(self, regime: Regime) -> bool:
        """Whether it can learn what the regime is about."""
        return self.trl is None or regime.exact_match


# The advantage is the return: there is no critic, and the defaults that estimate with one are not read.
RETURNS = {"loss__value": 0.0, "advantage__kind": "monte_carlo", "advantage__baseline": "none"}
ONE_PASS = {"actor__epochs": 1}

ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("ppo", "our defaults"),
        Algorithm("ppo-no-hints", "our defaults, but the critic is told nothing by the task", {"model__hints": False}),
        Algorithm("ppo-no-critic", "our defaults, but the baseline is a mean of the batch", {"loss__value": 0.0}),
        Algorithm("ppo-no-baseline", "PPO's clipped loss; the advantage is the return itself", RETURNS),
        Algorithm("grpo", "8 texts a prompt", {"algo": "grpo", "rollout__completions_per_prompt": 8}),
        Algorithm("rloo", "8 texts a prompt", {"algo": "rloo", "rollout__completions_per_prompt": 8, **ONE_PASS}),
        Algorithm(
            "reinforce",
            "the policy gradient of returns, one pass",
            {"algo": "reinforce", **RETURNS, **ONE_PASS},
        ),
        Algorithm(
            "a2c",
            "the policy gradient with a critic, lambda 1, one pass",
            {"algo": "a2c", **ONE_PASS, "advantage__baseline": "value", "advantage__actor_lambda": 1.0},
        ),
        Algorithm(
            "trl",
            "TRL 1.12's PPO, a second model as its critic",
            rates=(3e-5, 1e-4, 3e-4),
            patience=3,
            trl={"batch_size": 64, "minibatches": 4, "epochs": 4, "kl_coef": 0.05, "lam": 0.95, "cliprange": 0.2},
        ),
    )
}


def configuration(regime: Regime, algorithm: Algorithm, seed: int, rate: float | None = None) -> TrainConfig:
    """Of a run of ours; of TRL's it says what its start, its prompts and its judging are."""
    changes: dict[str, Any] = {"iterations": 10**6, "log__display": False, **regime.changes, **algorithm.changes}
    if rate is not None:
        changes["actor__learning_rate"] = rate
    config = TrainConfig(seed=seed).replace(**changes)
    if "constant" not in (config.actor.decay, config.critic.decay) or config.actor.decay != config.critic.decay:
        raise ValueError(
            f"{algorithm.name} in {regime.name}: a learning rate that falls goes by the number of iterations, but the "
            "suite's runs end by tokens: use the decay 'constant'"
        )
    return config
