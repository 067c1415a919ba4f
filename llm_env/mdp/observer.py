"""What the agent sees of a language model that reads along with it: nothing, all logits, or the likeliest tokens."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm_env.tokens.arrays import IntArray
from llm_env.tokens.state import RUNNING, TokenState
from llm_env.tokens.vocabulary import Vocabulary

Observe = Literal["tokens", "logits", "top_k"]

CLOSED = "this environment has been closed: make a new one"


class Observer:
    """No language model: observations are the tokens alone. The two kinds below add arrays, which they keep current."""

    def __init__(self) -> None:
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    @staticmethod
    def make(
        engine: Any, observe: Observe | None, top_k: int | None, model: Any, state: TokenState, vocabulary: Vocabulary
    ) -> Observer:
        """The observer that an environment's arguments ask for."""
        if observe not in (None, "tokens", "logits", "top_k"):
            raise ValueError(f"observe must be 'tokens', 'logits' or 'top_k', got {observe!r}")
        if observe is None:
            observe = "tokens" if engine is None else "top_k"
        if observe != "top_k" and top_k is not None:
            raise ValueError(f"top_k={top_k} is for observe='top_k' with an engine, not for observe={observe!r}")
        if observe == "tokens":
            if engine is not None:
                raise ValueError("an engine was given, but observe='tokens' would not use it: leave one of them out")
            return Observer()
        if engine is None:
            raise ValueError(f"observe={observe!r} needs a language model to read along: give engine='transformers'")
        count = (50 if top_k is None else top_k) if observe == "top_k" else None
        return EngineObserver(engine, count, model, state, vocabulary)

    def begin(self, rows: IntArray) -> None:
        """These rows hold a new text."""

    def advance(self, rows: IntArray) -> None:
        """These rows have grown."""

    def close(self) -> None:
        """Free what this observer made."""


class EngineObserver(Observer):
    """An engine reads every text. `arrays` has its distribution of each row's next token, zero after the end.

    A truncated text still has a next token, and its distribution: the last state's value may depend on it.
    An engine may serve several observers: each claims slots of its own, and gives them back when it is closed, after
    which it reads no more. When the engine's weights have been replaced, the texts are read again.

    A copy (`copy.deepcopy`) reads with slots of its own: in the same engine if that was handed in, else in a copy of
    the engine. To pickle an observer is to pickle its engine.

    Args:
        engine: an engine, or the name of one.
        top_k: how many of the likeliest tokens to show; None shows all logits.
        model: what an engine given by name runs.
        state: the texts.
        vocabulary: their tokens.
    """

    def __init__(self, engine: Any, top_k: int | None, model: Any, state: TokenState, vocabulary: Vocabulary) -> None:
        super().__init__()
        from llm_env.engines import make_engine

        self._owns_engine = isinstance(engine, str)
        self._state = state
        if self._owns_engine and not isinstance(model, str):
            raise ValueError(
                f"engine={engine!r} needs the name or folder of the model it is to run, but model={model!r}: "
                "give a name, or make the engine yourself and pass it"
            )
        served = model if self._owns_engine else None
        self.engine = make_engine(engine, served, num_slots=state.num_rows, context=state.context)
        if self.engine.vocab_size != vocabulary.size:
            raise ValueError(
                f"the tokenizer has {vocabulary.size} tokens, but that of the engine's model has "
                f"{self.engine.vocab_size}: they do not belong together"
            )
        rows, size = state.num_rows, vocabulary.size
        self._top_k = top_k
        if top_k is None:
            self.arrays["logits"] = np.zeros((rows, size), dtype=np.float32)
        elif 1 <= top_k <= size:
            self.arrays["top_ids"] = np.zeros((rows, top_k), dtype=np.int64)
            self.arrays["top_log_probs"] = np.zeros((rows, top_k), dtype=np.float32)
        else:
            raise ValueError(f"top_k must be from 1 to the {size} tokens of the vocabulary, got {top_k}")
        self._read = np.zeros(rows, dtype=np.int64)  # how many tokens of each row the engine has read
        self._closed = False
        self._version = self.engine.version
        self._hold(self.engine.claim(rows))

    def begin(self, rows: IntArray) -> None:
        """Read these rows from their beginning."""
        self._check_open()
        state = self._state
        for array in self.arrays.values():
            array[rows] = 0
        reading = rows[~state.terminated[rows] & (state.end[rows] >= RUNNING)]
        if len(reading):
            texts = [state.tokens[row, : state.length[row]] for row in reading]
            self._show(reading, self.engine.start(self._slots[reading], texts))
            self._read[reading] = state.length[reading]
        self._stop_ended(rows)

    def advance(self, rows: IntArray) -> None:
        """Read what these rows have gained: the agent's token, and perhaps a task's reply."""
        self._check_open()
        state = self._state
        if self.engine.version != self._version:
            self._version = self.engine.version
            self.begin(state.all_rows)
            return
        finished = rows[state.terminated[rows]]
        for array in self.arrays.values():
            array[finished] = 0
        reading = rows[~state.terminated[rows]]
        if len(reading):
            slots = self._slots[reading]
            gained = state.length[reading] - self._read[reading]
            gains: IntArray | list[IntArray]
            if (gained == 1).all():
                gains = state.tokens[reading, state.length[reading] - 1][:, None]
            else:
                gains = [state.tokens[row, self._read[row] : state.length[row]] for row in reading]
            logits = self.engine.advance(slots, gains, slots[:0], [])
            self._read[reading] = state.length[reading]
            self._show(reading, logits)
        self._stop_ended(rows)

    def close(self) -> None:
        """Free the engine, or only the slots if it was handed in; more than once does no harm."""
        self._closed = True
        if self._owns_engine:
            self.engine.close()
        else:
            self._release()

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineObserver:
        own = object.__new__(type(self))
        memo[id(self)] = own
        kept = {name: value for name, value in self.__getstate__().items() if name != "engine"}
        own.__dict__.update(copy.deepcopy(kept, memo), engine=self.engine)
        if self._closed:
            own._hold(own._slots)
        elif self._owns_engine:
            own.engine = self.engine.duplicate()
            own._hold(own._slots)
        else:
            own._hold(own.engine.claim(len(own._slots)))
            own.begin(own._state.all_rows)
        return own

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_release"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold(self._slots)

    def _hold(self, slots: IntArray) -> None:
        """Keep slots until `close`, or until the environment is dropped without it."""
        self._slots = slots
        # It runs once, and not at all if they were given back before: they may be another's by then.
        self._release = weakref.finalize(self, self.engine.release, slots)
        self._release.atexit = False
        if self._closed:
            self._release.detach()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(CLOSED)

    def _stop_ended(self, rows: IntArray) -> None:
        ended = rows[self._state.end[rows] != RUNNING]
        if len(ended):
            self.engine.stop(self._slots[ended])

    def _show(self, rows: IntArray, logits: Any) -> None:
        logits = logits.float()
        if self._top_k is None:
            self.arrays["logits"][rows] = logits.cpu().numpy()
            return
        values, ids = logits.topk(self._top_k, dim=-1)
        self.arrays["top_ids"][rows] = ids.cpu().numpy()
        self.arrays["top_log_probs"][rows] = (values - logits.logsumexp(-1, keepdim=True)).cpu().numpy()
