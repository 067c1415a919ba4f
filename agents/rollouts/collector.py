"""From prompts to batches: deal, write, score, filter, pack."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from agents.rollouts.packing import pack
from agents.rollouts.writers import Writer
from llm_env.engines import Sampling
from llm_env.tokens.episode import Episode

Filter = Callable[[TensorDict], torch.Tensor]
Refuses = Callable[[Episode], bool]

# How often to write when filters leave too little; after that, episodes that they left out fill the batch.
MAX_ROUNDS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What was collected for one iteration.

    Attributes:
        data: see `agents.rollouts.packing.pack`.
        episodes: those in `data`, in the same order.
        written: how many episodes were written for it, those that filters left out included.
        written_tokens: how many tokens the policy chose in them.
        refilled: how many episodes of the batch a filter had left out, but were needed to fill it.
        refused: how many of those written were refused.
        seconds: how long it took to collect.
    """

    data: TensorDict
    episodes: list[Episode]
    written: int
    written_tokens: int
    refilled: int
    refused: int
    seconds: float


class Collector:
    """An endless stream of batches of episodes, as TorchRL's collectors give them.

    What iteration `i` gives depends on the seed, `i`, and the prompts dealt before; so a run resumes exactly from
    `state_dict`.

    Args:
        writer: writes the texts.
        batch_size: episodes in a batch.
        temperature: divides the logits.
        seed: of the texts and of the order of prompts.
        over_sample: write this many times as many, for filters to choose from.
        filters: each is given a packed batch and returns `[B]` bool, which episodes to keep. Groups of completions are
            kept or left out as a whole: one stays if all its episodes do.
        refuses: says of an episode whether it is to be left out, as filters do, and counted.

    Examples:
        >>> from agents.rollouts.writers import EngineWriter
        >>> from llm_env.mdp.core import TokenMDP
        >>> from llm_env.engines import make_engine
        >>> mdp = TokenMDP("Reverse")
        >>> engine = make_engine("transformers", "tiny", num_slots=8, context=mdp.context)
        >>> collector = Collector(EngineWriter(mdp, engine), batch_size=8, seed=0)
        >>> batch = next(iter(collector))
        >>> batch.batch_size, batch["tokens"].shape[1] <= mdp.context
        (torch.Size([8]), True)
    """

    def __init__(
        self,
        writer: Writer,
        batch_size: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        over_sample: float = 1.0,
        filters: Sequence[Filter] = (),
        refuses: Refuses | None = None,
    ) -> None:
        group = writer.mdp.sampler.completions_per_prompt
        if batch_size < 1 or batch_size % group:
            raise ValueError(
                f"batch_size must be a positive multiple of the {group} texts of each prompt, got {batch_size}"
            )
        if over_sample < 1:
            raise ValueError(f"over_sample must be at least 1, got {over_sample}")
        self.writer = writer
        self.batch_size = batch_size
        self.temperature = temperature
        self.seed = seed
        self.filters = list(filters)
        self.refuses = refuses
        self._per_round = group * math.ceil(batch_size * over_sample / group)
        self.iteration = 0
        writer.mdp.sampler.reseed(seed)

    def __iter__(self) -> Iterator[TensorDict]:
        while True:
            yield self.collect().data

    def collect(self) -> Batch:
        """The next batch."""
        start = time.perf_counter()
        kept: list[Episode] = []
        left_out: list[Episode] = []
        refused = 0
        for round_ in range(MAX_ROUNDS):
            episodes = self._write(round_)
            refusals = [self.refuses is not None and self.refuses(episode) for episode in episodes]
            refused += sum(refusals)
            keep = self._keep(episodes, refusals)
            kept += [episode for episode, good in zip(episodes, keep, strict=True) if good]
            left_out += [episode for episode, good in zip(episodes, keep, strict=True) if not good]
            if len(kept) >= self.batch_size:
                break
        chosen = (kept + left_out)[: self.batch_size]
        self.iteration += 1
        return Batch(
            data=pack(chosen, self.writer.mdp.vocabulary.pad_token),
            episodes=chosen,
            written=len(kept) + len(left_out),
            written_tokens=sum(episode.rollout.num_actions for episode in kept + left_out),
            refilled=max(0, self.batch_size - len(kept)),
            refused=refused,
            seconds=time.perf_counter() - start,
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        mdp = self.writer.mdp
        return {"iteration": self.iteration, "sampler": mdp.sampler.state_dict(), "task": mdp.task.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another collector was."""
        self.iteration = state["iteration"]
        self.writer.mdp.sampler.load_state_dict(state["sampler"])
        if task := state.get("task"):
            self.writer.mdp.task.load_state_dict(task)

    def _write(self, round_: int) -> list[Episode]:
        mdp = self.writer.mdp
        seed = np.random.SeedSequence([self.seed, self.iteration, round_]).generate_state(1, np.uint64)[0]
        indices, groups = mdp.deal(self._per_round)
        return self.writer.episodes(indices, groups, Sampling(temperature=self.temperature, seed=int(seed)))

    def _keep(self, episodes: list[Episode], refusals: list[bool]) -> list[bool]:
        if not self.filters and not any(refusals):
            return [True] * len(episodes)
        data = pack(episodes, self.writer.mdp.vocabulary.pad_token)
        good = ~torch.tensor(refusals)
        for filter_ in self.filters:
            answer = filter_(data)
            if answer.shape != good.shape or answer.dtype != torch.bool:
                raise ValueError(
                    f"a filter must return a bool for each of {len(episodes)} episodes, got shape "
                    f"{tuple(answer.shape)} of {answer.dtype}"
                )
            good &= answer.cpu()
        spoilt = set(data["group"][~good].tolist())
        return [episode.group not in spoilt for episode in episodes]


def part_below(name: str, least: float) -> Refuses:
    """Refuses episodes of whose score a part is less than that, such as what a safety reward says.

    Examples:
        >>> from rewards import Rollout, Score
        >>> score = Score(1.0, {"safe": 0.1})
        >>> episode = Episode(Rollout.of("ab"), score, np.zeros(2, np.float32), None, False, prompt_index=0, group=0)
        >>> part_below("safe", 0.5)(episode), part_below("safe", 0.0)(episode)
        (True, False)
    """

    def refuses(episode: Episode) -> bool:
        parts = episode.score.parts
        if name not in parts:
            known = ", ".join(sorted(parts)) or "no parts"
            raise ValueError(f"--rollout.drop-part is {name!r}, but the scores of this task's texts have {known}")
        return parts[name] < least

    return refuses


def not_cut(data: TensorDict) -> torch.Tensor:
    """A filter: texts that came to their own end."""
    cut: torch.Tensor = data["cut"]
    return ~cut


def not_uniform(data: TensorDict) -> torch.Tensor:
    """A filter: groups whose texts were not all paid the same."""
    groups, totals = data["group"], data["total"]
    names, place = groups.unique(return_inverse=True)  # of each text's group among all groups
    highest = torch.full(names.shape, -torch.inf).scatter_reduce_(0, place, totals, "amax")
    lowest = torch.full(names.shape, torch.inf).scatter_reduce_(0, place, totals, "amin")
    return (highest > lowest)[place]
