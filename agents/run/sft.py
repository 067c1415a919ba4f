"""Supervised fine-tuning on a task's own answers, before reinforcement learning begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from agents.config import SFTConfig
from agents.networks.network import Network
from agents.rollouts.packing import pack
from agents.run.supervised import Supervised
from llm_env.mdp.core import TokenMDP
from llm_env.tasks.running import RunningEpisodes
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import PromptSampler
from rewards import Rollout, Score


class SFT:
    """Teaches the policy to write the answers: the loss is on the answer and its end-of-sequence token only.

    Where a task replies, a prompt may have a list of answers, one for each turn of the policy. The task's replies
    stand between them; they are read, and not learned.

    A task's action mask plays no part here: the model learns to keep to it by itself, and its loss is one of the whole
    vocabulary. Where texts are then written, the mask only takes from what is no answer.

    Args:
        config: steps, batch size, learning rate, where the answers are.
        network: whose policy learns.
        mdp: the task and its prompts.
        seed: of the order of prompts.
    """

    def __init__(self, config: SFTConfig, network: Network, mdp: TokenMDP, seed: int = 0) -> None:
        self.config = config
        self.network = network
        self.mdp = mdp
        if not mdp.vocabulary.eos_tokens:
            raise ValueError("the tokenizer has no end-of-sequence token: the model could not learn where to end")
        self.answers = self._play() if mdp.task.overrides("reply") else self._write()
        self.sampler = PromptSampler(len(self.answers), seed)
        self.learner = Supervised(config, network)

    @property
    def steps(self) -> int:
        """How many optimizer steps were taken."""
        return self.learner.optimizer.steps

    def run(self, report: Callable[[int, float], bool] = lambda step, loss: False) -> float:
        """All steps that are left; `report` is told the number of each, and its loss in nats per token. If it gives
        true, that was the last.

        Returns:
            The last loss; NaN if no step was left.
        """
        loss = float("nan")
        while self.steps < self.config.steps:
            loss = self.step()
            if not np.isfinite(loss):
                raise ValueError(
                    f"the loss of SFT step {self.steps} is {loss}: try a lower --sft.learning-rate "
                    f"(now {self.config.learning_rate:g})"
                )
            if report(self.steps, loss):
                break
        return loss

    def step(self) -> float:
        """One optimizer step; the mean negative log-likelihood of a token."""
        indices, _ = self.sampler.deal(self.config.batch_size)
        return self.learner.learn(
            pack([self._episode(index) for index in indices.tolist()], self.mdp.vocabulary.pad_token)
        )

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that decides how it goes on, but the global random generators: tensors by file, and JSON."""
        tensors, optimizer = self.learner.state()
        state = {"optimizer": optimizer, "sampler": self.sampler.state_dict()}
        return {"weights": self.network.weights(), "optimizer": tensors}, state

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on where another was."""
        self.network.load_weights(tensors["weights"])
        self.learner.load_state(tensors["optimizer"], state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])

    def _episode(self, index: int) -> Episode:
        rollout = self.answers[index]
        return Episode(rollout, Score(0.0), np.zeros(rollout.num_actions, np.float32), None, False, index, index)

    def _write(self) -> list[Rollout]:
        """Every prompt with its answer and an end-of-sequence token."""
        prompts, end = self.mdp.prompts, self.mdp.vocabulary.eos_tokens[0]
        texts = []
        for prompt, tokens in zip(prompts.prompts, prompts.tokens, strict=True):
            turn, *more = self._turns(prompt.metadata)
            if more:
                raise ValueError(
                    f"a prompt of {self.mdp.task.name} has {1 + len(more)} answers under {self.config.answer!r}, but "
                    f"the task does not reply between them: expected one text"
                )
            texts.append(Rollout(prompt_tokens=tokens, tokens=np.append(self._encode(turn), end)))
        return texts

    def _play(self) -> list[Rollout]:
        """Every prompt with its answers, and with what the task replies to each."""
        mdp, row = self.mdp, np.array([0])
        running = RunningEpisodes(
            mdp.task, mdp.prompts, mdp.vocabulary, num_rows=1, context=mdp.context, max_new_tokens=mdp.max_new_tokens
        )
        texts = []
        for index, prompt in enumerate(mdp.prompts.prompts):
            running.begin(row, np.array([index]))
            turns = self._turns(prompt.metadata)
            for number, turn in enumerate(turns):
                if not self._play_turn(running, self._encode(turn)):
                    raise ValueError(
                        f"answer {number + 1} of {len(turns)} to a prompt of {mdp.task.name}, {turn[:80]!r}, cannot be "
                        f"written as one turn: the task replies or ends the text before it (a stop sequence, its own "
                        f"end, or --task.max-new-tokens, {mdp.max_new_tokens})"
                    )
            texts.append(running.rollout(0))
        return texts

    def _play_turn(self, running: RunningEpisodes, tokens: IntArray) -> bool:
        """Write one turn, and its end if it has none; gives whether all of it could be written."""
        row = np.array([0])
        for left, token in zip(range(len(tokens), -1, -1), [*tokens, self.mdp.vocabulary.eos_tokens[0]], strict=True):
            if len(running.ended(row)):
                return False
            before = int(running.state.length[0])
            running.step(np.array([token]), row)
            if len(running.ended(row)) or running.state.length[0] > before + 1:  # the task has replied
                return left <= 1  # a stop sequence that the text ends with is its end
        return True

    def _turns(self, metadata: Mapping[str, Any]) -> list[str]:
        key = self.config.answer
        answer = metadata.get(key)
        turns = answer if isinstance(answer, list | tuple) else [answer]
        if not turns or not all(isinstance(turn, str | int | float) and not isinstance(turn, bool) for turn in turns):
            raise ValueError(
                f"SFT learns from the prompts' {key!r}, but a prompt of {self.mdp.task.name} has only "
                f"{sorted(metadata)}, or something that is no text there: set --sft.answer, or leave SFT out"
            )
        return [str(turn) for turn in turns]

    def _encode(self, turn: str) -> IntArray:
        tokens = self.mdp.vocabulary.encode(turn, add_special_tokens=False)
        if len(tokens) + 1 > self.mdp.max_new_tokens:
            raise ValueError(
                f"the answer {turn[:80]!r} has {len(tokens)} tokens and an end, but the policy may write only "
                f"{self.mdp.max_new_tokens}: raise --task.max-new-tokens"
            )
        return np.asarray(tokens, dtype=np.int64)
