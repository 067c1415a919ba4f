"""The token MDP: a `TokenState` with a task, its prompts, its reward, and (if asked) an engine that reads along.

The four environment faces (Gymnasium's two, TorchRL, Stable-Baselines3) are views of this class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llm_env.mdp.observer import Observe, Observer
from llm_env.mdp.options import refuse_unknown, vocabulary_of
from llm_env.tasks.base import Task
from llm_env.tasks.registry import make_task
from llm_env.tokens.checks import as_indices
from llm_env.tokens.prompts import Prompt, PromptSampler, TokenizedPrompts
from llm_env.tokens.state import END_OF_CODE, RUNNING, SavedRows, TokenState
from llm_env.tokens.stopping import IntArray
from rewards import Guard, RewardError, Rollout, Score

FloatArray = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]


class Finished(NamedTuple):
    """An episode that a step has ended."""

    rollout: Rollout
    score: Score
    prompt_index: int
    group: int
    episode_return: float


@dataclass(frozen=True, slots=True)
class SavedEpisodes:
    """A copy of some rows of a `TokenMDP`: their state, the prompt each answers, and what it earned so far.

    `more` is what those who follow the episodes have saved for them, such as the return that a wrapper counts.
    """

    state: SavedRows
    prompts: list[Prompt]
    more: list[Any]
    prompt_index: IntArray
    group: IntArray
    episode_return: FloatArray

    def __len__(self) -> int:
        return len(self.state)


class Follower(Protocol):
    """Keeps something of its own beside the episodes, and must know when they are copied."""

    def save(self, rows: IntArray) -> Any:
        """A copy of what it keeps for these rows."""

    def restore(self, rows: IntArray, saved: Any) -> None:
        """Episodes were copied into these rows; `saved` is what `save` gave for them, or None."""


class TokenMDP:
    """A batch of episodes of one task.

    Args:
        task: a registered name, a `Task`, or a subclass of it.
        num_envs: how many episodes live side by side.
        task_kwargs: arguments of a task given by name.
        model: whose tokens are used: a name, folder or hub id (see `llm_env.models`), or a tokenizer. Default "tiny".
        split: which prompts: "train", "test", or another one that the task has.
        context: how many tokens prompt and text may have together; by default what the task expects of both.
        drop_long_prompts: leave out prompts that leave no room to act in this context; by default they are an error.
        max_new_tokens: how many tokens the agent may choose; by default what the task says.
        completions_per_prompt: how many episodes begin with the same prompt, one after the other.
        shuffle: deal the prompts in random order; False goes through them as they are (for evaluation).
        engine: a language model that reads along: the name of an engine ("transformers"), which then serves `model`,
            or an engine, whose own tokens are then used. Observations hold its distribution of the next token.
        observe: with an engine, "logits" (all of them) or "top_k" (ids and log-probs of the likeliest).
        top_k: how many; 50 by default.
        on_reward_error: the score of a rollout whose reward raised or took longer than `reward_timeout`.
        reward_timeout: seconds a reward may take for one rollout; it then runs in a killable process of its own.

    Attributes:
        state: the tokens, see `TokenState`.
        begun: `[num_envs]` bool, the rows that the last reset began.
        finished: the episodes that the last step ended, by row.
        followers: those who keep something beside the episodes, and are told when episodes are copied.
    """

    def __init__(
        self,
        task: str | Task | type[Task],
        num_envs: int = 1,
        *,
        task_kwargs: Mapping[str, Any] | None = None,
        model: Any = None,
        drop_long_prompts: bool = False,
        split: str = "train",
        context: int | None = None,
        max_new_tokens: int | None = None,
        completions_per_prompt: int = 1,
        shuffle: bool = True,
        engine: Any = None,
        observe: Observe | None = None,
        top_k: int | None = None,
        on_reward_error: float = 0.0,
        reward_timeout: float | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(unknown)
        if num_envs < 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise ValueError(
                f"num_envs and max_new_tokens must be at least 1, got num_envs={num_envs}, "
                f"max_new_tokens={max_new_tokens}"
            )
        unbound = make_task(task, task_kwargs)
        reward = unbound.as_reward()
        if model is None:
            model = "tiny" if engine is None or isinstance(engine, str) else engine
        elif not (engine is None or isinstance(engine, str)):
            raise ValueError(f"an engine brings its own model: leave out model={model!r}, or name the engine")
        self.model = model
        self.vocabulary = vocabulary_of(model, engine)
        self.task = unbound.bind(self.vocabulary)
        self.num_envs = num_envs
        self.max_new_tokens = self.task.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.context = self.task.max_prompt_tokens + self.max_new_tokens if context is None else context
        self.prompts = TokenizedPrompts(
            self.task.prompts(split),
            self.vocabulary,
            self.task.chat,
            longest=self.context - 1,
            drop_long=drop_long_prompts,
        )
        self.sampler = PromptSampler(len(self.prompts), completions_per_prompt=completions_per_prompt, shuffle=shuffle)
        self.sampler.reseed(int(np.random.SeedSequence().generate_state(1)[0]))  # until a reset brings a seed
        self.reward = Guard(reward, on_error=on_reward_error, timeout=reward_timeout)
        self.state = TokenState(
            num_envs,
            self.context,
            vocab_size=self.vocabulary.size,
            pad_token=self.vocabulary.pad_token,
            eos_tokens=self.vocabulary.eos_tokens,
            stop=self.vocabulary.matchers(self.task.stop),
            budget=self.max_new_tokens,
            cut_is_final=self._cut_is_final(),
            over=self.task.over if self.task.overrides("over") else None,
            reply=self._reply if self.task.overrides("reply") else None,
        )
        self.observer = Observer.make(engine, observe, top_k, model, self.state, self.vocabulary)
        self.followers: list[Follower] = []
        self.begun = np.zeros(num_envs, dtype=np.bool_)
        self.prompt_index = np.zeros(num_envs, dtype=np.int64)
        self.group = np.zeros(num_envs, dtype=np.int64)
        self.episode_return = np.zeros(num_envs)
        self.finished: dict[int, Finished] = {}
        self._prompts: list[Prompt] = [Prompt("")] * num_envs
        self._chosen_groups = 0
        self._pays_tokens = self.task.overrides("token_reward")
        self.masks_actions = self.task.overrides("action_mask")

    def reset(
        self,
        rows: Sequence[int] | IntArray | None = None,
        *,
        seed: int | None = None,
        prompt_indices: Sequence[int] | IntArray | None = None,
    ) -> IntArray:
        """Begin new episodes in `rows` (all of them by default), and return those rows.

        Args:
            rows: which rows. Beginning all of them begins a new group of completions, too.
            seed: start the order of prompts over, from this seed.
            prompt_indices: begin with these prompts of the split, one for each row, instead of the next in order. Rows
                that are given the same prompt form a group; its number is negative, not to meet those dealt.
        """
        if seed is not None:
            self.sampler.reseed(int(seed))
        if rows is None:
            self.sampler.begin_group()
        rows = self.state.all_rows if rows is None else as_indices(rows, self.num_envs, "row")
        if prompt_indices is None:
            indices, groups = self.sampler.deal(len(rows))
        else:
            indices, groups = self._chosen(prompt_indices, rows)
        chosen = indices.tolist()
        self.state.reset(rows, [self.prompts.tokens[index] for index in chosen], checked=True)
        for row, index in zip(rows.tolist(), chosen, strict=True):
            self._prompts[row] = self.prompts.prompts[index]
        self.begun[:] = False
        self.begun[rows] = True
        self.prompt_index[rows] = indices
        self.group[rows] = groups
        self.episode_return[rows] = 0.0
        self.observer.begin(rows)
        return rows

    def step(self, actions: Sequence[int] | IntArray, rows: Sequence[int] | IntArray | None = None) -> FloatArray:
        """Let `rows` (all by default) each take an action; returns `[num_envs]` rewards, 0 for the others."""
        state = self.state
        state.step(actions, rows)
        acted = state.all_rows if rows is None else np.asarray(rows, dtype=np.int64)
        # Before anything is scored: should the reward raise, engine and text have not come apart.
        self.observer.advance(acted)
        reward = np.zeros(self.num_envs)
        self.finished = {}
        self.begun[:] = False
        if self._pays_tokens and len(acted):
            reward[acted] = self._token_reward(acted)
        ended = acted[state.end[acted] != RUNNING].tolist()
        if ended:
            rollouts = [self.rollout(row) for row in ended]
            for row, rollout, score in zip(ended, rollouts, self.score(rollouts), strict=True):
                reward[row] += score.total
                self.finished[row] = Finished(
                    rollout,
                    score,
                    int(self.prompt_index[row]),
                    int(self.group[row]),
                    float(self.episode_return[row] + reward[row]),
                )
        self.episode_return += reward
        return reward

    def observation(self, copy: bool = True) -> Arrays:
        """What the agent sees, by name, each with `num_envs` rows; without `copy` some arrays are the state itself."""
        state = self.state
        arrays: Arrays = {
            "tokens": state.tokens,
            "length": state.length[:, None],
            "prompt_length": state.prompt_length[:, None],
            **self.observer.arrays,
        }
        return {name: array.copy() for name, array in arrays.items()} if copy else arrays

    def action_mask(self) -> npt.NDArray[np.int8] | None:
        """`[num_envs, vocab_size]` 1 for the tokens the task allows, or None where it allows all."""
        if not self.masks_actions:
            return None
        mask = np.array(self.task.action_mask(self.state), dtype=np.int8)
        if mask.shape != (self.num_envs, self.vocabulary.size):
            raise ValueError(
                f"the task {self.task.name} gave an action_mask of shape {mask.shape}; expected "
                f"[num_envs, vocab_size] = {(self.num_envs, self.vocabulary.size)}"
            )
        return mask

    def rollout(self, row: int) -> Rollout:
        """The episode in `row` as it stands, as a reward sees it."""
        state = self.state
        start, stop = int(state.prompt_length[row]), int(state.length[row])
        return Rollout(
            prompt_tokens=state.tokens[row, :start].copy(),
            tokens=state.tokens[row, start:stop].copy(),
            metadata=self.prompt(row).metadata,
            end=END_OF_CODE[state.end[row]],
            is_action=state.is_action[row, start:stop].copy() if state.reply is not None else None,
            decode=self.vocabulary.decode,
        )

    def prompt(self, row: int) -> Prompt:
        """The prompt that the episode in `row` began with."""
        return self._prompts[row]

    def score(self, rollouts: list[Rollout]) -> list[Score]:
        """The scores of finished rollouts; what was cut off and is to be valued instead has none."""
        if self.state.cut_is_final:
            return self.reward(rollouts)
        whole = [rollout for rollout in rollouts if rollout.terminated]
        scores = iter(self.reward(whole) if whole else ())
        return [next(scores) if rollout.terminated else Score(0.0) for rollout in rollouts]

    def save(self, rows: Sequence[int] | IntArray) -> SavedEpisodes:
        """Copy episodes out, for search, best-of-n, or to begin again from a prefix."""
        rows = as_indices(rows, self.num_envs, "row")
        return SavedEpisodes(
            self.state.save(rows),
            [self._prompts[row] for row in rows],
            [follower.save(rows) for follower in self.followers],
            self.prompt_index[rows],
            self.group[rows],
            self.episode_return[rows],
        )

    def restore(self, rows: Sequence[int] | IntArray, saved: SavedEpisodes) -> None:
        """Put saved episodes into `rows`: one each, or a single one copied into all of them."""
        rows = as_indices(rows, self.num_envs, "row")
        self.state.restore(rows, saved.state)
        for place, row in enumerate(rows.tolist()):
            self._prompts[row] = saved.prompts[place if len(saved) > 1 else 0]
        self.prompt_index[rows] = saved.prompt_index
        self.group[rows] = saved.group
        self.episode_return[rows] = saved.episode_return
        self.observer.begin(rows)
        same = len(saved.more) == len(self.followers)
        for place, follower in enumerate(self.followers):
            follower.restore(rows, saved.more[place] if same else None)

    def close(self) -> None:
        """Free the engine, or its slots if it was handed in, and the process that rewards run in, if there is one."""
        self.observer.close()
        self.reward.end_worker()

    def _cut_is_final(self) -> bool:
        if self.task.when_cut not in ("score", "bootstrap"):
            raise ValueError(f"when_cut must be 'score' or 'bootstrap', got {self.task.when_cut!r}")
        return self.task.when_cut == "score"

    def _chosen(self, prompt_indices: Sequence[int] | IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
        indices = np.asarray(prompt_indices)
        fits = indices.shape == rows.shape and (not len(indices) or indices.dtype.kind in "iu")
        if not fits or (len(indices) and not 0 <= indices.min() <= indices.max() < len(self.prompts)):
            raise ValueError(
                f"prompt_indices must name one of the {len(self.prompts)} prompts for each of the {len(rows)} rows "
                f"to reset, got {prompt_indices!r}"
            )
        distinct, groups = np.unique(indices, return_inverse=True)
        self._chosen_groups += len(distinct)
        return indices.astype(np.int64), groups.astype(np.int64) - self._chosen_groups

    def _token_reward(self, rows: IntArray) -> FloatArray:
        paid = np.asarray(self.task.token_reward(self.state, rows))
        if paid.shape != rows.shape or paid.dtype.kind not in "biuf" or not np.isfinite(paid).all():
            raise RewardError(
                f"the task {self.task.name} gave a token_reward of {paid!r}; expected a finite number for each of "
                f"{len(rows)} rows"
            )
        return paid.astype(np.float64)

    def _reply(self, state: TokenState, row: int) -> Sequence[int] | None:
        reply = self.task.reply(self.rollout(row))
        if not isinstance(reply, str):
            return reply
        # In the middle of a text, the special tokens that a tokenizer puts around one would be out of place.
        return [int(token) for token in self.vocabulary.encode(reply, add_special_tokens=False)]
