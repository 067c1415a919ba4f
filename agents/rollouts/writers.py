"""Who writes the texts that are learned from: an engine, or any policy. Both run the one writing loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from agents.rollouts.workers import Workers
from llm_env.engines import Engine, Job, Sampling
from llm_env.engines.writing import write
from llm_env.mdp.core import TokenMDP
from llm_env.tasks.running import RunningEpisodes
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.episode import Episode
from llm_env.tokens.state import TokenState

Policy = Callable[[TensorDictBase], TensorDictBase]
Finish = Callable[[], list[Episode]]
"""Waits for texts that were begun: one scored episode for each prompt, in their order."""


class Writer(Protocol):
    """Writes texts after given prompts.

    Attributes:
        mdp: the task, its prompts and its reward.
    """

    mdp: TokenMDP

    def episodes(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> list[Episode]:
        """One scored episode for each of the prompts `indices`, in their order.

        Args:
            indices: of the split's prompts.
            groups: which of them belong together.
            sampling: temperature and seed; when a text ends is the task's affair.
        """


class EngineWriter:
    """An engine writes the texts.

    Args:
        mdp: the task, its prompts and its reward.
        engine: of the same tokens, or processes with one each; its slots hold at least the task's context.
        scored: the engine's episodes come with their scores.

    Examples:
        >>> from llm_env.engines import make_engine
        >>> mdp = TokenMDP("Reverse", task_kwargs={"length": 2})
        >>> writer = EngineWriter(mdp, make_engine("transformers", "tiny", num_slots=2, context=mdp.context))
        >>> prompts = np.array([4, 0, 4])
        >>> episodes = writer.episodes(prompts, groups=prompts, sampling=Sampling(seed=0))
        >>> [episode.prompt_index for episode in episodes]
        [4, 0, 4]
    """

    def __init__(self, mdp: TokenMDP, engine: Engine | Workers, *, scored: bool = False) -> None:
        if engine.context < mdp.context:
            raise ValueError(
                f"the engine's slots hold {engine.context} tokens, the task's texts may have {mdp.context}: make the "
                f"engine with a context of at least {mdp.context}"
            )
        self.mdp = mdp
        self.engine = engine
        self.scored = scored

    def episodes(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> list[Episode]:
        """One scored episode for each prompt."""
        return self.begin(indices, groups, sampling)()

    def begin(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> Finish:
        """The same; processes elsewhere begin now, an engine here when the texts are asked for."""
        mdp = self.mdp
        jobs = _jobs(indices, groups)
        written = self.engine.write(
            mdp.task, mdp.prompts, jobs, sampling, context=mdp.context, max_new_tokens=mdp.max_new_tokens
        )
        numbered = ((job.request, episode) for job, episode in written)
        return functools.partial(mdp.take_scored if self.scored else mdp.score_written, numbered)


class PolicyWriter:
    """A TorchRL policy chooses every token, from the tokens alone: it brings its own model.

    Args:
        mdp: the task, its prompts and its reward.
        policy: reads `tokens` `[n, context]`, `length` and `prompt_length` `[n, 1]` of the texts that go on, and, where
            the task has one, the `action_mask` `[n, V]`, which it must obey. It writes `action` and `action_log_prob`,
            as TorchRL's policies do with `return_log_prob=True`. It draws with torch's global random numbers; of
            `sampling` nothing is used.
        num_rows: how many texts are written at a time.

    Examples:
        >>> mdp = TokenMDP("Reverse", task_kwargs={"length": 2})
        >>> (token,) = mdp.vocabulary.encode("x")
        >>> def write_x(data):
        ...     assert data["action_mask"][:, token].all()
        ...     data["action"] = torch.full(data.batch_size, int(token))
        ...     data["action_log_prob"] = torch.zeros(data.batch_size)
        ...     return data
        >>> (episode,) = PolicyWriter(mdp, write_x, num_rows=1).episodes(np.array([0]), np.array([0]), Sampling())
        >>> episode.text, episode.end.is_cut
        ('xxx', True)
    """

    def __init__(self, mdp: TokenMDP, policy: Policy, num_rows: int) -> None:
        self.mdp = mdp
        self.policy = policy
        self.num_rows = num_rows

    def episodes(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> list[Episode]:
        """One scored episode for each prompt."""
        mdp = self.mdp
        running = RunningEpisodes(
            mdp.task,
            mdp.prompts,
            mdp.vocabulary,
            num_rows=max(1, min(self.num_rows, len(indices))),
            context=mdp.context,
            max_new_tokens=mdp.max_new_tokens,
        )
        jobs = _jobs(indices, groups)
        written = write(running, jobs, _PolicyChooser(self.policy, mdp.task.name))
        return mdp.score_written((job.request, episode) for job, episode in written)


class _PolicyChooser:
    """Shows a policy the texts as an environment would, and takes its tokens."""

    version = 0

    def __init__(self, policy: Policy, task: str) -> None:
        self._policy = policy
        self._task = task

    def begin(self, rows: IntArray, jobs: Sequence[Job]) -> None:
        """A policy reads whole texts: there is nothing to begin."""

    def choose(self, state: TokenState, rows: IntArray, allowed: BoolArray | None) -> tuple[IntArray, np.ndarray]:
        """Ask the policy."""
        observation: dict[str, np.ndarray] = {
            "tokens": state.tokens[rows],
            "length": state.length[rows, None],
            "prompt_length": state.prompt_length[rows, None],
        }
        if allowed is not None:
            observation["action_mask"] = allowed
        with torch.no_grad():
            data = self._policy(
                TensorDict({name: torch.from_numpy(array) for name, array in observation.items()}, [len(rows)])
            )
        log_probs = _log_prob(data).float().cpu().numpy()
        tokens = state.check_actions(data["action"].cpu().numpy(), rows)
        if allowed is not None and not (obeys := allowed[np.arange(len(rows)), tokens]).all():
            raise ValueError(
                f"the policy chose token {tokens[~obeys][0]}, which the task {self._task} forbids here: let it choose "
                "among what `action_mask` allows, by TorchRL's MaskedCategorical for one"
            )
        return tokens, log_probs

    def end(self, rows: IntArray) -> None:
        """There is nothing to free."""


def _jobs(indices: IntArray, groups: IntArray) -> list[Job]:
    pairs = zip(indices.tolist(), groups.tolist(), strict=True)
    return [Job(index, group, request) for request, (index, group) in enumerate(pairs)]


def _log_prob(data: TensorDictBase) -> torch.Tensor:
    for key in ("action_log_prob", "sample_log_prob"):
        if (value := data.get(key, None)) is not None:
            return cast(torch.Tensor, value).reshape(-1)
    raise KeyError(
        f"the policy wrote no log-prob of its action, only {sorted(map(str, data.keys()))}: make it with "
        "return_log_prob=True"
    )
