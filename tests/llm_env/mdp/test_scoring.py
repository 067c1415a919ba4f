"""What the token MDP pays: parts, failures, time-outs, scores per token, texts that were cut off."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llm_env import END_OF_CODE, Prompt, Task, TokenEnv, TokenVectorEnv, TorchRLTokenEnv
from llm_env.models import load_tokenizer
from llm_env.tasks import Copy, Dataset
from rewards import ExactMatch, LengthPenalty, Reward, RewardError, Rollout, Score


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
        assert info["score/exact_match"].tolist() == [1.0, 0.0]
        assert info["_score/exact_match"].tolist() == [True, False]
        assert info["score/length_penalty"][0] == -0.25
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
        assert info["score/reward_failed"].tolist() == [0.0, 1.0, 0.0]
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

    def test_what_an_isolated_one_draws_follows_the_seed(self) -> None:
        def drawing(rollout: Rollout) -> float:
            return random.random()

        options: Any = {"reward_timeout": 10.0, "max_new_tokens": 1}
        env = TokenEnv(one_prompt(drawing), **options)
        torchrl = TorchRLTokenEnv(one_prompt(drawing), **options)
        drawn = []
        for seed in (3, 4, 3):
            env.reset(seed=seed)
            drawn.append(env.step(5)[1])
            torchrl.set_seed(seed)
            step = torchrl.reset().set("action", torch.tensor([5]))
            assert torchrl.step(step)["next", "reward"].item() == pytest.approx(drawn[-1])
        assert drawn[0] == drawn[2] != drawn[1]
        env.close()
        torchrl.close()

    def test_nan_is_an_error_at_the_step_that_earned_it(self) -> None:
        env = TokenEnv(one_prompt(lambda rollout: float("nan")), max_new_tokens=1)
        env.reset(seed=0)
        with pytest.raises(RewardError, match=r"returned nan for the rollout with text 'x'; expected a finite number"):
            env.step(env.mdp.vocabulary.encode("x")[0])

    def test_token_rewards_are_checked(self) -> None:
        class Paying(Copy):
            name = "Paying"
            answer_with: Any = None

            def token_reward(self, episodes: Any, rows: Any) -> Any:
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

            def over(self, episodes: Any, rows: Any) -> Any:
                return True

        env = TokenEnv(Over(2))
        env.reset(seed=0)
        with pytest.raises(
            ValueError, match="`over` must return a bool for each of the 1 rows it was asked about, got"
        ):
            env.step(5)

        class Masking(Copy):
            name = "Masking"

            def action_mask(self, episodes: Any, rows: Any) -> Any:
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
            max_reply_tokens = 4

            def splits(self) -> dict[str, list[Prompt]]:
                return {"train": [Prompt("a")]}

            def reply(self, rollout: Rollout) -> str | None:
                return "ok" if rollout.num_actions < 3 else "never read"

            def score(self, rollout: Rollout) -> float:
                return float(len(rollout.transcript))

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
        assert (reward, terminated, END_OF_CODE[info["end_code"]]) == (4.0, True, "budget")

    def test_scores_per_token_are_paid_and_reported(self) -> None:
        def per_token(rollout: Rollout) -> Score:
            return Score(1.0, per_token=np.arange(len(rollout.tokens)) / 2)

        env = TokenEnv(one_prompt(per_token))
        env.reset(seed=0)
        env.step(5)
        _, reward, _, _, info = env.step(env.mdp.vocabulary.eos_tokens[0])
        assert reward == 1.5
        assert info["token_scores"].tolist() == [0.0, 0.5, 0.0, 0.0]  # one for each of the four choices it had

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
            assert reward == (pytest.approx(1 / 3) if terminated else 0.0)  # a letter, of two and the end
            assert END_OF_CODE[info["end_code"]] == "budget"

        class Wrong(Copy):
            name = "Wrong"
            when_cut = "perhaps"  # type: ignore[assignment]

        with pytest.raises(ValueError, match="when_cut must be 'score' or 'bootstrap', got 'perhaps'"):
            TokenEnv(Wrong)
