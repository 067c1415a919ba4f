"""Replies made in the background: the same texts as without, others go on meanwhile, and one that hangs is left."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from llm_env import Prompt, Task, TokenMDP
from llm_env.engines.writing import Job, write
from rewards import Rollout


class Echo(Task):
    """Replies twice with the last turn in capitals; `hold` says for which prompt it waits until it may go on."""

    stop = ("!",)
    max_new_tokens, max_reply_tokens = 9, 12
    slow_replies = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gate = threading.Event()
        self.held: list[str] = []
        self.inside = threading.Semaphore(0)

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(letter) for letter in "abcd"]}

    def reply(self, rollout: Rollout) -> str | None:
        assert threading.current_thread() is not threading.main_thread()
        self.inside.release()
        if rollout.prompt in self.held:
            self.gate.wait(30)
        agent = [turn for turn in rollout.turns if turn.who == "agent"]
        return agent[-1].text.upper() if len(agent) < 3 else None

    def score(self, rollout: Rollout) -> float:
        return float(len(rollout.turns))


class Spelling:
    """Writes the letters of the alphabet, and "!" after each second one."""

    version = 0

    def __init__(self, mdp: TokenMDP) -> None:
        self.tokens = mdp.vocabulary.encode("xy!")
        self.steps: list[list[int]] = []

    def begin(self, rows: Any, jobs: Any) -> None: ...

    def choose(self, state: Any, rows: Any, allowed: Any) -> Any:
        self.steps.append(rows.tolist())
        return self.tokens[state.num_actions[rows] % 3], np.zeros(len(rows), dtype=np.float32)

    def end(self, rows: Any) -> None: ...


def written(task: Task, rows: int, jobs: int = 6) -> list[tuple[int, str, str]]:
    mdp = TokenMDP(task, rows)
    todo = [Job(index % 4, index, index) for index in range(jobs)]
    found = [
        (job.request, each.rollout.transcript, str(each.rollout.end))
        for job, each in write(mdp.episodes, todo, Spelling(mdp))
    ]
    return sorted(found)


def test_texts_are_those_of_quick_replies() -> None:
    class Quick(Echo):
        slow_replies = False

        def reply(self, rollout: Rollout) -> str | None:
            agent = [turn for turn in rollout.turns if turn.who == "agent"]
            return agent[-1].text.upper() if len(agent) < 3 else None

    assert written(Echo(), 3) == written(Quick(), 3) == [(number, "xy!XY!xy!XY!xy!", "stop") for number in range(6)]


def test_the_others_go_on_while_one_waits() -> None:
    task = Echo()
    task.held = ["a"]
    mdp = TokenMDP(task, 2, shuffle=False)
    speller = Spelling(mdp)
    jobs = [Job(0, 0, 0), *(Job(1, number, number) for number in range(1, 5))]
    finished = []
    for job, _ in write(mdp.episodes, jobs, speller):
        finished.append(job.request)
        if len(finished) == 4:
            mdp.task.gate.set()  # only now
    assert finished == [1, 2, 3, 4, 0]
    assert [1] in speller.steps  # alone, while row 0 waits


def test_an_environment_waits_for_all_at_once() -> None:
    task = Echo()
    task.held = ["a", "b"]
    mdp = TokenMDP(task, 2, shuffle=False)
    mdp.reset(prompt_indices=[0, 1])

    def open_when_both_are_inside() -> None:
        task.inside.acquire(timeout=20)
        task.inside.acquire(timeout=20)
        task.gate.set()

    helper = threading.Thread(target=open_when_both_are_inside)
    helper.start()
    mdp.step(mdp.vocabulary.encode("!!"))
    helper.join()
    assert [mdp.rollout(row).transcript for row in (0, 1)] == ["!!", "!!"]
    assert mdp.state.running.all()


def test_one_that_hangs_fails_and_costs_its_own_episode() -> None:
    class Patient(Echo):
        reply_timeout = 0.2
        on_reply_error = "?"

    task = Patient()
    task.held = ["a"]
    mdp = TokenMDP(task, 2, shuffle=False)
    mdp.reset(prompt_indices=[0, 1])
    mdp.step(mdp.vocabulary.encode("!!"))
    assert [mdp.rollout(row).transcript for row in (0, 1)] == ["!?", "!!"]
    assert mdp.task.replies.num_failures == 1
    task.gate.set()


def test_an_error_is_a_failed_reply() -> None:
    class Broken(Echo):
        def reply(self, rollout: Rollout) -> str | None:
            if rollout.prompt == "a":
                raise OSError("no line")
            return "ok"

    mdp = TokenMDP(Broken(), 2, shuffle=False)
    mdp.reset(prompt_indices=[0, 1])
    mdp.step(mdp.vocabulary.encode("!!"))
    assert [str(mdp.rollout(row).end) for row in (0, 1)] == ["stop", "running"]


def test_what_is_given_up_is_not_heard_any_more() -> None:
    task = Echo()
    task.held = ["a"]
    mdp = TokenMDP(task, 2, shuffle=False)
    writing = write(mdp.episodes, [Job(0, 0, 0), Job(1, 1, 1), Job(1, 2, 2)], Spelling(mdp))
    next(writing)
    writing.close()
    assert not mdp.episodes.waiting.any()
    mdp.task.gate.set()
    time.sleep(0.05)
    mdp.reset(prompt_indices=[1, 1])
    assert len(mdp.episodes.answered(block=False)) == 0
    assert mdp.state.length.tolist() == [1, 1]


def test_token_rewards_are_asked_for_after_the_reply() -> None:
    class Paying(Echo):
        def token_reward(self, episodes: Any, rows: Any) -> Any:
            return episodes.state.length[rows].astype(float)

    mdp = TokenMDP(Paying(), 2, shuffle=False)
    found = [each.token_rewards.tolist() for _, each in write(mdp.episodes, [Job(0, 0, 0)], Spelling(mdp))]
    assert found == [[2, 3, 7, 8, 9, 13, 14, 15, 16]]  # one of the prompt, and three of each reply


pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
