"""Rollout, Score, the Reward interface and the checks every score passes."""

import functools
import json
import logging
import math
import pickle
import subprocess
import sys
from types import MappingProxyType

import cloudpickle
import numpy as np
import pytest

from rewards import (
    End,
    ExactMatch,
    Format,
    NumericMatch,
    Product,
    Reward,
    RewardError,
    Rollout,
    Score,
    WeightedSum,
    as_reward,
    reward,
)


def ids(*tokens):
    return np.array(tokens, dtype=np.int64)


class TestRollout:
    def test_text_is_decoded_once_and_only_when_asked_for(self):
        calls = []

        def decode(tokens):
            calls.append(tokens.tolist())
            return "".join(map(chr, tokens))

        rollout = Rollout(ids(65), ids(66, 67), {}, "eos", None, decode)
        assert calls == []
        assert (rollout.text, rollout.transcript, rollout.prompt, rollout.prompt) == ("BC", "BC", "A", "A")
        assert calls == [[66, 67], [65]]

    def test_without_decode_it_says_what_is_missing(self):
        with pytest.raises(ValueError, match="pass decode="):
            Rollout(ids(1), ids(2)).text

    def test_num_actions_counts_what_the_agent_chose(self):
        assert Rollout(ids(), ids(1, 2, 3)).num_actions == 3
        assert Rollout(ids(), ids(1, 2, 3), is_action=np.array([True, False, True])).num_actions == 2

    @pytest.mark.parametrize(
        ("end", "terminated"),
        [("eos", True), ("stop", True), ("task", True), ("budget", False), ("context", False)],
    )
    def test_terminated(self, end, terminated):
        assert Rollout.of("x", end=end).terminated is terminated

    def test_pickling_keeps_the_text_and_drops_decode(self):
        metadata = MappingProxyType({"answer": "BC"})
        mask = np.array([True, False])
        rollout = Rollout(ids(65), ids(66, 67), metadata, "stop", mask, lambda t: "".join(map(chr, t)))
        copy = pickle.loads(pickle.dumps(rollout))
        assert (copy.prompt, copy.transcript, copy.metadata, copy.end) == ("A", "BC", {"answer": "BC"}, "stop")
        assert [(turn.who, turn.text, turn.tokens.tolist()) for turn in copy.turns] == [
            ("agent", "B", [66]),
            ("task", "C", [67]),
        ]
        np.testing.assert_array_equal(copy.prompt_tokens, [65])
        np.testing.assert_array_equal(copy.tokens, [66, 67])
        np.testing.assert_array_equal(copy.is_action, [True, False])
        assert copy.episode == rollout.episode

    def test_of(self):
        rollout = Rollout.of("ab", prompt="c")
        assert (rollout.tokens.tolist(), rollout.prompt_tokens.tolist()) == ([97, 98], [99])
        assert Rollout.of("ab", tokens=[7]).tokens.tolist() == [7]
        with pytest.raises(ValueError, match="'EOS'; expected one of running, eos, stop, task, budget, context"):
            Rollout.of("x", end="EOS")

    def test_the_end_is_an_end_and_equals_its_string(self):
        given = [Rollout.of("x", end="budget"), Rollout.of("x", end=End.BUDGET), Rollout(ids(), ids(1), end="budget")]
        for rollout in [*given, pickle.loads(pickle.dumps(given[0]))]:
            assert rollout.end is End.BUDGET
            assert rollout.end == "budget"
            assert rollout.end in {"budget", "context"}
        assert json.dumps({"end": given[0].end}) == '{"end": "budget"}'
        assert repr(given[0]) == "Rollout('x', 1 tokens, end='budget')"
        with pytest.raises(ValueError, match="a rollout's end is 'done'; expected one of running"):
            Rollout(ids(), ids(1), end="done")

    def test_ends(self):
        assert [str(end) for end in End] == ["running", "eos", "stop", "task", "budget", "context"]
        assert not Rollout.of("x", end=End.RUNNING).terminated
        assert [end for end in End if end.is_cut] == ["budget", "context"]


