"""A task that talks: one object with its reward, replies that fail, that find no room, and who has said what."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from llm_env import Prompt, Task, TokenMDP
from llm_env.tasks import Copy, TaskError
from rewards import AlwaysFailsError, NumericMatch, Rollout, as_reward


class Talking(Task):
    """Three prompts; an end-of-sequence token is answered by what `answer` says."""

    max_new_tokens = 8
    max_prompt_tokens = 4
    max_reply_tokens = 16

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(text, {"answer": text.upper()}) for text in "pqr"]}

    def reply(self, rollout: Rollout) -> Any:
        return self.answer(rollout)

    def answer(self, rollout: Rollout) -> Any:
        return "ok" if len(rollout.turns) == 1 else None

    def score(self, rollout: Rollout) -> float:
        return float(len(rollout.text))


def begun(task: Task | type[Task], rows: int = 3, **options: Any) -> TokenMDP:
    mdp = TokenMDP(task, rows, shuffle=False, **options)
    mdp.reset(seed=0)
    return mdp


def write(mdp: TokenMDP, text: str) -> np.ndarray:
    """One step of all rows: a letter each, `$` for the end-of-sequence token."""
    eos = mdp.vocabulary.eos_tokens[0]
    return mdp.step([eos if letter == "$" else int(mdp.vocabulary.encode(letter)[0]) for letter in text])


class TestOneObject:
    def test_score_finds_what_the_others_have_written(self) -> None:
        class Remembering(Talking):
            def setup(self, vocabulary: Any) -> None:
                self.offset = 100.0
                self.seen: dict[int, str] = {}
                self.paid = 0

            def reply(self, rollout: Rollout) -> str | None:
                first = rollout.episode not in self.seen
                self.seen[rollout.episode] = self.seen.get(rollout.episode, "") + rollout.text
                return "?" if first else None

            def token_reward(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
                self.paid = self.paid + len(rows)
                return np.zeros(len(rows))

            def score(self, rollout: Rollout) -> float:
                assert self.vocabulary.decode(rollout.tokens) == rollout.transcript
                return self.offset + self.paid + len(self.seen[rollout.episode]) / 8

        mdp = begun(Remembering, rows=2)
        for letters in ("ab", "a$", "$a"):
            assert write(mdp, letters).tolist() == [0.0, 0.0]
        # Row 0 ends its second turn: it was heard "aa" and then "aa\na"; eight steps were paid.
        assert write(mdp, "a$").tolist() == [0.0, 100.0 + 8 + (len("b") + len("b\na")) / 8]
        assert mdp.reward.num_failures == 0

    def test_a_method_kept_as_the_reward_is_the_bound_tasks(self) -> None:
        class Judging(Talking):
            def __init__(self) -> None:
                super().__init__()
                self.reward = self.judge

            def judge(self, rollout: Rollout) -> float:
                return float(self.vocabulary.size)

        mdp = begun(Judging(), rows=1, max_new_tokens=1)
        assert write(mdp, "a").tolist() == [mdp.vocabulary.size]

    def test_a_sum_of_methods_is_made_in_setup(self) -> None:
        class Summing(Talking):
            def setup(self, vocabulary: Any) -> None:
                self.reward = 0.5 * as_reward(self.size) + as_reward(self.size)

            def size(self, rollout: Rollout) -> float:
                return float(self.vocabulary.size)

        mdp = begun(Summing, rows=1, max_new_tokens=1)
        assert write(mdp, "a").tolist() == [1.5 * mdp.vocabulary.size]

    def test_each_environment_has_its_own(self) -> None:
        class Naming(Copy):
            name = "Naming"

            def score(self, rollout: Rollout) -> float:
                return self.mark

        task = Naming(2)
        one, other = (begun(task, rows=1, max_new_tokens=1) for _ in range(2))
        one.task.mark, other.task.mark = 1.0, 2.0
        assert (write(one, "a").tolist(), write(other, "a").tolist()) == ([1.0], [2.0])
        one.close()
        other.reset()
        assert write(other, "a").tolist() == [2.0]

    def test_with_a_timeout_the_task_goes_along(self) -> None:
        class Sized(Copy):
            name = "Sized"

            def score(self, rollout: Rollout) -> float:
                return float(self.vocabulary.size) + self._allowed.sum() / 1024

        mdp = begun(Sized(2), rows=1, max_new_tokens=1, reward_timeout=60.0)
        assert write(mdp, "a").tolist() == [mdp.vocabulary.size + 27 / 1024]
        mdp.close()

    def test_what_a_copy_would_not_see_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"reward_timeout=5\.0 lets the task Talking score .* `reply` writes"):
            TokenMDP(Talking, reward_timeout=5.0)

        class Reading(Talking):
            reward = NumericMatch()

        TokenMDP(Reading, reward_timeout=5.0).close()

        class Locked(Copy):
            name = "Locked"

            def setup(self, vocabulary: Any) -> None:
                super().setup(vocabulary)
                self.lines = (line for line in "ab")

        with pytest.raises(TypeError, match="cannot be sent to the worker process"):
            TokenMDP(Locked(2), reward_timeout=5.0)


class Breaking(Talking):
    """Fails after the prompt q."""

    def answer(self, rollout: Rollout) -> Any:
        if rollout.metadata["answer"] == "Q":
            raise ConnectionError("the tool is down")
        return super().answer(rollout)


class TestFailures:
    def test_the_step_is_whole(self, caplog: pytest.LogCaptureFixture) -> None:
        mdp = begun(Breaking)
        write(mdp, "abc")
        assert write(mdp, "$$$").tolist() == [0.0, 1.0, 0.0]  # the second is scored as it stands
        assert mdp.state.running.tolist() == [True, False, True]
        finished = mdp.finished[1]
        assert (finished.end, finished.text, finished.failed_replies) == ("eos", "b", 1)
        assert [mdp.rollout(row).transcript for row in (0, 2)] == ["aok", "cok"]
        assert (mdp.task.replies.num_failures, mdp.task.replies.num_calls) == (1, 3)
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("llm_env", "WARNING")
        for expected in (
            "`reply` of the task Breaking failed and its episode ended there",
            "ConnectionError: the tool is down",
            "prompt: 'q'",
            "transcript: 'b'",
            "in answer",
        ):
            assert expected in record.getMessage()

    def test_it_may_be_answered(self, caplog: pytest.LogCaptureFixture) -> None:
        class Answering(Breaking):
            on_reply_error = "no!"

        mdp = begun(Answering)
        write(mdp, "abc")
        assert write(mdp, "$$$").tolist() == [0.0, 0.0, 0.0]
        assert [mdp.rollout(row).transcript for row in range(3)] == ["aok", "bno!", "cok"]
        assert "was answered by on_reply_error" in caplog.text
        mdp.restore([0], mdp.save([1]))  # the failures of an episode are copied with it
        write(mdp, "$$$")
        for _ in range(5):
            mdp.step(mdp.vocabulary.encode("zz"), [0, 1])
        assert [mdp.finished[row].failed_replies for row in (0, 1)] == [2, 2]
        mdp.reset([0, 1], prompt_indices=[0, 1])
        for _ in range(2):
            mdp.step([*mdp.vocabulary.eos_tokens] * 2, [0, 1])
        assert mdp.finished[0].failed_replies == 0

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (3, "ValueError: a task's reply must be a flat sequence of token ids"),
            (b"ok", "ValueError: a task's reply must be a flat"),
            ([1.5], "TypeError: a task's reply must be integer token ids"),
            ([5, 100], "ValueError: a task's reply has token id 100"),
            ([-1], "ValueError: a task's reply has token id -1"),
            (["a"], "TypeError: a task's reply must be integer"),
        ],
    )
    def test_what_is_no_reply_is_a_failure(self, answer: Any, error: str, caplog: pytest.LogCaptureFixture) -> None:
        class Odd(Talking):
            def answer(self, rollout: Rollout) -> Any:
                return answer if rollout.metadata["answer"] == "Q" else None

        mdp = begun(Odd)
        assert write(mdp, "$$$").tolist() == [0.0] * 3
        assert sorted(mdp.finished) == [0, 1, 2]
        assert mdp.task.replies.failures[0].error.startswith(error)

    def test_one_that_never_works_is_an_error(self, caplog: pytest.LogCaptureFixture) -> None:
        class Misspelt(Talking):
            def answer(self, rollout: Rollout) -> Any:
                return rollout.txt  # type: ignore[attr-defined]

        mdp = begun(Misspelt, rows=8)
        for _ in range(2):
            write(mdp, "$" * 8)
            mdp.reset()
        with pytest.raises(
            AlwaysFailsError, match=r"`reply` of the task Misspelt has not worked once, .* 20 rollouts"
        ) as caught:
            write(mdp, "$" * 8)
        assert isinstance(caught.value.__cause__, AttributeError)
        other = begun(Breaking, rows=3)
        for _ in range(30):
            write(other, "$$$")
            other.reset()
        assert other.task.replies.num_failures == 30

    def test_two_environments_count_apart(self, caplog: pytest.LogCaptureFixture) -> None:
        task = Breaking()
        one, other = begun(task), begun(task)
        write(one, "$$$")
        assert (one.task.replies.num_failures, other.task.replies.num_failures) == (1, 0)

    def test_the_answer_must_be_a_text(self) -> None:
        class Numbered(Talking):
            on_reply_error = 5  # type: ignore[assignment]

        with pytest.raises(TypeError, match="on_reply_error of the task Numbered is 5; expected the text"):
            TokenMDP(Numbered)

    @pytest.mark.parametrize("method", ["over", "token_reward", "action_mask"])
    def test_an_error_about_many_episodes_names_the_task(self, method: str) -> None:
        def broken(self: Task, episodes: Any, rows: np.ndarray) -> np.ndarray:
            raise KeyError("no such thing")

        mdp = begun(type("Broken", (Talking,), {method: broken}))
        expected = f"`{method}` of the task Broken raised KeyError: 'no such thing' (asked about rows [0, 1, 2])"
        with pytest.raises(TaskError, match=re.escape(expected)) as caught:
            mdp.action_mask() if method == "action_mask" else write(mdp, "abc")
        assert isinstance(caught.value.__cause__, KeyError)


def test_all_three_are_asked_with_the_prompt() -> None:
    class Asking(Talking):
        max_new_tokens = 3

        def letter(self, episodes: Any, rows: np.ndarray) -> list[str]:
            return [episodes.prompt(row).metadata["answer"] for row in rows]

        def over(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
            return np.array([letter == "Q" for letter in self.letter(episodes, rows)])

        def token_reward(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
            return np.array([float(ord(letter)) for letter in self.letter(episodes, rows)])

        def action_mask(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
            own = [self.vocabulary.encode(letter)[0] for letter in self.letter(episodes, rows)]
            return np.arange(self.vocabulary.size) == np.array(own)[:, None]

    mdp = begun(Asking)
    mask = mdp.action_mask()
    assert mask is not None
    assert [mdp.vocabulary.decode(np.flatnonzero(row)) for row in mask] == ["P", "Q", "R"]
    mdp.step(mdp.vocabulary.encode("PR"), [0, 2])
    assert mdp.step(mdp.vocabulary.encode("PQ"), [0, 1]).tolist() == [ord("P"), ord("Q") + 1, 0.0]
    assert list(mdp.finished) == [1]


class TestWho:
    def test_an_episode_keeps_its_identity_and_a_copy_has_its_own(self) -> None:
        class Listing(Talking):
            def setup(self, vocabulary: Any) -> None:
                self.heard: list[int] = []
                self.scored: list[int] = []

            def answer(self, rollout: Rollout) -> Any:
                self.heard.append(rollout.episode)
                return super().answer(rollout)

            def score(self, rollout: Rollout) -> float:
                self.scored.append(rollout.episode)
                return 0.0

        mdp = begun(Listing, rows=2)
        first, second = (mdp.rollout(row).episode for row in range(2))
        write(mdp, "$a")
        saved = mdp.save([0])
        write(mdp, "$$")
        assert (mdp.task.heard, mdp.task.scored) == ([first, first, second], [first])
        mdp.restore([0, 1], saved)
        copies = [mdp.rollout(row).episode for row in range(2)]
        assert len({first, second, *copies}) == 4
        assert [turn.who for turn in mdp.rollout(1).turns] == ["agent", "task"]  # so a tool can tell that it is a copy
        write(mdp, "$$")
        assert mdp.task.scored[1:] == copies
        mdp.reset([0])
        assert mdp.rollout(0).episode not in {first, second, *copies}

    def test_a_tools_number_is_not_the_agents(self) -> None:
        class Tool(Talking):
            reward = NumericMatch()

            def splits(self) -> dict[str, list[Prompt]]:
                return {"train": [Prompt("p", {"answer": "42"})]}

            def answer(self, rollout: Rollout) -> Any:
                return "42" if len(rollout.turns) == 1 else None

        mdp = begun(Tool, rows=3)
        for letters in ("aa4", "$$$", "a42"):
            write(mdp, letters)
        mdp.step(mdp.vocabulary.encode("2"), [1])
        assert write(mdp, "$$$").tolist() == [0.0, 1.0, 0.0]  # nor are 4 and, after the reply, 2
        assert [mdp.finished[row].rollout.transcript for row in range(3)] == ["a42a", "a4242", "4422"]
        assert [mdp.finished[row].text for row in range(3)] == ["a\na", "a\n42", "4\n2"]


class TestRoom:
    def test_the_default_context_has_room_for_replies(self) -> None:
        mdp = begun(Talking, rows=1)
        assert mdp.context == 4 + 8 + 16
        assert TokenMDP(Talking, max_new_tokens=2).context == 4 + 2 + 16

    def test_a_task_must_say_how_long_its_replies_are(self) -> None:
        class Silent(Talking):
            max_reply_tokens = 0

        with pytest.raises(ValueError, match="the task Silent replies, but has max_reply_tokens=0"):
            TokenMDP(Silent)
        assert TokenMDP(Silent, context=20).context == 20

    def test_a_reply_without_room_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        class Long(Talking):
            def answer(self, rollout: Rollout) -> Any:
                return "x" * (9 if rollout.metadata["answer"] == "P" else 8)

        mdp = begun(Long, context=11)
        assert write(mdp, "$$$").tolist() == [0.0] * 3  # a prompt of 1 and 1 of the agent leave 8 before its next
        assert (mdp.finished[0].end, mdp.state.running.tolist()) == ("context", [False, True, True])
        mdp.reset()
        write(mdp, "$$$")
        assert mdp.task.replies.num_left_out == 2
        (record,) = caplog.records
        assert record.name == "llm_env"
        assert record.getMessage().startswith(
            "a reply of 9 tokens from `reply` of the task Long found no room: 2 tokens come before it, and the context "
            "of 11 must hold"
        )
        assert "context of at least 12" in record.getMessage()
        assert begun(Long, rows=1, context=12).step(mdp.vocabulary.eos_tokens[:1]).tolist() == [0.0]

    def test_counts_go_on_from_a_state(self, caplog: pytest.LogCaptureFixture) -> None:
        mdp, other = begun(Breaking), begun(Breaking)
        write(mdp, "$$$")
        mdp.task.replies.left_out(5, 5, 9)
        other.task.replies.load_state_dict(mdp.task.replies.state_dict())
        replies = other.task.replies
        assert (replies.num_calls, replies.num_failures, replies.num_left_out) == (3, 1, 1)
