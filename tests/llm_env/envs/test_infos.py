"""Infos are numbers under the same keys at every step, so that buffers can stack and converters can convert them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList

from llm_env import END_OF_CODE, End, Prompt, SB3TokenVecEnv, Task, TokenEnv, TokenVectorEnv
from llm_env.tasks import Copy
from llm_env.wrappers import FlatTokens, KLReward, ScaleReward, vector
from rewards import Score
from tests.llm_env.reference import Probe

MODES = ["NextStep", "SameStep", "Disabled"]


class Paid(Copy):
    """A single prompt; every token of a text is worth its place."""

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt("copy: ab>", {"answer": "ab"})]}

    def score(self, rollout: Any) -> Score:
        return Score(0.5, {"half": 0.5}, per_token=np.arange(1.0, 1.0 + rollout.num_actions))


def ended_rows(envs: TokenVectorEnv) -> np.ndarray:
    return envs.mdp.state.end > 0


def play(envs: Any, steps: int = 12) -> Iterator[dict[str, Any]]:
    """The infos of all steps, with every way to begin anew; an episode is a token long, or two."""
    inside = envs.unwrapped
    palette = [*inside.mdp.vocabulary.encode("ax"), inside.mdp.vocabulary.eos_tokens[0]]
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    for _ in range(steps):
        if envs.metadata["autoreset_mode"].value == "Disabled" and ended_rows(inside).any():
            envs.reset(options={"reset_mask": ended_rows(inside)})
        yield envs.step(rng.choice(palette, size=inside.num_envs))[4]


def leaves(value: Any, path: str = "info") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}[{key!r}]")
    else:
        yield path, value


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("task", [Probe(), Copy(2)], ids=["replies", "masks"])
def test_a_single_environment_says_the_same_at_every_step(task: Task, wrapped: bool) -> None:
    env: gymnasium.Env[Any, Any] = TokenEnv(task, max_new_tokens=2)
    if wrapped:
        env = ScaleReward(FlatTokens(KLReward(env, beta=0.1, reference="transformers")), scale=2.0)
    kinds, ends = [], set()
    rng = np.random.default_rng(0)
    for _ in range(6):
        _, info = env.reset(seed=0)
        assert (info["end_code"], info["score"]) == (0, 0.0)
        done = False
        while not done:
            action: Any = int(rng.choice([*env.unwrapped.mdp.vocabulary.encode("ax"), 2]))
            _, _, terminated, truncated, info = env.step({"token": action, "log_prob": -1.0} if wrapped else action)
            done = terminated or truncated
            kinds.append({key: type(value) for key, value in info.items() if "score/" not in key})
            ends.add(END_OF_CODE[info["end_code"]])
            assert (info["end_code"] > 0) == done == (END_OF_CODE[info["end_code"]] is not End.RUNNING)
            assert all(isinstance(value, int | float | np.ndarray | np.number) for _, value in leaves(info))
    assert all(kind == kinds[0] for kind in kinds)
    assert {End.RUNNING, End.BUDGET} < ends


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_says_numbers_only(mode: str) -> None:
    """But for `final_obs`, which Gymnasium itself makes an array of objects."""
    envs = TokenVectorEnv(Paid(2), 3, autoreset_mode=mode, max_new_tokens=2)
    keys = []
    for info in play(envs):
        info.pop("final_obs", None)
        assert all(value.dtype.kind in "iufb" and len(value) == 3 for _, value in leaves(info))
        keys.append({key for key in info if not re.match("_?(final_|score/|token_scores)", key)})
    assert all(each == keys[0] for each in keys)
    begun = envs.reset()[1]
    assert begun["end_code"].tolist() == [0, 0, 0]
    assert set(begun) == keys[0]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_batch_says_what_single_environments_say(mode: str) -> None:
    """Gymnasium's own vector environment over single ones is the reference."""
    ours = TokenVectorEnv(Paid(2), 2, autoreset_mode=mode, max_new_tokens=2)
    theirs = SyncVectorEnv([lambda: TokenEnv(Paid(2), max_new_tokens=2)] * 2, autoreset_mode=mode)
    # Single environments do not know of each other's groups, and after its end a text has no next token to mask.
    besides = re.compile(r"group|final_obs|final_info.*action_mask")
    a, eos = ours.mdp.vocabulary.encode("a")[0], ours.mdp.vocabulary.eos_tokens[0]
    ours.reset(seed=0)
    theirs.reset(seed=0)
    for actions in ([a, eos], [a, a], [a, a], [eos, eos], [a, a]):
        step = [
            {path: value for path, value in leaves(envs.step(np.array(actions))[4]) if not besides.search(path)}
            for envs in (ours, theirs)
        ]
        assert set(step[0]) == set(step[1])
        for path, value in step[0].items():
            np.testing.assert_array_equal(value, step[1][path], err_msg=path)


