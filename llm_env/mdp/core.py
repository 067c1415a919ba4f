"""The token MDP: a `TokenState` with a task, its prompts, its reward, and (if asked) an engine that reads along.

The four environment faces (Gymnasium's two, TorchRL, Stable-Baselines3) are views of this class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Protocol, Unpack

import numpy as np
import numpy.typing as npt

from llm_env.mdp.observer import CLOSED, Observer
from llm_env.mdp.options import MDPOptions, vocabulary_of, with_defaults
from llm_env.tasks.base import Task
from llm_env.tasks.registry import make_task
from llm_env.tasks.running import RunningEpisodes, SavedEpisodes
from llm_env.tokens.arrays import FloatArray, IntArray
from llm_env.tokens.checks import as_indices
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt, PromptSampler, TokenizedPrompts
from rewards import Guard, Rollout, Score
from rewards.alongside import Alongside
from rewards.base import FunctionReward

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class SavedMDP:
    """A copy of some rows of a `TokenMDP`: their episodes, and what each has earned so far.

    `more` is what those who follow the episodes have saved for them, such as the return that a wrapper counts.
    """

    episodes: SavedEpisodes
    more: list[Any]
    episode_return: FloatArray

    def __len__(self) -> int:
        return len(self.episodes)


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
        **options: see `llm_env.mdp.options.MDPOptions`.

    Attributes:
        episodes: the rows that are being written, see `RunningEpisodes`.
        state: their tokens, see `TokenState`.
        begun: `[num_envs]` bool, the rows that the last reset began.
        closed: whether `close` was called. Nothing can be stepped, reset or restored any more.
        observes_mask: whether observations hold the action mask.
        finished: the episodes that the last step ended, by row.
        followers: those who keep something beside the episodes, and are told when episodes are copied.

    Examples:
        >>> mdp = TokenMDP("Reverse", num_envs=2, task_kwargs={"length": 2})
        >>> rows = mdp.reset(seed=0)
        >>> for letter in "ab":
        ...     _ = mdp.step(np.repeat(mdp.vocabulary.encode(letter), 2))
        >>> [mdp.rollout(row).text for row in rows]
        ['ab', 'ab']
    """

    def __init__(self, task: str | Task | type[Task], num_envs: int = 1, **options: Unpack[MDPOptions]) -> None:
        chosen = with_defaults(options)
        engine, model, max_new_tokens = chosen["engine"], chosen["model"], chosen["max_new_tokens"]
        if num_envs < 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise ValueError(
                f"num_envs and max_new_tokens must be at least 1, got num_envs={num_envs}, "
                f"max_new_tokens={max_new_tokens}"
            )
        unbound = make_task(task, chosen["task_kwargs"])
        if model is None:
            model = "tiny" if engine is None or isinstance(engine, str) else engine
        elif not (engine is None or isinstance(engine, str)):
            raise ValueError(f"an engine brings its own model: leave out model={model!r}, or name the engine")
        self.model = model
        self.vocabulary = vocabulary_of(model, engine)
        self.task = unbound.bind(self.vocabulary)
        self.reward = _guarded(self.task, chosen["on_reward_error"], chosen["reward_timeout"])
        self.num_envs = num_envs
        self.max_new_tokens = self.task.max_new_tokens if max_new_tokens is None else max_new_tokens
        context = chosen["context"]
        self.context = self.task.default_context(self.max_new_tokens) if context is None else context
        self.prompts = TokenizedPrompts.encode(
            self.task.prompts(chosen["split"]),
            self.vocabulary,
            self.task.chat,
            longest=self.context - 1,
            drop_long=chosen["drop_long_prompts"],
        )
        self._is_training = chosen["split"] == "train"
        if self.prompts.dropped and self._trains("deal"):
            raise ValueError(
                f"the task {self.task.name} deals its prompts by their numbers, so none may be left out, but "
                f"{self.prompts.dropped} are too long: use a larger context"
            )
        self.sampler = PromptSampler(
            len(self.prompts),
            completions_per_prompt=chosen["completions_per_prompt"],
            shuffle=chosen["shuffle"],
        )
        self.sampler.reseed(int(np.random.SeedSequence().generate_state(1)[0]))  # until a reset brings a seed
        self.episodes = RunningEpisodes(
            self.task,
            self.prompts,
            self.vocabulary,
            num_rows=num_envs,
            context=self.context,
            max_new_tokens=self.max_new_tokens,
        )
        self.state = self.episodes.state
        self.observer = Observer.make(engine, chosen["observe"], chosen["top_k"], model, self.state, self.vocabulary)
        self.observes_mask = chosen["observe_mask"]
        self._mask: npt.NDArray[np.int8] | None = None  # of the present states, once somebody has asked for it
        self.followers: list[Follower] = []
        self.closed = False
        self.begun = np.zeros(num_envs, dtype=np.bool_)
        self.episode_return = np.zeros(num_envs)
        self.finished: dict[int, Episode] = {}
        self._chosen_groups = 0

    @property
    def prompt_index(self) -> IntArray:
        """`[num_envs]` which prompt of the split each row answers."""
        return self.episodes.prompt_index

    @property
    def group(self) -> IntArray:
        """`[num_envs]` which rows are to be compared with each other."""
        return self.episodes.group

    def reseed(self, seed: int) -> None:
        """Start over all that this draws at random: the order of prompts, and what a reward with a timeout draws."""
        self.sampler.reseed(seed)
        self.reward.reseed(seed)

    def reset(
        self,
        rows: Sequence[int] | IntArray | None = None,
        *,
        seed: int | None = None,
        prompt_indices: Sequence[int] | IntArray | None = None,
    ) -> IntArray:
        """Begin new episodes in `rows` (all of them by default), and return those rows.

        Args:
            rows: which rows. Beginning all of them begins a new group of episodes, too.
            seed: see `reseed`.
            prompt_indices: begin with these prompts of the split, one for each row, instead of the next in order. Rows
                that are given the same prompt form a group; its number is negative, unlike those dealt in order.
        """
        self._check_open()
        if seed is not None:
            self.reseed(int(seed))
        if rows is None:
            self.sampler.begin_group()
        rows = self.state.all_rows if rows is None else as_indices(rows, self.num_envs, "row")
        if prompt_indices is None:
            indices, groups = self.deal(len(rows))
        else:
            indices, groups = self._chosen(prompt_indices, rows)
        self.episodes.begin(rows, indices, groups)
        self._mask = None
        self.begun[:] = False
        self.begun[rows] = True
        self.episode_return[rows] = 0.0
        self.observer.begin(rows)
        return rows

    def step(self, actions: Sequence[int] | IntArray, rows: Sequence[int] | IntArray | None = None) -> FloatArray:
        """Let `rows` (all by default) each take an action; returns `[num_envs]` rewards, 0 for the others."""
        self._check_open()
        episodes = self.episodes
        self._mask = None
        episodes.step(actions, rows)
        acted = self.state.all_rows if rows is None else np.asarray(rows, dtype=np.int64)
        # Before anything is scored: if the reward raises an error, the engine has still read the same text.
        self.observer.advance(acted)
        reward = np.zeros(self.num_envs)
        self.finished = {}
        self.begun[:] = False
        if (paid := episodes.pay(acted)) is not None:
            reward[acted] = paid
        if len(ended := episodes.ended(acted)):
            rows_ended = ended.tolist()
            rollouts = [episodes.rollout(row) for row in rows_ended]
            scores = self._scores(rollouts, [episodes.is_truncated(row) for row in rows_ended])
            for row, rollout, score in zip(rows_ended, rollouts, scores, strict=True):
                reward[row] += score.total
                self.finished[row] = episodes.episode(row, rollout=rollout, score=score)
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
        if self.observes_mask:
            mask = self.action_mask()
            shape = (self.num_envs, self.vocabulary.size)
            arrays["action_mask"] = np.ones(shape, dtype=np.int8) if mask is None else mask
        return {name: array.copy() for name, array in arrays.items()} if copy else arrays

    def action_mask(self) -> npt.NDArray[np.int8] | None:
        """`[num_envs, vocab_size]` 1 for the tokens the task allows next (all, where a text has ended); None: any."""
        if not self.episodes.masks_actions:
            return None
        if self._mask is None:  # a new array every time: those handed out before stay as they were
            running = np.flatnonzero(self.state.running)
            allowed = self.episodes.action_mask(running) if len(running) else None
            if allowed is not None and len(running) == self.num_envs:
                self._mask = allowed.astype(np.int8)
            else:
                self._mask = np.ones((self.num_envs, self.vocabulary.size), dtype=np.int8)
                if allowed is not None:
                    self._mask[running] = allowed
        return self._mask

    def rollout(self, row: int) -> Rollout:
        """The episode in `row` as it stands, as a reward sees it."""
        return self.episodes.rollout(row)

    def prompt(self, row: int) -> Prompt:
        """The prompt that the episode in `row` began with."""
        return self.episodes.prompt(row)

    def deal(self, count: int) -> tuple[IntArray, IntArray]:
        """The prompts of the next `count` episodes, and the group of each; see `PromptSampler.deal` and `Task.deal`."""
        indices, groups = self.sampler.deal(count)
        return (self.task.deal(indices, groups) if self._trains("deal") else indices), groups

    def score(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Finished episodes with their scores; a truncated one gets 0, for its last state is valued instead."""
        return self.score_written(enumerate(episodes))

    def score_written(self, written: Iterable[tuple[int, Episode]]) -> list[Episode]:
        """Episodes that have a number each, and may come in any order; in the numbers' order, with their scores.

        They are scored as they come where the reward may be asked `alongside`, and else together in the end.
        """
        if not self.reward.alongside:
            episodes = [episode for _, episode in sorted(written, key=itemgetter(0))]
            scores = self._scores([each.rollout for each in episodes], [each.truncated for each in episodes])
            return [replace(each, score=score) for each, score in zip(episodes, scores, strict=True)]
        come: list[tuple[int, Episode]] = []
        try:
            with Alongside(self.reward) as scorer:
                for number, episode in written:
                    come.append((number, episode))
                    if not episode.truncated:
                        scorer.add(episode.rollout)
                found = iter(scorer.scores())
        except BaseException:
            self._close_sessions([episode.rollout for _, episode in come])
            raise
        scored = [(number, replace(each, score=Score(0.0) if each.truncated else next(found))) for number, each in come]
        episodes = [episode for _, episode in sorted(scored, key=itemgetter(0))]
        self._ended([each.rollout for each in episodes], [each.score for each in episodes])
        return episodes

    def take_scored(self, written: Iterable[tuple[int, Episode]]) -> list[Episode]:
        """Episodes that were scored elsewhere, as those of `score_written` are here; in the numbers' order."""
        episodes = [episode for _, episode in sorted(written, key=itemgetter(0))]
        self.reward.count_elsewhere([each.score for each in episodes if not each.truncated])
        self._ended([each.rollout for each in episodes], [each.score for each in episodes])
        return episodes

    def save(self, rows: Sequence[int] | IntArray) -> SavedMDP:
        """Copy episodes out, for search, best-of-n, or to begin again from a prefix."""
        rows = as_indices(rows, self.num_envs, "row")
        return SavedMDP(
            self.episodes.save(rows), [follower.save(rows) for follower in self.followers], self.episode_return[rows]
        )

    def restore(self, rows: Sequence[int] | IntArray, saved: SavedMDP) -> None:
        """Put saved episodes into `rows`: one each, or a single one copied into all of them."""
        self._check_open()
        rows = as_indices(rows, self.num_envs, "row")
        self.episodes.restore(rows, saved.episodes)
        self._mask = None
        self.episode_return[rows] = saved.episode_return
        self.observer.begin(rows)
        same = len(saved.more) == len(self.followers)
        for place, follower in enumerate(self.followers):
            follower.restore(rows, saved.more[place] if same else None)

    def close(self) -> None:
        """Free the engine, or its slots if it was handed in, and the process that rewards run in, if there is one.

        Once more does no harm.
        """
        self.closed = True
        self.observer.close()
        self.reward.end_worker()
        self.episodes.sessions.close_all()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(CLOSED)

    def _scores(self, rollouts: Sequence[Rollout], truncated: Sequence[bool]) -> list[Score]:
        scored = [rollout for rollout, cut in zip(rollouts, truncated, strict=True) if not cut]
        try:
            scores = iter(self.reward(scored) if scored else ())
        except BaseException:
            self._close_sessions(rollouts)
            raise
        found = [Score(0.0) if cut else next(scores) for cut in truncated]
        self._ended(rollouts, found)
        return found

    def _ended(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
        """These episodes are over and scored."""
        self._close_sessions(rollouts)
        if self._trains("finished"):
            self.task.finished(rollouts, scores)

    def _close_sessions(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts if self.episodes.sessions.kept else ():
            self.episodes.sessions.close(rollout.episode)

    def _trains(self, method: str) -> bool:
        return self._is_training and self.task.overrides(method)

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


def _guarded(task: Task, on_error: float, timeout: float | None) -> Guard:
    """The reward of a bound task, which is one object with it."""
    reward = task.as_reward()
    scores_itself = isinstance(reward, FunctionReward) and getattr(reward.function, "__self__", None) is task
    writes = [method for method in ("over", "reply", "token_reward") if task.overrides(method)]
    if timeout is not None and scores_itself and writes:
        raise ValueError(
            f"reward_timeout={timeout} lets the task {task.name} score in another process, by a copy made now, which "
            f"would not see what `{writes[0]}` writes on the task while texts are written. Make `reward` of a function "
            "that needs nothing but the rollout instead of writing `score`, or leave reward_timeout out"
        )
    return Guard(reward, on_error=on_error, timeout=timeout)
