"""The token MDP itself: rewards that fail, engines that read along, episodes copied, options checked."""

from __future__ import annotations

import logging
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llm_env import Prompt, Task, TokenEnv, TokenMDP, TokenVectorEnv, TorchRLTokenEnv
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer
from llm_env.tasks import Copy, Dataset
from rewards import ExactMatch, LengthPenalty, Reward, RewardError, Rollout, Score
from tests.reference import LETTERS, Probe


def one_prompt(reward: Any, **settings: Any) -> Dataset:
    return Dataset([Prompt("say a: ", {"answer": "a"})], reward=reward, max_new_tokens=4, **settings)


class TestRewards:
    def test_parts_are_in_the_infos(self) -> None:
        envs = TokenVectorEnv(one_prompt(ExactMatch() + LengthPenalty(free=1, cost=0.25)), 2)
        envs.reset(seed=0)
        a, eos = envs.mdp.vocabulary.encode("a")[0], envs.mdp.vocabulary.eos_tokens[0]
        envs.step(np.array([a, a]))
        _, reward, terminated, _, info = envs.step(np.array([eos, a]))
        assert terminated.tolist() == [True, False]
        assert info["score"]["exact_match"].tolist() == [1.0, 0.0]
        assert info["score"]["_exact_match"].tolist() == [True, False]
        assert info["score"]["length_penalty"][0] == -0.25
        assert reward.tolist() == [0.75, 0.0]

    def test_one_that_raises_costs_its_rollout_only(self, caplog: pytest.LogCaptureFixture) -> None:
        def picky(rollout: Rollout) -> float:
            if "b" in rollout.text:
                raise RuntimeError("no b, please")
            return 1.0

        caplog.set_level(logging.CRITICAL, logger="rewards")
        envs = TokenVectorEnv(one_prompt(picky), 3, on_reward_error=-2.0, max_new_tokens=1)
        envs.reset(seed=0)
        _, reward, _, _, info = envs.step(envs.mdp.vocabulary.encode("aba"))
        assert reward.tolist() == [1.0, -2.0, 1.0]
        assert info["score"]["reward_failed"].tolist() == [0.0, 1.0, 0.0]
        assert envs.mdp.reward.num_failures == 1
        assert envs.mdp.reward.failures[0].rollout.text == "b"
        assert "no b, please" in envs.mdp.reward.failures[0].error

    def test_one_that_hangs_is_killed(self, caplog: pytest.LogCaptureFixture) -> None:
        def stuck(rollout: Rollout) -> float:
            while "b" in rollout.text:
                pass
            return 1.0

        caplog.set_level(logging.CRITICAL, logger="rewards")
        envs = TokenVectorEnv(one_prompt(stuck), 2, reward_timeout=0.5, on_reward_error=-1.0, max_new_tokens=1)
        envs.reset(seed=0)
        start = time.monotonic()
        assert envs.step(envs.mdp.vocabulary.encode("ab"))[1].tolist() == [1.0, -1.0]
        assert time.monotonic() - start < 60  # it came back at all
        envs.close()

    def test_nan_is_an_error_at_the_step_that_earned_it(self) -> None:
        env = TokenEnv(one_prompt(lambda rollout: float("nan")), max_new_tokens=1)
        env.reset(seed=0)
        with pytest.raises(RewardError, match=r"returned nan for the rollout with text 'x'; expected a finite number"):
            env.step(env.mdp.vocabulary.encode("x")[0])

    def test_token_rewards_are_checked(self) -> None:
        class Paying(Copy):
            name = "Paying"
            answer_with: Any = None

            def token_reward(self, state: Any, rows: Any) -> Any:
                return self.answer_with

        for answer in (None, np.array([np.nan]), np.zeros(2), [[1.0]]):
            Paying.answer_with = answer
            env = TokenEnv(Paying(2))
            env.reset(seed=0)
            with pytest.raises(
                RewardError, match=r"the task Paying gave a token_reward of .* a finite number for each of 1"
            ):
                env.step(5)

        class Over(Copy):
            name = "Over"

            def over(self, state: Any) -> Any:
                return True

        env = TokenEnv(Over(2))
        env.reset(seed=0)
        with pytest.raises(ValueError, match="`over` must return a bool for each of the 1 rows, got shape"):
            env.step(5)

        class Masking(Copy):
            name = "Masking"

            def action_mask(self, state: Any) -> Any:
                return np.ones(100)

        with pytest.raises(ValueError, match="the task Masking gave an action_mask of shape"):
            TokenEnv(Masking(2)).reset(seed=0)

    def test_batches_of_nothing_are_not_scored(self) -> None:
        def count(rollouts: Any) -> Any:
            assert len(rollouts)
            return [1.0] * len(rollouts)

        class Batch(Reward):
            def score_batch(self, rollouts: Any) -> Any:
                return count(rollouts)

        task = one_prompt(Batch())
        task.when_cut = "bootstrap"
        env = TokenEnv(task, max_new_tokens=1)
        env.reset(seed=0)
        assert env.step(5)[1] == 0.0
        assert env.mdp.reward.num_failures == 0

    def test_closing_one_environment_leaves_a_shared_reward_open(self) -> None:
        class Connected(ExactMatch):
            open = True

            def close(self) -> None:
                self.open = False

        reward = Connected()
        TokenEnv(one_prompt(reward)).close()
        assert reward.open

    def test_replies_bring_no_special_tokens(self) -> None:
        class Chatty(Task):
            max_new_tokens = 3

            def splits(self) -> dict[str, list[Prompt]]:
                return {"train": [Prompt("a")]}

            def reply(self, rollout: Rollout) -> str | None:
                return "ok" if rollout.num_actions < 3 else "never read"

            def score(self, rollout: Rollout) -> float:
                return float(len(rollout.text))

        tokenizer = load_tokenizer("tiny")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        env = TokenEnv(Chatty, model=tokenizer)
        observation, _ = env.reset(seed=0)
        assert observation["tokens"][:2].tolist() == [1, tokenizer.convert_tokens_to_ids("a")]
        eos = env.mdp.vocabulary.eos_tokens[0]
        tokens = env.step(eos)[0]["tokens"]
        assert tokens[2:5].tolist() == [eos, *tokenizer.convert_tokens_to_ids(["o", "k"])]
        env.step(eos)
        _, reward, terminated, _, info = env.step(eos)  # the last token it may write: no reply could be read
        assert (reward, terminated, info["end"]) == (4.0, True, "budget")

    def test_scores_per_token_are_paid_and_reported(self) -> None:
        def per_token(rollout: Rollout) -> Score:
            return Score(1.0, per_token=np.arange(len(rollout.tokens)) / 2)

        env = TokenEnv(one_prompt(per_token))
        env.reset(seed=0)
        env.step(5)
        _, reward, _, _, info = env.step(env.mdp.vocabulary.eos_tokens[0])
        assert reward == 1.5
        assert info["token_scores"].tolist() == [0.0, 0.5]

    def test_a_text_that_is_cut_off_is_scored_or_valued(self) -> None:
        class Bootstrapped(Copy):
            name = "Bootstrapped"
            when_cut = "bootstrap"

        for task, flags in ((Copy(2, dense=True), (True, False)), (Bootstrapped(2, dense=True), (False, True))):
            env = TokenEnv(task, max_new_tokens=1)
            env.reset(seed=0)
            right = env.mdp.vocabulary.encode(env.mdp.prompt(0).metadata["answer"][0])[0]
            _, reward, terminated, truncated, info = env.step(right)
            assert (terminated, truncated) == flags
            assert reward == (0.5 if terminated else 0.0)
            assert info["end"] == "budget"

        class Wrong(Copy):
            name = "Wrong"
            when_cut = "perhaps"  # type: ignore[assignment]

        with pytest.raises(ValueError, match="when_cut must be 'score' or 'bootstrap', got 'perhaps'"):
            TokenEnv(Wrong)


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
            ({"engine": "transformer"}, "unknown engine 'transformer'. Did you mean 'transformers'"),
            ({"engine": "transformers", "model": load_tokenizer("tiny")}, "needs the name or folder of the model"),
            ({"engine": "transformers", "observe": "tokens"}, "an engine was given, but observe='tokens'"),
            ({"observe": "logits"}, "observe='logits' needs a language model"),
            ({"observe": "pixels"}, "observe must be 'tokens', 'logits' or 'top_k', got 'pixels'"),
            ({"engine": "transformers", "top_k": 101}, "top_k must be from 1 to the 100 tokens"),
            ({"engine": engine}, "2 slots of 12 tokens, but 1 of 20 are needed"),
            ({"engine": engine, "model": "tiny"}, "an engine brings its own model: leave out model='tiny'"),
            ({"top_k": 5}, "top_k=5 is for observe='top_k' with an engine"),
            ({"num_envs": 0}, "num_envs and max_new_tokens must be at least 1, got num_envs=0"),
            ({"model": "tinny"}, "unknown model 'tinny'. Did you mean 'tiny'"),
        ):
            with pytest.raises(ValueError, match=message):
                TokenMDP("Copy", **arguments)
        for arguments, message in (
            (
                {"legnth": 3},
                "got an unexpected keyword argument 'legnth'; Arguments of the task itself go into task_kwargs",
            ),
            ({"contxt": 30}, "got an unexpected keyword argument 'contxt'; did you mean context"),
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
        assert TokenVectorEnv("Copy", 2, engine=engine).reset(seed=0)

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


def test_groups_share_a_prompt() -> None:
    envs = TokenVectorEnv("Reverse", 6, completions_per_prompt=3, autoreset_mode="Disabled")
    observation, info = envs.reset(seed=0)
    assert info["group"].tolist() == [0, 0, 0, 1, 1, 1]
    assert len({tuple(row) for row in observation["tokens"]}) == 2
    assert (observation["tokens"][0] == observation["tokens"][2]).all()


def test_prompts_can_be_chosen() -> None:
    envs = TokenVectorEnv("Reverse", 2, split="test")
    _, info = envs.reset(seed=0, options={"prompt_indices": [5, 0]})
    assert info["prompt_index"].tolist() == [5, 0]
    assert envs.mdp.prompt(0) == envs.mdp.task.prompts("test")[5]
    env = TokenEnv("Reverse")
    assert env.reset(options={"prompt_index": 7})[1]["prompt_index"] == 7
    for wrong in ([0], [0, 10_000], [-1, 0], [1.5, 2.9]):
        with pytest.raises(ValueError, match="must name one of the 256 prompts for each of the 2 rows"):
            envs.reset(options={"prompt_indices": wrong})


def test_chosen_prompts_form_groups_of_their_own() -> None:
    envs = TokenVectorEnv("Reverse", 4, completions_per_prompt=2, autoreset_mode="Disabled")
    assert envs.reset(seed=0)[1]["group"].tolist() == [0, 0, 1, 1]
    options = {"reset_mask": np.array([False, False, True, True]), "prompt_indices": [7, 7]}
    assert envs.reset(options=options)[1]["group"].tolist() == [0, 0, -1, -1]
    assert envs.reset(options={"prompt_indices": [7, 9, 7, 9]})[1]["group"].tolist() == [-3, -2, -3, -2]
    envs.reset(options={"reset_mask": np.array([True, False, False, False])})
    assert envs.reset()[1]["group"].tolist() == [3, 3, 4, 4]  # what was left of group 2 is not dealt out


def test_evaluation_goes_through_the_held_out_prompts_in_order() -> None:
    envs = TokenVectorEnv(Copy(3, num_test=5), 3, split="test", shuffle=False, autoreset_mode="SameStep")
    seen = envs.reset(seed=0)[1]["prompt_index"].tolist()
    _, _, _, _, info = envs.step(np.full(3, envs.mdp.vocabulary.eos_tokens[0]))
    assert seen + info["prompt_index"].tolist() == [0, 1, 2, 3, 4, 0]


def test_sampling_of_prompts_goes_on_where_it_was() -> None:
    first = TokenMDP("Reverse", 3)
    first.reset(seed=1)
    state = first.sampler.state_dict()
    expected = first.prompt_index[first.reset()].tolist()
    second = TokenMDP("Reverse", 3)
    second.sampler.load_state_dict(state)
    assert second.prompt_index[second.reset()].tolist() == expected


def test_rendering() -> None:
    env = gymnasium.make("llm_env/Copy-v0", task_kwargs={"length": 2}, render_mode="ansi")
    assert env.unwrapped.render() == "(no episode yet: call reset)"
    env.reset(seed=0, options={"prompt_index": 0})
    answer = env.unwrapped.mdp.prompt(0).metadata["answer"]
    for token in env.unwrapped.mdp.vocabulary.encode(answer):
        env.step(token)
    assert env.render() == f"copy {answer}: {answer}\n[Copy] token 2/3, return 0, running"
    env.step(env.unwrapped.mdp.vocabulary.eos_tokens[0])
    assert env.render() == f"copy {answer}: {answer}\n[Copy] token 3/3, return 1, ended (eos)"
    envs = TokenVectorEnv("Copy", 2, render_mode="ansi")
    envs.reset(seed=0)
    assert len(envs.render() or ()) == 2
    with pytest.raises(TypeError, match="render_mode must be None or 'ansi', got 'human'"):
        TokenEnv("Copy", render_mode="human")


def test_restored_episodes_keep_their_prompt() -> None:
    train, test = TokenVectorEnv(Copy(3), 2), TokenVectorEnv(Copy(3), 2, split="test")
    train.reset(seed=0)
    test.reset(seed=0)
    test.restore_rows([1], train.save_rows([0]))
    assert test.mdp.prompt(1) == train.mdp.prompt(0)
    for rows in (slice(0, 1), 0, [True, False], [0, 0], [2]):
        with pytest.raises(ValueError, match="row"):
            train.save_rows(rows)


def test_bad_actions_change_nothing() -> None:
    envs = TokenVectorEnv("Copy", 2, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match="row 0 was given action 5, but its episode has not begun: reset it first"):
        envs.step(np.array([5, 5]))
    envs.reset(seed=0)
    for wrong, message in (
        ([5, 100], "token id 100; this vocabulary has ids 0 to 99"),
        ([5], "expected 2 actions"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.step(np.array(wrong))
    envs.step(np.array([5, envs.mdp.vocabulary.eos_tokens[0]]))
    with pytest.raises(
        ValueError, match=r"row 1 was given action 6, but its episode has ended \(eos\): reset it first"
    ):
        envs.step(np.array([5, 6]))
    assert envs.mdp.state.num_actions.tolist() == [1, 1]
    following = TokenVectorEnv("Copy", 2)
    following.reset(seed=0)
    following.step(np.array([5, following.mdp.vocabulary.eos_tokens[0]]))
    with pytest.raises(ValueError, match=r"expected actions of shape \(2,\), one per row; got shape \(1,\)"):
        following.step(np.array([5]))


def test_bad_resets() -> None:
    envs = TokenVectorEnv("Copy", 2)
    for options, message in (
        ({"reset_mask": [True, False]}, r"reset_mask must be a bool array of shape \(2,\)"),
        ({"reset_mask": np.array([1, 0])}, "reset_mask must be a bool array"),
        ({"mask": None}, r"unknown reset options \['mask'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.reset(options=options)
    with pytest.raises(TypeError, match=r"seed must be one int, got \[1, 2\]"):
        envs.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="known is 'prompt_index'"):
        TokenEnv("Copy").reset(options={"prompt": 3})


def test_a_prompt_longer_than_the_context() -> None:
    class Long(Task):
        def splits(self) -> dict[str, list[Prompt]]:
            return {"train": [Prompt("x" * 30)]}

        def score(self, rollout: Rollout) -> float:
            return 0.0

    with pytest.raises(
        ValueError, match=r"at most 29 tokens fit, and prompt 0 has 30 \('x+'\). Use a context of at least 31"
    ):
        TokenEnv(Long, context=30)
    with pytest.raises(ValueError, match="all 1 prompts have more than 29 tokens: none is left"):
        TokenEnv(Long, context=30, drop_long_prompts=True)
    mixed = Dataset(["x" * 30, "ab", "x" * 31], reward=lambda rollout: 0.0)
    env = TokenEnv(mixed, context=20, drop_long_prompts=True)
    assert (len(env.mdp.prompts), env.mdp.prompts.dropped) == (1, 2)
    env = TokenEnv(Long, context=31)
    env.reset()
    assert env.step(5)[4]["end"] == "context"


def test_same_seed_same_run() -> None:
    runs = []
    for _ in range(2):
        envs = TokenVectorEnv("Countdown", 4, engine="transformers", observe="top_k", top_k=3, max_new_tokens=6)
        observation, _ = envs.reset(seed=11)
        rng = np.random.default_rng(0)
        seen = []
        for _ in range(12):
            observation, reward, *_ = envs.step(observation["top_ids"][np.arange(4), rng.integers(3, size=4)])
            seen.append((observation["tokens"].tolist(), observation["top_log_probs"].tolist(), reward.tolist()))
        runs.append(seen)
        envs.close()
    assert runs[0] == runs[1]
