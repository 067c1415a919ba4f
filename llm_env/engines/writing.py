"""Generation, written as an agent would: start, choose, step. So it cannot differ from stepping."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_env.engines.sampling import Sampling, choose, uniforms
from llm_env.tokens.state import END_OF_CODE, TokenState
from llm_env.tokens.stopping import IntArray
from rewards import End

if TYPE_CHECKING:
    from llm_env.engines.base import EngineBase


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What an engine has written after a prompt.

    Attributes:
        prompt_index: which prompt.
        completion_index: which of its completions, from 0 to `Sampling.n - 1`.
        tokens: `[T]` int64, the token that ended it included.
        log_probs: `[T]` float32, of the distribution that was sampled from.
        end: why it ended: EOS, STOP, BUDGET (`max_new_tokens`) or CONTEXT.
    """

    prompt_index: int
    completion_index: int
    tokens: IntArray
    log_probs: npt.NDArray[np.float32]
    end: End


def complete(
    engine: EngineBase, slots: IntArray, prompts: Sequence[IntArray], sampling: Sampling
) -> Iterator[Completion]:
    """Sample every prompt to its end in the given slots, which must be free and be left alone until then.

    When a text ends, the next one waiting begins in its slot at once, while the others go on.
    """
    sampling = sampling.with_fresh_seed()
    assert sampling.seed is not None
    vocabulary = engine.vocabulary
    state = TokenState(
        len(slots),
        engine.context,
        vocab_size=engine.vocab_size,
        pad_token=vocabulary.pad_token,
        eos_tokens=() if sampling.ignore_eos else vocabulary.eos_tokens,
        stop=vocabulary.matchers(sampling.stop),
        budget=sampling.max_new_tokens,
    )
    waiting = deque((prompt, completion) for prompt in range(len(prompts)) for completion in range(sampling.n))
    of_row = [(-1, -1)] * len(slots)
    most = min(sampling.max_new_tokens, engine.context)
    random = np.zeros((len(slots), most))
    log_probs = np.zeros((len(slots), most), dtype=np.float32)
    try:
        while True:
            rows = np.flatnonzero(state.running)
            last = state.tokens[rows, state.length[rows] - 1]
            fresh = np.flatnonzero(~state.running)[: len(waiting)]
            if not len(rows) and not len(fresh):
                return
            for row in fresh.tolist():
                prompt, completion = of_row[row] = waiting.popleft()
                random[row] = uniforms(sampling.seed, prompt, completion, most)
            begun = [prompts[of_row[row][0]] for row in fresh.tolist()]
            state.reset(fresh, begun)
            logits = engine._step_and_start(slots[rows], last, slots[fresh], begun)
            rows = np.concatenate([rows, fresh])
            count = state.num_actions[rows]
            tokens, chosen = choose(logits, sampling, random[rows, count])
            log_probs[rows, count] = chosen.cpu().numpy()
            state.step(tokens.cpu().numpy(), rows)

            ended = rows[~state.running[rows]]
            engine.stop(slots[ended])
            for row in ended.tolist():
                prompt, completion = of_row[row]
                yield Completion(
                    prompt_index=prompt,
                    completion_index=completion,
                    tokens=state.tokens[row, state.prompt_length[row] : state.length[row]].copy(),
                    log_probs=log_probs[row, : state.num_actions[row]].copy(),
                    end=END_OF_CODE[state.end[row]],
                )
    finally:
        engine.stop(slots[state.running])
