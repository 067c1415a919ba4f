"""What learning from pairs can be told. Every field is a flag of `llm-env reward-model` or `llm-env dpo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agents.config.ranges import BelowOne, Count, CountOrZero, NotNegative, Positive


@dataclass(frozen=True)
class PairConfig:
    """What reward models and DPO have in common."""

    pairs: Path
    """A JSONL file of pairs, a line each, with a prompt, a chosen and a rejected answer: texts or lists of chat
    messages. Without a prompt: two conversations that are alike up to their last answers, or two transcripts as HH has
    them."""
    out: Path = Path("runs/preferences")
    """The folder of what comes out of it."""
    model: str = "tiny"
    """The language model to begin with: the name of a built-in one, a folder, or an id on the Hugging Face hub."""
    lora_rank: CountOrZero = 0
    """The size of LoRA adapters to train in place of all weights; they are merged in the end. 0 trains all weights."""
    validation: BelowOne = 0.1
    """The share of the pairs that is held out, to choose the best step by. Pairs of one prompt stay together."""
    epochs: Count = 1
    """How often each pair is seen. What is seen more often than once or twice is soon known by heart."""
    batch_size: Count = 32
    """Pairs in a step."""
    micro_batch_size: Count = 16
    """Pairs that are in memory at once."""
    learning_rate: Positive = 3e-5
    """The highest learning rate; it rises over the first tenth of the steps, and falls to 0."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay."""
    max_length: Count = 1024
    """The most tokens of a prompt and its answer; of longer ones the beginning is left out."""
    evaluations: Count = 8
    """How often the held-out pairs are looked at on the way; the best model is kept, and a checkpoint made."""
    bfloat16: bool = False
    """Compute in bfloat16, where the machine is good at it; weights stay in float32."""
    seed: int = 0
    """Of new weights, the order of the pairs, and which are held out."""


@dataclass(frozen=True)
class RewardModelConfig(PairConfig):
    """Reward models, trained on which of two texts is preferred.

    Examples:
        >>> RewardModelConfig(Path("pairs.jsonl"), members=3).members
        3
    """

    out: Path = Path("runs/reward-model")
    """Where the models go, as folders member-1, member-2 and so on that transformers loads, with what was measured."""
    members: Count = 1
    """How many models to train, each on a part of the pairs of its own: members that have seen the same data are wrong
    about the same texts, and of no use as an ensemble."""
    models: tuple[str, ...] = ()
    """Language models that the members begin with, in turn, in place of --model: the same that was trained with other
    seeds, or others. Members with a beginning in common are wrong about the same texts, too."""
    head_only: bool = False
    """Train the last layer alone, on what the language model makes of a text."""
    center: NotNegative = 0.01
    """How strongly values are drawn towards 0, so that they do not drift: this times the mean of the squared sum of a
    pair's values is added to the loss."""


@dataclass(frozen=True)
class DPOConfig(PairConfig):
    """Direct preference optimisation: the policy itself learns from pairs, without a reward model.

    Examples:
        >>> DPOConfig(Path("pairs.jsonl"), beta=0.2).beta
        0.2
    """

    out: Path = Path("runs/dpo")
    """Where the model goes, as a folder model that transformers loads, with what was measured."""
    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo: the chosen is to be likelier than the rejected, compared with the model of the beginning, as surely as the
    odds say. ipo: by a fixed distance, so that pairs which are all alike do not drive it on and on."""
    beta: Positive = 0.1
    """How closely to stay with the model of the beginning; more is closer."""
    smoothing: BelowOne = 0.0
    """The share of pairs that may be labelled the wrong way round, which dpo then allows for."""
    learning_rate: Positive = 5e-6
    """The highest learning rate; it rises over the first tenth of the steps, and falls to 0."""


@dataclass(frozen=True)
class RLHFConfig:
    """The whole pipeline in rounds: what comes before the policy learns. Every field is a flag of `llm-env rlhf`.

    Examples:
        >>> RLHFConfig(rounds=2).pairs
        512
    """

    rounds: Count = 3
    """How often the policy writes, its texts are compared, reward models are trained on all pairs so far, and the
    policy learns from them."""
    pairs: Count = 512
    """How many pairs of texts are compared in each round; those with equal scores are left out."""
    noise: BelowOne = 0.0
    """The share of the pairs to label the wrong way round, to see what comes of it: people do, in one of four."""
    members: Count = 4
    """Reward models, each on a part of the pairs of its own. Of three or more the last is an alarm and no judge."""
    epochs: Count = 2
    """How often the reward models see each pair."""
    learning_rate: Positive = 3e-5
    """The highest learning rate of the reward models; 3e-4 is for tiny models."""
    batch_size: Count = 16
    """Pairs in a step of a reward model."""
    max_length: Count = 1024
    """The most tokens of a prompt and its answer that a reward model reads; the last ones."""
