"""What Gymnasium records of the wrappers, and builds again from it; and who may wear which."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence

from llm_env import Prompt, Task, TokenEnv, TokenVectorEnv, TorchRLTokenEnv, register_task, wrappers
from llm_env.engines import make_engine
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer
from llm_env.wrappers import EpisodeStatistics, FlatTokens, KLReward, ScaleReward, TopKActions, vector

NAMES = ["AllowedTokens", "EpisodeStatistics", "FlatTokens", "KLReward", "OneHotTokens", "ScaleReward", "TopKActions"]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "KLReward": {"beta": 0.5, "reference": "transformers"},
    "ScaleReward": {"scale": 3.0, "high": 2.0},
}
SEEN = {"engine": "transformers", "observe": "top_k", "top_k": 4}


@register_task
class Weighing(Task):
    """Every token earns something of its own, and so does every text: no two trajectories are paid the same."""

    max_new_tokens = 4
    max_prompt_tokens = 2

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(letter) for letter in "abc"]}

    def token_reward(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        state = episodes.state
        return state.tokens[rows, state.length[rows] - 1] / 64

    def score(self, rollout: Any) -> float:
        return 1.0 + rollout.tokens.sum() / 64


def make(name: str) -> gymnasium.Env[Any, Any]:
    """A wrapped environment, by its wrapper's name."""
    env = gymnasium.make("llm_env/Weighing-v0", **(SEEN if name == "TopKActions" else {}))
    return getattr(wrappers, name)(env, **ARGUMENTS.get(name, {}))


def make_all() -> gymnasium.Env[Any, Any]:
    """All of them, one in the other, with one of Gymnasium's between."""
    env = TopKActions(gymnasium.make("llm_env/Weighing-v0", **SEEN))
    env = gymnasium.wrappers.ClipReward(KLReward(env, beta=0.5, reference="transformers"), -100.0, 100.0)
    return FlatTokens(EpisodeStatistics(ScaleReward(env, scale=3.0, high=2.0)))


def play(env: gymnasium.Env[Any, Any], steps: int = 12) -> list[Any]:
    """All that an environment says, for actions that only its action space and the seed determine."""
    said: list[Any] = [env.reset(seed=3)]
    env.action_space.seed(5)
    for _ in range(steps):
        action = env.action_space.sample()
        if isinstance(action, dict):
            action["log_prob"] = np.float32(-1.25)
        said.append(env.step(action))
        if said[-1][2] or said[-1][3]:
            said.append(env.reset())
    return said


@pytest.mark.parametrize("through_json", [False, True])
@pytest.mark.parametrize("build", [*(lambda name=name: make(name) for name in NAMES), make_all], ids=[*NAMES, "all"])
def test_an_environment_is_rebuilt_from_its_spec(build: Callable[[], Any], through_json: bool) -> None:
    env = build()
    spec = EnvSpec.from_json(env.spec.to_json()) if through_json else env.spec
    again = gymnasium.make(spec)
    assert str(again) == str(env)
    assert again.spec == env.spec
    assert (again.action_space, again.observation_space) == (env.action_space, env.observation_space)
    first, second = play(env), play(again)
    assert data_equivalence(first, second, exact=True)
    assert all(step[1] != 0 for step in first if len(step) == 5)  # rewards were there to differ
    env.close()
    again.close()


def test_what_is_recorded() -> None:
    env = ScaleReward(FlatTokens(gymnasium.make("llm_env/Copy-v0")), scale=2.0, low=-1.0)
    assert [(spec.name, spec.entry_point, spec.kwargs) for spec in env.spec.additional_wrappers] == [
        ("FlatTokens", "llm_env.wrappers.flat:FlatTokens", {}),
        ("ScaleReward", "llm_env.wrappers.scale:ScaleReward", {"scale": 2.0, "low": -1.0, "high": np.inf}),
    ]
    assert KLReward(gymnasium.make("llm_env/Copy-v0"), 0.5, "transformers").spec.additional_wrappers[0].kwargs == {
        "beta": 0.5,
        "reference": "transformers",
        "model": None,
    }
    assert FlatTokens(TokenEnv("Copy")).spec is None  # made by its class, an environment has no spec


def test_a_rebuilt_environment_shares_the_engine_that_was_handed_in() -> None:
    """Gymnasium copies what a spec records whenever it is looked at; the engine is not copied, weights and all."""
    with TransformersEngine(load_model("tiny"), load_tokenizer("tiny"), num_slots=2, context=20) as engine:
        env = FlatTokens(KLReward(gymnasium.make("llm_env/Copy-v0"), beta=0.1, reference=engine))
        assert env.spec.additional_wrappers[0].kwargs["reference"] is engine
        again = gymnasium.make(env.spec)
        with pytest.raises(ValueError, match="1 slots are wanted, but of the engine's 2 only 0 are free"):
            gymnasium.make(env.spec)
        again.close()
        engine.claim(1)
        with pytest.raises(TypeError, match="TransformersEngine is not JSON serializable"):
            env.spec.to_json()
        env.close()


def made_with_an_engine() -> gymnasium.Env[Any, Any]:
    """Two engines that were handed in: one reads along, the other is the reference."""
    first, second = (make_engine("transformers", "tiny", num_slots=3, context=20) for _ in range(2))
    return FlatTokens(KLReward(gymnasium.make("llm_env/Copy-v0", engine=first), beta=0.1, reference=second))