class TestTurns:
    def test_the_text_is_what_the_agent_wrote(self):
        calls = []

        def decode(tokens):
            calls.append(tokens.tolist())
            return "".join(map(chr, tokens))

        own = np.array([True, True, False, True, False, False, True])
        rollout = Rollout(ids(65), ids(52, 59, 63, 50, 33, 33, 55), is_action=own, decode=decode)
        assert (rollout.text, rollout.transcript) == ("4;\n2\n7", "4;?2!!7")
        assert calls == [[52, 59], [50], [55], [63], [33, 33]]  # each turn by itself
        assert [(turn.who, turn.text) for turn in rollout.turns] == [
            ("agent", "4;"),
            ("task", "?"),
            ("agent", "2"),
            ("task", "!!"),
            ("agent", "7"),
        ]
        assert np.concatenate([turn.tokens for turn in rollout.turns]).tolist() == rollout.tokens.tolist()
        assert rollout.num_actions == 4

    def test_a_character_that_two_turns_would_make_together_is_nobodys(self):
        def decode(tokens):
            return bytes(tokens.tolist()).decode(errors="replace")

        rollout = Rollout(ids(), ids(0xC3, 0xA9), is_action=np.array([True, False]), decode=decode)
        assert (decode(rollout.tokens), rollout.text, rollout.transcript) == ("é", "\ufffd", "\ufffd\ufffd")

    def test_by_hand(self):
        rollout = Rollout.of(["4", "sure?", "2"], prompt="p")
        assert (rollout.text, rollout.transcript, rollout.num_actions) == ("4\n2", "4sure?2", 2)
        assert rollout.is_action.tolist() == [True, *[False] * 5, True]
        assert rollout.tokens.tolist() == [ord(char) for char in "4sure?2"]
        assert repr(rollout) == "Rollout('4sure?2', 7 tokens, end='eos')"
        assert repr(rollout.turns[1]) == "Turn('task', 'sure?', 5 tokens)"
        assert Rollout.of("ab").is_action is None
        with pytest.raises(ValueError, match=r"got 3 turns and the tokens \[1\]"):
            Rollout.of(["a", "b", "c"], tokens=[1])

    def test_nothing_written(self):
        rollout = Rollout(ids(65), ids(), decode=lambda tokens: "never asked")
        assert (rollout.turns, rollout.text, rollout.transcript) == ((), "", "")
        assert Rollout.of("").text == ""

    def test_a_tools_number_earns_nothing(self):
        rewards = NumericMatch(), ExactMatch(), Format("42")
        told, wrong, right = (
            Rollout.of(turns, metadata={"answer": "42"}) for turns in (["6*7?", "42"], ["4", "go on", "2"], ["42", "!"])
        )
        assert [reward([rollout])[0].value for rollout in (told, wrong, right) for reward in rewards] == [
            *(0.0, 0.0, 0.0),
            *(0.0, 0.0, 0.0),
            *(1.0, 1.0, 1.0),
        ]


class TestBefore:
    def test_a_reply_belongs_to_the_state_after_it(self):
        is_action = np.array([True, True, False, True])
        rollout = Rollout(ids(65), ids(1, 2, 3, 4), {"a": 1}, "eos", is_action, decode=str, episode=7)
        states = [rollout.before(action) for action in range(4)]
        assert [state.tokens.tolist() for state in states] == [[], [1], [1, 2, 3], [1, 2, 3, 4]]
        assert [state.num_actions for state in states] == [0, 1, 2, 3]
        assert [state.end for state in states] == ["running", "running", "running", "eos"]
        assert {(state.episode, state.metadata["a"], state.prompt) for state in states} == {(7, 1, "[65]")}

    def test_without_replies_and_by_hand(self):
        assert [Rollout.of("abc", prompt="p").before(action).text for action in range(4)] == ["", "a", "ab", "abc"]
        assert Rollout.of("abc", prompt="p").before(1).prompt == "p"

    @pytest.mark.parametrize("action", [-1, 4])
    def test_no_such_state(self, action):
        with pytest.raises(
            ValueError, match=f"expected an action from 0 to 3, which is the state at the end, got {action}"
        ):
            Rollout.of("abc").before(action)


