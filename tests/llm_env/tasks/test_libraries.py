"""Environments of other libraries as tasks: the real ones, as far as they are installed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from llm_env.tasks import GEM, OpenEnv, SkyRLGym, TextArena, Verifiers
from llm_env.tasks.turns import Game, TurnTask


def halve(game: Game, high: int, guess: str) -> int:
    """Find a number by halving; how many turns it took."""
    low = 1
    while not game.over:
        middle = (low + high) // 2
        answer = str(game.told(guess.format(middle)) or "")
        low, high = (middle + 1, high) if "higher" in answer else (low, middle - 1)
    return game.turns


def transcript(task: TurnTask, said: list[str]) -> list[Any]:
    """What is told in the first two episodes, played by turns, whatever the global generators are."""
    random.seed()
    np.random.seed()  # noqa: NPY002
    games = [task.session(prompt) for prompt in task.prompts("train")[:2]]
    return [games[0].first, games[1].first, *(game.told(text) for text in said for game in games if not game.over)]


class TestTextArena:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("textarena")

    def test_a_number_is_found_by_halving(self) -> None:
        task = TextArena(num_train=4, num_test=2)
        games = [task.session(prompt) for prompt in task.prompts("train")]
        assert all(halve(game, 20, "[{}]") <= 5 for game in games)
        assert [game.score for game in games] == [1.0] * 4

    def test_a_game_of_two(self) -> None:
        seen: list[str] = []

        def first_free(text: str) -> str:
            seen.append(text)
            return next(f"[{cell}]" for cell in range(9) if f"'[{cell}]'" in text.rpartition("Available")[2])

        task = TextArena("TicTacToe-v0", opponent=first_free, num_train=1, num_test=1)
        game = task.session(task.prompts("train")[0])
        assert game.told("[4]") is not None
        game.told("[2]")
        assert game.told("[6]") is None
        assert game.score == 1.0
        assert len(seen) == 2

    def test_an_unknown_game(self) -> None:
        with pytest.raises(ValueError, match=r"textarena has no game 'GuessTheNumber'; it has GuessTheNumber-v0"):
            TextArena("GuessTheNumber")


class TestGEM:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("gem")

    def test_a_number_is_found_by_halving(self) -> None:
        task = GEM("game:GuessTheNumber-v0-easy", num_train=6, num_test=2)
        games = [task.session(prompt) for prompt in task.prompts("train")]
        turns = [halve(game, 10, "\\boxed{{{}}}") for game in games]
        assert [game.score for game in games] == [1.0] * 6
        assert max(turns) <= 4 < sum(turns)

    @pytest.mark.parametrize("env", ["game:Mastermind-v0-easy", "game:GuessTheNumber-v0-easy", "game:Sudoku-v0-easy"])
    def test_episodes_side_by_side_agree_with_those_of_another_time(self, env: str) -> None:
        said = ["\\boxed{1}", "\\boxed{5}", "\\boxed{1234}", "nothing"]
        first, second = (transcript(GEM(env, num_train=2, num_test=1), said) for _ in range(2))
        assert first == second
        assert len(first) >= 4

    def test_a_turn_that_cannot_be_read_is_paid_as_the_environment_says(self) -> None:
        task = GEM("game:GuessTheNumber-v0-easy", num_train=1, num_test=1)
        game = task.session(task.prompts("train")[0])
        assert game.told("seven") is None
        assert game.score == -0.1

    def test_a_puzzle_of_reasoning_gym(self) -> None:
        pytest.importorskip("reasoning_gym")
        task = GEM("rg:leg_counting", num_train=2, num_test=1)
        game = task.session(task.prompts("train")[0])
        assert "legs" in game.first
        assert game.told("\\boxed{-1}") is None
        assert game.score == 0.0

    def test_an_unknown_environment(self) -> None:
        with pytest.raises(ValueError, match="GEM has no environment 'game:Mastermind'; it has game:Mastermind-v0"):
            GEM("game:Mastermind")


ROW = {
    "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "40+2?"}],
    "reward_spec": {"ground_truth": "42"},
    "extra_info": {"max_turns": 3},
}


class TestSkyRLGym:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("skyrl_gym")

    def test_an_answer_is_found_in_the_second_turn(self) -> None:
        task = SkyRLGym("gsm8k_multi_turn", train=[ROW], test=[ROW])
        prompt = task.prompts("train")[0]
        assert prompt.text == ROW["prompt"]
        game = task.session(prompt)
        told = game.told("#### 41", actions=3)
        assert [message["role"] for message in told or ()] == ["user"]
        assert game.told("#### 42") is None
        assert game.score == 1.0
        assert game.paid == [(3, pytest.approx(0.2 / 3))]

    def test_a_row_says_which_environment(self) -> None:
        task = SkyRLGym("gsm8k_multi_turn", train=[{**ROW, "env_class": "gsm8k"}] * 10)
        assert [len(task.prompts(split)) for split in ("train", "test")] == [9, 1]
        game = task.session(task.prompts("train")[0])
        assert game.told("#### 41") is None

    def test_an_unknown_environment(self) -> None:
        with pytest.raises(ValueError, match="skyrl-gym has no environment 'gsm'; it has aime, gsm8k"):
            SkyRLGym("gsm", train=[ROW])


class TestOpenEnv:
    """An environment written for the real OpenEnv, where that is installed."""

    @pytest.fixture
    def parts(self) -> dict[str, Any]:
        interfaces = pytest.importorskip("openenv.core.env_server.interfaces", exc_type=ImportError)
        types = pytest.importorskip("openenv.core.env_server.types", exc_type=ImportError)

        class Guess(types.Action):  # type: ignore[name-defined,misc]
            number: int

        class Hint(types.Observation):  # type: ignore[name-defined,misc]
            hint: str

        class Hidden(interfaces.Environment):  # type: ignore[name-defined,misc]
            closed = 0

            def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Hint:
                self.secret = random.Random(seed).randint(1, 10)
                return Hint(hint="from 1 to 10?")

            def step(self, action: Guess, timeout_s: float | None = None, **kwargs: Any) -> Hint:
                if action.number == self.secret:
                    return Hint(hint="", done=True, reward=1.0)
                return Hint(hint="higher" if action.number < self.secret else "lower", reward=-0.1)

            @property
            def state(self) -> Any:
                return types.State()

            def close(self) -> None:
                type(self).closed += 1

        class Listed(Hidden):
            def list_splits(self) -> list[Any]:
                return [{"name": "practice", "type": "train"}, "exam"]

            def num_tasks(self, split: str) -> int:
                return {"practice": 3, "exam": 2}[split]

            def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Hint:
                self.secret = 1 + kwargs["index"]
                return Hint(hint=kwargs["split"])

        return {"hidden": Hidden, "listed": Listed, "action": lambda text: Guess(number=int(text))}

    def test_a_number_is_found_by_halving(self, parts: dict[str, Any]) -> None:
        task = OpenEnv(parts["hidden"], parts["action"], num_train=6, num_test=2)
        prompts = task.prompts("train")
        games = [task.session(prompt) for prompt in prompts]
        turns = [halve(game, 10, "{}") for game in games]
        assert {prompt.text for prompt in prompts} == {"from 1 to 10?\n"}
        assert [game.score for game in games] == [1.0] * 6
        assert [sum(reward for _, reward in game.paid) for game in games] == pytest.approx(
            [-0.1 * (count - 1) for count in turns]
        )
        assert parts["hidden"].closed == 1 + 8 + 6

    def test_an_environment_s_own_tasks(self, parts: dict[str, Any]) -> None:
        task = OpenEnv(parts["listed"], parts["action"])
        assert [prompt.text for prompt in task.prompts("train")] == ["practice\n"] * 3
        assert [prompt.text for prompt in task.prompts("test")] == ["exam\n"] * 2
        game = task.session(task.prompts("train")[2])
        assert game.told("3") is None
        assert game.score == 1.0

    def test_what_is_no_function_is_refused(self) -> None:
        with pytest.raises(TypeError, match="action of OpenEnv must be a function, got 'guess'"):
            OpenEnv(lambda: None, "guess")  # type: ignore[arg-type]


class TestVerifiers:
    """A taskset written for the real verifiers, where that is installed."""

    @pytest.fixture
    def tasks(self) -> list[Any]:
        vf = pytest.importorskip("verifiers.v1", exc_type=ImportError)

        class Sum(vf.TaskData):  # type: ignore[name-defined,misc]
            answer: str

        class Adding(vf.Task[Sum, vf.State, vf.TaskConfig]):  # type: ignore[name-defined,misc]
            @vf.reward(weight=2.0)  # type: ignore[untyped-decorator]
            async def right(self, trace: Any) -> float:
                return float(trace.last_reply == self.data.answer)

            @vf.metric  # type: ignore[untyped-decorator]
            async def turns(self, trace: Any) -> float:
                return float(trace.num_turns)

        class Sums(vf.Taskset[Adding, vf.TasksetConfig]):  # type: ignore[name-defined,misc]
            def load(self) -> Any:
                for number in range(6):
                    system = "Add." if number == 5 else None
                    yield Adding(Sum(prompt=f"{number}+1=", answer=str(number + 1), system_prompt=system))

        return Sums(vf.TasksetConfig())  # type: ignore[no-any-return]

    def test_a_task_is_scored_by_its_rewards(self, tasks: Any) -> None:
        task = Verifiers(tasks, num_test=2)
        prompts = task.prompts("train")
        assert [prompt.text for prompt in prompts[:3]] == ["2+1=\n", "3+1=\n", "4+1=\n"]
        assert prompts[3].text == [{"role": "system", "content": "Add."}, {"role": "user", "content": "5+1="}]
        games = [task.session(prompt) for prompt in prompts]
        assert [game.told("4") for game in games] == [None] * 4
        assert [game.score.value for game in games] == [0.0, 2.0, 0.0, 0.0]
        assert games[1].score.parts == {"right": 2.0, "turns": 1.0}

    def test_several_turns(self, tasks: Any) -> None:
        async def twice(task: Any, agents: Any) -> None:
            async with agents.player.interaction(task) as interaction:
                if (await interaction.turn()).last_reply != task.data.answer:
                    await interaction.turn("No.")

        task = Verifiers(tasks, run=twice, num_test=2)
        game = task.session(task.prompts("train")[0])
        assert game.told("4") == "No.\n"
        assert game.told("3") is None
        assert game.score.parts == {"right": 2.0, "turns": 2.0}

    def test_what_waits_for_something_else_is_refused(self, tasks: Any) -> None:
        import asyncio

        async def sleepy(task: Any, agents: Any) -> None:
            await asyncio.sleep(0)

        with pytest.raises(TypeError, match=r"sleepy.* waits for None; it may wait for nothing but the turns"):
            Verifiers(tasks, run=sleepy, num_test=2).prompts("train")

    def test_two_agents_are_refused(self, tasks: Any) -> None:
        async def talk(task: Any, agents: Any) -> None:
            for agent in (agents.user, agents.assistant):
                await agent.interaction(task).turn()

        task = Verifiers(tasks, run=talk, num_test=2)
        with pytest.raises(ValueError, match="has one agent here, but asks for 'user' and 'assistant'"):
            task.prompts("train")

    def test_a_taskset_that_is_all_held_out(self, tasks: Any) -> None:
        with pytest.raises(ValueError, match="the taskset has 6 tasks, of which num_test=128 are held out"):
            Verifiers(tasks)
