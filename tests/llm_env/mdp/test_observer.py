"""Engines that read along with the episodes, and episodes copied under them."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from llm_env import TokenEnv, TokenMDP, TokenVectorEnv, TorchRLTokenEnv
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer
from llm_env.tasks import Copy
from tests.llm_env.reference import LETTERS, Probe


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny", seed=3)


class TestEngine:
    @pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
    def test_logits_are_those_of_the_text_so_far(self, model: Any, mode: str) -> None:
        """Through replies, task ends, and every kind of beginning anew; checked by reading each text in full."""
        engine = TransformersEngine(model, load_tokenizer("tiny"), num_slots=3, context=14)
        envs = TokenVectorEnv(Probe(), 3, autoreset_mode=mode, context=14, engine=engine, observe="logits")
        palette = np.array([*envs.mdp.vocabulary.encode(LETTERS), envs.mdp.vocabulary.eos_tokens[0]])
        rng = np.random.default_rng(0)
        observation, _ = envs.reset(seed=0)
        done = np.zeros(3, dtype=bool)
        compared = 0
        for _ in range(40):
            if mode == "Disabled" and done.any():
                observation, _ = envs.reset(options={"reset_mask": done})
                done = np.zeros(3, dtype=bool)
            for row in range(3):
                tokens = torch.from_numpy(observation["tokens"][row, : observation["length"][row, 0]])[None]
                with torch.no_grad():
                    expected = model(tokens).logits[0, -1].numpy()
                if envs.mdp.state.terminated[row]:
                    expected = np.zeros_like(expected)
                np.testing.assert_allclose(observation["logits"][row], expected, atol=1e-4)
                compared += 1
            observation, _, terminated, truncated, _ = envs.step(rng.choice(palette, size=3))
            done = terminated | truncated
        assert compared == 120

    def test_top_k_are_the_likeliest(self, model: Any) -> None:
        arguments = {"num_slots": 2, "context": 20}
        both = {}
        for observe in ("logits", "top_k"):
            engine = TransformersEngine(model, load_tokenizer("tiny"), **arguments)
            more = {"top_k": 7} if observe == "top_k" else {}
            both[observe] = TokenEnv("Copy", engine=engine, observe=observe, **more).reset(seed=0)[0]
        log_probs = torch.log_softmax(torch.from_numpy(both["logits"]["logits"]), -1)
        values, ids = log_probs.topk(7)
        assert both["top_k"]["top_ids"].tolist() == ids.tolist()
        np.testing.assert_allclose(both["top_k"]["top_log_probs"], values, atol=1e-5)

    def test_episodes_can_be_copied_and_restored(self) -> None:
        """Best of n from one prefix: the same actions after it lead to the same place."""
        envs = TokenVectorEnv(Copy(4, dense=True), 3, engine="transformers", observe="top_k", top_k=3)
        envs.reset(seed=0)
        envs.step(np.array([70, 71, 72]))
        saved = envs.save_rows([1])
        observation = envs.restore_rows([0, 2], saved)
        for name, array in observation.items():
            np.testing.assert_allclose(array[[0, 2]], array[[1, 1]], atol=1e-5, err_msg=name)
        answer = envs.mdp.vocabulary.encode(envs.mdp.prompt(1).metadata["answer"])
        assert envs.mdp.prompt(0) == envs.mdp.prompt(1)
        for token in answer[1:]:
            envs.step(np.array([token, 72, token]))
        _, reward, terminated, _, _ = envs.step(np.full(3, envs.mdp.vocabulary.eos_tokens[0]))
        assert terminated.all()
        assert reward[0] == reward[2] == max(reward)
        envs.restore_rows([0, 1, 2], saved)
        assert not envs.mdp.state.terminated.any()
        envs.close()

    def test_a_single_env_goes_back(self) -> None:
        env = TokenEnv("Copy")
        env.reset(seed=0)
        env.step(70)
        saved = env.save()
        first = [env.step(token)[0]["tokens"] for token in (71, 72)]
        assert env.restore(saved)["length"].tolist() == [14]
        second = [env.step(token)[0]["tokens"] for token in (71, 72)]
        np.testing.assert_array_equal(first, second)

    def test_torchrl_sees_it_too(self) -> None:
        env = TorchRLTokenEnv("Copy", 2, engine="transformers", observe="logits", seed=0)
        rollout = env.rollout(3, break_when_any_done=False)
        assert rollout["logits"].shape == (2, 3, 100)
        assert env.observation_spec["logits"].shape == (2, 100)
        env.close()

    def test_bad_arguments(self, model: Any) -> None:
        engine = TransformersEngine(model, load_tokenizer("tiny"), num_slots=2, context=12)
        for arguments, message in (
            ({"engine": "transformer"}, "unknown engine 'transformer'; did you mean 'transformers'"),
            ({"engine": "transformers", "model": load_tokenizer("tiny")}, "needs the name or folder of the model"),
            ({"engine": "transformers", "observe": "tokens"}, "an engine was given, but observe='tokens'"),
            ({"observe": "logits"}, "observe='logits' needs a language model"),
            ({"observe": "pixels"}, "observe must be 'tokens', 'logits' or 'top_k', got 'pixels'"),
            ({"engine": "transformers", "top_k": 101}, "top_k must be from 1 to the 100 tokens"),
            ({"engine": engine}, "2 slots of 12 tokens, but 1 of 20 are needed"),
            ({"engine": engine, "model": "tiny"}, "an engine brings its own model: leave out model='tiny'"),
            ({"top_k": 5}, "top_k=5 is for observe='top_k' with an engine"),
            ({"num_envs": 0}, "num_envs and max_new_tokens must be at least 1, got num_envs=0"),
            ({"model": "tinny"}, "unknown model 'tinny'; did you mean 'tiny'"),
        ):
            with pytest.raises(ValueError, match=message):
                TokenMDP("Copy", **arguments)
        for arguments, message in (
            (
                {"legnth": 3},
                "got an unexpected keyword argument 'legnth'; Arguments of the task itself go into task_kwargs",
            ),
            ({"contxt": 30}, "got an unexpected keyword argument 'contxt'; did you mean 'context'"),
            ({"max_episode_steps": 3}, "use max_new_tokens, not max_episode_steps"),
            ({"model": 3}, "model must be a name, a folder, a hub id or a tokenizer, got int: 3"),
        ):
            with pytest.raises(TypeError, match=message):
                TokenMDP("Copy", **arguments)

    def test_environments_may_share_an_engine(self, model: Any) -> None:
        engine = TransformersEngine(model, load_tokenizer("tiny"), num_slots=4, context=20)
        alone = TokenVectorEnv(
            "Copy", 2, engine=TransformersEngine(model, load_tokenizer("tiny"), num_slots=2, context=20)
        )
        first = TokenVectorEnv("Copy", 2, engine=engine)
        second = TokenVectorEnv("Copy", 2, engine=engine)
        for envs, seed in ((alone, 0), (first, 0), (second, 1)):
            envs.reset(seed=seed)
        second.step(np.array([70, 71]))
        expected, seen = (envs.step(np.array([72, 73]))[0] for envs in (alone, first))
        np.testing.assert_allclose(seen["top_log_probs"], expected["top_log_probs"], atol=1e-5)
        with pytest.raises(ValueError, match="1 slots are wanted, but of the engine's 4 only 0 are free"):
            TokenVectorEnv("Copy", 1, engine=engine)
        second.close()
        third = TokenVectorEnv("Copy", 2, engine=engine)
        third.reset(seed=0)
        del second, envs
        gc.collect()  # what was closed must not give up its slots once more: they are another's now
        third.step(np.array([72, 73]))

    def test_texts_are_read_again_when_the_weights_have_changed(self) -> None:
        engine = TransformersEngine(load_model("tiny", seed=1), load_tokenizer("tiny"), num_slots=2, context=20)
        other = load_model("tiny", seed=2)
        envs = TokenVectorEnv("Copy", 2, engine=engine, observe="logits")
        envs.reset(seed=0)
        engine.load_weights(other.state_dict(), version=1)
        observation, *_ = envs.step(np.array([70, envs.mdp.vocabulary.eos_tokens[0]]))
        with torch.no_grad():
            expected = other(torch.from_numpy(observation["tokens"][:1, :14])).logits[0, -1]
        np.testing.assert_allclose(observation["logits"][0], expected, atol=1e-4)
        envs.step(np.array([71, 0]))

    def test_a_restored_text_that_was_cut_off_keeps_its_distribution(self) -> None:
        task = Copy(3)
        task.when_cut = "bootstrap"
        envs = TokenVectorEnv(
            task, 2, engine="transformers", observe="logits", autoreset_mode="Disabled", max_new_tokens=1
        )
        envs.reset(seed=0)
        before = envs.step(np.array([70, 71]))[0]["logits"]
        after = envs.restore_rows([1], envs.save_rows([0]))["logits"]
        assert abs(before[0]).max() > 0
        np.testing.assert_allclose(after[1], before[0], atol=1e-5)
        assert envs.mdp.observer.engine.lengths.tolist() == [0, 0]
