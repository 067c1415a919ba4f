"""The one loop that writes texts: slots that refill as texts end, while the others go on.

    begin new texts in free rows  ->  somebody chooses an allowed token for each  ->  `TokenState` takes the step
          ^                                                                                 |
          +------------- texts that have ended are handed out, their rows are free <--------+

The transition is `TokenState`'s alone, and with it the task's: what it replies, where it ends a text, what it pays.
`Engine.generate`, the collectors of training and evaluation all run this loop; stepping an environment is the same
process seen one action at a time, and tests hold the two together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llm_env.engines.sampling import Sampling, choose, uniforms
from llm_env.tasks.running import RunningEpisodes
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.episode import Episode
from llm_env.tokens.state import IDLE, TokenState

LogProbs = npt.NDArray[np.float32]
FEW_MASKS = 256
"""So many different action masks are kept, though no text may need them."""


class Job(NamedTuple):
    """A text to be written.

    Attributes:
        prompt_index: which prompt it answers.
        group: which texts it is to be compared with.
        request: with `completion` it decides the random numbers that the text is drawn with.
        completion: see `request`.
    """

    prompt_index: int
    group: int
    request: int
    completion: int = 0


class Chooser(Protocol):
    """Chooses the tokens of running texts: a language model with a sampler, or a policy from outside.

    Attributes:
        version: of the weights that choose.
    """

    version: int

    def begin(self, rows: IntArray, jobs: Sequence[Job]) -> None:
        """New texts have begun in these rows."""

    def choose(self, state: TokenState, rows: IntArray, allowed: BoolArray | None) -> tuple[IntArray, LogProbs]:
        """Choose the next token of running rows.

        Args:
            state: the texts.
            rows: those that are running.
            allowed: `[n, V]` the task's action mask for them; nothing else may be chosen. None: any token may.

        Returns:
            `[n]` tokens, and `[n]` log-probs under the distributions they were drawn from.
        """

    def end(self, rows: IntArray) -> None:
        """The texts in these rows have ended."""


class Part(NamedTuple):
    """A text as far as it has been written: what it takes to go on with it, wherever.

    Attributes:
        job: what is being written.
        row: where.
        actions: the tokens that were chosen.
        log_probs: of each of them.
        versions: of the weights that chose them.
        tokens: all after the prompt, replies of the task among them.
        done: it has ended.
    """

    job: Job
    row: int
    actions: list[int]
    log_probs: list[float]
    versions: list[int]
    tokens: list[int]
    done: bool = False


def write(episodes: RunningEpisodes, jobs: Iterable[Job], chooser: Chooser) -> Iterator[tuple[Job, Episode]]:
    """Write texts, each handed out with its job as soon as it has ended, and not scored yet.

    Args:
        episodes: rows to write in; none of them may be running.
        jobs: what to write, in the order in which texts are to begin.
        chooser: chooses every token.
    """
    writing = Writing(episodes, jobs, chooser)
    try:
        while (ended := writing.step()) is not None:
            yield from ((part.job, episode) for part, episode in ended)
    finally:
        writing.close()


class Writing:
    """Texts that are being written, a step at a time.

    Args:
        episodes: rows to write in; none of them may be running.
        jobs: what to write, in the order in which texts are to begin; there may be no end of it.
        chooser: chooses every token.
    """

    def __init__(self, episodes: RunningEpisodes, jobs: Iterable[Job], chooser: Chooser) -> None:
        self.episodes = episodes
        self.chooser = chooser
        self._jobs = iter(jobs)
        self._job_of_row: list[Job | None] = [None] * episodes.num_rows
        self._masks = _Masks(episodes.num_rows)
        shape = (episodes.num_rows, min(int(episodes.state.budget.max()), episodes.state.context))
        self._log_probs = np.zeros(shape, dtype=np.float32)
        self._versions: IntArray = np.zeros(shape, dtype=np.int64)

    def step(self) -> list[tuple[Part, Episode]] | None:
        """One token more in each text, and new texts in free rows. The texts that have ended; None if all have."""
        episodes, state = self.episodes, self.episodes.state
        running = np.flatnonzero(state.running)
        fresh = np.flatnonzero(~(state.running | episodes.waiting))
        begun = list(itertools.islice(self._jobs, len(fresh)))
        fresh = fresh[: len(begun)]
        rows = np.concatenate([running, fresh])
        if not len(rows) and not episodes.waiting.any():
            return None
        if begun:
            self._begin(fresh, begun)
            self.chooser.begin(fresh, begun)
        if len(rows):
            allowed = episodes.action_mask(rows)
            tokens, chosen = self.chooser.choose(state, rows, allowed)
            self._note(rows, allowed, chosen, self.chooser.version)
            episodes.step(tokens, rows, wait=False)
        settled = np.concatenate([rows[~episodes.waiting[rows]], episodes.answered(block=not len(rows))])
        episodes.pay(settled)
        ended = episodes.ended(settled)
        self.chooser.end(ended)
        return [self._finished(row) for row in ended.tolist()]

    def close(self) -> None:
        """Give up the texts that have not ended; their rows are free."""
        left = np.flatnonzero(self.episodes.state.running | self.episodes.waiting)
        self.chooser.end(left)
        self._free(left)

    def unfinished(self) -> list[Part]:
        """What has been written of the texts that have not ended."""
        left = np.flatnonzero(self.episodes.state.running | self.episodes.waiting)
        return [self._part(row) for row in left.tolist()]

    def go_on_with(self, parts: Sequence[Part]) -> tuple[list[tuple[Part, Episode]], list[Part]]:
        """Begin again what somebody else has written, by the same tokens.

        Args:
            parts: each in a row that is free, or that of one before it that has ended.

        Returns:
            Those that have ended with that; and those that could not be begun again, as the task now replies otherwise,
            or ends them elsewhere. The rows of both are free.
        """
        ended: list[tuple[Part, Episode]] = []
        changed: list[Part] = []
        left = list(parts)
        while left:
            first = {part.row: part for part in reversed(left)}
            left = [part for part in left if first[part.row] is not part]
            self._write_again(list(first.values()))
            for row, part in first.items():
                now, running = self._part(row), bool(self.episodes.state.running[row])
                # What a task was still to reply, it has replied by now.
                alike = now.actions == part.actions and now.tokens[: len(part.tokens)] == part.tokens
                if not alike or running == part.done:
                    changed.append(part)
                    self._free(np.array([row]))
                elif part.done:
                    ended.append(self._finished(row))
                else:
                    self.chooser.begin(np.array([row]), [part.job])
        return ended, changed

    def _write_again(self, parts: Sequence[Part]) -> None:
        state = self.episodes.state
        self._begin(np.array([part.row for part in parts]), [part.job for part in parts])
        for step in range(max(len(part.actions) for part in parts)):
            here = [part for part in parts if step < len(part.actions) and state.running[part.row]]
            if not here:
                break
            rows = np.array([part.row for part in here], dtype=np.int64)
            log_probs = np.array([part.log_probs[step] for part in here], dtype=np.float32)
            self._note(rows, self.episodes.action_mask(rows), log_probs, [part.versions[step] for part in here])
            self.episodes.step([part.actions[step] for part in here], rows)
            self.episodes.pay(rows)

    def _free(self, rows: IntArray) -> None:
        self.episodes.leave(rows)
        self.episodes.state.end[rows] = IDLE

    def _begin(self, rows: IntArray, jobs: Sequence[Job]) -> None:
        for row, job in zip(rows.tolist(), jobs, strict=True):
            self._job_of_row[row] = job
        prompt_indices, groups = np.array([job[:2] for job in jobs], dtype=np.int64).T
        self.episodes.begin(rows, prompt_indices, groups)
        self._masks.begin(rows)

    def _note(self, rows: IntArray, allowed: BoolArray | None, log_probs: LogProbs, version: int | list[int]) -> None:
        self._masks.note(rows, allowed)
        steps = self.episodes.state.num_actions[rows]
        self._log_probs[rows, steps] = log_probs
        self._versions[rows, steps] = version

    def _part(self, row: int, done: bool = False) -> Part:
        state = self.episodes.state
        start, stop, count = int(state.prompt_length[row]), int(state.length[row]), int(state.num_actions[row])
        tokens = state.tokens[row, start:stop]
        actions = tokens if state.reply is None else tokens[state.is_action[row, start:stop]]
        job = self._job_of_row[row]
        assert job is not None
        log_probs, versions = self._log_probs[row, :count].tolist(), self._versions[row, :count].tolist()
        return Part(job, row, actions.tolist(), log_probs, versions, tokens.tolist(), done)

    def _finished(self, row: int) -> tuple[Part, Episode]:
        part, count = self._part(row, done=True), self.episodes.state.num_actions[row]
        versions = self._versions[row, :count].copy()
        episode = self.episodes.episode(
            row,
            log_probs=self._log_probs[row, :count].copy(),
            completion_index=part.job.completion,
            version=int(versions[-1]),
            action_masks=self._masks.of(row),
        )
        episode.versions = None if versions[0] == versions[-1] else versions
        return part, episode


class _Masks:
    """What was allowed at each step of the texts that are being written: bits, and those of equal masks once only."""

    def __init__(self, num_rows: int) -> None:
        self._of_row: list[list[bytes]] = [[] for _ in range(num_rows)]
        self._distinct: dict[bytes, bytes] = {}
        self._most = FEW_MASKS

    def begin(self, rows: IntArray) -> None:
        for row in rows.tolist():
            self._of_row[row] = []
        if len(self._distinct) > self._most:  # those of texts that are long gone
            self._distinct = {mask: mask for masks in self._of_row for mask in masks}
            self._most = max(FEW_MASKS, 2 * len(self._distinct))

    def note(self, rows: IntArray, allowed: BoolArray | None) -> None:
        if allowed is not None:
            for row, bits in zip(rows.tolist(), np.packbits(allowed, axis=1), strict=True):
                mask = bits.tobytes()
                self._of_row[row].append(self._distinct.setdefault(mask, mask))

    def of(self, row: int) -> tuple[bytes, ...] | None:
        return tuple(self._of_row[row]) or None


class SlotReader(Protocol):
    """What the loop needs of an engine: slots that texts are read in."""

    context: int
    version: int

    def advance(
        self,
        slots: IntArray,
        token_lists: IntArray | Sequence[IntArray],
        fresh: IntArray,
        prompts: Sequence[IntArray],
    ) -> torch.Tensor:
        """Append tokens to slots, begin texts in others; the logits of the next token of each."""

    def stop(self, slots: IntArray) -> None:
        """Free slots."""

    def claim(self, count: int) -> IntArray:
        """Slots that nobody else has."""

    def release(self, slots: IntArray) -> None:
        """Give them back."""


class EngineChooser:
    """A language model and a sampler. A text is drawn with the same random numbers in any row, beside any other.

    Args:
        engine: reads the texts.
        slots: one for each row; free, and left alone until the end.
        sampling: how tokens are drawn; budget and stop sequences are the episodes' own.
        longest: how many tokens a text may have at most.
    """

    def __init__(self, engine: SlotReader, slots: IntArray, sampling: Sampling, longest: int) -> None:
        sampling = sampling.with_fresh_seed()
        assert sampling.seed is not None
        self.seed = sampling.seed
        self.sampling = sampling
        self.version = self._reads_with = engine.version
        self._engine = engine
        self._slots = slots
        self._random = np.zeros((len(slots), longest))
        self._read: IntArray = np.zeros(len(slots), dtype=np.int64)  # how many tokens of each row the engine has read

    def begin(self, rows: IntArray, jobs: Sequence[Job]) -> None:
        """New texts have begun in these rows."""
        self._read[rows] = 0
        for row, job in zip(rows.tolist(), jobs, strict=True):
            self._random[row] = uniforms(self.seed, job.request, job.completion, self._random.shape[1])

    def choose(self, state: TokenState, rows: IntArray, allowed: BoolArray | None) -> tuple[IntArray, LogProbs]:
        """Read what is new in these rows, then draw the next token of each."""
        if self._engine.version != self._reads_with:
            raise RuntimeError(
                f"the engine's weights were replaced (version {self._reads_with}, now {self._engine.version}) while "
                "texts were being written, whose slots are lost with that: finish or close the stream first"
            )
        tokens, log_probs = choose(
            self._read_on(state, rows), self.sampling, self._random[rows, state.num_actions[rows]], allowed
        )
        return tokens.cpu().numpy(), log_probs.cpu().numpy()

    def end(self, rows: IntArray) -> None:
        """The texts in these rows have ended: free their slots."""
        self._engine.stop(self._slots[rows])

    def pause(self) -> None:
        """Give the slots back for a while. What was read in them is read again, with the weights of then."""
        self._engine.release(self._slots)

    def go_on(self, version: int) -> None:
        """Choose with the weights that the engine has now, and call them by this number."""
        self._slots = self._engine.claim(len(self._slots))
        self._read[:] = 0
        self._reads_with, self.version = self._engine.version, version

    def _read_on(self, state: TokenState, rows: IntArray) -> torch.Tensor:
        """Let the engine read all that is new in the rows; the logits after it."""
        begin, end = self._read[rows], state.length[rows]
        tokens, is_new = state.tokens, begin == 0
        slots, old = self._slots[rows], np.flatnonzero(~is_new)
        if (end[old] - begin[old] == 1).all():
            news: IntArray | list[IntArray] = tokens[rows[old], begin[old]][:, None]
        else:
            news = [tokens[rows[place], begin[place] : end[place]] for place in old]
        prompts = [tokens[rows[place], : end[place]] for place in np.flatnonzero(is_new)]
        self._read[rows] = end
        logits = self._engine.advance(slots[old], news, slots[is_new], prompts)
        if is_new[: len(is_new) - len(prompts)].any():  # they come last, and do not stand last in `rows`
            logits = logits[torch.from_numpy(np.argsort(np.argsort(is_new, kind="stable"))).to(logits.device)]
        return logits