def test_scores_per_token_have_one_shape() -> None:
    """One number for each choice that the agent may make."""
    envs = TokenVectorEnv(Paid(2), 3, max_new_tokens=4)
    envs.reset(seed=0)
    a, eos = envs.mdp.vocabulary.encode("a")[0], envs.mdp.vocabulary.eos_tokens[0]
    assert "token_scores" not in envs.step(np.array([a, a, a]))[4]
    info = envs.step(np.array([a, eos, eos]))[4]
    assert info["_token_scores"].tolist() == info["_score/half"].tolist() == [False, True, True]
    assert info["token_scores"].tolist() == [[0] * 4, [1, 2, 0, 0], [1, 2, 0, 0]]
    env = TokenEnv(Paid(2), max_new_tokens=4)
    env.reset(seed=0)
    assert env.step(eos)[4]["token_scores"].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_gymnasium_makes_lists_of_them(mode: str) -> None:
    envs = DictInfoToList(vector.ScaleReward(TokenVectorEnv(Paid(2), 3, autoreset_mode=mode, max_new_tokens=2)))
    seen = set()
    for infos in play(envs):
        for info in infos:  # type: ignore[attr-defined]
            said = info.get("final_info", info)
            seen.add(int(said["end_code"]))
            assert ("score/half" in said) == (said["score"] != 0) == (said["end_code"] != 0)
    assert {0, END_OF_CODE.index(End.EOS), END_OF_CODE.index(End.BUDGET)} <= seen


def test_gymnasium_makes_tensors_of_one() -> None:
    pytest.importorskip("array_api_compat")
    env = gymnasium.wrappers.NumpyToTorch(TokenEnv(Paid(2), max_new_tokens=1))
    assert torch.is_tensor(env.reset(seed=0)[0]["tokens"])
    assert env.step(torch.tensor(5))[4]["end_code"] == END_OF_CODE.index(End.BUDGET)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])  # its own environments fail with SameStep, too: `final_obs`
def test_gymnasium_makes_tensors_of_a_batch(mode: str) -> None:
    pytest.importorskip("array_api_compat")
    wrappers = gymnasium.wrappers.vector
    inside = TokenVectorEnv(Paid(2), 3, autoreset_mode=mode, max_new_tokens=2)
    envs = wrappers.NumpyToTorch(wrappers.RecordEpisodeStatistics(vector.FlatTokens(inside)))
    eos = torch.full((3,), inside.mdp.vocabulary.eos_tokens[0])
    envs.reset(seed=0)
    for _ in range(2):
        observation, _, terminated, _, info = envs.step(eos)
        assert observation.shape == (3, inside.mdp.context)
        assert all(torch.is_tensor(value) for _, value in leaves(info))
        assert terminated.all()
        assert info["end_code"].tolist() == [END_OF_CODE.index(End.EOS)] * 3
        assert info["episode"]["l"].tolist() == [1, 1, 1]
        if mode == "Disabled":
            envs.reset(options={"reset_mask": np.array([True] * 3)})
        else:
            assert envs.step(eos)[4]["end_code"].tolist() == [0, 0, 0]


def test_stable_baselines3_is_told_of_the_episode_that_ended_and_of_the_next() -> None:
    envs = SB3TokenVecEnv(Copy(2), 2, max_new_tokens=2, shuffle=False)
    envs.reset()
    eos = envs.envs.mdp.vocabulary.eos_tokens[0]
    allowed = int(envs.envs.mdp.vocabulary.encode("a")[0])
    _, _, done, infos = envs.step(np.array([allowed, eos]))
    assert done.tolist() == [False, True]
    assert [info["prompt_index"] for info in infos] == [0, 1]
    assert [END_OF_CODE[info["end_code"]] for info in infos] == ["running", "eos"]
    assert "score/reward_failed" not in infos[0]
    assert infos[1]["score/reward_failed"] == 0.0
    assert envs.reset_infos[1]["prompt_index"] == 2
    assert envs.reset_infos[1]["end_code"] == 0
    assert "action_mask" in envs.reset_infos[1]
    _, _, _, infos = envs.step(np.array([allowed, allowed]))
    assert [info["prompt_index"] for info in infos] == [0, 2]
    assert type(infos[0]["end_code"]) is int
