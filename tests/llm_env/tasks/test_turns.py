"""Tasks that keep something for each episode: sessions, games written as generators, TextArena's."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest

from llm_env import Prompt, Task, TokenMDP
from llm_env.engines.writing import Job, write
from llm_env.models import load_tokenizer
from llm_env.tasks import SessionError, TurnTask
from llm_env.tasks.turns import Play
from llm_env.tokens.chat import UnstableTemplateError
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout


class Counting(Task):
    """Replies how many turns there have been; ends after three. Its sessions say when they are closed."""

    stop = ("!",)
    max_new_tokens, max_reply_tokens = 12, 20

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.begun: list[_Counter] = []

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt("a", {"from": 0}), Prompt("b", {"from": 9})]}

    def session(self, prompt: Prompt) -> _Counter:
        self.begun.append(_Counter(prompt.metadata["from"]))
        return self.begun[-1]

    def reply(self, rollout: Rollout) -> str | None:
        rollout.session.count += 1
        return str(rollout.session.count) if rollout.session.count % 10 < 3 else None

    def score(self, rollout: Rollout) -> float:
        assert not rollout.session.closed
        return float(rollout.session.count)


class _Counter:
    def __init__(self, count: int) -> None:
        self.count = count
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Guess(TurnTask):
    """Higher or lower, drawing from all three kinds of random numbers; a wrong guess costs 0.1."""

    stop = ("!",)
    chat = False
    num_train, num_test = 6, 3

    def play(self, rng: np.random.Generator) -> Any:
        secret = int(rng.integers(10)) + random.randrange(10) + np.random.randint(10)
        said = yield "guess: "
        for _ in range(3):
            if said == str(secret):
                return 1.0
            said = yield f"{'higher' if int(said) < secret else 'lower'} {random.randrange(100)}: ", -0.1
        return 0.0


def say(mdp: TokenMDP, *texts: str | None) -> np.ndarray:
    """Each row writes its text (None: it does nothing) and "!"; the sums of what they were paid."""
    actions = [[] if text is None else mdp.vocabulary.encode(text + "!").tolist() for text in texts]
    paid = np.zeros(len(texts))
    while any(actions):
        rows = [row for row, left in enumerate(actions) if left]
        paid += mdp.step([actions[row].pop(0) for row in rows], rows)
    return paid


class Shouting:
    """Writes "!" and nothing else."""

    version = 0

    def __init__(self, mdp: TokenMDP) -> None:
        self.token = mdp.vocabulary.encode("!")

    def begin(self, rows: Any, jobs: Any) -> None: ...

    def choose(self, state: Any, rows: Any, allowed: Any) -> Any:
        return np.repeat(self.token, len(rows)), np.zeros(len(rows), dtype=np.float32)

    def end(self, rows: Any) -> None: ...


class TestSessions:
    def test_each_episode_has_its_own_and_it_is_closed_once_it_is_scored(self) -> None:
        mdp = TokenMDP(Counting(), num_envs=2)
        mdp.reset(prompt_indices=[0, 1])
        say(mdp, "x", "y")
        say(mdp, "x", None)
        assert [mdp.episodes.session(row).count for row in (0, 1)] == [2, 10]
        assert say(mdp, "x", "y").tolist() == [3.0, 0.0]
        assert [mdp.rollout(row).transcript for row in (0, 1)] == ["x!1x!2x!", "y!10y!11"]
        assert [session.closed for session in mdp.task.begun] == [1, 0]
        assert mdp.rollout(0).session is None

    def test_a_reset_and_the_end_close_what_is_still_open(self) -> None:
        mdp = TokenMDP(Counting(), num_envs=2)
        mdp.reset(prompt_indices=[0, 1])
        mdp.reset([0])
        assert [session.closed for session in mdp.task.begun] == [1, 0, 0]
        mdp.close()
        mdp.close()
        assert [session.closed for session in mdp.task.begun] == [1, 1, 1]

    def test_a_budget_that_is_used_up_closes_too(self) -> None:
        mdp = TokenMDP(Counting(), max_new_tokens=2)
        mdp.reset(prompt_indices=[0])
        letter = mdp.vocabulary.encode("x")
        assert [mdp.step(letter)[0] for _ in range(2)] == [0.0, 0.0]
        assert mdp.task.begun[0].closed == 1

    def test_a_copied_episode_goes_on_with_a_copy(self) -> None:
        mdp = TokenMDP(Counting(), num_envs=3)
        mdp.reset(prompt_indices=[0, 1, 1])
        say(mdp, "x", None, None)
        saved = mdp.save([0])
        mdp.restore([1, 2], saved)
        say(mdp, None, "x", None)
        assert [mdp.episodes.session(row).count for row in range(3)] == [1, 2, 1]
        assert [session.closed for session in mdp.task.begun] == [0, 1, 1]  # those that were overwritten

    def test_texts_that_are_written_at_once_keep_theirs_until_they_are_scored(self) -> None:
        mdp = TokenMDP(Counting(), num_envs=2)
        jobs = [Job(index % 2, index, index) for index in range(5)]
        written = [episode for _, episode in write(mdp.episodes, jobs, Shouting(mdp))]
        assert [session.closed for session in mdp.task.begun] == [0] * 5
        assert sorted(episode.score.total for episode in mdp.score(written)) == [3, 3, 3, 13, 13]
        assert [session.closed for session in mdp.task.begun] == [1] * 5

    def test_writing_that_is_given_up_closes_what_was_running(self) -> None:
        mdp = TokenMDP(Counting(), num_envs=2)
        writing = write(mdp.episodes, [Job(index % 2, index, index) for index in range(5)], Shouting(mdp))
        next(writing)
        writing.close()
        assert [session.closed for session in mdp.task.begun] == [0, 1]  # the first has ended, and may be scored
        mdp.close()
        assert [session.closed for session in mdp.task.begun] == [1, 1]

    def test_an_error_at_the_beginning_names_the_prompt(self) -> None:
        class Broken(Counting):
            def session(self, prompt: Prompt) -> _Counter:
                raise OSError("no room")

        mdp = TokenMDP(Broken())
        with pytest.raises(SessionError, match=r"`session` of the task Broken raised OSError: no room.*'b'"):
            mdp.reset(prompt_indices=[1])

    def test_a_close_that_fails_ends_no_run(self, caplog: pytest.LogCaptureFixture) -> None:
        class Stuck(_Counter):
            def close(self) -> None:
                raise OSError("stuck")

        class Sticky(Counting):
            def session(self, prompt: Prompt) -> _Counter:
                return Stuck(2)

        mdp = TokenMDP(Sticky())
        mdp.reset(prompt_indices=[0])
        assert say(mdp, "x").tolist() == [3.0]
        assert "stuck" in caplog.text


class TestTurnTask:
    def test_games_are_their_seeds_whoever_plays_beside_them(self) -> None:
        alone, together = TokenMDP(Guess(), num_envs=1), TokenMDP(Guess(), num_envs=3)
        together.reset(prompt_indices=[0, 1, 1])
        random.seed(7)
        say(together, "99", "98", None)
        say(together, "99", None, "98")
        say(together, None, "98", "98")
        alone.reset(prompt_indices=[1])
        say(alone, "98")
        say(alone, "98")
        assert together.rollout(1).transcript == together.rollout(2).transcript == alone.rollout(0).transcript

    def test_the_global_generators_are_left_alone(self) -> None:
        mdp = TokenMDP(Guess())
        random.seed(3)
        np.random.seed(3)
        mdp.reset()
        say(mdp, "99")
        drawn = random.random(), np.random.rand()
        random.seed(3)
        np.random.seed(3)
        assert drawn == (random.random(), np.random.rand())

    def test_turns_are_paid_with_their_last_token(self) -> None:
        mdp = TokenMDP(Guess())
        mdp.reset(prompt_indices=[0])
        for _ in range(3):
            assert say(mdp, "99").tolist() == [0.0]
        assert say(mdp, "99")[0] == pytest.approx(-0.3)
        score = mdp.finished[0].score
        np.testing.assert_allclose(score.per_token, [0, 0, -0.1] * 3 + [0, 0, 0])
        assert [score.parts[name] for name in ("finished", "turns")] == [1.0, 4.0]
        assert score.parts["by_turn"] == pytest.approx(-0.3)

    def test_an_unfinished_game_is_worth_what_the_task_says(self) -> None:
        class Pessimist(Guess):
            unfinished = -1.0

        mdp = TokenMDP(Pessimist(), max_new_tokens=2)
        mdp.reset()
        assert sum(mdp.step(mdp.vocabulary.encode("9"))[0] for _ in range(2)) == -1.0

    def test_a_generator_is_copied_by_playing_again(self) -> None:
        mdp = TokenMDP(Guess(), num_envs=2)
        mdp.reset(prompt_indices=[0, 1])
        say(mdp, "99", None)
        mdp.restore([1], mdp.save([0]))
        say(mdp, "99", "99")
        assert mdp.rollout(0).transcript == mdp.rollout(1).transcript

    def test_one_that_plays_otherwise_the_second_time_is_refused(self) -> None:
        class Moody(Guess):
            times = iter(range(100))

            def play(self, rng: np.random.Generator) -> Any:
                while True:
                    yield f"{next(self.times)} "

        mdp = TokenMDP(Moody(), num_envs=2)
        mdp.reset()
        say(mdp, "9", None)
        with pytest.raises(SessionError, match=r"told the same turns again, a new one replied '\d+ ' where"):
            mdp.restore([1], mdp.save([0]))

    def test_a_play_that_fails_costs_its_own_episode(self) -> None:
        mdp = TokenMDP(Guess(), num_envs=2)
        mdp.reset()
        say(mdp, "no number", "99")
        assert [str(mdp.rollout(row).end) for row in (0, 1)] == ["stop", "running"]

    @pytest.mark.parametrize("given", [3, ("a", "b"), None])
    def test_what_is_no_text_is_refused(self, given: Any) -> None:
        class Mute(Guess):
            def play(self, rng: np.random.Generator) -> Any:
                yield given

        with pytest.raises(TypeError, match="a pair of them and a number"):
            Mute().prompts("train")


class TestThoughts:
    @pytest.mark.parametrize(
        ("said", "heard"),
        [
            ("<think>7?</think>8", "8"),
            ("7?</think>\n\n8", "8"),
            ("I say <think>7?</think> 8", "I say 8"),
            ("<think>7? <think>8?</think></think>9", "9"),
            ("<think>7?</think>8<think>or", "8"),
            ("<think>7?", ""),
            ("8", "8"),
        ],
    )
    def test_they_are_not_heard(self, said: str, heard: str) -> None:
        class Echo(TurnTask):
            def play(self, rng: np.random.Generator) -> Play:
                said = yield "?"
                yield f"({said})"
                return 0.0

        for keeps, expected in ((False, heard), (True, said)):
            task = Echo(num_train=1, num_test=1)
            task.keeps_thoughts = keeps
            mdp = TokenMDP(task)
            mdp.reset()
            for token in [*mdp.vocabulary.encode(said, add_special_tokens=False), mdp.vocabulary.eos_tokens[0]]:
                mdp.step([token])
            assert mdp.rollout(0).turns[-1].text == f"({expected})"


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class TestChat:
    def vocabulary(self, template: str = TEMPLATE) -> Vocabulary:
        tokenizer = load_tokenizer("tiny")
        tokenizer.chat_template = template
        return Vocabulary(tokenizer)

    @pytest.mark.parametrize("ended", [True, False])
    def test_what_was_written_and_the_reply_are_what_the_template_makes_of_both(self, ended: bool) -> None:
        vocabulary = self.vocabulary()
        messages = [{"role": "user", "content": "1"}]
        said = vocabulary.encode("2", add_special_tokens=False).tolist() + list(vocabulary.eos_tokens[:1]) * ended
        reply = {"role": "user", "content": "3"}
        whole = vocabulary.encode_chat([*messages, {"role": "assistant", "content": "2"}, reply])
        ours = [*vocabulary.encode_chat(messages), *said, *vocabulary.encode_turn([reply], ended=ended)]
        assert ours == whole.tolist()

    def test_a_template_that_changes_what_came_before_is_refused(self) -> None:
        forgetful = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
        with pytest.raises(UnstableTemplateError, match="writes what came before differently"):
            self.vocabulary(forgetful).encode_turn([{"role": "user", "content": "3"}], ended=True)

    def test_a_game_speaks_as_the_user(self) -> None:
        class Chatty(Guess):
            chat = None

        mdp = TokenMDP(Chatty(), model=self.vocabulary())
        mdp.reset()
        eos = mdp.vocabulary.eos_tokens[:1]
        for token in [*mdp.vocabulary.encode("99", add_special_tokens=False), *eos]:
            mdp.step([token])
        shown = mdp.vocabulary.tokenizer.decode(mdp.state.tokens[0, : mdp.state.length[0]])
        assert re.fullmatch(
            r"\[user\]guess: <\|?e\w+\|?>\n\[assistant\]99<\|?e\w+\|?>\n\[user\]lower \d+: <\|?e\w+\|?>\n\[assistant\]",
            shown,
        )
