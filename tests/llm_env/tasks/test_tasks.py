"""The built-in tasks: what they ask, and what they pay for."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from llm_env import Prompt, Task, TokenEnv, TokenMDP, TokenVectorEnv, register_task
from llm_env.tasks import (
    Addition,
    Copy,
    Countdown,
    Dataset,
    ReasoningGym,
    Reverse,
    Sentiment,
    WordSums,
    make_task,
    task_class,
)
from llm_env.tasks.sums import in_words
from rewards import ExactMatch, Rollout, Score


def write(mdp: TokenMDP, text: str) -> float:
    """Write a text into row 0 and end it; what it earned."""
    mdp.reset(seed=0)
    for token in [*mdp.vocabulary.encode(text), mdp.vocabulary.eos_tokens[0]]:
        mdp.step([token])
        if mdp.finished:
            break
    return mdp.finished[0].total


@pytest.mark.parametrize("task", [Copy(4), Reverse(4), Addition(3), WordSums(30)])
def test_the_right_answer_earns_one_and_others_nothing(task: Task) -> None:
    mdp = TokenMDP(task)
    mdp.reset(seed=0)
    answer = mdp.prompt(0).metadata["answer"]
    assert write(mdp, answer) == 1.0
    assert mdp.finished[0].rollout.end == "eos"
    assert write(mdp, answer[:-1]) == 0.0
    assert write(mdp, answer + answer[-1]) == 0.0  # the budget has room for this


def test_what_the_character_tasks_ask() -> None:
    for prompt in Reverse(5).prompts("train")[:20]:
        word = prompt.text.removeprefix("reverse ").removesuffix(": ")  # type: ignore[union-attr]
        assert prompt.metadata["answer"] == word[::-1]
    for prompt in Copy(5).prompts("train")[:20]:
        assert prompt.text == f"copy {prompt.metadata['answer']}: "
    for prompt in Addition(2).prompts("train")[:20]:
        left, right = prompt.text.removesuffix("=").split("+")  # type: ignore[union-attr]
        assert int(prompt.metadata["answer"]) == int(left) + int(right)


@pytest.mark.parametrize(
    ("text", "fifths"),
    [
        ("abcd", [1, 1, 1, 1, 1]),  # the last is the end, in its place
        ("abxd", [1, 1, 0, 1, 1]),
        ("ab", [1, 1, 0]),
        ("xbcda", [0, 1, 1, 1, 0]),  # cut off: it has no end
        ("", [0]),
    ],
)
def test_dense_pays_each_character_where_it_is_written(text: str, fifths: list[int]) -> None:
    rollout = Rollout.of(text, metadata={"answer": "abcd"}, tokens=list(range(len(fifths))))
    score = Reverse(4, dense=True).score(rollout)
    assert isinstance(score, Score)
    assert score.per_token is not None
    assert score.per_token.tolist() == pytest.approx([fifth / 5 for fifth in fifths])
    assert score.parts == {"exact": float(text == "abcd")}


def test_where_tokens_are_no_characters_dense_pays_at_the_end() -> None:
    score = Reverse(4, dense=True).score(Rollout.of("abxd", metadata={"answer": "abcd"}, tokens=[7, 8]))
    assert score == Score(0.8, {"exact": 0.0})


def test_the_action_mask_allows_answers_only() -> None:
    env = TokenEnv(Addition(2))
    _, info = env.reset(seed=0)
    allowed = [env.mdp.vocabulary.token_bytes[t] for t in np.flatnonzero(info["action_mask"])]
    assert b"".join(sorted(allowed)) == b"0123456789<eos>"
    env.action_space.seed(0)
    assert env.action_space.sample(info["action_mask"]) in np.flatnonzero(info["action_mask"])
    assert env.step(env.action_space.sample())[4]["action_mask"].sum() == 11


@pytest.mark.parametrize(
    "task", [Copy(3), Addition(2), Countdown(), Sentiment(), ReasoningGym("chain_sum"), WordSums()]
)
def test_held_out_prompts_are_held_out_and_stay_the_same(task: Task) -> None:
    train, test = ({p.identity for p in task.prompts(split)} for split in ("train", "test"))
    assert train
    assert test
    assert not train & test


def test_more_training_prompts_leave_the_held_out_ones_alone() -> None:
    small, large = Copy(num_train=10, num_test=5), Copy(num_train=1000, num_test=5)
    assert list(small.prompts("test")) == list(large.prompts("test"))
    assert list(small.prompts("train")) == list(large.prompts("train"))[:10]
    assert list(Copy(seed=1, num_train=10).prompts("train")) != list(small.prompts("train"))


def test_a_task_with_few_prompts_gives_what_it_has() -> None:
    task = Copy(1, alphabet="abcde")
    assert len(task.prompts("train")) == 4
    assert len(task.prompts("test")) == 1


class TestCountdown:
    FACTS: dict[str, Any] = {"numbers": [3, 5, 2], "target": 21}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("text", "score"),
        [
            ("3*(5+2)", 1.0),
            ("I think <answer>3*5</answer>... no: <answer> (2+5)*3 = 21 </answer>", 1.0),
            ("let me see\n(5 + 2) * 3 = 21\n", 1.0),
            ("3*(5+2)+0", 0.1),  # a number that was not given
            ("3*5+3+3", 0.1),
            ("21", 0.1),
            ("3*5+2", 0.1),
            ("5/0", 0.0),
            ("3**5", 0.0),
            ("-3*(-5-2)", 0.0),
            ("__import__('os').system('true')", 0.0),
            ("(" * 150 + ")" * 150, 0.0),
            ("9" * 5000, 0.0),
            ("", 0.0),
            ("\x00", 0.0),
            ("3.0*(5+2)", 0.0),
            ("True*(5+2)", 0.0),
        ],
    )
    def test_scores(self, text: str, score: float) -> None:
        assert Countdown().score(Rollout.of(text, metadata=self.FACTS)).value == score

    def test_every_prompt_has_a_solution(self) -> None:
        """Found by trying everything."""

        def reachable(numbers: list[Any]) -> set[Any]:
            from fractions import Fraction

            if len(numbers) == 1:
                return {Fraction(numbers[0])}
            results = set()
            for i, left in enumerate(numbers):
                for j, right in enumerate(numbers):
                    if i != j:
                        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
                        left, right = Fraction(left), Fraction(right)
                        values = [left + right, left - right, left * right] + ([left / right] if right else [])
                        for value in values:
                            results |= reachable([value, *rest])
            return results

        for prompt in Countdown(count=4, num_train=8, num_test=2).prompts("train"):
            assert prompt.metadata["target"] in reachable(list(prompt.metadata["numbers"]))
            assert str(prompt.metadata["target"]) in prompt.text


class TestWordSums:
    @pytest.mark.parametrize(
        ("number", "words"),
        [
            (0, "zero"),
            (7, "seven"),
            (13, "thirteen"),
            (20, "twenty"),
            (42, "forty-two"),
            (99, "ninety-nine"),
            (100, "one hundred"),
            (101, "one hundred one"),
            (315, "three hundred fifteen"),
            (998, "nine hundred ninety-eight"),
        ],
    )
    def test_numbers_in_words(self, number: int, words: str) -> None:
        assert in_words(number) == words

    def test_every_number_has_words_of_its_own(self) -> None:
        assert len({in_words(number) for number in range(1000)}) == 1000

    @pytest.mark.parametrize("largest", [12, 99])
    def test_prompts_are_right_sums(self, largest: int) -> None:
        """Looked up in a table, instead of computed on the way."""
        numbers = {in_words(number): number for number in range(1000)}
        task = WordSums(largest, num_train=100, num_test=20)
        for prompt in [*task.prompts("train"), *task.prompts("test")]:
            left, right = prompt.text.removeprefix("What is ").removesuffix("?").split(" plus ")  # type: ignore[union-attr]
            assert 1 <= numbers[left] <= largest
            assert 1 <= numbers[right] <= largest
            assert numbers[prompt.metadata["answer"].removeprefix(" ")] == numbers[left] + numbers[right]

    def test_a_held_out_sum_is_not_learned_the_other_way_round(self) -> None:
        task = WordSums(9, num_test=6)
        train, test = (
            [tuple(p.text[len("What is ") : -1].split(" plus ")) for p in task.prompts(split)]  # type: ignore[index]
            for split in ("train", "test")
        )
        assert len(test) == 6
        assert len(set(train)) == len(train) == 81 - sum(1 if left == right else 2 for left, right in test)
        assert not {frozenset(pair) for pair in train} & {frozenset(pair) for pair in test}
        assert list(task.prompts("test")) == list(WordSums(9, num_test=6, num_train=10).prompts("test"))
        assert len(WordSums(9, num_train=10).prompts("train")) == 10

    @pytest.mark.parametrize(
        ("text", "score"),
        [
            (" one hundred twelve", 1.0),
            ("one hundred twelve", 1.0),
            (" one hundred and twelve.", 1.0),
            (" One Hundred Twelve", 1.0),
            (" one-hundred twelve", 1.0),
            (" one hundred twelve..", 0.0),
            (" one hundred twelve. one hundred twelve", 0.0),
            (" one hundred twelve\n", 0.0),  # not ended, and anything may follow
            (" one hundred twelve one", 0.0),
            (" and one hundred twelve", 0.0),
            (" hundred twelve", 0.0),
            (" 112", 0.0),
            (".", 0.0),
            ("", 0.0),
        ],
    )
    def test_scores(self, text: str, score: float) -> None:
        assert WordSums().score(Rollout.of(text, metadata={"answer": " one hundred twelve"})) == score

    def test_there_is_room_for_the_longest_prompt_and_answer(self) -> None:
        mdp = TokenMDP("WordSums")
        assert mdp.max_new_tokens == len(" one hundred seventy-seven") + 2
        assert mdp.context == len("What is seventy-seven plus seventy-seven?") + mdp.max_new_tokens

    @pytest.mark.parametrize("largest", [0, 500])
    def test_numbers_it_has_no_words_for(self, largest: int) -> None:
        with pytest.raises(ValueError, match=f"from 1 to 499 at most, got largest={largest}"):
            WordSums(largest)


def test_sentiment_pays_for_praise() -> None:
    mdp = TokenMDP("Sentiment")
    assert write(mdp, "it was wonderful, I love it") > 0.9
    assert write(mdp, "it was awful, I hate it") < 0.2
    with pytest.raises(ValueError, match="has 240 prompts in all, got num_train=300"):
        Sentiment(num_train=300).prompts("train")


def test_reasoning_gym() -> None:
    task = ReasoningGym("chain_sum", config={"min_terms": 2, "max_terms": 2}, num_train=5, num_test=2)
    prompt = task.prompts("train")[0]
    answer = prompt.metadata["entry"]["answer"]
    for text, score in ((answer, 1.0), (f"so <answer>{answer}</answer>", 1.0), ("<answer>none</answer>", 0.0)):
        assert (task.score(Rollout.of(text, metadata=prompt.metadata)) == 1.0) == (score == 1.0)
    with pytest.raises(ValueError, match=r"no data set 'chain_sums'; did you mean 'chain_sum'"):
        ReasoningGym("chain_sums")


def test_data_sets() -> None:
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(30)]
    task = Dataset(rows, prompt="question", reward=ExactMatch(), max_new_tokens=4, max_prompt_tokens=8)
    assert len(task.prompts("train")) == 27
    assert len(task.prompts("test")) == 3
    mdp = TokenMDP(task)
    mdp.reset(seed=0)
    assert write(mdp, mdp.prompt(0).metadata["answer"]) == 1.0
    repeated = Dataset([f"{i % 20}" for i in range(200)], reward=ExactMatch())
    train, test = ({p.identity for p in repeated.prompts(split)} for split in ("train", "test"))
    assert (len(train), len(test), train & test) == (18, 2, set())
    held_out = Dataset(rows[:3], test=rows[3:5], prompt="question", reward=lambda rollout: 0.5)
    assert [len(held_out.prompts(split)) for split in ("train", "test")] == [3, 2]


def test_a_class_is_found_by_its_name() -> None:
    assert task_class("Copy") is Copy
    with pytest.raises(ValueError, match="unknown task 'Copie'; did you mean 'Copy'"):
        task_class("Copie")


def test_bad_tasks() -> None:
    with pytest.raises(ValueError, match="unknown task 'Reverce'; did you mean 'Reverse'"):
        TokenVectorEnv("Reverce")
    with pytest.raises(TypeError, match=r"cannot make the task Copy with .'lenght': 3."):
        gymnasium.make("llm_env/Copy-v0", task_kwargs={"lenght": 3})
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Copy(0)
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        TokenEnv("Copy", split="dev")
    with pytest.raises(ValueError, match="the split 'test' of the task Copy has no prompts"):
        TokenEnv(Copy(num_test=0), split="test")
    with pytest.raises(ValueError, match="task_kwargs go with a task's name"):
        make_task(Copy(), {"length": 3})

    class Empty(Task):
        def splits(self) -> dict[str, list[Prompt]]:
            return {"train": []}

        def score(self, rollout: Rollout) -> float:
            return 0.0

    with pytest.raises(ValueError, match="the split 'train' of the task Empty has no prompts"):
        TokenEnv(Empty)

    class Unscored(Task):
        def sample(self, rng: np.random.Generator) -> Prompt:
            return Prompt("a")

    with pytest.raises(NotImplementedError, match="Unscored has neither `reward` nor `score`"):
        TokenEnv(Unscored)

    class Promptless(Task):
        def score(self, rollout: Rollout) -> float:
            return 0.0

    with pytest.raises(NotImplementedError, match="neither `sample` nor `splits`"):
        TokenEnv(Promptless)
    with pytest.raises(TypeError, match=r"a task is a registered name .*, a Task, or a subclass; got 3"):
        TokenEnv(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a subclass of Task"):
        register_task(Copy())  # type: ignore[type-var]

    class Clash(Task):
        name = "Copy"

    with pytest.raises(ValueError, match="a task named 'Copy' is already registered"):
        register_task(Clash)


def test_a_task_may_be_written_loosely() -> None:
    class Loose(Task):
        def __init__(self) -> None:  # without calling the base class
            self.word = "hi"

        def sample(self, rng: np.random.Generator) -> str:  # type: ignore[override]
            return f"say {self.word} {rng.integers(10_000)}"

        @property
        def reward(self) -> ExactMatch:  # type: ignore[override]
            return ExactMatch()

    assert len(Loose().prompts("test")) == 256

    class Generated(Task):
        def splits(self) -> dict[str, Any]:
            return {"train": (text for text in ("a", "b"))}

        def reward(rollout: Rollout) -> float:  # type: ignore[override,misc]
            return 0.25

    mdp = TokenMDP(Generated)
    assert write(mdp, "x") == 0.25


def test_one_task_serves_environments_with_other_tokens() -> None:
    task = Copy(3)
    first, second = TokenMDP(task), TokenMDP(task)
    assert first.task is not task
    assert first.task is not second.task
    assert not hasattr(task, "vocabulary")


class TestHints:
    """What the built-in tasks tell the critic."""

    def test_of_one_right_answer(self) -> None:
        facts = {"answer": "cba"}
        states = [Rollout.of(text, metadata=facts, end="running") for text in ("", "c", "cb", "ca", "cba", "cbaa")]
        assert [Reverse(length=3).hints(state) for state in states] == [
            (1, 0), (1, pytest.approx(1 / 3)), (1, pytest.approx(2 / 3)), (0, 0), (1, 1), (0, 0),
        ]  # fmt: skip

    def test_of_sums_in_words_capitals_and_hyphens_make_no_difference(self) -> None:
        facts = {"answer": " fifty-nine"}
        told = [
            WordSums().hints(Rollout.of(text, metadata=facts)) for text in (" Fifty", " fifty nine", " fifty-eight")
        ]
        assert told == [(1, pytest.approx(0.5)), (1, 1), (0, 0)]

    def test_of_sentiment_the_score_so_far(self) -> None:
        pytest.importorskip("vaderSentiment")
        task = Sentiment()
        text = Rollout.of(" it was wonderful.")
        assert task.hints(text.before(0)) == (0.5,)
        assert task.hints(text) == (task.as_reward()([text])[0].value,)

    def test_every_built_in_task_with_hints_has_as_many_as_names(self) -> None:
        for name in ("Copy", "Reverse", "Addition", "Maze", "WordSums"):
            task = make_task(name)
            prompt = task.prompts("train")[0]
            for text in ("", "n", "a"):
                state = Rollout.of([text] if text else "", prompt=prompt.text, metadata=prompt.metadata, end="running")
                assert len(task.hints(state)) == len(task.hint_names)