@pytest.mark.parametrize(
    "build",
    [*(lambda name=name: make(name) for name in NAMES), make_all, made_with_an_engine],
    ids=[*NAMES, "all", "engines"],
)
def test_gymnasium_checks_the_wrapped_environment(build: Callable[[], Any]) -> None:
    """It rebuilds it from its spec, with every render mode, and closes what it built twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(is different from the unwrapped version|infinity)")
        check_env(build())


def test_gymnasium_vectorizes_what_is_recorded() -> None:
    """Its `make_vec` puts single environments side by side, each with its wrappers."""
    env = ScaleReward(FlatTokens(gymnasium.make("llm_env/Copy-v0", max_new_tokens=1)), scale=2.0)
    envs = gymnasium.make_vec(env.spec, num_envs=2, vectorization_mode="sync")
    assert [str(single) for single in envs.envs] == [str(env)] * 2
    observation, _ = envs.reset(seed=0)
    assert observation.shape == (2, env.observation_space.shape[0])
    with pytest.raises(gymnasium.error.Error, match="vector_entry_point"):
        gymnasium.make_vec(env.spec, num_envs=2)


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_of_a_wrapped_batch_is_that_of_the_batch(name: str) -> None:
    options = SEEN if name == "TopKActions" else {}
    inside = gymnasium.make_vec("llm_env/Copy-v0", num_envs=2, autoreset_mode="SameStep", **options)
    envs = getattr(vector, name)(inside, **ARGUMENTS.get(name, {}))
    assert envs.spec is inside.spec
    again = gymnasium.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    assert str(again) == str(inside)
    assert again.metadata["autoreset_mode"] == inside.metadata["autoreset_mode"]
    envs.close()
    again.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_wrong_kind_of_environment(name: str) -> None:
    single, batched = getattr(wrappers, name), getattr(vector, name)
    arguments = ARGUMENTS.get(name, {})
    with pytest.raises(
        TypeError, match=rf"^{name} is for a single environment; for a batch use llm_env\.wrappers\.vector\.{name}$"
    ):
        single(TokenVectorEnv("Copy", 2), **arguments)
    with pytest.raises(
        TypeError, match=rf"^vector\.{name} is for a batch; for a single environment use llm_env\.wrappers\.{name}$"
    ):
        batched(gymnasium.make("llm_env/Copy-v0"), **arguments)
    for foreign in (gymnasium.make("CartPole-v1"), TorchRLTokenEnv("Copy", 1), None):
        with pytest.raises(TypeError, match="these wrappers are for TokenEnv and TokenVectorEnv, got"):
            single(foreign, **arguments)
    with pytest.raises(TypeError, match="these wrappers are for TokenEnv and TokenVectorEnv, got"):
        batched(gymnasium.make_vec("CartPole-v1", num_envs=2), **arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
def test_a_copy_goes_on_by_itself(name: str, how: Callable[[Any], Any]) -> None:
    env = make(name)
    begun = play(env, steps=2)
    again = how(env)
    assert again.unwrapped.mdp is not env.unwrapped.mdp
    assert again.layer.mdp is again.unwrapped.mdp
    assert data_equivalence(begun, play(again, steps=2), exact=True)
    first = play(env)
    assert data_equivalence(first, play(again), exact=True)
    env.close()
    again.close()


def test_a_copied_batch() -> None:
    inside = vector.TopKActions(TokenVectorEnv("Copy", 2, **SEEN))
    envs = vector.EpisodeStatistics(vector.KLReward(vector.ScaleReward(inside, 2.0), 0.5, "transformers"))
    again, third = copy.deepcopy(envs), pickle.loads(pickle.dumps(envs))
    action = {"token": np.array([1, 2]), "log_prob": np.array([-1.0, -2.0])}
    steps = []
    for each in (envs, again, third):
        each.reset(seed=0)
        steps.append(each.step(action))
    assert data_equivalence(steps[0], steps[1], exact=True)
    assert data_equivalence(steps[0], steps[2], exact=True)
    assert steps[0][4]["log_ratio"].all()


def test_single_and_batch_of_one_agree() -> None:
    """All five in one, on the same actions: the rule is written once."""
    single = make_all()
    envs = vector.TopKActions(TokenVectorEnv("Weighing", 1, autoreset_mode="Disabled", **SEEN))
    envs = vector.ScaleReward(vector.KLReward(envs, beta=0.5, reference="transformers"), scale=3.0, high=2.0)
    envs = vector.FlatTokens(vector.EpisodeStatistics(envs))
    assert (single.reset(seed=3)[0] == envs.reset(seed=3)[0][0]).all()
    for index in (0, 3, 1):
        one = single.step({"token": index, "log_prob": -1.5})
        many = envs.step({"token": np.array([index]), "log_prob": np.array([-1.5])})
        assert (one[0] == many[0][0]).all()
        assert one[1] == many[1][0]
        assert one[4]["log_ratio"] == many[4]["log_ratio"][0]
        if one[2]:
            assert one[4]["rollout"] == many[4]["rollout"][0]
            break
    single.close()
    envs.close()
