"""What a training run can be told. Every field is a flag of `llm-env train`; its docstring is the flag's help.

A help text is read without those of the fields around it, so it says what the field is by itself, and names other
fields by their flags. The range of a number stands in its type, see `agents.config.ranges`.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.config.learning import AdvantageConfig, KLConfig, LossConfig, OptimizerConfig, RewardConfig
from agents.config.ranges import AtLeastOne, BelowOne, Count, CountOrZero, Finite, NotNegative, Positive

Scalar = int | float | bool | str
Precision = Literal["float32", "bfloat16"]
Autocast = Literal["off", "on"]


@dataclass(frozen=True)
class TaskConfig:
    """What is learned: a task gives the prompts, and a reward for each text."""

    name: str = "Reverse"
    """Which task to learn, such as Reverse or Addition; `llm-env tasks` lists them all."""
    args: dict[str, Scalar] = field(default_factory=dict)
    """Arguments of the task, each a name and a value, such as: length 6. A name of several parts reaches inside of an
    argument that is a mapping, such as: config.max_terms 3."""
    reward: str | None = None
    """Score the texts by this reward instead of the task's own, such as exact_match; `llm-env rewards` lists them
    all."""
    reward_args: dict[str, Scalar] = field(default_factory=dict)
    """Arguments of the reward that --task.reward names, each a name and a value."""
    chat: bool | None = None
    """Whether prompts of plain text go through the model's chat template, as what a user says; none leaves it to the
    task, and most tasks use a template where there is one."""
    max_new_tokens: Count | None = None
    """The most tokens that the model may write after a prompt; none leaves it to the task."""
    context: Count | None = None
    """The most tokens that a prompt and the text after it may have together; none leaves it to the task."""
    drop_long_prompts: bool = False
    """Leave out prompts that do not fit into --task.context, instead of ending with an error."""
    reward_timeout: Positive | None = None
    """The most seconds that scoring one text may take; a text that takes longer gets a score of 0. Scores are then
    computed in processes of their own, which can be stopped."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA): instead of all weights, train small matrices added to them. It saves memory."""

    rank: CountOrZero = 0
    """The size of the LoRA adapters; 8 to 64 is usual, and more can learn more. 0 trains all weights, without LoRA."""
    alpha: Count = 32
    """How strongly the LoRA adapters act: their output is multiplied by alpha / rank; once or twice the rank is
    usual."""
    dropout: BelowOne = 0.0
    """The share of the LoRA adapters' inputs that is set to zero at random while training, such as 0.05."""
    targets: Literal["attention", "all"] = "all"
    """Which linear layers get LoRA adapters: those of the attention, or all but the output layer."""


