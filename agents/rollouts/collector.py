"""From prompts to batches: deal, write, score, filter, pack."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from agents.rollouts.packing import pack
from agents.rollouts.stream import Stream
from agents.rollouts.workers import Workers
from agents.rollouts.writers import EngineWriter, Finish, Writer
from llm_env.engines import Sampling
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.episode import Episode

Filter = Callable[[TensorDict], torch.Tensor]
Refuses = Callable[[Episode], bool]

WEIGHTS = "written-with-{}"
NO_TENSORS: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({})

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
        behind: how many versions of the weights there have been since those that wrote them, on average.
    """

    data: TensorDict
    episodes: list[Episode]
    written: int
    written_tokens: int
    refilled: int
    refused: int
    seconds: float
    behind: float = 0.0


@dataclass(frozen=True, slots=True)
class _Begun:
    """A batch that is being written."""

    indices: IntArray
    groups: IntArray
    version: int
    finish: Finish


class Collector:
    """An endless stream of batches of episodes, as TorchRL's collectors give them.

    What iteration `i` gives depends on the seed, `i`, and the prompts dealt before; so a run resumes exactly from
    `state_dict`.

    Args:
        writer: writes the texts.
        batch_size: episodes in a batch.
        temperature: divides the logits.
        seed: of the texts and of the order of prompts.
        ahead: begin this many batches before they are needed: texts are then as many versions of the weights old, and
            no more. Only `Workers` write meanwhile.
        over_sample: write this many times as many, for filters to choose from.
        filters: each is given a packed batch and returns `[B]` bool, which episodes to keep. Groups of completions are
            kept or left out as a whole: one stays if all its episodes do.
        refuses: says of an episode whether it is to be left out, as filters do, and counted.
        stream: gives the texts, those first that end first, in place of `writer`; nothing is left out then.

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
        ahead: int = 0,
        over_sample: float = 1.0,
        filters: Sequence[Filter] = (),
        refuses: Refuses | None = None,
        stream: Stream | None = None,
    ) -> None:
        group = writer.mdp.sampler.completions_per_prompt
        if batch_size < 1 or batch_size % group:
            raise ValueError(
                f"batch_size must be a positive multiple of the {group} texts of each prompt, got {batch_size}"
            )
        if over_sample < 1:
            raise ValueError(f"over_sample must be at least 1, got {over_sample}")
        engine = writer.engine if isinstance(writer, EngineWriter) else None
        self.workers = engine if isinstance(engine, Workers) else None
        if ahead and self.workers is None:
            raise ValueError(
                f"ahead is {ahead}, but there are no Workers: in this process nothing is written meanwhile"
            )
        self.writer = writer
        self.stream = stream
        self.batch_size = batch_size
        self.temperature = temperature
        self.seed = seed
        self.filters = list(filters)
        self.refuses = refuses
        self._per_round = group * math.ceil(batch_size * over_sample / group)
        self.iteration = 0
        self.ahead = ahead
        self._begun: deque[_Begun] = deque()
        writer.mdp.sampler.reseed(seed)

    def __iter__(self) -> Iterator[TensorDict]:
        while True:
            yield self.collect().data

    def collect(self) -> Batch:
        """The next batch."""
        start = time.perf_counter()
        if self.stream is not None:
            return self._streamed(self.stream, start)
        kept: list[Episode] = []
        left_out: list[Episode] = []
        refused = 0
        while len(self._begun) <= self.ahead:
            self._begun.append(self._begin(self.iteration + len(self._begun)))
        begun = self._begun.popleft()
        for round_ in range(MAX_ROUNDS):
            episodes = begun.finish() if round_ == 0 else self._begin(self.iteration, round_).finish()
            refusals = [self.refuses is not None and self.refuses(episode) for episode in episodes]
            refused += sum(refusals)
            keep = self._keep(episodes, refusals)
            kept += [episode for episode, good in zip(episodes, keep, strict=True) if good]
            left_out += [episode for episode, good in zip(episodes, keep, strict=True) if not good]
            if len(kept) >= self.batch_size:
                break
        chosen = (kept + left_out)[: self.batch_size]
        self.iteration += 1
        version = None if self.workers is None else self.workers.version
        return Batch(
            data=pack(chosen, self.writer.mdp.vocabulary.pad_token),
            episodes=chosen,
            written=len(kept) + len(left_out),
            written_tokens=sum(episode.rollout.num_actions for episode in kept + left_out),
            refilled=max(0, self.batch_size - len(kept)),
            refused=refused,
            behind=0.0 if version is None else float(np.mean([version - episode.version for episode in chosen])),
            seconds=time.perf_counter() - start,
        )

    def _streamed(self, stream: Stream, start: float) -> Batch:
        episodes = stream.take(self.batch_size, version=self.iteration)
        versions = [each.version if each.versions is None else float(np.mean(each.versions)) for each in episodes]
        batch = Batch(
            data=pack(episodes, self.writer.mdp.vocabulary.pad_token),
            episodes=episodes,
            written=len(episodes),
            written_tokens=sum(episode.rollout.num_actions for episode in episodes),
            refilled=0,
            refused=0,
            behind=self.iteration - float(np.mean(versions)),
            seconds=time.perf_counter() - start,
        )
        self.iteration += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, as JSON can hold it; `tensors` has the rest."""
        mdp = self.writer.mdp
        state = {"iteration": self.iteration, "sampler": mdp.sampler.state_dict(), "task": mdp.task.state_dict()}
        if self.stream is not None:
            state["stream"] = self.stream.state_dict()
        if self.ahead and self.workers is not None:
            begun = [
                {"indices": each.indices.tolist(), "groups": each.groups.tolist(), "version": each.version}
                for each in self._begun
            ]
            state |= {"begun": begun, "version": self.workers.version}
        return state

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The weights that batches are being written with."""
        if self.workers is None:
            return {}
        versions = {each.version for each in self._begun}
        return {WEIGHTS.format(version): self.workers.weights_of(version) for version in versions}

    def load_state_dict(
        self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]] = NO_TENSORS
    ) -> None:
        """Go on where another collector was. What it had begun is begun again, with the weights that it had."""
        self.iteration = state["iteration"]
        if self.stream is not None:  # before the task's state, which asking it again may change
            self.stream.load_state_dict(state["stream"])
        self.writer.mdp.sampler.load_state_dict(state["sampler"])
        if task := state.get("task"):
            self.writer.mdp.task.load_state_dict(task)
        self._begun.clear()
        if self.workers is None or "version" not in state:
            return
        loaded = None
        for place, begun in enumerate(state["begun"][: self.ahead]):
            if begun["version"] != loaded:
                loaded = begun["version"]
                self.workers.load_weights(tensors[WEIGHTS.format(loaded)], loaded)
            dealt = np.array(begun["indices"], dtype=np.int64), np.array(begun["groups"], dtype=np.int64)
            self._begun.append(self._begin(self.iteration + place, dealt=dealt))
        self.workers.version = state["version"] - 1  # the present weights are still to come

    def _begin(self, iteration: int, round_: int = 0, dealt: tuple[IntArray, IntArray] | None = None) -> _Begun:
        seed = np.random.SeedSequence([self.seed, iteration, round_]).generate_state(1, np.uint64)[0]
        indices, groups = self.writer.mdp.deal(self._per_round) if dealt is None else dealt
        sampling = Sampling(temperature=self.temperature, seed=int(seed))
        writer, version = self.writer, 0 if self.workers is None else self.workers.version
        if self.ahead and isinstance(writer, EngineWriter):
            return _Begun(indices, groups, version, writer.begin(indices, groups, sampling))
        return _Begun(indices, groups, version, partial(writer.episodes, indices, groups, sampling))

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
