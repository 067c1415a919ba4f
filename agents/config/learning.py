"""The settings of what is learned from a batch: rewards, advantages, losses, the KL penalty, the optimizers.

They are parts of `agents.config.schema.TrainConfig`; its docstring says how help texts and ranges are written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from agents.config.ranges import (
    AboveOne,
    BelowOne,
    Count,
    CountOrZero,
    Finite,
    FromZeroToOne,
    NotNegative,
    Positive,
    UpToOne,
)


@dataclass(frozen=True)
class RewardConfig:
    """What is done to rewards before they are learned from: first the penalty, then whiten, scale and clip."""

    whiten: bool = False
    """Subtract the mean of a batch's rewards and divide by their standard deviation."""
    scale: Finite = 1.0
    """Multiply rewards by this; useful where they are far larger or smaller than 1."""
    clip: Positive | None = None
    """Cut rewards down to this size, in both directions: 5 keeps them from -5 to 5."""
    no_eos_penalty: NotNegative = 0.0
    """Subtract this from the reward of a text that was cut off before the model had ended it."""


@dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages: how much better than expected it was to write a token."""

    kind: str = "gae"
    """How advantages are estimated: gae (for each token, with the critic's help), monte_carlo (the rewards to come
    minus the critic's prediction), sequence (one for all tokens of a text), or an estimator that --module registers."""
    gamma: FromZeroToOne = 1.0
    """The discount: how much of a reward counts one token earlier. 1 counts it in full, as is usual for texts."""
    actor_lambda: FromZeroToOne | None = None
    """GAE's lambda for the policy. 1 goes by the rewards alone; less relies on the critic's predictions too, which is
    steadier, but wrong where they are. None goes by how good the critic is: 1 minus its explained variance on the
    batch, so that one that explains nothing has no say."""
    critic_lambda: FromZeroToOne = 1.0
    """GAE's lambda for what the critic learns to predict. 1 goes by the rewards alone; less, by its own predictions
    too."""
    length_adaptive: Positive | None = None
    """Give each text a lambda of its own, 1 - 1 / (this * length), in place of --advantage.actor-lambda; 0.05 is
    usual."""
    baseline: Literal["fitted", "value", "none"] = "fitted"
    """What is subtracted from the rewards to come, so that an advantage says how much better than expected a token was:
    a line through the critic's predictions, fitted so that the policy's gradient is least noisy (fitted); the
    predictions themselves (value, as is usual in PPO); or nothing (none), which only ever makes texts likelier where
    rewards are never negative."""
    normalize: bool = True
    """Divide the advantages of a batch by their root mean square, so that the size of rewards does not matter. grpo
    divides those of each prompt's texts by their standard deviation."""


@dataclass(frozen=True)
class LossConfig:
    """What an update makes small: the policy's loss, and the critic's."""

    kind: str = "clip"
    """What keeps an update near the policy that wrote the texts: clip (PPO's clipping), penalty (a KL penalty whose
    weight adapts itself), or a loss that --module registers."""
    terms: dict[str, Finite] = field(default_factory=dict)
    """More terms of the loss, which --module registers, each a name and a weight, such as: my_term 0.1."""
    clip_low: UpToOne = 0.2
    """How much rarer an update may make a token (PPO's clipping): with 0.2, the loss does not push its probability
    below 0.8 times what it was."""
    clip_high: Positive = 0.28
    """How much likelier an update may make a token (PPO's clipping): with 0.28, the loss does not push its
    probability above 1.28 times what it was. A little more than --loss.clip-low keeps texts varied."""
    dual_clip: AboveOne | None = None
    """Bound the loss of a token with a negative advantage at this times that advantage, so that no single token can
    upset the policy; 3 is usual, none sets no bound."""
    penalty_target: Positive = 0.01
    """How far --loss.kind penalty tries to let an update move the policy, as a KL per token; 0.01 is usual."""
    entropy: NotNegative = 0.0
    """The weight of a bonus for entropy, which keeps the policy from always writing the same: 0.1 to 0.5 where there
    are few tokens to choose among, 0.01 or less where there are many."""
    entropy_decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight of that bonus goes on: constant, or falling to 0 at the last iteration, as a line or a cosine, so
    that much is tried at first, and in the end what has proved best is written. A run in which it falls cannot be made
    longer later."""
    value: NotNegative = 0.5
    """The weight of the critic's loss beside the policy's, which matters where they share a model; 0 trains no
    critic."""
    value_clip: Positive | None = None
    """How far an update may move the critic's predictions, as a share of their typical error on the batch (its root
    mean square), such as 0.2. It makes a critic that learns from noise steadier, and any critic slower; none, which is
    usual, sets no limit."""
    aggregate: Literal["token", "sequence", "fixed"] = "token"
    """How the losses of tokens are put together: the mean of all tokens; the mean of each text first, so that all texts
    count the same (sequence); or the sum over each text divided by --task.max-new-tokens (fixed)."""
    importance_cap: Positive | None = 2.0
    """Where the engine computes otherwise than the trained model, weight each token by the ratio of the trained model's
    probability to the engine's, but by no more than this; none does not correct for it. The old probabilities that an
    update is held near to are the trained model's own in any case."""
    target_kl: Positive | None = 0.05
    """How far a batch may move the policy, as a KL per token (in nats); one whose entropy is below 1 nat, less far in
    proportion. The learning rate begins at a tenth of
    --actor.learning-rate, rises while batches move the policy less than this, and falls where one has moved it further.
    Beyond 1.5 times this the passes over a batch end at once, and what went further is taken back. It falls along with
    the learning rate (--actor.decay). None sets no bound, and keeps the learning rate as it is:
    one that is too high then ruins the policy."""


