"""Rewards by name: those built in, and those registered from outside."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from rewards import (
    ExactMatch,
    Guard,
    LengthPenalty,
    Reward,
    Rollout,
    Score,
    make_reward,
    register_reward,
    reward,
    reward_names,
)
from rewards.named import _REWARDS


@register_reward("test_politeness")
@dataclass(eq=False)
class Politeness(Reward):
    word: str = "please"

    def score(self, rollout: Rollout) -> float:
        return float(self.word in rollout.text)


@register_reward("test_ends_with")
def ends_with(rollout: Rollout, suffix: str = ".") -> float:
    return float(rollout.text.endswith(suffix))


BUILT_IN = [
    "code_tests",
    "exact_match",
    "format",
    "judge",
    "length_penalty",
    "math",
    "missing_eos_penalty",
    "numeric_match",
    "repetition_penalty",
    "reward_model",
    "vader_sentiment",
]


def test_the_built_in_ones_are_registered_under_their_own_names():
    classes = {name: thing for name in reward_names() if isinstance(thing := _REWARDS[name], type)}
    assert [name for name, thing in classes.items() if thing.__module__.startswith("rewards.")] == BUILT_IN
    assert [_REWARDS[name].name for name in BUILT_IN] == BUILT_IN


def test_a_class_is_made_with_its_arguments():
    assert isinstance(make_reward("exact_match"), ExactMatch)
    penalty = make_reward("length_penalty", {"free": 3, "cost": 0.5})
    assert isinstance(penalty, LengthPenalty)
    assert (penalty.free, penalty.cost, penalty.floor) == (3, 0.5, -1.0)
    assert penalty([Rollout.of("1234")]) == [Score(-0.5, {"length_penalty": -0.5})]


def test_a_class_registered_from_outside():
    assert "test_politeness" in reward_names()
    scores = make_reward("test_politeness", {"word": "thanks"})([Rollout.of("thanks"), Rollout.of("please")])
    assert scores == [Score(1.0, {"politeness": 1.0}), Score(0.0, {"politeness": 0.0})]


def test_a_function_registered_from_outside_may_take_arguments():
    rollouts = [Rollout.of("Yes."), Rollout.of("Yes!")]
    assert [score.value for score in make_reward("test_ends_with")(rollouts)] == [1.0, 0.0]
    assert make_reward("test_ends_with", {"suffix": "!"})(rollouts) == [
        Score(0.0, {"test_ends_with": 0.0}),
        Score(1.0, {"test_ends_with": 1.0}),
    ]


def test_a_function_may_be_decorated_by_both_in_either_order():
    @register_reward("test_short")
    @reward
    def short(rollout):
        return float(len(rollout.text) < 3)

    @reward
    @register_reward("test_long")
    def long(rollout):
        return float(len(rollout.text) >= 3)

    for given, name, parts in ((short, "short", "test_short"), (long, "long", "test_long")):
        assert isinstance(given, Reward)
        assert given.name == name  # what the decorator gave back is still combined and logged as before
        assert list(make_reward(parts)([Rollout.of("abc")])[0].parts) == [parts]
    assert (make_reward("test_short") + make_reward("test_long"))([Rollout.of("abc")])[0].value == 1.0


def test_running_a_cell_again_replaces_the_reward():
    for value in (1.0, 2.0):

        @register_reward("test_again")
        @reward
        def again(rollout, value=value):
            return value

    assert make_reward("test_again")([Rollout.of("")])[0].value == 2.0


def test_one_made_by_name_runs_in_a_worker_process():
    guard = Guard(make_reward("test_ends_with", {"suffix": "!"}), timeout=30)
    assert guard([Rollout.of("Yes!")])[0].value == 1.0
    guard.close()


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="unknown reward 'exact_mach'; did you mean 'exact_match'"):
        make_reward("exact_mach")
    with pytest.raises(TypeError, match=r"cannot make the reward 'length_penalty' with \{'fre': 3\}: .*'fre'"):
        make_reward("length_penalty", {"fre": 3})
    with pytest.raises(TypeError, match=r"cannot make the reward 'test_ends_with' with \{'sufix': '!'\}: .*'sufix'"):
        make_reward("test_ends_with", {"sufix": "!"})
    with pytest.raises(ValueError, match="LengthPenalty: free is -1"):
        make_reward("length_penalty", {"free": -1})
    with pytest.raises(ValueError, match="a reward named 'exact_match' is already registered"):
        register_reward("exact_match")(Politeness)


@pytest.mark.parametrize(
    ("wrong", "message"), [(ExactMatch(), "got ExactMatch"), (3, "got 3; expected"), (int, "the class int; expected")]
)
def test_only_classes_of_rewards_and_functions_are_registered(wrong, message):
    with pytest.raises(TypeError, match=message):
        register_reward("test_wrong")(wrong)
    assert "test_wrong" not in reward_names()
