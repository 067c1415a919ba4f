"""What a process that writes texts is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llm_env.engines import Job, Sampling
from llm_env.engines.writing import Part
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Leg:
    """How a process is to write on: in rows of which each begins another text when one has ended.

    It keeps nothing for the next leg: what has not ended goes back, and comes again, to whoever it may be.

    Attributes:
        rows: how many texts are written side by side.
        groups: it stops when so many groups are whole.
        size: how many texts a group has.
        lacking: how many texts still lack to groups of which some have ended.
        begun: what has been written of texts that have not ended; or of such that have, to be made into episodes.
        called: what the weights that it writes with are called.
    """

    rows: int
    groups: int
    size: int
    lacking: Mapping[int, int]
    begun: Sequence[Part]
    called: int

    def allows(self, jobs: Sequence[Job], ended: Sequence[int], others: Sequence[Part]) -> bool:
        """Whether this can be what has become of its texts, and of those jobs that have begun: each is there once."""
        back = [*ended, *(part.job.request for part in others)]
        before = {part.job.request for part in self.begun}
        new = set(back) - before
        return len(back) == len(set(back)) and before <= set(back) and new == {job.request for job in jobs[: len(new)]}


@dataclass(frozen=True, slots=True)
class Rest:
    """What a leg has left.

    Attributes:
        parts: what has been written of texts that have not ended.
        begun: how many of its jobs have begun, the first ones.
        changed: what could not be gone on with, as the task does not go the same way with the same tokens.
    """

    parts: list[Part]
    begun: int
    changed: list[Part]


@dataclass(frozen=True, slots=True)
class Shard:
    """Texts that one process is to write, side by side. Whoever writes it gets the same texts.

    Attributes:
        number: of the shard.
        version: of the weights to write with.
        copy: where in the shared memory they lie.
        jobs: what to write; `prompt_index` says which of `prompts`.
        prompts: with their tokens.
        sampling: temperature and seed.
        context: how many tokens prompt and text may have.
        max_new_tokens: how many tokens the model may choose in a text.
        leg: they go on with others, and not to the end of all; None: all of them are written.
    """

    number: int
    version: int
    copy: int
    jobs: Sequence[Job]
    prompts: Sequence[tuple[Prompt, IntArray]]
    sampling: Sampling
    context: int | None
    max_new_tokens: int | None
    leg: Leg | None = None


@dataclass(frozen=True, slots=True)
class WeightsFollow:
    """The next message is the weights to write with from now on, as they lie in memory."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process has what it needs to write."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The model has read or written something since this was said the last time."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text that has ended.

    Attributes:
        number: of the shard.
        request: of the job.
        episode: without a session, which stays where it is; scored if the task keeps sessions.
        part: of a leg, what it takes to write it again.
    """

    number: int
    request: int
    episode: Episode
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A shard is written.

    Attributes:
        number: of the shard.
        replies: how many the task was asked for, how many failed, and how many were left out.
        rest: of a leg, what has been written of texts that have not ended.
        changed: of a leg, what could not be gone on with.
    """

    number: int
    replies: Mapping[str, int] = field(default_factory=dict)
    rest: Sequence[Part] = ()
    changed: Sequence[Part] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The task or the engine raised an error; or the process could not begin.

    Attributes:
        error: in words.
        trace: where it came from.
        pickled: the error itself, if it can be pickled.
    """

    error: str
    trace: str
    pickled: bytes | None = None


Answer = Ready | Alive | Text | Done | Failed


def split_evenly(jobs: Sequence[Job], shards: int) -> list[list[Job]]:
    """Jobs in as many parts, of sizes as equal as they can be, in their order.

    Examples:
        >>> [[job.request for job in part] for part in split_evenly([Job(n, n, n) for n in range(5)], 2)]
        [[0, 1, 2], [3, 4]]
    """
    count = max(1, min(shards, len(jobs)))
    size, larger = divmod(len(jobs), count)
    bounds = [place * size + min(place, larger) for place in range(count + 1)]
    return [list(jobs[start:stop]) for start, stop in pairwise(bounds)]