@dataclass(frozen=True)
class ModelConfig:
    """The language model that is trained (the policy), its critic and its reference."""

    name: str = "tiny"
    """The model to train: tiny or smollm2-135m (built in), a folder, or the id of a model on the Hugging Face hub."""
    dtype: Precision = "float32"
    """The number format of the model's weights. Of trained weights in bfloat16 the optimizer keeps copies in float32,
    so that small updates are not lost to rounding: it computes faster, but saves memory only where weights are frozen
    (LoRA, the reference model) and in what is computed with them."""
    autocast: Literal["off", "on", "auto"] = "off"
    """Compute in bfloat16 (on), while the weights stay in their own format (--model.dtype). It is faster on most GPUs,
    and slower on some CPUs. auto tries both for a few seconds when the run begins, and takes bfloat16 if it is clearly
    faster: the numbers of a run then depend on the machine it was begun on, also for the same --seed."""
    critic: Literal["fitted", "shared", "separate"] = "fitted"
    """What predicts rewards. A linear head on the policy's own hidden states, computed anew from each batch (fitted):
    it takes no time, needs no learning rate and leaves the policy alone, but knows only what the policy thinks of
    anyway. A head whose loss trains the policy's model along (shared), which also moves the policy. Or a second model
    (separate; with LoRA a second adapter), which can learn all there is to know, in twice the time and memory."""
    hints: bool = True
    """Let the critic read what the task tells about each state (its hints; `llm-env tasks NAME` lists them), such as
    whether all is right so far. Without them it has to find out by itself."""
    reference: Literal["penalty", "always"] = "penalty"
    """When the reference is kept, a frozen copy of the model that the run begins with: for a KL penalty that needs it
    (penalty), or always, which logs how far the policy has moved from it without a penalty, too. It takes the memory
    of a copy, and a forward pass over each batch."""
    reference_dtype: Precision | None = None
    """The number format of the frozen reference model; none takes that of the trained one. With LoRA there is no such
    model: the reference is the trained one with its adapters switched off."""
    offload_reference: bool = False
    """Keep the reference in the machine's memory, and on the GPU only while it reads a batch."""
    frozen_bits: Literal[8, 4] | None = None
    """Keep the linear layers that do not learn in 8 or 4 bits a weight: with LoRA those of the model, else those of the
    reference. The output layer stays as it is. None keeps them in their number format."""
    refresh_reference: CountOrZero = 0
    """Replace the reference model by the current policy every so many iterations; 0 keeps the first one."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations a second time in the backward pass; a step takes about a third longer."""
    packing: bool = True
    """Read texts of different lengths one behind the other, without padding between them, where that is faster and the
    model can be read so. It changes numbers by rounding only."""
    compile: bool = False
    """Compile the trained model with torch.compile: slow in the first iteration, faster after it."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def in_bfloat16(self) -> bool:
        """Whether --model.autocast says so.

        Raises:
            ValueError: it does not say, for `auto` is measured by a run, which then says it.
        """
        if self.autocast not in ("off", "on"):
            raise ValueError(
                f"autocast is {self.autocast!r}, expected 'off' or 'on'; 'auto' is for `build` and `train`"
            )
        return self.autocast == "on"


@dataclass(frozen=True)
class RolloutConfig:
    """How the model writes the texts that it learns from."""

    batch_size: Count = 64
    """How many texts are written and learned from in an iteration. More make the updates steadier, but slower."""
    completions_per_prompt: Count = 1
    """How many texts are written after each prompt. grpo compares them with one another; 8 is usual there."""
    temperature: Positive = 1.0
    """How random the texts are: the logits are divided by this before a token is drawn. 1 takes the model as it is,
    less makes it more predictable."""
    engine: str = "transformers"
    """What writes the texts: transformers (anywhere), vllm (fast on GPUs), or an engine that --module registers."""
    engine_dtype: Precision | None = None
    """The number format of the engine's copy of the weights. With none, the transformers engine uses the trained
    weights themselves, and another engine makes a copy in --model.dtype."""
    tensor_parallel: Count = 1
    """On how many GPUs each engine's weights lie, for a model that one cannot hold; needs --rollout.engine vllm."""
    slots: Count | None = None
    """How many texts are written at the same time; none writes the whole batch at once. Fewer take less memory."""
    ahead: CountOrZero = 0
    """How many batches --workers write ahead, while the model learns from those before: texts are then as many
    iterations behind the model as that, and no more, and --loss.importance-cap corrects for it."""
    go_on: bool = False
    """Learn from the texts that end first, and let the others go on with the new weights, instead of waiting for the
    longest of a batch. Long texts are then by several policies, for which --loss.importance-cap corrects."""
    patience: Positive = 600.0
    """Seconds after which one of --workers that has not been heard of is replaced."""
    over_sample: AtLeastOne = 1.0
    """Write this many times the batch and learn from one batch of it, such as 1.5, so that
    --rollout.drop-uniform-groups, --rollout.drop-cut and --rollout.drop-part have some to choose from."""
    drop_uniform_groups: bool = False
    """Do not learn from prompts whose texts all got the same reward: there is nothing in them for grpo to compare."""
    drop_cut: bool = False
    """Do not learn from texts that were cut off because they reached --task.max-new-tokens or --task.context."""
    drop_part: str | None = None
    """Refuse texts for a part of their score, such as what a safety reward says of them: those where it is less than
    --rollout.drop-below are counted, and not learned from. Others are written in their place."""
    drop_below: Finite = 0.5
    """What the part --rollout.drop-part must be at least."""

    @property
    def side_by_side(self) -> int:
        """How many texts are written at the same time."""
        return self.slots or self.batch_size


