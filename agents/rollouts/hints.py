"""What a task tells the critic about the states of texts, as a batch holds it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDict

from llm_env.tasks import Task
from llm_env.tasks.base import TaskError
from llm_env.tokens.arrays import FloatArray
from llm_env.tokens.episode import Episode
from rewards import Rollout

HINTS, LAST_HINTS = "hints", "last_hints"


def pack_hints(task: Task, episodes: Sequence[Episode]) -> TensorDict:
    """`hints` `[B, T, K]` of the states in which the agent chose, and `last_hints` `[B, K]` of those at the end.

    Args:
        task: says what its `hint_names` are, and the numbers (`Task.hints`).
        episodes: finished ones.

    Examples:
        >>> from llm_env.tasks import Maze
        >>> from rewards import Score
        >>> maze = Maze(2, walls=["a1b1"], moves=4)
        >>> walk = Rollout.of(["n", "a2 ", "e"], metadata=maze.prompt("a1", "b1").metadata)
        >>> hints = pack_hints(maze, [Episode(walk, Score(0.0), None, None, False, prompt_index=0, group=0)])
        >>> hints["hints"][..., 0].tolist(), hints["last_hints"][..., 0].tolist()  # how far the goal is
        ([[0.75, 0.5]], [0.25])
    """
    counts = [episode.rollout.num_actions for episode in episodes]
    hints = torch.zeros(len(episodes), max(counts), len(task.hint_names))
    last = torch.zeros(len(episodes), len(task.hint_names))
    for row, (episode, count) in enumerate(zip(episodes, counts, strict=True)):
        states = torch.from_numpy(np.stack([_hints(task, episode.rollout.before(n)) for n in range(count + 1)])).float()
        hints[row, :count], last[row] = states[:-1], states[-1]
    return TensorDict({HINTS: hints, LAST_HINTS: last}, [len(episodes)])


def _hints(task: Task, state: Rollout) -> FloatArray:
    try:
        given = np.asarray(task.hints(state), dtype=np.float64)
    except Exception as error:
        raise TaskError(
            f"`hints` of the task {task.name} raised {type(error).__name__}: {error}, asked about {state!r}"
        ) from error
    if given.shape != (len(task.hint_names),) or not np.isfinite(given).all():
        raise TaskError(
            f"`hints` of the task {task.name} gave {given.tolist()} for {state!r}; expected a finite number for each "
            f"of its hint_names {tuple(task.hint_names)}"
        )
    return given
