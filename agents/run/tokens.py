"""Some texts of an iteration, token by token: what was paid, what the critic thought, what else there was to say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from agents.algorithms.base import Algorithm
from agents.networks.distribution import TokenDistribution
from agents.networks.network import Network
from agents.rollouts.masks import allowed_in
from llm_env.tasks.mixture import PART
from llm_env.tokens.episode import Episode
from llm_env.tokens.vocabulary import Vocabulary

ALTERNATIVES = 5
"""How many of the likeliest tokens are kept beside each that was written."""
COLUMNS: Mapping[str, str | tuple[str, str]] = {
    "reward": "shaped_reward",
    "task_reward": ("next", "reward"),
    "advantages": "advantage",
    "value": "state_value",
    "value_target": "value_target",
    "inference_logprobs": "behaviour_log_prob",
    "trainer_logprobs": "action_log_prob",
    "ref_logprobs": "ref_log_prob",
}
"""The columns of a text, and what they are called in a batch that was scored."""


def token_rows(algorithm: Algorithm, count: int) -> list[dict[str, Any]]:
    """The texts of the last batch that show most, after it was learned from; see `agents/report/README.md`.

    Args:
        algorithm: after a step.
        count: of texts, at most.
    """
    if algorithm.batch is None or algorithm.scored is None:
        return []
    data, episodes = algorithm.scored, algorithm.batch.episodes
    chosen = worth_seeing(data, count)
    rows = data[torch.tensor(list(chosen))].to(algorithm.config.device)
    after = _afterwards(algorithm, rows)
    vocabulary = algorithm.collector.writer.mdp.vocabulary
    return [
        _row(episodes[index], why, rows[place], {name: each[place] for name, each in after.items()}, vocabulary)
        for place, (index, why) in enumerate(chosen.items())
    ]


def worth_seeing(data: TensorDict, count: int) -> dict[int, str]:
    """Which texts of a batch, and why: the best and the worst paid, that with the largest advantage at a token, that
    about which engine and trainer differ most, the longest, and then the first.
    """
    mask = data["mask"]
    wrote, was = data["behaviour_log_prob"], data["action_log_prob"]
    by: dict[str, Tensor] = {
        "the best paid": data["total"],
        "the worst paid": -data["total"],
        "the largest advantage": (data["advantage"][..., 0].abs() * mask).amax(1),
        "engine and trainer differ most": ((wrote - was).abs() * mask).amax(1),
        "the longest": mask.sum(1),
    }
    found: dict[int, str] = {}
    for why, worth in by.items():
        if why.startswith("engine") and float(worth.max()) < 1e-3:
            continue
        order = torch.argsort(worth.float(), descending=True, stable=True).tolist()
        found.setdefault(next((index for index in order if index not in found), order[0]), why)
    for index in range(len(mask)):
        found.setdefault(index, "one of the first")
    return dict(list(found.items())[:count])


def _afterwards(algorithm: Algorithm, rows: TensorDict) -> dict[str, Any]:
    """What the policy makes of the texts now that it has learned from them."""
    found = algorithm.network.compute(_read_again, rows)
    _, own = algorithm.loss.gain(found["learned_logprobs"], rows["action_log_prob"], rows["advantage"][..., 0])
    if (clipped := own.get("policy/clip_fraction")) is not None:
        found["clipped"] = clipped
    return found


@torch.no_grad()
def _read_again(network: Network, rows: TensorDict) -> dict[str, Any]:
    network.eval()
    rows = rows.to(network.head.weight.device)
    hidden = network.encode(rows.select("tokens", "state_position", "mask").clone(), critic=False)["hidden"]
    allowed = allowed_in(rows)

    def distribution(where: slice | None = None) -> TokenDistribution:
        states, mask = (hidden, rows["mask"]) if where is None else (hidden[:, where], rows["mask"][:, where])
        return TokenDistribution(
            states, network.head, mask, network.temperature, network.compute_dtype, network.vocabulary, allowed
        )

    whole = distribution()
    found: dict[str, Any] = {"learned_logprobs": whole.log_prob(rows["action"]), "entropy": whole.entropy()}
    if allowed is None:  # a mask says already what else there was
        found["alternatives"] = _alternatives(distribution, rows["mask"].shape[1])
    return found


def _alternatives(distribution: Any, steps: int, chunk: int = 32) -> list[list[list[tuple[int, float]]]]:
    parts = []
    for begin in range(0, steps, chunk):
        logits = distribution(slice(begin, begin + chunk)).logits
        best = logits.float().log_softmax(-1).topk(min(ALTERNATIVES, logits.shape[-1]), dim=-1)
        parts.append((best.indices, best.values.exp()))
    tokens, chances = (torch.cat([part[which] for part in parts], 1).tolist() for which in (0, 1))
    return [
        [list(zip(ids, each, strict=True)) for ids, each in zip(of_text, of_chance, strict=True)]
        for of_text, of_chance in zip(tokens, chances, strict=True)
    ]


def _row(
    episode: Episode, why: str, data: TensorDict, after: Mapping[str, Any], vocabulary: Vocabulary
) -> dict[str, Any]:
    """One text, as JSON can hold it. Columns have a number for each token, null where the policy did not choose it."""
    rollout = episode.rollout
    chosen = np.ones(len(rollout.tokens), bool) if rollout.is_action is None else rollout.is_action
    columns = {name: data[key] for name, key in COLUMNS.items() if key in data.keys(True)}
    columns |= {name: after[name] for name in ("learned_logprobs", "entropy", "clipped") if name in after}
    row: dict[str, Any] = {
        "why": why,
        "prompt_index": episode.prompt_index,
        "prompt": rollout.prompt,
        "end": str(episode.end),
        "score": episode.total,
        "parts": dict(episode.score.parts),
        "token_ids": rollout.tokens.tolist(),
        "tokens": [written(int(token), vocabulary) for token in rollout.tokens],
        "loss_mask": [bool(each) for each in chosen],
    }
    if PART in rollout.metadata:
        row["part"] = str(rollout.metadata[PART])
    for name, values in columns.items():
        row[name] = _spread(values.reshape(-1).tolist(), chosen)
    if "alternatives" in after:
        each = after["alternatives"][: int(chosen.sum())]
        named = [[[written(token, vocabulary), round(chance, 4)] for token, chance in here] for here in each]
        row["alternatives"] = _spread(named, chosen)
    return row


def _spread(values: list[Any], chosen: np.ndarray) -> list[Any]:
    """Values of actions as values of tokens."""
    given = iter(values)
    spread = [next(given) if own else None for own in chosen]
    return [_short(value) if isinstance(value, float) else value for value in spread]


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def written(token: int, vocabulary: Vocabulary) -> str:
    """A token as text; one that is part of a character, or nothing to see, by its name in the tokenizer."""
    text = vocabulary.decode(np.array([token]))
    if text and "\ufffd" not in text:
        return text
    name = str(vocabulary.tokenizer.convert_ids_to_tokens(token))
    return name if name.startswith("<") else f"<{name}>"
