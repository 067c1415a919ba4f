"""What a training run can be told. Every field is a flag of `llm-env train`; its docstring is the flag's help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Scalar = int | float | bool | str


@dataclass(frozen=True)
class TaskConfig:
    """What is to be learned."""

    name: str = "Reverse"
    """A registered task."""
    args: dict[str, Scalar] = field(default_factory=dict)
    """Its arguments, such as: length 6."""
    max_new_tokens: int | None = None
    """How many tokens the agent may choose; by default what the task says."""
    context: int | None = None
    """How many tokens prompt and text may have together; by default what the task expects."""
    drop_long_prompts: bool = False
    """Leave out prompts that do not fit, instead of raising an error."""
    reward_timeout: float | None = None
    """Seconds that a reward may take for one text; it then runs in a process of its own."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning."""

    rank: int = 0
    """Of the adapters; 0 trains all weights."""
    alpha: int = 32
    """The adapters' scale is alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    targets: Literal["attention", "all"] = "all"
    """Adapt the attention's linear layers only, or all linear layers but the output."""


@dataclass(frozen=True)
class ModelConfig:
    """The language model, its critic and its reference."""

    name: str = "tiny"
    """A built-in name, a folder, or a hub id; see `llm_env.models`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights."""
    autocast: bool = False
    """Compute in bfloat16 while the weights stay as they are."""
    critic: Literal["shared", "separate"] = "shared"
    """A value head on the policy's own hidden states, or a second model (with LoRA, a second adapter)."""
    critic_gradient: bool = True
    """Let the value loss of a shared critic train the backbone, too."""
    reference: Literal["initial", "none"] = "initial"
    """The model that the KL penalty compares with: the one the run begins with, or none at all."""
    reference_dtype: Literal["float32", "bfloat16"] | None = None
    """Of a frozen copy; by default that of the model. With LoRA there is no copy: the adapters are switched off."""
    refresh_reference: int = 0
    """Replace the reference by the current policy every so many iterations; 0 never does."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Run the backbone through torch.compile."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""


@dataclass(frozen=True)
class RolloutConfig:
    """How texts are written."""

    batch_size: int = 256
    """Episodes in an iteration."""
    completions_per_prompt: int = 1
    """Episodes that begin with the same prompt; GRPO compares these."""
    temperature: float = 1.0
    """Divides the logits; the log-probs that are trained on are those of the distribution sampled from."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the model."""
    engine_dtype: Literal["float32", "bfloat16"] | None = None
    """Of the engine's own copy of the weights; None lets the transformers engine use the trained weights themselves."""
    mode: Literal["auto", "generate", "step"] = "auto"
    """Let the engine write whole texts, or step the environment token by token; the batches are equal."""
    slots: int | None = None
    """How many texts the engine writes side by side; by default the whole batch."""
    over_sample: float = 1.0
    """Write this many times the batch; a filter, or chance, keeps one batch of them."""
    drop_uniform_groups: bool = False
    """Leave out groups of completions whose rewards are all the same: they teach GRPO nothing."""
    drop_truncated: bool = False
    """Leave out texts that were cut off by the budget or the context."""


@dataclass(frozen=True)
class RewardConfig:
    """What is done to rewards before they are learned from."""

    whiten: bool = False
    """Divide by the batch's standard deviation, after taking off its mean."""
    scale: float = 1.0
    """Multiply by this."""
    clip: float | None = None
    """Then clip to plus and minus this."""
    no_eos_penalty: float = 0.0
    """Take this off the reward of a text that was cut off."""


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages."""

    kind: str = "gae"
    """A registered estimator: gae, per token with a critic; monte_carlo, the discounted return minus the value;
    sequence, A = r - V(prompt) for all tokens of a text; ..."""
    gamma: float = 1.0
    """The discount per token."""
    actor_lambda: float = 1.0
    """GAE's lambda of the advantages."""
    critic_lambda: float = 1.0
    """GAE's lambda of the value targets."""
    length_adaptive: float | None = None
    """If set to alpha, the actor's lambda is 1 - 1 / (alpha * length) for each text."""
    baseline: bool = True
    """Compare with the value. Without it, an advantage is the return itself (with lambda below 1, the lambda-return):
    where rewards are never negative, texts are only ever made likelier, which lets a policy that is right now and then
    sharpen fast, at high learning rates; leave `whiten` off then."""
    whiten: bool = True
    """Normalise the advantages of a batch."""


@dataclass(frozen=True)
class LossConfig:
    """The objective."""

    kind: str = "clip"
    """A registered policy loss: clip, PPO's; penalty, an adaptive KL to the old policy in place of clipping; ..."""
    terms: dict[str, float] = field(default_factory=dict)
    """Registered terms to add to it, each with its weight, such as: my_term 0.1."""
    clip_low: float = 0.2
    """The probability ratio is clipped at 1 - this."""
    clip_high: float = 0.28
    """The probability ratio is clipped at 1 + this."""
    dual_clip: float | None = None
    """For negative advantages, bound the loss at this times their size; 3 is usual."""
    penalty_target: float = 0.01
    """The KL that the loss "penalty" aims for."""
    entropy: float = 0.0
    """The weight of the entropy bonus."""
    value: float = 0.5
    """The weight of the value loss in the gradient of a shared backbone."""
    value_clip: float | None = 0.2
    """New values are clipped to this distance of the old ones; none: no clipping."""
    aggregate: Literal["token", "sequence", "fixed"] = "token"
    """The mean over all tokens; over texts of their own means (1/|o|); or the sum over a fixed length."""
    importance_cap: float | None = 2.0
    """Tokens are weighted by trainer's over engine's probability, at most this; none: no correction."""
    target_kl: float | None = None
    """End the epochs when the approximate KL to the old policy exceeds 1.5 times this."""