@dataclass(frozen=True)
class EvaluationConfig:
    """How the policy is judged, on prompts that it does not learn from."""

    every: CountOrZero = 10
    """Judge the policy every so many iterations; 0 does so at the beginning and the end only."""
    prompts: Count = 256
    """The most prompts that the policy is judged on. More give a more exact mean, and take longer."""
    split: str = "test"
    """Which of the task's sets of prompts the policy is judged on, such as test."""
    best: Literal["sampled", "greedy"] = "sampled"
    """Which mean reward decides what the best model is: that of sampled texts, drawn at random as in training, or of
    greedy ones, in which every token is the likeliest."""
    stop_at: Finite | None = None
    """End the run as soon as the mean reward on held-out prompts, as --evaluation.best counts it, reaches this; none
    goes on to the last iteration."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown in the terminal and written down."""

    display: bool = True
    """Show how the run goes: a live panel in a terminal, plain lines elsewhere. Without it, only warnings are shown."""
    samples_every: CountOrZero = 10
    """Show and log some of the texts every so many iterations; 0 does so at evaluations only."""
    texts: CountOrZero = 4
    """How many texts of such an iteration are written down token by token, for the report: the best and the worst paid,
    that with the largest advantage, and so on."""
    tensorboard: bool = False
    """Write TensorBoard files into the run's folder, too."""
    wandb: bool = False
    """Log to Weights & Biases, too; needs its package, wandb."""
    wandb_project: str = "llm-env"
    """The project in Weights & Biases that --log.wandb logs to."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk for --resume to go on from."""

    every: CountOrZero = 20
    """Write a checkpoint every so many iterations; 0 writes one at the end only."""
    minutes: Positive = 10.0
    """Where iterations take long, write one whenever so many minutes have passed since the last, too; not if
    --checkpoint.every is 0."""
    keep: Count = 2
    """How many of the latest checkpoints are kept; older ones are deleted."""


@dataclass(frozen=True)
class GuardConfig:
    """When an update is skipped, when there is a warning, and when the run gives up."""

    max_skipped: Count = 5
    """Give up when so many updates in a row had to be skipped because a loss, gradient or reward was not a finite
    number; those of the policy, of the critic, and of the reward are counted each by itself."""
    kl_warning: Positive = 1.0
    """Warn when the policy has moved further than this KL per token (in nats) from the reference model, or in one
    iteration."""
    entropy_warning: NotNegative = 0.01
    """Warn when the policy's entropy per token (in nats) falls below this: it then writes nearly the same text each
    time."""
    stop_on_hacking: bool = False
    """End the run when the reward rises while the reward model that was held out (--task.reward-args held_out true)
    sees the texts grow worse, which is warned of in any case."""


@dataclass(frozen=True)
class SFTConfig:
    """The supervised warm start (SFT): before it learns from rewards, the model learns the task's own answers."""

    steps: CountOrZero = 0
    """How many optimizer steps the supervised warm start has; 0 leaves it out."""
    batch_size: Count = 64
    """How many prompts with their answers are learned from in a step of the warm start."""
    learning_rate: NotNegative = 1e-3
    """The highest learning rate of the warm start; 1e-3 is for tiny models, 1e-5 for large ones."""
    warmup: CountOrZero = 20
    """In how many steps of the warm start its learning rate rises to the highest; it then falls to 0 along a cosine."""
    weight_decay: NotNegative = 0.0
    """How strongly every step of the warm start shrinks the weights (AdamW's weight decay); 0 does not."""
    answer: str = "answer"
    """Under which name the task's prompts keep the answer that the warm start learns to write: a text, or in a task
    that replies a list of them, one for each turn."""
    stop_at: Finite | None = None
    """End the warm start as soon as the mean reward on held-out prompts, as --evaluation.best counts it, reaches this:
    runs with different seeds then begin alike. None goes on to the last step."""
    evaluate_every: Count = 10
    """Judge the model every so many steps of the warm start, to see whether it has reached --sft.stop-at."""
    stop_within: NotNegative | None = None
    """If the score jumped past --sft.stop-at by more than this, go back: take the model on the way from the one judged
    before, found by halving, that is hardly above it. None keeps the model that jumped."""
    checkpoint_every: CountOrZero = 50
    """Write a checkpoint of the warm start every so many of its steps; 0 writes one at Ctrl-C only."""


