"""What engines share: checked arguments, the length of every slot, and generation. A subclass runs the model."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from llm_env.engines.checks import as_slots, as_token_lists, check_prompt, check_room
from llm_env.engines.protocol import NamedTensors, Tokens
from llm_env.engines.sampling import Sampling
from llm_env.engines.writing import EngineChooser, Job, write
from llm_env.tasks.base import Task
from llm_env.tasks.running import RunningEpisodes
from llm_env.tokens.checks import as_token_ids
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt, TokenizedPrompts
from llm_env.tokens.stopping import IntArray
from llm_env.tokens.vocabulary import Vocabulary

NO_SLOTS: IntArray = np.zeros(0, dtype=np.int64)


class EngineBase(abc.ABC):
    """Checks arguments, keeps the length of every slot, and generates; a subclass runs the model.

    A subclass writes `_advance`, `_log_probs` and `_load_weights`, and `_stop` if there is something to free. An engine
    is also a context manager, which closes it.

    Args:
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        vocabulary: the tokens; its size must be the number of logits.

    Attributes:
        lengths: `[num_slots]` how many tokens each slot holds; 0 for a free slot.
        one_pass: whether `advance` takes one pass of the model, however many tokens each slot is given; set by the
            subclass. Where it takes more, the writing loop feeds the few words that a task replies one by one, beside
            the tokens of the other texts.

    Examples:
        >>> from llm_env.engines import make_engine
        >>> engine = make_engine("transformers", "tiny", num_slots=2, context=16)
        >>> prompts = [engine.vocabulary.encode(text) for text in ("1+1=", "Hi")]
        >>> logits = engine.start([0, 1], prompts)
        >>> logits = engine.step([1], logits[1:].argmax(-1).numpy())    # the agent chooses
        >>> logits.shape, engine.lengths.tolist()
        (torch.Size([1, 100]), [4, 3])
    """

    def __init__(self, *, num_slots: int, context: int, vocabulary: Vocabulary) -> None:
        for name, value in (("num_slots", num_slots), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_slots = num_slots
        self.context = context
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.version = 0
        self.lengths: IntArray = np.zeros(num_slots, dtype=np.int64)
        self._claimed = np.zeros(num_slots, dtype=np.bool_)
        self._closed = False

    one_pass = False

    def start(self, slots: Tokens, prompts: Sequence[Tokens]) -> torch.Tensor:
        """Begin a text in each of `slots`, whatever they held before.

        Args:
            slots: which slots, each at most once, in any order.
            prompts: their prompts, as token ids, at least one token each.

        Returns:
            `[n, V]` float32 logits of the next token, in the order of `slots`.
        """
        slots = self._slots(slots)
        token_lists = as_token_lists(prompts, slots, self.vocab_size, "prompt")
        for prompt in token_lists:
            check_prompt(prompt, self.context, 0, self.vocabulary.bos_token)
        return self.advance(NO_SLOTS, [], slots, token_lists)

    def step(self, slots: Tokens, tokens: Tokens) -> torch.Tensor:
        """Append the token that the agent chose to each of `slots`; the other slots stay as they are.

        Args:
            slots: which slots, each at most once, in any order.
            tokens: `[n]` their token ids.

        Returns:
            `[n, V]` float32 logits of the next token, in the order of `slots`.
        """
        slots, tokens = self._slots(slots), as_token_ids(tokens, self.vocab_size, "a step")
        if tokens.shape != slots.shape:
            raise ValueError(f"a step of {len(slots)} slots needs as many tokens, got {len(tokens)}")
        return self.advance(slots, tokens[:, None], NO_SLOTS, [])

    def extend(self, slots: Tokens, token_lists: Sequence[Tokens]) -> torch.Tensor:
        """Append several tokens to each of `slots`, such as the agent's choice and a task's reply to it.

        Args:
            slots: which slots, each at most once, in any order.
            token_lists: the token ids for each, at least one; they need not be of the same length.

        Returns:
            `[n, V]` float32 logits of the token after the last, in the order of `slots`.
        """
        slots = self._slots(slots)
        arrays = as_token_lists(token_lists, slots, self.vocab_size, "list of tokens")
        if not all(len(tokens) for tokens in arrays):
            raise ValueError("every slot must be extended by at least one token: leave out those that are not")
        return self.advance(slots, arrays, NO_SLOTS, [])

    def advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        """`extend` some slots and `start` others, in as few passes as the engine can.

        For those who have checked already what they hand over, such as the writing loop, for which `TokenState` has:
        only that the texts fit is checked here.

        Args:
            slots: which hold texts.
            token_lists: the tokens for each of them, at least one; `[n, 1]` is one for each.
            fresh: other slots, in which texts begin.
            prompts: their prompts.

        Returns:
            `[n, V]` float32 logits of the token after the last, those of `slots` first.
        """
        self._check_open()
        added = np.array([len(tokens) for tokens in token_lists], dtype=np.int64)
        check_room(slots, self.lengths[slots], added, self.context)
        self.lengths[fresh] = 0  # should the model fail half-way, nobody may step what is left
        logits = self._advance(slots, token_lists, fresh, prompts)
        self.lengths[slots] += added
        self.lengths[fresh] = [len(prompt) for prompt in prompts]
        return logits

    def stop(self, slots: Tokens) -> None:
        """Free slots; stopping a free one does nothing."""
        if not self._closed:
            slots = self._slots(slots)
            self.lengths[slots] = 0
            self._stop(slots)

    def claim(self, count: int) -> IntArray:
        """Slots that hold no text and that nobody else has claimed; they are the caller's until `release`.

        Those who share an engine claim their slots, so that none steps another's text; whoever has it alone need not.

        Examples:
            >>> from llm_env.engines import make_engine
            >>> engine = make_engine("transformers", "tiny", num_slots=4, context=16)
            >>> engine.claim(2), engine.claim(2)
            (array([0, 1]), array([2, 3]))
        """
        self._check_open()
        free = self._free()
        if len(free) < count:
            raise ValueError(
                f"{count} slots are wanted, but of the engine's {self.num_slots} only {len(free)} are free; the others "
                "hold texts or belong to another environment: make the engine with more, or an engine for each"
            )
        self._claimed[free[:count]] = True
        return free[:count]

    def release(self, slots: Tokens) -> None:
        """Stop slots that were claimed, and give them back."""
        if not self._closed:
            slots = self._slots(slots)
            self.stop(slots)
            self._claimed[slots] = False

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> list[Episode]:
        """Sample every prompt to its end, `sampling.n` times.

        With a seed, a text depends on the weights, the prompt and its index only, neither on the number of
        slots nor on what else is generated (but for the rounding of the arithmetic, which differs between batch
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
        done = self.stream(prompts, sampling)
        return sorted(done, key=lambda episode: (episode.prompt_index, episode.completion_index))

    def stream(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> Iterator[Episode]:
        """As `generate`, but each text comes as soon as it is done."""
        self._check_open()
        sampling = sampling or Sampling()
        arrays = [as_token_ids(prompt, self.vocab_size, "a prompt") for prompt in prompts]
        for prompt in arrays:
            check_prompt(prompt, self.context, 1, self.vocabulary.bos_token)
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

        When a text ends, the next one begins in its slot at once, while the others go on; the same holds while the task
        replies to one of them. As with `generate`, a text depends on its random numbers only, not on what is beside it.

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
        return self._write(task, prompts, jobs, sampling, context, max_new_tokens, None)

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
            yield from write(episodes, jobs, EngineChooser(self, slots, sampling, longest))
        finally:
            self.release(slots)

    def _free(self) -> IntArray:
        return np.flatnonzero(~self._claimed & (self.lengths == 0))

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

    def close(self) -> None:
        """Free the slots and whatever the engine holds; it cannot be used any more."""
        self.lengths[:] = 0
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stop(self, slots: IntArray) -> None:  # noqa: B027  (not every engine has something to do here)
        pass

    @abc.abstractmethod
    def _advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        """`advance`, with checked arguments; `lengths` are those before."""

    @abc.abstractmethod
    def _log_probs(self, sequences: list[IntArray]) -> list[npt.NDArray[np.float32]]:
        """`log_probs`, with checked arguments."""

    @abc.abstractmethod
    def _load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Copy all weights, or raise before the first."""

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine has been closed: make a new one")

    def _slots(self, slots: Tokens) -> IntArray:
        self._check_open()
        return as_slots(slots, self.num_slots)
