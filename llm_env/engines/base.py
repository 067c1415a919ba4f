"""What engines share: slots that are stepped, and texts that are generated in them. A subclass runs the model."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from llm_env.engines.checks import check_prompt
from llm_env.engines.protocol import NamedTensors, Tokens
from llm_env.engines.sampling import Sampling
from llm_env.engines.slots import EngineSlots
from llm_env.engines.writing import EngineChooser, Job, Writing, write
from llm_env.tasks.base import Task
from llm_env.tasks.running import RunningEpisodes
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.checks import as_token_ids
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt, TokenizedPrompts


class EngineBase(EngineSlots):
    """Checks arguments, keeps the length of every slot, and generates; a subclass runs the model.

    A subclass writes `_advance`, `_log_probs` and `_load_weights`, and `_stop` if there is something to free. An engine
    is also a context manager, which closes it.

    Args:
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        vocabulary: the tokens. A model may have more logits: see `Vocabulary.usable`, which `_log_probs` must respect.

    Attributes:
        lengths: `[num_slots]` how many tokens each slot holds; 0 for a free slot.
        version: of the weights, as `load_weights` was told.

    Examples:
        >>> from llm_env.engines import make_engine
        >>> engine = make_engine("transformers", "tiny", num_slots=2, context=16)
        >>> prompts = [engine.vocabulary.encode(text) for text in ("1+1=", "Hi")]
        >>> logits = engine.start([0, 1], prompts)
        >>> logits = engine.step([1], logits[1:].argmax(-1).numpy())    # the agent chooses
        >>> logits.shape, engine.lengths.tolist()
        (torch.Size([1, 100]), [4, 3])
    """

    version = 0

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> list[Episode]:
        """Sample every prompt to its end, `sampling.n` times.

        With a seed, a text depends on the weights, the prompt and which of its `n` texts it is, neither on the number
        of slots nor on what else is generated (but for the rounding of the arithmetic, which differs between batch
        sizes). Only free slots are used, so texts being stepped are safe.

        Args:
            prompts: as token ids; each may be any length that leaves room for one token.
            sampling: how; plain sampling by default.

        Returns:
            The texts as episodes, those of the first prompt first. They have no score: an engine knows no task.

        Examples:
            >>> from llm_env.engines import Sampling, make_engine
            >>> engine = make_engine("transformers", "tiny", num_slots=4, context=32)
            >>> prompts = [engine.vocabulary.encode(text) for text in ("1+1=", "Hi")]
            >>> episodes = engine.generate(prompts, Sampling(max_new_tokens=5, n=3, seed=0))
            >>> [episode.prompt_index for episode in episodes]
            [0, 0, 0, 1, 1, 1]
        """
        written = self.stream(prompts, sampling)
        return sorted(written, key=lambda episode: (episode.prompt_index, episode.completion_index))

    def stream(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> Iterator[Episode]:
        """As `generate`, but each text comes as soon as it is done."""
        self._check_open()
        sampling = sampling or Sampling()
        arrays = self._checked_prompts(prompts, self.context)
        if not len(self._free()):
            raise ValueError(f"all {self.num_slots} slots hold texts or are claimed: stop some before you generate")
        jobs = [Job(index, index, index, number) for index in range(len(arrays)) for number in range(sampling.n)]
        plain = Task(num_train=1)  # a task without rules of its own
        plain.stop = sampling.stop
        texts = TokenizedPrompts([Prompt("")] * len(arrays), arrays)
        eos_tokens = () if sampling.ignore_eos else None
        written = self._write(plain, texts, jobs, sampling, self.context, sampling.max_new_tokens, eos_tokens)
        return (episode for _, episode in written)

    def write(
        self,
        task: Task,
        prompts: TokenizedPrompts,
        jobs: Sequence[Job],
        sampling: Sampling,
        *,
        context: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[tuple[Job, Episode]]:
        """Write episodes of a task, by its rules, each handed out with its job as soon as it has ended.

        When a text ends, the next one begins in its slot while the others go on; the same holds while the task replies
        to one of them. As with `generate`, a text depends on its random numbers only, not on what is beside it.

        Args:
            task: bound to the tokens of this engine's model.
            prompts: of the task.
            jobs: what to write.
            sampling: temperature and seed; when a text ends is the task's affair.
            context: how many tokens prompt and text may have; by default as many as a slot holds.
            max_new_tokens: how many tokens the model may choose in a text; by default what the task says.
        """
        self._check_open()
        context = self.context if context is None else context
        if context > self.context:
            raise ValueError(
                f"texts of {context} tokens do not fit this engine, whose slots hold {self.context}: make the engine "
                f"with a context of at least {context}"
            )
        self._checked_prompts([prompts.tokens[index] for index in {job.prompt_index for job in jobs}], context)
        return self._write(task, prompts, jobs, sampling, context, max_new_tokens, None)

    def begin(
        self,
        task: Task,
        prompts: TokenizedPrompts,
        jobs: Iterable[Job],
        sampling: Sampling,
        *,
        rows: int,
        context: int,
        max_new_tokens: int | None = None,
    ) -> tuple[Writing, EngineChooser]:
        """As `write`, for one who takes the steps, and lets others have the slots in between.

        Args:
            task: see `write`.
            prompts: see there; they must fit.
            jobs: there may be no end of them.
            sampling: see there.
            rows: how many texts to write side by side.
            context: see there.
            max_new_tokens: see there.
        """
        self._check_open()
        slots = self.claim(rows)
        episodes, chooser = self._rows(slots, task, prompts, sampling, context, max_new_tokens, None)
        return Writing(episodes, jobs, chooser), chooser

    def _checked_prompts(self, prompts: Sequence[Tokens], context: int) -> list[IntArray]:
        arrays = [as_token_ids(prompt, self.vocab_size, "a prompt") for prompt in prompts]
        for prompt in arrays:
            check_prompt(prompt, context, 1, self.vocabulary.bos_token)
        return arrays

    def _write(
        self,
        task: Task,
        prompts: TokenizedPrompts,
        jobs: Sequence[Job],
        sampling: Sampling,
        context: int,
        max_new_tokens: int | None,
        eos_tokens: Sequence[int] | None,
    ) -> Iterator[tuple[Job, Episode]]:
        slots = self.claim(max(1, min(len(self._free()), len(jobs))))
        try:
            episodes, chooser = self._rows(slots, task, prompts, sampling, context, max_new_tokens, eos_tokens)
            yield from write(episodes, jobs, chooser)
        finally:
            self.release(slots)

    def _rows(
        self,
        slots: IntArray,
        task: Task,
        prompts: TokenizedPrompts,
        sampling: Sampling,
        context: int,
        max_new_tokens: int | None,
        eos_tokens: Sequence[int] | None,
    ) -> tuple[RunningEpisodes, EngineChooser]:
        """A row for each slot, and who chooses its tokens."""
        episodes = RunningEpisodes(
            task,
            prompts,
            self.vocabulary,
            num_rows=len(slots),
            context=context,
            max_new_tokens=max_new_tokens,
            eos_tokens=eos_tokens,
        )
        longest = min(int(episodes.state.budget.max()), context)
        return episodes, EngineChooser(self, slots, sampling, longest)

    def log_probs(self, sequences: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
        """Score given sequences at temperature 1.

        Args:
            sequences: as token ids, each at most `context` long.

        Returns:
            For each the log-probability of its tokens from the second on, given those before.
        """
        self._check_open()
        arrays = [as_token_ids(sequence, self.vocab_size, "a sequence") for sequence in sequences]
        for array in arrays:
            if len(array) > self.context:
                raise ValueError(f"a sequence of {len(array)} tokens does not fit a context of {self.context}")
        return self._log_probs(arrays)

    def load_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Replace all weights. All slots are stopped: what they remember was computed with the old ones.

        Args:
            named_tensors: every weight by the name it has in the model, such as `model.named_parameters()` or
                `model.state_dict()`. Of tied weights one name is enough.
            version: what `version` shall be from now on.
        """
        self._check_open()
        self._load_weights(dict(named_tensors))
        self.stop(np.arange(self.num_slots))
        self.version = version

    @abc.abstractmethod
    def _log_probs(self, sequences: list[IntArray]) -> list[npt.NDArray[np.float32]]:
        """`log_probs`, with checked arguments."""

    @abc.abstractmethod
    def _load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Copy all weights, or raise before the first."""
