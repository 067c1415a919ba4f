"""The token MDP: a `TokenState` with a task, its prompts, its reward, and (if asked) an engine that reads along.

The four environment faces (Gymnasium's two, TorchRL, Stable-Baselines3) are views of this class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from llm_env.models import load_vocabulary
from llm_env.observer import Observe, Observer
from llm_env.prompts import Prompt, PromptSampler, TokenizedPrompts
from llm_env.state import RUNNING, End, SavedRows, TokenState
from llm_env.stopping import IntArray
from llm_env.tasks.base import Task
from llm_env.tasks.registry import make_task
from llm_env.text import Vocabulary
from rewards import Guard, Rollout, Score

FloatArray = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]


class MDPOptions(TypedDict, total=False):
    """The keyword arguments every face shares; `TokenMDP` says what they mean."""

    task_kwargs: Mapping[str, Any] | None
    model: Any
    split: str
    context: int | None
    max_new_tokens: int | None
    completions_per_prompt: int
    shuffle: bool
    engine: Any
    observe: Observe
    top_k: int
    on_reward_error: float
    reward_timeout: float | None


@dataclass(frozen=True, slots=True)
class Finished:
    """An episode that a step has ended."""

    rollout: Rollout
    score: Score
    prompt_index: int
    group: int
    episode_return: float


@dataclass(frozen=True, slots=True)
class SavedEpisodes:
    """A copy of some rows of a `TokenMDP`: their state, which prompt each answers, and what it earned so far."""

    state: SavedRows
    prompt_index: IntArray
    group: IntArray
    episode_return: FloatArray

    def __len__(self) -> int:
        return len(self.state)


class TokenMDP:
    """A batch of episodes of one task.

    Args:
        task: a registered name, a `Task`, or a subclass of it.
        num_envs: how many episodes live side by side.
        task_kwargs: arguments of a task given by name.
        model: whose tokens are used: a name, folder or hub id (see `llm_env.models`), or a tokenizer.
        split: which prompts: "train", "test", or another one that the task has.
        context: how many tokens prompt and text may have together; by default what the task expects of both.
        max_new_tokens: how many tokens the agent may choose; by default what the task says.
        completions_per_prompt: how many episodes begin with the same prompt, one after the other.
        shuffle: deal the prompts in random order; False goes through them as they are (for evaluation).
        engine: a language model that reads along: the name of an engine ("transformers"), which then serves `model`,
            or an engine, whose own tokens are then used. Observations hold its distribution of the next token.
        observe: with an engine, "logits" (all of them) or "top_k" (ids and log-probs of the likeliest).
        top_k: how many.
        on_reward_error: the score of a rollout whose reward raised or took longer than `reward_timeout`.
        reward_timeout: seconds a reward may take for one rollout; it then runs in a killable process of its own.

    Attributes:
        state: the tokens, see `TokenState`.
        finished: the episodes that the last step ended, by row.
    """

    def __init__(
        self,
        task: str | Task | type[Task],
        num_envs: int = 1,
        *,
        task_kwargs: Mapping[str, Any] | None = None,
        model: Any = "tiny",
        split: str = "train",
        context: int | None = None,
        max_new_tokens: int | None = None,
        completions_per_prompt: int = 1,
        shuffle: bool = True,
        engine: Any = None,
        observe: Observe | None = None,
        top_k: int = 50,
        on_reward_error: float = 0.0,
        reward_timeout: float | None = None,
    ) -> None:
        unbound = make_task(task, task_kwargs)
        self.model = model
        self.vocabulary = _vocabulary(model, engine)
        self.task = unbound.bind(self.vocabulary)
        self.num_envs = num_envs
        self.max_new_tokens = self.task.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.context = self.task.max_prompt_tokens + self.max_new_tokens if context is None else context
        self.prompts = TokenizedPrompts(self.task.prompts(split), self.vocabulary, self.task.chat)
        self.sampler = PromptSampler(len(self.prompts), completions_per_prompt=completions_per_prompt, shuffle=shuffle)
        self.sampler.reseed(int(np.random.SeedSequence().generate_state(1)[0]))  # until a reset brings a seed
        self.reward = Guard(self.task.as_reward(), on_error=on_reward_error, timeout=reward_timeout)
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
        self.prompt_index = np.zeros(num_envs, dtype=np.int64)
        self.group = np.zeros(num_envs, dtype=np.int64)
        self.episode_return = np.zeros(num_envs)
        self.finished: dict[int, Finished] = {}
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
            rows: which rows.
            seed: start the order of prompts over, from this seed.
            prompt_indices: begin with these prompts of the split, one for each row, instead of the next in order.
        """
        rows = self.state.all_rows if rows is None else np.asarray(rows, dtype=np.int64)
        if seed is not None:
            self.sampler.reseed(seed)
        if prompt_indices is None:
            indices, groups = self.sampler.deal(len(rows))
        else:
            indices = groups = np.asarray(prompt_indices, dtype=np.int64)
            if indices.shape != rows.shape or (
                len(indices) and not 0 <= indices.min() <= indices.max() < len(self.prompts)
            ):
                raise ValueError(
                    f"prompt_indices must name one of the {len(self.prompts)} prompts for each of the {len(rows)} rows "
                    f"to reset, got {prompt_indices!r}"
                )
        prompts = [self.prompts.tokens(index) for index in indices.tolist()]
        try:
            self.state.reset(rows, prompts)
        except ValueError as error:
            worst = int(indices[np.argmax([len(prompt) for prompt in prompts])])
            text = str(self.prompts.prompts[worst].text)[:200]
            error.add_note(f"it is prompt {worst} of the task {self.task.name}: {text!r}")
            raise
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
        reward = np.zeros(self.num_envs)
        if self._pays_tokens:
            reward[acted] = self.task.token_reward(state, acted)
        self.finished = {}
        ended = acted[state.end[acted] != RUNNING].tolist()
        if ended:
            rollouts = [self.rollout(row) for row in ended]
            for row, rollout, score in zip(ended, rollouts, self._score(rollouts), strict=True):
                reward[row] += score.total
                self.finished[row] = Finished(
                    rollout,
                    score,
                    int(self.prompt_index[row]),
                    int(self.group[row]),
                    float(self.episode_return[row] + reward[row]),
                )
        self.episode_return += reward
        self.observer.advance(acted)
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
        return np.array(self.task.action_mask(self.state), dtype=np.int8) if self.masks_actions else None

    def rollout(self, row: int) -> Rollout:
        """The episode in `row` as it stands, as a reward sees it."""
        state = self.state
        start, stop = int(state.prompt_length[row]), int(state.length[row])
        return Rollout(
            prompt_tokens=state.tokens[row, :start].copy(),
            tokens=state.tokens[row, start:stop].copy(),
            metadata=self.prompt(row).metadata,
            end=End(state.end[row]).label,
            is_action=state.is_action[row, start:stop].copy() if state.reply is not None else None,
            decode=self.vocabulary.decode,
        )

    def prompt(self, row: int) -> Prompt:
        """The prompt that the episode in `row` began with."""
        return self.prompts.prompts[int(self.prompt_index[row])]

    def save(self, rows: Sequence[int] | IntArray) -> SavedEpisodes:
        """Copy episodes out, for search, best-of-n, or to begin again from a prefix."""
        return SavedEpisodes(
            self.state.save(rows), self.prompt_index[rows], self.group[rows], self.episode_return[rows]
        )

    def restore(self, rows: Sequence[int] | IntArray, saved: SavedEpisodes) -> None:
        """Put saved episodes into `rows`: one each, or a single one copied into all of them."""
        self.state.restore(rows, saved.state)
        self.prompt_index[rows] = saved.prompt_index
        self.group[rows] = saved.group
        self.episode_return[rows] = saved.episode_return
        self.observer.begin(np.asarray(rows, dtype=np.int64))

    def close(self) -> None:
        """Free the engine, if this environment made it, and the reward's process, if it has one."""
        self.observer.close()
        self.reward.close()

    def _cut_is_final(self) -> bool:
        if self.task.when_cut not in ("score", "bootstrap"):
            raise ValueError(f"when_cut must be 'score' or 'bootstrap', got {self.task.when_cut!r}")
        return self.task.when_cut == "score"

    def _score(self, rollouts: list[Rollout]) -> list[Score]:
        if self.state.cut_is_final:
            return self.reward(rollouts)
        scores = iter(self.reward([rollout for rollout in rollouts if rollout.terminated]))
        return [next(scores) if rollout.terminated else Score(0.0) for rollout in rollouts]

    def _reply(self, state: TokenState, row: int) -> Sequence[int] | None:
        reply = self.task.reply(self.rollout(row))
        return self.vocabulary.encode(reply).tolist() if isinstance(reply, str) else reply


def _vocabulary(model: Any, engine: Any) -> Vocabulary:
    if engine is not None and not isinstance(engine, str):
        # Its own vocabulary counts logits, of which a model may have more than its tokenizer has tokens.
        return Vocabulary(engine.vocabulary.tokenizer, eos_tokens=engine.vocabulary.eos_tokens)
    if isinstance(model, Vocabulary):
        return model
    if hasattr(model, "convert_ids_to_tokens"):
        return Vocabulary(model)
    return load_vocabulary(model)
