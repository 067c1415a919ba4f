"""A run that goes wrong is told so in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from agents.config import GuardConfig


class Warnings:
    """Looks at the numbers of each iteration and says in plain words what is going wrong, and what to try.

    Each warning comes at most once in `every` iterations. Metrics that are missing or not finite are passed over.

    Args:
        config: the bounds of KL and entropy.
        max_new_tokens: the longest that a text may become, if known: only texts near it count as exploding.
        every: how many iterations a warning is silent after it was given.

    Examples:
        >>> warnings = Warnings(GuardConfig(kl_warning=1.0))
        >>> print(warnings.look({"iteration": 7, "kl/reference": 2.5})[0])  # doctest: +ELLIPSIS
        The policy is 2.5 nats per token away from the reference (more than --guard.kl-warning 1): ...
        >>> warnings.look({"iteration": 8, "kl/reference": 2.6})
        []
    """

    def __init__(self, config: GuardConfig, max_new_tokens: int | None = None, every: int = 20) -> None:
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.every = every
        self._streaks: dict[str, int] = {}
        self._numbers: dict[str, float] = {}
        self._said: dict[str, int] = {}

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """What is to be said about this iteration; call it once for each, in order."""
        iteration = int(metrics["iteration"])
        numbers = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        sentences = []
        for name, rule in _RULES.items():
            sentence = rule(self, numbers)
            if sentence and iteration - self._said.get(name, -self.every) >= self.every:
                self._said[name] = iteration
                sentences.append(sentence)
        return sentences

    @property
    def hacking(self) -> bool:
        """Whether the policy earns by what its reward models are wrong about, as far as one that was held out tells."""
        return self._streaks.get("hacking", 0) >= 3

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as JSON can hold it."""
        return {"streaks": dict(self._streaks), "numbers": dict(self._numbers), "said": dict(self._said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was: a resumed run says what it would have said."""
        self._streaks, self._numbers, self._said = dict(state["streaks"]), dict(state["numbers"]), dict(state["said"])

    def streak(self, name: str, holds: bool) -> int:
        """For how many iterations in a row, this one included, something holds."""
        self._streaks[name] = self._streaks.get(name, 0) + 1 if holds else 0
        return self._streaks[name]

    def rise(self, name: str, metrics: Mapping[str, float]) -> float:
        """By how much a count of the run so far has grown in this iteration."""
        before = self._numbers.get(name, 0.0)
        self._numbers[name] = metrics.get(name, before)
        return self._numbers[name] - before

    def usual(self, name: str, value: float) -> float | None:
        """The running mean before this value; None until five were seen."""
        seen = self.streak(f"seen {name}", True) - 1
        mean = self._numbers.get(name, value)
        # The plain mean at first, then an exponential one over the last twenty or so.
        self._numbers[name] = mean + (value - mean) / min(seen + 1, 20)
        return mean if seen >= 5 else None


def _equal_rewards(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    mean, std = metrics.get("reward/mean", 0.0), metrics.get("reward/std", math.inf)
    # The deviation of equal numbers may be some rounding error.
    streak = self.streak("equal rewards", std <= 1e-6 * max(1.0, abs(mean)))
    if streak < 3:
        return None
    return (
        f"In each of the last {streak} iterations all texts had the same reward (now {mean:g}): nothing can be learned "
        "from that. If it is the best there is, the task is solved (--evaluation.stop-at ends a run in time). If not, "
        "no text is better than another yet: begin from a supervised warm start (--sft.steps), sample more widely "
        "(--rollout.temperature), or give the task a reward with steps in between (--task.args)."
    )


def _kl_to_reference(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    kl, bound = metrics.get("kl/reference", 0.0), self.config.kl_warning
    if kl <= bound:
        return None
    return (
        f"The policy is {kl:.3g} nats per token away from the reference (more than --guard.kl-warning {bound:g}): "
        "its texts may no longer read like language, and the reward may be gamed; look at the samples. Try a larger "
        "--kl.beta, or an adaptive one (--kl.target), or a lower --actor.learning-rate."
    )


def _kl_to_old(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    kl, bound = metrics.get("kl/old", 0.0), self.config.kl_warning
    if kl <= bound:
        return None
    return (
        f"One iteration moved the policy by {kl:.3g} nats per token (more than --guard.kl-warning {bound:g}), far out "
        "of the range in which its samples can be trusted. Try a lower --actor.learning-rate, fewer --actor.epochs, "
        "or --loss.target-kl 0.01, which lowers the rate and ends the epochs in time."
    )


def _entropy(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    entropy, bound = metrics.get("policy/entropy", math.inf), self.config.entropy_warning
    if entropy >= bound:
        return None
    return (
        f"The entropy has fallen to {entropy:.2g} nats per token (less than --guard.entropy-warning {bound:g}): the "
        "policy writes nearly the same text every time. If the score is as high as it should be, that is success; if "
        "not, it has stopped exploring: try --loss.entropy 0.01, a lower --actor.learning-rate, a larger --kl.beta, "
        "or a larger --loss.clip-high."
    )


def _length(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    length, cut = metrics.get("text/length"), metrics.get("text/cut")
    what = None
    if length is not None:
        usual = self.usual("length", length)
        near = self.max_new_tokens is None or length > 0.8 * self.max_new_tokens
        if usual is not None and length > 1.5 * usual and near:
            what = f"The texts have grown to {length:.0f} tokens, from {usual:.0f} in the iterations before"
    if cut is not None:
        usual = self.usual("cut", cut)
        if usual is not None and cut > 0.5 and cut > usual + 0.1:
            what = f"{cut:.0%} of the texts are cut off before they end, {usual:.0%} in the iterations before"
    return what and (
        f"{what}: the policy may be earning reward by length, or has forgotten how to stop. Try "
        "--reward.no-eos-penalty, a larger --kl.beta, or another --loss.aggregate; if the texts are good and simply "
        "long, raise --task.max-new-tokens."
    )


def _hacking(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    """A reward model that judges nothing, see `rewards.RewardModel`, disagrees with those that do."""
    reward, held_out = metrics.get("reward/mean"), metrics.get("reward/held_out")
    if reward is None or held_out is None:
        return None
    for name, value in (("smooth reward", reward), ("smooth held out", held_out)):
        self._numbers[name] = value + 0.7 * (self._numbers.get(name, value) - value)
    reward, held_out = self._numbers["smooth reward"], self._numbers["smooth held out"]
    peak = self._numbers.get("held out peak", -math.inf)
    if held_out >= peak:
        self._numbers |= {"held out peak": held_out, "reward at peak": reward}
        peak = held_out
    before = self._numbers["reward at peak"]
    self.streak("hacking", reward > before and held_out < peak - 0.25)
    if not self.hacking:
        return None
    return (
        f"The reward rises ({before:.3g} to {reward:.3g}) while the reward model that was held out sees the texts grow "
        f"worse ({peak:.3g} to {held_out:.3g}, in deviations of reference texts): the policy earns by what the others "
        "are wrong about. The best model is one of before (checkpoints/, best/). Try a larger --kl.beta, more members, "
        "or new pairs of what it writes now; --guard.stop-on-hacking ends a run in time."
    )


def _explained_variance(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    explained = metrics.get("value/explained_variance")
    if explained is None:
        return None
    streak = self.streak("explained variance", explained <= 0 and metrics.get("reward/std", 1.0) > 0)
    if streak < 10:
        return None
    return (
        f"The explained variance was not above 0 for {streak} iterations (now {explained:.2g}): the critic predicts no "
        "better than a constant would. By default it then has no say in the advantages; with --advantage.baseline "
        "value or an --advantage.actor-lambda below 1 it misleads the policy. Let the task tell it more (Task.hints), "
        "or try --model.critic separate, which can learn more, and with that another --critic.learning-rate, if the "
        "value loss does not fall."
    )


def _mismatch(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    mismatch = metrics.get("kl/mismatch", 0.0)
    if mismatch <= 0.1:
        return None
    said = (
        f"The engine that writes the texts and the model that is trained disagree by {mismatch:.2g} nats per token: "
        "the policy learns from texts that are not quite its own. "
    )
    if metrics.get("rollout/behind", 0.0) > 0:
        return said + ("They were written by a policy of before: try a smaller --rollout.ahead, or --rollout.no-go-on.")
    return said + (
        "Try --rollout.engine-dtype float32, or --rollout.engine transformers to see whether it is the engine; "
        "--loss.importance-cap 2 limits the harm."
    )


def _failing_rewards(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    more = self.rise("reward/failures", metrics)
    if more <= 0:
        return None
    return (
        f"The reward failed in this iteration ({more:.0f} times): those texts got its fallback instead of a score. If "
        "it took too long, raise --task.reward-timeout; otherwise mend the reward function: it must cope with any text."
    )


def _failing_replies(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    more = self.rise("reply/failures", metrics)
    if more <= 0:
        return None
    return (
        f"The task's reply failed in this iteration ({more:.0f} times): the agent was answered by on_reply_error, or "
        "its text ended there. The first failures are logged in full; mend `reply`: it must cope with any text."
    )


def _replies_left_out(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    more = self.rise("reply/left_out", metrics)
    if more <= 0:
        return None
    return (
        f"Replies of the task found no room in this iteration ({more:.0f} times), which ended the texts there. Raise "
        "the task's max_reply_tokens, or --task.context."
    )


def _skipped(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    more = self.rise("guard/skipped", metrics)
    if more <= 0:
        return None
    return (
        f"Optimizer steps of this iteration were left out ({more:.0f} times), as loss or gradient was not finite; "
        "the batches lie in the run's folder under skipped/. If it happens again, try a lower --actor.learning-rate, a "
        "smaller --actor.max-gradient-norm, or --model.dtype float32."
    )


def _unscored(self: Warnings, metrics: Mapping[str, float]) -> str | None:
    more = self.rise("guard/unscored", metrics)
    if more <= 0:
        return None
    return (
        "The reward of a text was not a finite number, so nothing was learned from the batch of this iteration; which "
        "text it was is told in the run's folder under skipped/. Mend the reward function: it must give a finite "
        "number for any text, also for an empty one."
    )


_RULES: dict[str, Callable[[Warnings, Mapping[str, float]], str | None]] = {
    "equal rewards": _equal_rewards,
    "kl to reference": _kl_to_reference,
    "kl to old": _kl_to_old,
    "entropy": _entropy,
    "length": _length,
    "explained variance": _explained_variance,
    "hacking": _hacking,
    "mismatch": _mismatch,
    "failing rewards": _failing_rewards,
    "failing replies": _failing_replies,
    "replies left out": _replies_left_out,
    "skipped": _skipped,
    "unscored": _unscored,
}
