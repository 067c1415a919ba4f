"""From finished texts to the TensorDict that learning reads, against arrays written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents.rollouts.packing import pack, trim
from llm_env.tokens.episode import Episode
from rewards import Rollout, Score

PAD, EOS = 0, 2


def episode(
    prompt: list[int],
    tokens: list[int],
    *,
    end: str = "eos",
    is_action: list[bool] | None = None,
    score: Score | None = None,
    token_rewards: list[float] | None = None,
    truncated: bool = False,
    index: int = 0,
    group: int = 0,
) -> Episode:
    """Its log-probs are -0.5, -1.5, ..."""
    rollout = Rollout(
        prompt_tokens=np.array(prompt, dtype=np.int64),
        tokens=np.array(tokens, dtype=np.int64),
        end=end,  # type: ignore[arg-type]
        is_action=None if is_action is None else np.array(is_action),
    )
    return Episode(
        rollout=rollout,
        score=score or Score(1.0),
        log_probs=-0.5 - np.arange(rollout.num_actions, dtype=np.float32),
        token_rewards=None if token_rewards is None else np.array(token_rewards),
        truncated=truncated,
        prompt_index=index,
        group=group,
    )


def as_lists(data: TensorDict) -> dict[Any, Any]:
    items = data.items(include_nested=True, leaves_only=True)
    return {name: (value[..., 0] if value.ndim == 3 else value).tolist() for name, value in items}


def test_three_texts_by_hand() -> None:
    data = pack(
        [
            episode([7, 8], [5, 6, EOS], index=3, group=1),
            # Two choices, a reply of two tokens, one choice; then the budget is used up.
            episode(
                [9],
                [4, 5, 30, 31, 6],
                end="budget",
                is_action=[True, True, False, False, True],
                score=Score(0.25),
                truncated=True,
                index=4,
                group=1,
            ),
            episode([7, 8, 9], [EOS], score=Score(-1.0), index=5, group=2),
        ],
        pad_token=PAD,
    )
    assert data.batch_size == torch.Size([3])
    found = as_lists(data)
    assert found["tokens"] == [[7, 8, 5, 6, 2, 0], [9, 4, 5, 30, 31, 6], [7, 8, 9, 2, 0, 0]]
    assert found["attention_mask"] == [[True] * 5 + [False], [True] * 6, [True] * 4 + [False] * 2]
    assert found["length"] == [5, 6, 4]
    assert found["prompt_length"] == [2, 1, 3]
    assert found["prompt_index"] == [3, 4, 5]
    assert found["group"] == [1, 1, 2]
    assert found["total"] == [1.0, 0.25, -1.0]
    assert found["cut"] == [False, True, False]
    assert found["mask"] == [[True] * 3, [True] * 3, [True, False, False]]
    assert found["action"] == [[5, 6, EOS], [4, 5, 6], [EOS, PAD, PAD]]
    # The third choice of the second text was made after the reply.
    assert found["action_position"] == [[2, 3, 4], [1, 2, 5], [3, 1, 1]]
    assert found["state_position"] == [[1, 2, 3], [0, 1, 4], [2, 0, 0]]
    assert found["behaviour_log_prob"] == [[-0.5, -1.5, -2.5], [-0.5, -1.5, -2.5], [-0.5, 0, 0]]
    assert found["action_log_prob"] == found["behaviour_log_prob"]
    assert found["next", "reward"] == [[0, 0, 1], [0, 0, 0.25], [-1, 0, 0]]
    assert found["next", "done"] == [[False, False, True]] * 2 + [[True, False, False]]
    assert found["next", "terminated"] == [[False, False, True], [False] * 3, [True, False, False]]
    assert found["next", "truncated"] == [[False] * 3, [False, False, True], [False] * 3]


def test_old_log_probs_may_be_replaced_without_touching_those_of_the_engine() -> None:
    data = pack([episode([7], [5, EOS])], PAD)
    data["action_log_prob"] += 1
    assert data["behaviour_log_prob"].tolist() == [[-0.5, -1.5]]


def test_every_action_lies_where_its_position_says() -> None:
    random = np.random.default_rng(0)
    episodes = []
    for _ in range(20):
        length = int(random.integers(1, 9))
        is_action = random.random(length) < 0.6
        is_action[-1] = True
        prompt = random.integers(3, 50, size=int(random.integers(1, 6))).tolist()
        episodes.append(episode(prompt, random.integers(3, 50, size=length).tolist(), is_action=is_action.tolist()))
    data = pack(episodes, PAD)
    mask = data["mask"]
    assert (data["tokens"].gather(1, data["action_position"])[mask] == data["action"][mask]).all()
    assert (data["action_position"] - 1 == data["state_position"]).all()
    assert data["state_position"].min() >= 0
    assert data["action_position"].max() < data["tokens"].shape[1]
    assert mask.sum(1).tolist() == [one.rollout.num_actions for one in episodes]
    # No choice was made in a prompt, nor at a token that the task wrote.
    for row, one in enumerate(episodes):
        chosen = data["action"][row, mask[row]].tolist()
        assert one.rollout.is_action is not None
        assert chosen == one.rollout.tokens[one.rollout.is_action].tolist()


def test_a_prompt_that_fills_the_context_but_for_one_token() -> None:
    data = pack([episode([7] * 7, [5], end="context", truncated=True), episode([8], [5, 6, EOS])], PAD)
    assert data["tokens"].shape == (2, 8)
    assert data["action_position"].tolist() == [[7, 1, 1], [1, 2, 3]]
    assert data["action"].tolist() == [[5, PAD, PAD], [5, 6, EOS]]
    assert data["cut"].tolist() == [True, False]
    assert data["next", "truncated"][..., 0].tolist() == [[True, False, False], [False] * 3]


def test_cut_and_truncated_are_two_things() -> None:
    """A text that was cut off and scored all the same has terminated."""
    data = pack([episode([7], [5], end="budget", truncated=False)], PAD)
    assert data["cut"].tolist() == [True]
    assert data["next", "terminated"].flatten().tolist() == [True]
    assert data["next", "truncated"].flatten().tolist() == [False]


def test_padding_may_be_the_end_of_sequence_token() -> None:
    texts = [episode([7], [5, EOS]), episode([7, EOS], [EOS]), episode([7], [5, 6, 4], end="budget")]
    plain, same = pack(texts, PAD), pack(texts, EOS)
    assert same["tokens"].tolist() == [[7, 5, EOS, EOS], [7, EOS, EOS, EOS], [7, 5, 6, 4]]
    assert same["length"].tolist() == [3, 3, 4]
    assert same["mask"].tolist() == [[True, True, False], [True, False, False], [True] * 3]
    for name, value in plain.items(include_nested=True, leaves_only=True):
        if name not in ("tokens", "action"):
            assert (value == same[name]).all(), name
    assert (same["tokens"][same["attention_mask"]] == plain["tokens"][plain["attention_mask"]]).all()


def test_rewards_per_token_come_together() -> None:
    scored = Score(2.0, per_token=np.array([0.5, 0.0, -0.25]))
    one = episode([7], [5, 6, EOS], score=scored, token_rewards=[0.0, 0.125, 0.125])
    assert one.rewards.tolist() == [0.5, 0.125, 1.875]
    assert pack([one], PAD)["next", "reward"][0, :, 0].tolist() == [0.5, 0.125, 1.875]
    assert pack([one], PAD)["total"].tolist() == [2.5]  # the score and what the task pays at tokens
    assert one.rewards.tolist() == [0.5, 0.125, 1.875]  # asked again: nothing was added up in place
    assert scored.per_token is not None
    assert scored.per_token.tolist() == [0.5, 0.0, -0.25]


def test_packing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no episodes"):
        pack([], PAD)


# Trimming.


def test_trim_cuts_what_is_padding_for_all() -> None:
    texts = [episode([7], [5, EOS]), episode([7, 8], [EOS]), episode([7] * 5, [4, 5, 6, EOS])]
    data = pack(texts, PAD)
    data["state_value"] = torch.arange(12.0).reshape(3, 4, 1)
    short = trim(data[:2])
    assert short["state_value"][..., 0].tolist() == [[0, 1], [4, 5]]
    for name, value in pack(texts[:2], PAD).items(include_nested=True, leaves_only=True):
        assert (value == short[name]).all(), name
        assert value.shape == short[name].shape, name
    assert trim(data) is data
    assert data["tokens"].shape == (3, 9)


def test_trim_looks_at_tokens_and_steps_apart() -> None:
    """The longest text need not be the one of the most choices."""
    data = pack([episode([7], [4, 5, 6, EOS]), episode([7] * 6, [EOS])], PAD)
    assert trim(data) is data
    few = trim(data[1:])
    assert (few["tokens"].shape, few["action"].shape, few["next", "reward"].shape) == ((1, 7), (1, 1), (1, 1, 1))
    many = trim(data[:1])
    assert (many["tokens"].shape, many["action"].shape) == ((1, 5), (1, 4))