@dataclass(frozen=True)
class KLConfig:
    """The KL penalty, which holds the policy near the reference model; a KL says how far two models differ, in nats."""

    beta: NotNegative = 0.0
    """The weight of the KL penalty, such as 0.05; 0 means no penalty. With --kl.target it is only the first weight."""
    where: Literal["reward", "loss"] = "reward"
    """Where the KL penalty acts: subtracted from the reward of every token, or added to the loss."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """How the KL of a token is estimated: in the loss by k2 (half the log-ratio's square, whose gradient is that of the
    KL) or k3 (never negative, usual for grpo), in the reward by k1 (the log-ratio). None takes k2 or k1, as fits."""
    target: Positive | None = None
    """Adapt the weight of the KL penalty so that the KL of a whole text stays near this, such as 6; none keeps the
    weight as it is."""
    horizon: Count = 10_000
    """How slowly --kl.target adapts the weight of the KL penalty: in so many texts it changes by a fifth at most."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How the policy or the critic is trained: AdamW, its learning rate, and how often it goes over a batch."""

    learning_rate: NotNegative = 3e-4
    """The highest learning rate, which is how far a step moves the weights. The policy's is lowered from there to what
    --loss.target-kl allows; without that, 1e-6 to 1e-5 is usual for large models, and more for small ones."""
    warmup: CountOrZero = 0
    """In how many optimizer steps the learning rate rises to its highest; a few, such as 10, keep the first steps
    small."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after its warm-up: constant, or falling to 0 at the last iteration, as a line or a
    cosine. A run in which it falls cannot be made longer later."""
    weight_decay: NotNegative = 0.0
    """How strongly every step shrinks the weights (AdamW's weight decay), such as 0.01; 0 does not."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """How slowly AdamW's averages of the gradient and of its square change; nearer to 1 is slower."""
    state_bits: Literal[8] | None = None
    """In how many bits AdamW keeps its averages. 8 take a quarter of the memory (2 bytes a weight in place of 8), and
    on a CPU many times as long. None keeps them in float32."""
    max_gradient_norm: Positive = 1.0
    """The longest gradient that is followed as it is; a longer one is shortened to this. 1 is usual."""
    epochs: Count = 4
    """How many passes are made over each batch. More learn more from it, but move further from the policy that wrote
    it; 1 to 4 is usual."""
    minibatches: Count = 4
    """Into how many parts a batch is split for each pass over it; every part makes one optimizer step."""
    micro_batch_size: Count | None = None
    """How many texts are computed at once; none takes a whole mini-batch. Fewer take less memory and more time, with
    the same result."""