@dataclass(frozen=True)
class TrainConfig:
    """A run: everything that decides what it does.

    Examples:
        >>> TrainConfig(out="runs/mine").out.name  # a path or a string
        'mine'
        >>> TrainConfig(seed=3).replace(actor__learning_rate=1e-3).actor.learning_rate
        0.001
    """

    algo: str = "ppo"
    """How to learn from rewards: ppo, grpo, rloo, a2c, reinforce, or an algorithm of your own (--module);
    `llm-env algorithms` says what each is."""
    algo_args: dict[str, Scalar] = field(default_factory=dict)
    """Arguments of an algorithm of your own, each a name and a value, such as: strength 0.5."""
    module: str | None = None
    """A Python module to import first, such as my_package.my_task: it may register tasks, rewards, algorithms, losses,
    loss terms, advantages and engines of your own."""
    seed: CountOrZero = 0
    """Decides everything random: two runs with the same seed and settings give the same numbers."""
    iterations: CountOrZero = 100
    """How many times the model writes a batch of texts and learns from it."""
    out: Path = Path("runs/llm-env")
    """The folder that everything is written to: models, checkpoints, the log and its pictures."""
    device: str = "cpu"
    """What to compute on: cpu, cuda, or one GPU of several, such as cuda:1."""
    workers: CountOrZero = 0
    """How many other processes write the texts, each with an engine of its own: on this machine, unless --ray or
    --listen says otherwise. They write the same texts as one; of one that dies another takes the place. 0 writes them
    in this process."""
    worker_cpus: Count | None = None
    """How many threads each of --workers computes with. None divides those of this machine; with --ray it is one."""
    worker_gpus: CountOrZero = 0
    """How many GPUs each of --workers has for itself, on this machine those after the learner's. 0 lets it compute on
    --device, with --ray on the CPU."""
    ray: str | None = None
    """Let a Ray cluster start the --workers where it has room: auto (the one that this machine belongs to), local (one
    of this machine alone, for this run), or its address."""
    listen: str | None = None
    """Let --workers come by themselves to this address, such as 0.0.0.0:7000, from wherever they are:
    llm-env worker HOST:7000, with the same secret in LLM_ENV_KEY as here."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    actor: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the policy (the actor, the model that writes the texts) is trained, with AdamW."""
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the critic, which predicts rewards, is trained, with an AdamW of its own. One that shares the policy's model
    learns in the policy's passes, in their mini-batches, and in passes of its own only where it makes more of them."""
    critic_warmup: CountOrZero = 0
    """In how many iterations at the beginning only the critic learns, so that its first guesses do not mislead the
    policy."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        out: object = self.out
        if not isinstance(out, str | os.PathLike):
            raise TypeError(f"out is {out!r}, expected the path of a folder, such as 'runs/mine'")
        object.__setattr__(self, "out", Path(out))  # the only way into a frozen dataclass

    @property
    def keeps_reference(self) -> bool:
        """Whether there is a reference model, which every batch is then compared with.

        Examples:
            >>> TrainConfig().keeps_reference, TrainConfig().replace(kl__beta=0.1).keeps_reference
            (False, True)
        """
        return self.kl.beta > 0 or self.model.reference == "always"

    def replace(self, **changes: object) -> TrainConfig:
        """The same with some fields changed; `part__field` reaches into a part.

        Examples:
            >>> TrainConfig().replace(seed=1, actor__learning_rate=1e-3).actor.learning_rate
            0.001
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
