"""Finished episodes, and the TensorDict that learning reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict

from agents.rollouts.hints import LAST_HINTS
from agents.rollouts.masks import INDEX, TABLE, pack_masks
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.episode import Episode
from rewards import Rollout


def pack(episodes: Sequence[Episode], pad_token: int) -> TensorDict:
    """Episodes as one TensorDict of batch size `[B]`; tokens are stored once per text, never once per step.

    A step is one choice of the agent. Tokens that a task has injected lie in `tokens` and are no steps:
    `action_position` says where in `tokens` each action lies, `state_position` where the token before it does.

        tokens [B, L]   attention_mask [B, L]   length, prompt_length, group, prompt_index [B] [B]
        total [B]: all that was paid for the text
        action, action_position, state_position, mask [B, T]
        behaviour_log_prob, action_log_prob [B, T]: as sampled (a trainer may replace the second by its own)
        next: reward, done, terminated, truncated [B, T, 1]   cut [B]: ended by the budget or the context
        action_mask_index [B, T], action_mask_table: what the task allowed, where it has masks (`agents.rollouts.masks`)

    Args:
        episodes: at least one.
        pad_token: fills `tokens` and `action` on the right.

    Examples:
        >>> from rewards import Score
        >>> written = Rollout.of("ab", prompt="?")
        >>> log_probs = np.array([-1.0, -2.0], dtype=np.float32)
        >>> data = pack([Episode(written, Score(0.5), log_probs, None, False, prompt_index=0, group=0)], pad_token=0)
        >>> data["tokens"].tolist(), data["action"].tolist(), data["next", "reward"].squeeze(-1).tolist()
        ([[63, 97, 98]], [[97, 98]], [[0.0, 0.5]])
    """
    if not episodes:
        raise ValueError("there are no episodes to pack")
    rows = len(episodes)
    starts = [len(episode.rollout.prompt_tokens) for episode in episodes]
    lengths = np.array([start + len(e.rollout.tokens) for start, e in zip(starts, episodes, strict=True)])
    counts = np.array([episode.rollout.num_actions for episode in episodes])
    width, steps = int(lengths.max()), int(counts.max())
    tokens = np.full((rows, width), pad_token, dtype=np.int64)
    position = np.ones((rows, steps), dtype=np.int64)  # of padding: anything that exists, and has one before it
    log_prob = np.zeros((rows, steps), dtype=np.float32)
    reward = np.zeros((rows, steps), dtype=np.float32)
    for row, (episode, start) in enumerate(zip(episodes, starts, strict=True)):
        rollout, count = episode.rollout, counts[row]
        if episode.log_probs is None:
            raise ValueError(
                f"episode {row} ({rollout!r}) has no log-probs of its tokens, which learning needs: let a writer write "
                "it, see `agents.rollouts.writers`"
            )
        tokens[row, :start] = rollout.prompt_tokens
        tokens[row, start : lengths[row]] = rollout.tokens
        position[row, :count] = start + _action_places(rollout)
        log_prob[row, :count] = episode.log_probs
        reward[row, :count] = episode.rewards
    mask = np.arange(steps) < counts[:, None]
    last = np.arange(steps) == counts[:, None] - 1
    truncated = last & np.array([episode.truncated for episode in episodes])[:, None]
    action = np.where(mask, np.take_along_axis(tokens, np.minimum(position, width - 1), 1), pad_token)
    arrays: dict[Any, npt.NDArray[Any]] = {
        "tokens": tokens,
        "attention_mask": np.arange(width) < lengths[:, None],
        "length": lengths,
        "prompt_length": np.array(starts),
        "group": np.array([episode.group for episode in episodes]),
        "prompt_index": np.array([episode.prompt_index for episode in episodes]),
        "total": np.array([episode.total for episode in episodes], dtype=np.float32),
        "cut": np.array([episode.end.is_cut for episode in episodes]),
        "action": action,
        "action_position": position,
        "state_position": position - 1,
        "mask": mask,
        "behaviour_log_prob": log_prob,
        "action_log_prob": log_prob.copy(),
        ("next", "reward"): reward[..., None],
        ("next", "done"): last[..., None],
        ("next", "terminated"): (last & ~truncated)[..., None],
        ("next", "truncated"): truncated[..., None],
    }
    masks = pack_masks(episodes, steps)
    if masks is not None:
        arrays[INDEX], table = masks
    data = TensorDict({name: torch.from_numpy(array) for name, array in arrays.items()}, batch_size=[rows])
    return data if masks is None else data.set_non_tensor(TABLE, table)


def trim(data: TensorDict) -> TensorDict:
    """The same texts without the columns that are padding for all of them."""
    width, steps = int(data["length"].max()), int(data["mask"].sum(1).max())
    full_width, full_steps = data["tokens"].shape[1], data["mask"].shape[1]
    if width == full_width and steps == full_steps:
        return data

    per_token, per_text = {"tokens", "attention_mask"}, {LAST_HINTS}

    def cut(name: Any, value: torch.Tensor) -> torch.Tensor:
        if value.ndim == 1 or name in per_text:
            return value
        return value[:, :width] if name in per_token else value[:, :steps]

    return data.named_apply(cut, nested_keys=True)


def _action_places(rollout: Rollout) -> IntArray:
    if rollout.is_action is None:
        return np.arange(len(rollout.tokens))
    return np.flatnonzero(rollout.is_action)