class TestIdentity:
    def test_each_rollout_made_by_hand_is_an_episode_of_its_own(self):
        assert len({Rollout.of("a").episode, Rollout.of("a").episode, Rollout(ids(), ids(1)).episode}) == 3

    def test_it_is_kept(self):
        assert pickle.loads(pickle.dumps(Rollout(ids(), ids(1), episode=7))).episode == 7
        assert Rollout(ids(), ids(1), episode=7).episode == 7


class TestScore:
    def test_total(self):
        assert Score(2.0).total == 2.0
        assert Score(2.0, per_token=np.array([0.5, -1.0])).total == 1.5

    def test_equality_compares_arrays(self):
        one = Score(1.0, {"a": 1.0}, np.array([1.0, 2.0]))
        assert one == Score(1.0, {"a": 1.0}, np.array([1.0, 2.0]))
        assert one != Score(1.0, {"a": 1.0}, np.array([1.0, 3.0]))
        assert one != Score(1.0, {"a": 1.0})
        assert one != 1.0


class Half(Reward):
    def score(self, rollout):
        return 0.5


class LMScore(Reward):
    """Scores in batches only."""

    def score_batch(self, rollouts):
        return np.arange(len(rollouts))


def returning(value):
    return as_reward(lambda rollout: value)


class TestReward:
    def test_names(self):
        assert (Half().name, LMScore().name, ExactMatch().name) == ("half", "lm_score", "exact_match")
        named = type("Anything", (Half,), {"name": "mine"})
        assert named().name == "mine"

    def test_scores_are_normalised_and_logged_under_the_name(self):
        assert Half()([Rollout.of("x")]) == [Score(0.5, {"half": 0.5})]
        (score,) = returning(Score(1, {"detail": True}, [1, 2]))([Rollout.of("ab")])
        assert score == Score(1.0, {"detail": 1.0, "lambda": 1.0}, np.array([1.0, 2.0]))
        assert score.per_token.dtype == np.float64

    def test_a_batched_reward_scores_one_rollout_too(self):
        assert [score.value for score in LMScore()([Rollout.of("")] * 3)] == [0.0, 1.0, 2.0]
        assert LMScore().score(Rollout.of("")) == 0
        assert LMScore()([]) == []

    def test_overriding_nothing(self):
        with pytest.raises(NotImplementedError, match="Empty overrides neither score"):
            type("Empty", (Reward,), {})()([Rollout.of("")])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1.0", [1.0, 2.0], 10**400, 1j])
    def test_what_is_no_finite_number_is_an_error_that_shows_it(self, value):
        with pytest.raises(RewardError) as error:
            returning(value)([Rollout.of("good"), Rollout.of("the text")])
        message = str(error.value)
        assert f"reward 'lambda' returned {value!r}" in message
        assert "'good'" in message
        assert "expected a finite number" in message
        assert isinstance(error.value, ValueError)

    def test_the_error_names_the_guilty_rollout(self):
        with pytest.raises(RewardError, match="text 'bad'"):
            as_reward(lambda r: math.nan if r.text == "bad" else 1.0)([Rollout.of("good"), Rollout.of("bad")])

    def test_the_error_names_the_guilty_member_of_a_sum(self):
        with pytest.raises(RewardError, match="reward 'lambda' returned nan"):
            (Half() + returning(math.nan))([Rollout.of("x")])

    def test_a_part_that_is_no_number(self):
        with pytest.raises(RewardError, match="part 'detail' = nan"):
            returning(Score(1.0, {"detail": math.nan}))([Rollout.of("x")])

    @pytest.mark.parametrize(
        ("per_token", "problem"),
        [
            ([1.0], r"has shape \(1,\).*shape \(2,\)"),
            ([[1.0, 2.0]], r"has shape \(1, 2\)"),
            ([1.0, math.nan], "has nan at index 1"),
            (["a", "b"], "cannot read as numbers"),
        ],
    )
    def test_a_wrong_per_token(self, per_token, problem):
        with pytest.raises(RewardError, match=problem):
            returning(Score(0.0, per_token=per_token))([Rollout.of("ab")])

    @pytest.mark.parametrize(("result", "got"), [([1.0], "1 scores for 2"), (3, "returned 3 for 2")])
    def test_a_wrong_number_of_scores(self, result, got):
        batched = type("Batched", (Reward,), {"score_batch": lambda self, rollouts: result})
        with pytest.raises(RewardError, match=got):
            batched()([Rollout.of("a"), Rollout.of("b")])

    def test_one_rollout_instead_of_a_batch(self):
        with pytest.raises(TypeError, match="expected a sequence"):
            Half()(Rollout.of("a"))


