"""Two ways to let a policy finish texts. The same seed gives the same episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from agents.rollouts.packing import Episode
from llm_env import TorchRLTokenEnv
from llm_env.engines import Engine, Sampling
from llm_env.engines.sampling import choose, uniforms
from llm_env.mdp.core import TokenMDP
from llm_env.tokens.stopping import IntArray
from rewards import Rollout

Policy = Callable[[TensorDictBase], TensorDictBase]


class Rollouts(Protocol):
    """Writes texts after given prompts."""

    mdp: TokenMDP

    def episodes(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> list[Episode]:
        """One episode for each of the prompts `indices`, in their order.

        Args:
            indices: of the split's prompts.
            groups: which of them belong together.
            sampling: temperature and seed; budget and stop sequences are the task's.
        """


def needs_steps(mdp: TokenMDP) -> bool:
    """Whether the task acts while a text is being written, which an engine that writes alone does not know of."""
    return any(mdp.task.overrides(method) for method in ("reply", "over", "token_reward"))


class EngineRollouts:
    """The engine writes whole texts by itself, and they are scored when all are done.

    Args:
        mdp: the task, its prompts and its reward.
        engine: has the task's context.
    """

    def __init__(self, mdp: TokenMDP, engine: Engine) -> None:
        if needs_steps(mdp):
            raise ValueError(
                f"the task {mdp.task.name} acts while a text is being written (reply, over or token_reward): an engine "
                "that writes whole texts would skip that; use rollout.mode='step' (or 'auto')"
            )
        if engine.context != mdp.context:
            raise ValueError(
                f"the engine's context is {engine.context}, the task's {mdp.context}: texts would be cut off at "
                "different lengths; make the engine with the task's context"
            )
        self.mdp = mdp
        self.engine = engine

    def episodes(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> list[Episode]:
        """One episode for each prompt."""
        mdp = self.mdp
        prompts = [mdp.prompts.tokens[index] for index in indices.tolist()]
        how = Sampling(
            temperature=sampling.temperature,
            seed=sampling.seed,
            max_new_tokens=mdp.max_new_tokens,
            stop=mdp.task.stop,
        )
        completions = self.engine.generate(prompts, how)
        rollouts = [
            Rollout(
                prompt_tokens=prompts[done.prompt_index],
                tokens=done.tokens,
                metadata=mdp.prompts.prompts[int(indices[done.prompt_index])].metadata,
                end=done.end,
                decode=mdp.vocabulary.decode,
            )
            for done in completions
        ]
        return [
            Episode(
                rollout=rollout,
                score=score,
                log_probs=done.log_probs,
                token_rewards=None,
                truncated=not (rollout.terminated or mdp.state.cut_is_final),
                prompt_index=int(indices[done.prompt_index]),
                group=int(groups[done.prompt_index]),
            )
            for rollout, score, done in zip(rollouts, mdp.score(rollouts), completions, strict=True)
        ]


class StepRollouts:
    """A policy chooses every token, and the environment takes the step: for any policy, and any task.

    Args:
        env: one row for each text that is written at a time.
        policy: reads the observation and writes `action` and `action_log_prob`, as TorchRL's policies do with
            `return_log_prob=True`.
    """

    def __init__(self, env: TorchRLTokenEnv, policy: Policy) -> None:
        self.env = env
        self.policy = policy
        self.mdp = env.mdp

    def episodes(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> list[Episode]:
        """One episode for each prompt."""
        done: list[Episode] = []
        for begin in range(0, len(indices), self.mdp.num_envs):
            part = slice(begin, begin + self.mdp.num_envs)
            done += self._play(indices[part], groups[part], sampling, begin)
        return done

    def _play(self, indices: IntArray, groups: IntArray, sampling: Sampling, first: int) -> list[Episode]:
        mdp, rows = self.mdp, np.arange(len(indices))
        if isinstance(self.policy, EnginePolicy):
            self.policy.begin(sampling, first)
        # Rows to spare begin too, for the policy to read something, and take no step.
        wanted = torch.arange(mdp.num_envs) < len(rows)
        data = self.env.reset(prompt_indices=np.resize(indices, mdp.num_envs))
        log_probs = np.zeros((len(rows), mdp.max_new_tokens), dtype=np.float32)
        earned = np.zeros((len(rows), mdp.max_new_tokens))
        finished: dict[int, Any] = {}
        acting = wanted
        with torch.no_grad():
            while acting.any():
                data = self.policy(data)
                chosen = acting.nonzero()[:, 0].numpy()
                count = mdp.state.num_actions[chosen]
                log_probs[chosen, count] = _log_prob(data).cpu().numpy()[chosen]
                data.set("_step", acting)
                data = self.env.step(data)["next"]
                earned[chosen, count] = data["reward"].cpu().numpy()[chosen, 0]
                for row, one in mdp.finished.items():
                    finished[row] = (one, bool(mdp.state.truncated[row]))
                acting = acting & ~data["done"][:, 0].cpu()
        pays = mdp.task.overrides("token_reward")
        episodes = []
        for row in rows.tolist():
            one, truncated = finished[row]
            count = one.rollout.num_actions
            rewards = earned[row, :count].copy()
            rewards[-1] -= one.score.total  # it is paid where it belongs, see `Episode.rewards`
            episodes.append(
                Episode(
                    rollout=one.rollout,
                    score=one.score,
                    log_probs=log_probs[row, :count],
                    token_rewards=rewards if pays else None,
                    truncated=truncated,
                    prompt_index=int(indices[row]),
                    group=int(groups[row]),
                )
            )
        return episodes


class EnginePolicy(TensorDictModuleBase):  # type: ignore[misc]
    """Draws from the logits that the environment observes, with the random numbers that `Engine.generate` would use.

    Args:
        env: made with an engine and `observe="logits"`.
    """

    def __init__(self, env: TorchRLTokenEnv) -> None:
        super().__init__()
        if "logits" not in env.mdp.observer.arrays:
            raise ValueError("EnginePolicy reads logits: make the environment with engine=..., observe='logits'")
        self.in_keys, self.out_keys = ["logits"], ["action", "action_log_prob"]
        self._mdp = env.mdp
        self.begin(Sampling(seed=0), 0)

    def begin(self, sampling: Sampling, first: int) -> None:
        """New texts: row `i` will draw what completion `first + i` of `generate` would."""
        self.sampling = sampling.with_fresh_seed()
        seed = self.sampling.seed
        assert seed is not None
        most = min(self._mdp.max_new_tokens, self._mdp.context)
        self._random = np.stack([uniforms(seed, first + row, 0, most) for row in range(self._mdp.num_envs)])

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        """Write `action` and `action_log_prob`; rows that have ended get some token."""
        count = np.minimum(self._mdp.state.num_actions, self._random.shape[1] - 1)
        random = self._random[np.arange(len(count)), count]
        tokens, log_probs = choose(data["logits"], self.sampling, random)
        return data.set("action", tokens).set("action_log_prob", log_probs)


def _log_prob(data: TensorDictBase) -> torch.Tensor:
    for key in ("action_log_prob", "sample_log_prob"):
        if (value := data.get(key, None)) is not None:
            return cast(torch.Tensor, value).reshape(-1)
    raise KeyError(
        f"the policy wrote no log-prob of its action, only {sorted(map(str, data.keys()))}: make it with "
        "return_log_prob=True"
    )
