"""The batched state of the token MDP, and the one transition function.

Everything else in the library (the four environment faces, the engines' own `generate`) asks this class what a token
does to an episode. If you find a rule about ending, budgets or injected tokens anywhere else, it is a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.checks import as_indices, as_token_ids
from llm_env.tokens.stopping import StopMatcher
from rewards import End

Over = Callable[["TokenState", IntArray], BoolArray]


class Later:
    """In place of a reply that is still being made: the row waits for `TokenState.answer`."""


LATER = Later()
Reply = Callable[["TokenState", int], Sequence[int] | IntArray | Later | None]


# Why a row's episode has ended, as codes in an int8 array. They are plain numbers because a step compares a dozen of
# them: the members of an enum cost a third of a microsecond each to look up, and more to compare with arrays.
IDLE = -1  # no episode was ever begun in this row
RUNNING, EOS, STOP, TASK, BUDGET, CONTEXT = range(6)

# The `End` of each code, which the environments report as `info["end_code"]`. That of IDLE, -1, is the last: a row in
# which nothing was begun has not ended either.
END_OF_CODE = (End.RUNNING, End.EOS, End.STOP, End.TASK, End.BUDGET, End.CONTEXT, End.RUNNING)


@dataclass(frozen=True, slots=True)
class SavedRows:
    """A copy of some rows of a `TokenState`, to be restored later, elsewhere, or many times."""

    tokens: IntArray
    is_action: BoolArray
    stop_state: npt.NDArray[np.int16]
    length: IntArray
    prompt_length: IntArray
    num_actions: IntArray
    budget: IntArray
    end: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.length)


class TokenState:
    """A batch of prompts and what has been written after each of them.

    A step appends one token, chosen by the agent, to every row (or to the rows named). After it, in this order:

    1. an end-of-sequence token or a completed stop sequence ends the agent's turn, and with it the episode, unless
    2. the task replies (`reply`): its tokens are appended and the episode goes on (if the agent may still act);
    3. the task may end the episode by itself (`over`);
    4. an episode still running is cut off when the agent's budget is spent or when the context is full.

    1 and 3 are terminations: the text is finished. 4 is a truncation: it is not, and its last state still has a value,
    which a learner bootstraps. With `cut_is_final`, 4 is a termination as well; see `llm_env.tasks.Task.when_cut`.
    All arrays are allocated once; the cost of a step depends on neither the position in the text nor the context.

    Args:
        num_rows: how many episodes live side by side.
        context: how many tokens a row can hold, prompt included.
        vocab_size: actions are token ids from 0 to `vocab_size - 1`.
        pad_token: fills `tokens` after the end of each row. It may also be a token the agent can choose.
        eos_tokens: the end-of-sequence tokens.
        stop: matchers of stop sequences. They see what the agent wrote in one go: not the prompt, not across a reply.
        budget: how many tokens the agent may choose in an episode; None means as many as fit.
        cut_is_final: a text that is cut off counts as finished.
        over: given this state and rows that have acted and go on, says which of them the task ends (`[n]` bool). Called
            at most once a step.
        reply: given this state and a row whose turn has ended, the token ids that the task answers, or None if the
            episode ends here. Called only for those rows.

    Attributes:
        tokens: `[num_rows, context]` int64.
        is_action: `[num_rows, context]` bool, True where the agent chose the token.
        length: `[num_rows]` how many tokens each row holds.
        prompt_length: `[num_rows]` how many of them were the prompt.
        num_actions: `[num_rows]` how many the agent chose.
        end: `[num_rows]` int8, a code of this module; `END_OF_CODE` has its `End`.
        left_out: the rows whose reply found no room in the last step, and how many tokens it had.

    Examples:
        >>> state = TokenState(2, context=6, vocab_size=10, eos_tokens=[9], budget=3)
        >>> state.reset([0, 1], [[1, 2], [3]])
        >>> state.step([9, 4])
        >>> state.tokens.tolist()
        [[1, 2, 9, 0, 0, 0], [3, 4, 0, 0, 0, 0]]
        >>> [END_OF_CODE[code].value for code in state.end]
        ['eos', 'running']
    """

    def __init__(
        self,
        num_rows: int,
        context: int,
        *,
        vocab_size: int,
        pad_token: int = 0,
        eos_tokens: Sequence[int] = (),
        stop: Sequence[StopMatcher] = (),
        budget: int | None = None,
        cut_is_final: bool = False,
        over: Over | None = None,
        reply: Reply | None = None,
    ) -> None:
        for name, value, least in (("num_rows", num_rows, 1), ("context", context, 1), ("vocab_size", vocab_size, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {budget}")
        for token in (pad_token, *eos_tokens):
            if not 0 <= token < vocab_size:
                raise ValueError(f"pad and eos tokens must be ids from 0 to {vocab_size - 1}, got {token}")
        self.num_rows = num_rows
        self.context = context
        self.vocab_size = vocab_size
        self.pad_token = pad_token
        self.stop = tuple(stop)
        self.cut_is_final = cut_is_final
        self.over = over
        self.reply = reply
        self.left_out: dict[int, int] = {}
        self._default_budget = context if budget is None else budget
        self.all_rows: IntArray = np.arange(num_rows)
        self._end_of_token = np.zeros(vocab_size, dtype=np.int8)
        self._end_of_token[list(eos_tokens)] = EOS

        self.tokens: IntArray = np.full((num_rows, context), pad_token, dtype=np.int64)
        self.is_action: BoolArray = np.zeros((num_rows, context), dtype=np.bool_)
        self.length: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.prompt_length: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.num_actions: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.budget: IntArray = np.full(num_rows, self._default_budget, dtype=np.int64)
        self.end: npt.NDArray[np.int8] = np.full(num_rows, IDLE, dtype=np.int8)
        self._stop_state = np.zeros((num_rows, len(self.stop)), dtype=np.int16)

    @property
    def running(self) -> BoolArray:
        """`[num_rows]` rows whose episode goes on."""
        return np.equal(self.end, RUNNING)

    @property
    def terminated(self) -> BoolArray:
        """`[num_rows]` rows whose text is finished."""
        return self.end > RUNNING if self.cut_is_final else (self.end > RUNNING) & (self.end <= TASK)

    @property
    def truncated(self) -> BoolArray:
        """`[num_rows]` rows that were cut off: their last state still has a value."""
        return np.zeros_like(self.end, dtype=np.bool_) if self.cut_is_final else self.end >= BUDGET

    def is_truncated(self, row: int) -> bool:
        """`truncated` of a single row."""
        return not self.cut_is_final and int(self.end[row]) >= BUDGET

    def reset(
        self,
        rows: Sequence[int] | IntArray,
        prompts: Sequence[Sequence[int] | IntArray],
        budgets: Sequence[int] | IntArray | None = None,
        *,
        checked: bool = False,
    ) -> None:
        """Begin a new episode in each of `rows`; the others are left as they are.

        Args:
            rows: which rows.
            prompts: their prompts, as token ids. A prompt may be empty; it must leave room for one token.
            budgets: how many tokens the agent may choose in each; by default the budget of this state.
            checked: rows and prompts are arrays, and known to be good.
        """
        if not checked:
            rows = self._as_rows(rows)
            prompts = [self._check_prompt(prompt) for prompt in prompts]
        if len(prompts) != len(rows):
            raise ValueError(f"reset of {len(rows)} rows needs as many prompts, got {len(prompts)}")
        self.tokens[rows] = self.pad_token
        for row, prompt in zip(rows, prompts, strict=True):
            self.tokens[row, : len(prompt)] = prompt
        self.length[rows] = self.prompt_length[rows] = [len(prompt) for prompt in prompts]
        self.is_action[rows] = False
        self.num_actions[rows] = 0
        self._stop_state[rows] = 0
        self.budget[rows] = self._default_budget if budgets is None else budgets
        self.end[rows] = RUNNING

    def step(self, actions: Sequence[int] | IntArray, rows: Sequence[int] | IntArray | None = None) -> None:
        """Append the agent's tokens and decide what they end. Rows not named are left as they are.

        Args:
            actions: `[num_rows]` token ids, or one for each of `rows`.
            rows: which rows act; all of them by default. Every one must be running.
        """
        rows = self._as_rows(rows)
        actions = self.check_actions(actions, rows)

        position = self.length[rows]
        self.tokens[rows, position] = actions
        self.is_action[rows, position] = True
        self.length[rows] = position + 1
        self.num_actions[rows] += 1

        end = self._end_of_token[actions]
        for index, matcher in enumerate(self.stop):
            state = matcher.next_state[self._stop_state[rows, index], actions]
            self._stop_state[rows, index] = state
            end[(state == matcher.found) & (end == RUNNING)] = STOP
        self.end[rows] = end
        if self.reply is not None:
            self.left_out = {}
            for row in rows[end != RUNNING].tolist():
                if not isinstance(reply := self.reply(self, row), Later):
                    self._inject(row, reply)
        self._end_if_over(rows)

    def answer(self, row: int, reply: Sequence[int] | IntArray | None) -> None:
        """Go on with a row whose reply was to come later: what `step` does once it has one."""
        self.left_out = {}
        self._inject(row, reply)
        self._end_if_over(np.array([row]))

    def _end_if_over(self, rows: IntArray) -> None:
        if self.over is not None and len(going := rows[self.end[rows] == RUNNING]):
            self._end_running(going, self._asked_over(going), TASK)
        self._end_running(rows, self.num_actions[rows] >= self.budget[rows], BUDGET)
        self._end_running(rows, self.length[rows] >= self.context, CONTEXT)

    def save(self, rows: Sequence[int] | IntArray) -> SavedRows:
        """Copy some rows out; `restore` puts them back, into the same rows or others."""
        rows = self._as_rows(rows)
        return SavedRows(
            tokens=self.tokens[rows],
            is_action=self.is_action[rows],
            stop_state=self._stop_state[rows],
            length=self.length[rows],
            prompt_length=self.prompt_length[rows],
            num_actions=self.num_actions[rows],
            budget=self.budget[rows],
            end=self.end[rows],
        )

    def restore(self, rows: Sequence[int] | IntArray, saved: SavedRows) -> None:
        """Overwrite `rows` with saved ones: one each, or a single one copied into all of them.

        Examples:
            >>> state = TokenState(3, context=4, vocab_size=10)
            >>> state.reset([0, 1, 2], [[1], [2], [3]])
            >>> state.restore([1, 2], state.save([0]))
            >>> state.tokens[:, 0].tolist()
            [1, 1, 1]
        """
        rows = self._as_rows(rows)
        if len(saved) not in (1, len(rows)):
            raise ValueError(f"cannot restore {len(saved)} saved rows into {len(rows)} rows: give as many, or one")
        if saved.tokens.shape[1] != self.context or saved.stop_state.shape[1] != len(self.stop):
            raise ValueError(
                f"the saved rows have context {saved.tokens.shape[1]} and {saved.stop_state.shape[1]} stop matchers, "
                f"this state has {self.context} and {len(self.stop)}: they come from another kind of environment"
            )
        self.tokens[rows] = saved.tokens
        self.is_action[rows] = saved.is_action
        self._stop_state[rows] = saved.stop_state
        self.length[rows] = saved.length
        self.prompt_length[rows] = saved.prompt_length
        self.num_actions[rows] = saved.num_actions
        self.budget[rows] = saved.budget
        self.end[rows] = saved.end

    def _end_running(self, rows: IntArray, condition: BoolArray, reason: int) -> None:
        if condition.any():
            ending = rows[condition]
            self.end[ending[self.end[ending] == RUNNING]] = reason

    def _inject(self, row: int, reply: Sequence[int] | IntArray | None) -> None:
        """Append a task's reply, unless the agent could not act on it: for want of budget, or of room after it."""
        if reply is None:
            return
        tokens = as_token_ids(reply, self.vocab_size, "a task's reply")
        start, stop = int(self.length[row]), int(self.length[row]) + len(tokens)
        if self.num_actions[row] >= self.budget[row]:
            self.end[row] = BUDGET
            return
        if stop >= self.context:
            self.end[row] = CONTEXT
            self.left_out[row] = len(tokens)
            return
        self.tokens[row, start:stop] = tokens
        self.length[row] = stop
        self._stop_state[row] = 0
        self.end[row] = RUNNING

    def _asked_over(self, rows: IntArray) -> BoolArray:
        assert self.over is not None
        answer = np.asarray(self.over(self, rows))
        if answer.shape != rows.shape or answer.dtype != np.bool_:
            raise ValueError(
                f"`over` must return a bool for each of the {len(rows)} rows it was asked about, "
                f"got shape {answer.shape} of {answer.dtype}"
            )
        return answer

    def _as_rows(self, rows: Sequence[int] | IntArray | None) -> IntArray:
        return self.all_rows if rows is None or rows is self.all_rows else as_indices(rows, self.num_rows, "row")

    def _check_prompt(self, prompt: Sequence[int] | IntArray) -> IntArray:
        array = as_token_ids(prompt, self.vocab_size, "a prompt")
        if len(array) >= self.context:
            raise ValueError(
                f"a prompt of {len(array)} tokens leaves no room to act in a context of {self.context}: "
                f"use a context of at least {len(array) + 1}, or shorter prompts"
            )
        return array

    def check_actions(self, actions: Sequence[int] | IntArray, rows: IntArray) -> IntArray:
        """The actions as an array, if they are token ids, one for each of `rows`, all of which are running."""
        array = np.asarray(actions)
        if array.shape != rows.shape:
            raise ValueError(f"expected {len(rows)} actions, shape {rows.shape}, one per row; got shape {array.shape}")
        array = as_token_ids(array, self.vocab_size, "an action")
        ended = self.end[rows]
        if ended.any():
            row = int(rows[ended != RUNNING][0])
            code = self.end[row]
            why = "has not begun" if code == IDLE else f"has ended ({END_OF_CODE[code]})"
            raise ValueError(
                f"row {row} was given action {array[rows == row][0]}, but its episode {why}: reset it first"
            )
        return array