@dataclass(frozen=True)
class KLConfig:
    """The penalty for moving away from the reference model."""

    beta: float = 0.0
    """Its weight (at first, if adaptive)."""
    where: Literal["reward", "loss"] = "reward"
    """Take it off every token's reward, or add it to the loss."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """In the loss; the reward always uses k1, the log-ratio itself. k2's gradient is that of the true KL."""
    target: float | None = None
    """If set, beta is adapted so that the KL per text stays near this."""
    horizon: int = 10_000
    """Episodes over which the adaptation acts."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-4
    """At its highest."""
    warmup: int = 0
    """Optimizer steps until it is reached."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """What it does then, until the last iteration."""
    weight_decay: float = 0.0
    """AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    max_gradient_norm: float = 1.0
    """Longer gradients are shortened to this."""
    epochs: int = 4
    """Passes over each batch."""
    minibatches: int = 4
    """Optimizer steps in a pass."""
    micro_batch_size: int | None = None
    """Texts in one forward pass; by default a whole mini-batch. It changes memory and time, not the gradient."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How the policy is judged on held-out prompts."""

    every: int = 10
    """Iterations between evaluations; 0 evaluates at the beginning and the end only."""
    prompts: int = 256
    """How many held-out prompts, at most."""
    split: str = "test"
    """Which prompts of the task."""
    best: Literal["sampled", "greedy"] = "sampled"
    """Which mean score decides what the best model is."""
    stop_at: float | None = None
    """End the run when that score is reached."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown and written down."""

    display: bool = True
    """A live display in the terminal; plain lines where it is none."""
    samples_every: int = 10
    """Iterations between sample texts."""
    tensorboard: bool = False
    """Write TensorBoard files, too."""
    wandb: bool = False
    """Log to Weights & Biases, too."""
    wandb_project: str = "llm-env"
    """Its project."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 20
    """Iterations between checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """How many checkpoints are kept."""


@dataclass(frozen=True)
class GuardConfig:
    """When to skip a step, and when to give up."""

    max_skipped: int = 5
    """The run stops after so many steps in a row with a loss, gradient or reward that is not finite."""
    kl_warning: float = 1.0
    """Warn when the KL to the reference exceeds this per token."""
    entropy_warning: float = 0.01
    """Warn when the entropy falls below this per token."""


@dataclass(frozen=True)
class SFTConfig:
    """The supervised warm start on the task's own answers (loss on the completion only)."""

    steps: int = 0
    """Optimizer steps; 0 leaves the warm start out."""
    batch_size: int = 64
    """Pairs in a step."""
    learning_rate: float = 1e-3
    """At its highest."""
    warmup: int = 20
    """Steps until it is reached; it then decays to zero as a cosine."""
    weight_decay: float = 0.0
    """AdamW's."""
    answer: str = "answer"
    """Which entry of a prompt's metadata is the completion."""


@dataclass(frozen=True)
class TrainConfig:
    """A run: everything that decides what it does."""

    algo: str = "ppo"
    """A registered algorithm: ppo, a2c, reinforce, grpo, rloo, ...; all else is the same for all of them."""
    algo_args: dict[str, Scalar] = field(default_factory=dict)
    """Arguments of an algorithm of your own, such as: strength 2."""
    module: str | None = None
    """A Python module to import first, which may register tasks, rewards, algorithms, losses, ... of your own."""
    seed: int = 0
    """Of everything random. Two runs with one seed agree."""
    iterations: int = 100
    """Batches to collect and learn from."""
    out: Path = Path("runs/llm-env")
    """The run's folder."""
    device: str = "cpu"
    """Where the models live: cpu, cuda, cuda:0, ..."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    actor: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-3))
    critic_warmup: int = 0
    """Iterations in which only the critic learns."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def replace(self, **changes: object) -> TrainConfig:
        """The same with some fields changed; `part__field` reaches into a part.

        Examples:
            >>> TrainConfig().replace(seed=1, actor__learning_rate=3e-4).actor.learning_rate
            0.0003
        """
        parts: dict[str, dict[str, object]] = {}
        own: dict[str, object] = {}
        for name, value in changes.items():
            part, _, rest = name.partition("__")
            if rest:
                parts.setdefault(part, {})[rest] = value
            else:
                own[name] = value
        for part, inner in parts.items():
            own[part] = _replace(getattr(self, part), inner)
        return dataclasses.replace(self, **own)  # type: ignore[arg-type]


def _replace(part: object, changes: dict[str, object]) -> object:
    own = {name: value for name, value in changes.items() if "__" not in name}
    for name, value in changes.items():
        inner, _, rest = name.partition("__")
        if rest:
            own[inner] = _replace(own.get(inner, getattr(part, inner)), {rest: value})
    return dataclasses.replace(part, **own)  # type: ignore[type-var]
