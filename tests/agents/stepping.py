"""The same texts as the writing loop's, written the long way: a TorchRL environment is stepped, one action at a time.

The slow, obvious reference that the loop is compared with. A batch is fixed: the next begins when all its texts have
ended.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from llm_env import TorchRLTokenEnv
from llm_env.engines import Sampling
from llm_env.engines.sampling import choose, uniforms
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.episode import Episode


class SteppingWriter:
    """Draws from the logits that an environment observes, with the random numbers that an engine would use.

    Args:
        env: made with an engine and `observe="logits"`; one row for each text that is written at a time.
    """

    def __init__(self, env: TorchRLTokenEnv) -> None:
        self.env = env
        self.mdp = env.mdp

    def episodes(self, indices: IntArray, groups: IntArray, sampling: Sampling) -> list[Episode]:
        """One episode for each prompt."""
        done: list[Episode] = []
        for begin in range(0, len(indices), self.mdp.num_envs):
            part = slice(begin, begin + self.mdp.num_envs)
            done += self._play(indices[part], groups[part], sampling, begin)
        return done

    def _play(self, indices: IntArray, groups: IntArray, sampling: Sampling, first: int) -> list[Episode]:
        mdp, count = self.mdp, len(indices)
        seed = sampling.seed
        assert seed is not None
        random = [uniforms(seed, first + row, 0, mdp.max_new_tokens) for row in range(count)]
        drawn: list[list[float]] = [[] for _ in range(count)]
        masks: list[list[bytes]] = [[] for _ in range(count)]
        paid: list[list[float]] = [[] for _ in range(count)]
        finished: dict[int, Episode] = {}
        # Rows to spare begin too, and take no step.
        data = self.env.reset(prompt_indices=np.resize(indices, mdp.num_envs))
        while len(finished) < count:
            acting = [row for row in range(count) if row not in finished]
            actions = torch.zeros(mdp.num_envs, dtype=torch.int64)
            for row in acting:
                place = len(drawn[row])
                allowed = data["action_mask"][row : row + 1] if "action_mask" in data else None
                if allowed is not None:
                    masks[row].append(np.packbits(allowed.numpy()).tobytes())
                number = random[row][place : place + 1]
                token, log_prob = choose(data["logits"][row : row + 1], sampling, number, allowed)
                actions[row] = token[0]
                drawn[row].append(float(log_prob))
            step = torch.zeros(mdp.num_envs, dtype=torch.bool)
            step[acting] = True
            data = self.env.step(data.set("action", actions).set("_step", step))["next"]
            for row in acting:
                paid[row].append(float(data["reward"][row, 0]))
            finished.update(mdp.finished)
        episodes = []
        for row in range(count):
            episode = finished[row]
            assert abs(sum(paid[row]) - episode.total) < 1e-5
            log_probs = np.array(drawn[row], dtype=np.float32)
            episodes.append(
                dataclasses.replace(
                    episode,
                    prompt_index=int(indices[row]),
                    group=int(groups[row]),
                    log_probs=log_probs,
                    action_masks=tuple(masks[row]) or None,
                )
            )
        return episodes
