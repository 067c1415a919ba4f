"""Rewards for finished rollouts of a language model.

A reward gets a finished `Rollout` (token ids, text, prompt, and what the task knows about it) and gives
back a `Score`. Write one as a function, combine it with others, and call it with a batch:

    >>> from rewards import ExactMatch, LengthPenalty, Rollout, reward
    >>> @reward
    ... def polite(rollout):
    ...     return float("please" in rollout.text)
    >>> total = ExactMatch() + 0.5 * polite + LengthPenalty(free=20, cost=0.01)
    >>> (score,) = total([Rollout.of("please", prompt="Say please: ", metadata={"answer": "please"})])
    >>> score.value
    1.5
    >>> score.parts
    {'exact_match': 1.0, 'polite': 1.0, 'length_penalty': 0.0, 'weighted_sum': 1.5}

To make your own with settings or for whole batches, subclass `Reward`. To keep a run alive when a reward fails or
hangs, wrap it in a `Guard`. To choose a reward by its name, as a configuration does, see `register_reward` and
`make_reward`. This package knows of no environment and no model.
"""

from rewards.base import Product, Reward, RewardLike, WeightedSum, as_reward, reward
from rewards.code import CodeTests, program_in
from rewards.combine import Clip, Ensemble
from rewards.failures import AlwaysFailsError, Failure
from rewards.guard import Guard
from rewards.judge import Judge, JudgeError
from rewards.match import ExactMatch, Format, NumericMatch
from rewards.mathematics import Math, final_answer
from rewards.named import make_reward, register_reward, reward_names
from rewards.reward_model import RewardModel
from rewards.rollout import End, Rollout, Turn
from rewards.sandbox import Outcome, Sandbox
from rewards.score import RewardError, Score
from rewards.seats import Limits, SandboxUnavailable
from rewards.shaping import LengthPenalty, MissingEosPenalty, RepetitionPenalty
from rewards.vader import VaderSentiment

__all__ = [
    "AlwaysFailsError",
    "Clip",
    "CodeTests",
    "End",
    "Ensemble",
    "ExactMatch",
    "Failure",
    "Format",
    "Guard",
    "Judge",
    "JudgeError",
    "LengthPenalty",
    "Limits",
    "Math",
    "MissingEosPenalty",
    "NumericMatch",
    "Outcome",
    "Product",
    "RepetitionPenalty",
    "Reward",
    "RewardError",
    "RewardLike",
    "RewardModel",
    "Rollout",
    "Sandbox",
    "SandboxUnavailable",
    "Score",
    "Turn",
    "VaderSentiment",
    "WeightedSum",
    "as_reward",
    "final_answer",
    "make_reward",
    "program_in",
    "register_reward",
    "reward",
    "reward_names",
]