class TestOperators:
    def test_hand_computed(self):
        a, b = returning(3.0), returning(2.0)
        rollouts = [Rollout.of("x")]
        values = {
            "a + b": a + b,
            "0.5 * a": 0.5 * a,
            "a * 2": a * 2,
            "a * b": a * b,
            "-a": -a,
            "a - b": a - b,
            "numpy": np.float64(0.5) * a,
            "function": a + (lambda rollout: 1.0),
            "function on the left": (lambda rollout: 1.0) - a,
            "function times": (lambda rollout: 4.0) * a,
            "distributed": 2 * (a + 0.5 * b) - a,
        }
        assert {name: reward(rollouts)[0].value for name, reward in values.items()} == {
            "a + b": 5.0,
            "0.5 * a": 1.5,
            "a * 2": 6.0,
            "a * b": 6.0,
            "-a": -3.0,
            "a - b": 1.0,
            "numpy": 1.5,
            "function": 4.0,
            "function on the left": -2.0,
            "function times": 12.0,
            "distributed": 5.0,
        }

    def test_sums_and_products_stay_flat(self):
        a, b, c = Half(), ExactMatch(), returning(1.0)
        total = 2 * (a + 0.5 * b) + c
        assert isinstance(total, WeightedSum)
        assert (total.rewards, total.weights) == ((a, b, c), (2.0, 1.0, 1.0))
        product = a * b * c
        assert isinstance(product, Product)
        assert product.rewards == (a, b, c)

    def test_a_sum_with_a_name_of_its_own_stays_whole(self):
        quality = Half() + Half()
        quality.name = "quality"
        (score,) = (quality + Half())([Rollout.of("x")])
        assert score.parts == {
            "half": 0.5,
            "half_2": 0.5,
            "quality": 1.0,
            "half_3": 0.5,
            "weighted_sum": 1.5,
        }

    def test_a_number_is_no_reward(self):
        with pytest.raises(TypeError, match=r"0\.5 is a float; expected a Reward or a function"):
            Half() + 0.5


class TestAsReward:
    def test_a_reward_stays_itself(self):
        half = Half()
        assert as_reward(half) is half

    def test_a_function_gives_its_name(self):
        @reward
        def polite(rollout):
            return float("please" in rollout.text)

        assert polite([Rollout.of("please")]) == [Score(1.0, {"polite": 1.0})]

        def scaled(scale, rollout):
            return scale

        partial = as_reward(functools.partial(scaled, 3))
        assert partial([Rollout.of("")]) == [Score(3.0, {"scaled": 3.0})]

    @pytest.mark.parametrize(
        ("wrong", "help"),
        [
            (ExactMatch, r"ExactMatch is a class.*Write ExactMatch\(\.\.\.\)"),
            ("exact_match", "expected a Reward or a function"),
            (None, "expected a Reward or a function"),
            (lambda completions, prompts: 0.0, "cannot be called with a rollout alone"),
            (lambda: 0.0, "cannot be called with a rollout alone"),
        ],
    )
    def test_anything_else_is_refused_with_help(self, wrong, help):
        with pytest.raises(TypeError, match=help):
            as_reward(wrong)

    def test_rewards_survive_cloudpickle(self):
        offset = 2.0
        total = ExactMatch() + 0.5 * as_reward(lambda rollout: offset)
        copy = cloudpickle.loads(cloudpickle.dumps(total))
        rollouts = [Rollout.of("a", metadata={"answer": "a"})]
        assert (
            copy(rollouts) == total(rollouts) == [Score(2.0, {"exact_match": 1.0, "lambda": 2.0, "weighted_sum": 2.0})]
        )


def test_importing_rewards_imports_no_environment_and_no_torch():
    code = (
        "import rewards, sys; "
        "print(sorted({'torch', 'llm_env', 'agents', 'gymnasium', 'vaderSentiment'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n", result.stderr
    assert logging.getLogger("rewards").handlers == []  # a library leaves handlers to its user
