"""Combinations of rewards, by hand and as properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import (
    Clip,
    Ensemble,
    ExactMatch,
    Guard,
    Product,
    RewardError,
    Rollout,
    Score,
    WeightedSum,
    as_reward,
)

numbers = st.floats(-100, 100, allow_nan=False)
members = st.lists(numbers, min_size=1, max_size=6)


def returning(value, per_token=None, name="member"):
    reward = as_reward(lambda rollout: Score(value, per_token=per_token))
    reward.name = name
    return reward


def score_of(reward, text="ab"):
    return reward([Rollout.of(text)])[0]


class TestWeightedSum:
    def test_hand_computed(self):
        a = returning(1.0, [1.0, 0.0], name="a")
        b = returning(3.0, [0.0, 2.0], name="b")
        c = returning(10.0, name="c")
        assert score_of(WeightedSum([(a, 2.0), (b, -0.5), (c, 0.1)])) == Score(
            2 - 1.5 + 1,
            {"a": 1.0, "b": 3.0, "c": 10.0, "weighted_sum": 1.5},
            np.array([2.0, -1.0]),
        )

    def test_from_a_mapping(self):
        assert score_of(WeightedSum({returning(1.0): 2.0, returning(5.0): 1.0})).value == 7.0

    def test_names_are_made_unique(self):
        assert score_of(WeightedSum([(returning(1.0), 1), (returning(2.0), 1), (returning(3.0), 1)])).parts == {
            "member": 1.0,
            "member_2": 2.0,
            "member_3": 3.0,
            "weighted_sum": 6.0,
        }

    def test_a_member_keeps_its_name_while_another_fails(self):
        failing = Guard(ExactMatch(key="first") + ExactMatch(key="first"))
        total = WeightedSum([(failing, 1.0), (ExactMatch(key="second"), 1.0)])
        fine = Rollout.of("a", metadata={"first": "b", "second": "a"})
        broken = Rollout.of("a", metadata={"second": "a"})
        for batch in ([fine, broken], [broken, fine]):
            for score, rollout in zip(total(batch), batch, strict=True):
                assert score.parts["exact_match_3"] == 1.0
                assert score.parts.get("exact_match", "absent") == (0.0 if rollout is fine else "absent")

    @given(members, st.data())
    def test_linear_in_the_totals(self, values, data):
        weights = data.draw(st.lists(numbers, min_size=len(values), max_size=len(values)))
        dense = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
        rewards = [returning(v, [v, 1.0] if d else None) for v, d in zip(values, dense, strict=True)]
        total = score_of(WeightedSum(list(zip(rewards, weights, strict=True)))).total
        expected = sum(w * score_of(r).total for r, w in zip(rewards, weights, strict=True))
        assert total == pytest.approx(expected, abs=1e-6)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="no rewards"):
            WeightedSum([])
        with pytest.raises(ValueError, match="is nan; expected a finite number"):
            WeightedSum([(ExactMatch(), math.nan)])


class TestProduct:
    def test_a_gate_shuts_tokens_too(self):
        dense = returning(3.0, [1.0, 2.0])
        assert score_of(Product(returning(0.0), dense)).total == 0.0
        score = score_of(Product(returning(0.5), dense, returning(-1.0)))
        assert score.value == -1.5
        np.testing.assert_array_equal(score.per_token, [-0.5, -1.0])

    @given(st.lists(numbers, min_size=1, max_size=3))
    def test_the_total_is_the_product_of_totals(self, values):
        rewards = [returning(values[0], [1.0, 2.0]), *map(returning, values[1:])]
        assert score_of(Product(*rewards)).total == pytest.approx(
            (values[0] + 3) * math.prod(values[1:]), abs=1e-6, rel=1e-9
        )

    def test_two_dense_factors_have_no_meaning(self):
        with pytest.raises(RewardError, match=r"per_token scores from 'a', 'b'.*at most one factor"):
            score_of(Product(returning(1.0, [0.0, 0.0], "a"), returning(1.0, [0.0, 0.0], "b")))


class TestClip:
    @pytest.mark.parametrize(("value", "clipped"), [(-3.0, -1.0), (-1.0, -1.0), (0.3, 0.3), (2.0, 2.0), (9.0, 2.0)])
    def test_hand_computed(self, value, clipped):
        assert score_of(Clip(returning(value), -1, 2)) == Score(clipped, {"member": value, "clip": clipped})

    def test_the_bounds_are_about_the_total_and_settled_at_the_end(self):
        score = score_of(Clip(returning(1.0, [2.0, 3.0]), low=0, high=4))
        assert (score.value, score.total) == (-1.0, 4.0)
        np.testing.assert_array_equal(score.per_token, [2.0, 3.0])

    @given(numbers, numbers, numbers, st.booleans())
    def test_stays_in_bounds(self, value, one, other, dense):
        low, high = sorted([one, other])
        total = score_of(Clip(returning(value, [value, 1.0] if dense else None), low, high)).total
        assert low - 1e-9 <= total <= high + 1e-9

    def test_one_bound_is_enough(self):
        assert score_of(Clip(returning(7.0), low=0, high=math.inf)).value == 7.0

    @pytest.mark.parametrize(("low", "high"), [(1, 0), (math.nan, 1)])
    def test_wrong_bounds(self, low, high):
        with pytest.raises(ValueError, match="expected low <= high"):
            Clip(ExactMatch(), low, high)


class TestEnsemble:
    # mean 2; deviations -1, -1, 2: variance (1 + 1 + 4) / 3 = 2
    @pytest.mark.parametrize(
        ("how", "k", "value"),
        [
            ("mean", 1.0, 2.0),
            ("min", 1.0, 1.0),
            ("mean-std", 1.0, 2 - 2**0.5),
            ("mean-std", 2.0, 2 - 2 * 2**0.5),
        ],
    )
    def test_hand_computed(self, how, k, value):
        score = score_of(Ensemble([returning(1.0), returning(1.0), returning(4.0)], how, k))
        assert score.value == pytest.approx(value)
        assert score.parts == {
            "member": 1.0,
            "member_2": 1.0,
            "member_3": 4.0,
            "ensemble": score.value,
        }

    def test_per_token(self):
        rewards = [returning(0.0, [4.0, 0.0]), returning(1.0)]
        mean = score_of(Ensemble(rewards))
        assert mean.value == 0.5
        np.testing.assert_array_equal(mean.per_token, [2.0, 0.0])
        assert score_of(Ensemble(rewards, "min")) == Score(1.0, {"member": 0.0, "member_2": 1.0, "ensemble": 1.0})
        disagreeing = score_of(Ensemble(rewards, "mean-std"))  # totals 4 and 1: mean 2.5, deviation 1.5
        assert disagreeing.total == pytest.approx(1.0)

    @given(members, st.floats(0, 3))
    def test_order_of_the_modes(self, values, k):
        rewards = [returning(value) for value in values]
        mean, least, lowered = (score_of(Ensemble(rewards, how, k)).value for how in ("mean", "min", "mean-std"))
        assert least <= mean + 1e-9
        assert lowered <= mean
        assert min(values) == least

    @given(numbers, st.integers(1, 5), st.sampled_from(["mean", "min", "mean-std"]))
    def test_agreement_costs_nothing(self, value, size, how):
        assert score_of(Ensemble([returning(value)] * size, how, k=3.0)).value == pytest.approx(value, abs=1e-9)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="'median'; expected one of 'mean', 'min', 'mean-std'"):
            Ensemble([ExactMatch()], how="median")
        with pytest.raises(ValueError, match="k is -1; expected"):
            Ensemble([ExactMatch()], "mean-std", k=-1)


def test_the_outermost_keeps_its_name():
    assert score_of(Clip(Clip(returning(9.0), 0, 5), 0, 2)).parts == {"member": 9.0, "clip_2": 5.0, "clip": 2.0}


def test_close_reaches_every_member():
    closed = []

    class Closing(ExactMatch):
        def close(self):
            closed.append(self)

    a, b, c = Closing(), Closing(), Closing()
    Clip(a + Product(b, Guard(c)), 0, 1).close()
    assert closed == [a, b, c]
