"""Episodes of a task while they are being written."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm_env.tasks.background import Asked, Background
from llm_env.tasks.base import Task, TaskError
from llm_env.tasks.sessions import Sessions
from llm_env.tokens.arrays import BoolArray, FloatArray, IntArray
from llm_env.tokens.chat import Message
from llm_env.tokens.checks import as_token_ids
from llm_env.tokens.episode import UNSCORED, Episode
from llm_env.tokens.prompts import Prompt, TokenizedPrompts
from llm_env.tokens.state import END_OF_CODE, LATER, RUNNING, Later, SavedRows, TokenState
from llm_env.tokens.vocabulary import Vocabulary
from rewards import End, Failure, RewardError, Rollout, Score
from rewards.rollout import new_episode


@dataclass(frozen=True, slots=True)
class SavedEpisodes:
    """A copy of some rows of `RunningEpisodes`; see there."""

    state: SavedRows
    prompts: list[Prompt]
    prompt_index: IntArray
    group: IntArray
    token_rewards: FloatArray | None
    failed_replies: IntArray
    sessions: list[Any]

    def __len__(self) -> int:
        return len(self.state)


class RunningEpisodes:
    """Episodes of one task side by side: their tokens, and which prompt each of them answers.

    What a task does while a text is being written happens here and nowhere else: its stop sequences and its budget,
    what it replies (`reply`), where it ends a text (`over`), and what it pays for a token (`token_reward`). A
    `TokenMDP` shows these rows to an agent outside; the writing loop fills them from a language model.

    Args:
        task: bound to a vocabulary.
        prompts: of one of its splits, with their tokens.
        vocabulary: of whoever chooses the tokens.
        num_rows: how many episodes live side by side.
        context: how many tokens prompt and text may have together.
        max_new_tokens: how many tokens the agent may choose; by default what the task says.
        eos_tokens: what ends a text; by default what the vocabulary says.

    Attributes:
        state: the tokens, see `TokenState`.
        masks_actions: whether the task allows some tokens only, see `action_mask`.
        prompt_index: `[num_rows]` which prompt each row answers.
        group: `[num_rows]` rows of one group are to be compared with each other.
        number: `[num_rows]` which episode is in each row, see `rewards.Rollout.episode`.
        sessions: what the task keeps for each episode, until it has been scored.

    Examples:
        >>> from llm_env.models import load_vocabulary
        >>> from llm_env.tasks import Reverse
        >>> vocabulary = load_vocabulary("tiny")
        >>> task = Reverse(length=2).bind(vocabulary)
        >>> prompts = TokenizedPrompts.encode(task.prompts("test"), vocabulary)
        >>> episodes = RunningEpisodes(task, prompts, vocabulary, num_rows=1, context=20)
        >>> row = np.array([0])
        >>> episodes.begin(row, np.array([3]))
        >>> for letter in (*episodes.prompt(0).metadata["answer"], None):
        ...     token = vocabulary.eos_tokens if letter is None else vocabulary.encode(letter)
        ...     episodes.step(np.asarray(token), row)
        >>> str(episodes.rollout(0).end), episodes.rollout(0).text == episodes.prompt(0).metadata["answer"]
        ('eos', True)
    """

    def __init__(
        self,
        task: Task,
        prompts: TokenizedPrompts,
        vocabulary: Vocabulary,
        *,
        num_rows: int,
        context: int,
        max_new_tokens: int | None = None,
        eos_tokens: Sequence[int] | None = None,
    ) -> None:
        self.task = task
        self.prompts = prompts
        self.vocabulary = vocabulary
        if task.when_cut not in ("score", "bootstrap"):
            raise ValueError(f"when_cut must be 'score' or 'bootstrap', got {task.when_cut!r}")
        budget = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.state = TokenState(
            num_rows,
            context,
            vocab_size=vocabulary.size,
            pad_token=vocabulary.pad_token,
            eos_tokens=vocabulary.eos_tokens if eos_tokens is None else eos_tokens,
            stop=vocabulary.matchers(task.stop),
            budget=budget,
            cut_is_final=task.when_cut == "score",
            over=self._over if task.overrides("over") else None,
            reply=self._reply if task.overrides("reply") else None,
        )
        self.prompt_index: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.group: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.number: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.sessions = Sessions(task)
        self._background = Background(num_rows)
        weakref.finalize(self, self.sessions.close_all)
        self._failed_replies: IntArray = np.zeros(num_rows, dtype=np.int64)
        self._answer_to_failure = self._checked_answer()
        self._prompts: list[Prompt] = [Prompt("")] * num_rows
        self.masks_actions = task.overrides("action_mask")
        self._token_rewards = np.zeros((num_rows, min(budget, context))) if task.overrides("token_reward") else None

    @property
    def num_rows(self) -> int:
        """How many episodes live side by side."""
        return self.state.num_rows

    def begin(self, rows: IntArray, prompt_indices: IntArray, groups: IntArray | None = None) -> None:
        """Begin new episodes in `rows`, with these prompts. The arguments are not checked again."""
        chosen = prompt_indices.tolist()
        self.leave(rows)
        self.state.reset(rows, [self.prompts.tokens[index] for index in chosen], checked=True)
        for row, index in zip(rows.tolist(), chosen, strict=True):
            self._prompts[row] = self.prompts.prompts[index]
        self.prompt_index[rows] = prompt_indices
        self.group[rows] = prompt_indices if groups is None else groups
        self.number[rows] = [new_episode() for _ in chosen]
        for row in rows.tolist() if self.sessions.kept else ():
            self.sessions.begin(int(self.number[row]), self._prompts[row])
        self._failed_replies[rows] = 0
        if self._token_rewards is not None:
            self._token_rewards[rows] = 0.0

    def step(
        self, actions: Sequence[int] | IntArray, rows: Sequence[int] | IntArray | None = None, *, wait: bool = True
    ) -> None:
        """Let `rows` (all by default) each take an action; see `TokenState.step`.

        Args:
            actions: see there.
            rows: see there.
            wait: for replies that are being made in the background (`Task.slow_replies`). Without, their rows are
                `waiting` until `answered` says that they no longer are.
        """
        self.state.step(actions, rows)
        self._note_left_out()
        while wait and self._background.num_open:
            self.answered(block=True)

    @property
    def waiting(self) -> BoolArray:
        """`[num_rows]` rows that wait for a reply: they neither run nor have ended."""
        return self._background.waiting

    def answered(self, *, block: bool) -> IntArray:
        """Rows that no longer wait for their replies, and have gone on or ended; with `block`, one at least."""
        came = self._background.collect(self.task.reply_timeout, block=block)
        for row, result in came:
            self.state.answer(row, self._settled(result))
            self._note_left_out()
        return np.array([row for row, _ in came], dtype=np.int64)

    def pay(self, rows: IntArray) -> FloatArray | None:
        """`[len(rows)]` what the task pays for the step that these rows have just made; None if it never does."""
        if self._token_rewards is None or not len(rows):
            return None
        paid = np.asarray(self._ask("token_reward", rows))
        if paid.shape != rows.shape or paid.dtype.kind not in "biuf" or not np.isfinite(paid).all():
            raise RewardError(
                f"the task {self.task.name} gave a token_reward of {paid!r}; expected a finite number for each of "
                f"{len(rows)} rows"
            )
        self._token_rewards[rows, self.state.num_actions[rows] - 1] = paid
        return paid.astype(np.float64)

    def action_mask(self, rows: IntArray) -> BoolArray | None:
        """`[len(rows), vocab_size]` which tokens the task allows next in these running rows; None if it allows all."""
        if not self.masks_actions:
            return None
        given = np.asarray(self._ask("action_mask", rows))
        expected = (len(rows), self.vocabulary.size)
        if given.shape != expected or given.dtype.kind not in "biu":
            raise ValueError(
                f"the task {self.task.name} gave an action_mask of shape {given.shape} of {given.dtype}; expected "
                f"bools [rows, vocab_size] = {expected}"
            )
        mask: BoolArray = np.require(given, np.bool_, ["C", "W"])  # of its own, where a task gives one row for all
        if not (allowed := mask.any(1)).all():
            row = int(rows[~allowed][0])
            raise ValueError(
                f"the task {self.task.name} allows no token at all next in {self.rollout(row)!r}: let `over` end the "
                "text there, or allow an end-of-sequence token"
            )
        return mask

    def prompt(self, row: int) -> Prompt:
        """The prompt that the episode in `row` began with."""
        return self._prompts[row]

    def session(self, row: int) -> Any:
        """What the task keeps for the episode in `row`."""
        return self.sessions.of(int(self.number[row]))

    def leave(self, rows: IntArray) -> None:
        """Give up the episodes in `rows` that have not ended: close their sessions."""
        left = rows[self.state.running[rows] | self.waiting[rows]]
        self._background.forget(left)
        for row in left.tolist() if self.sessions.kept else ():
            self.sessions.close(int(self.number[row]))

    def rollout(self, row: int) -> Rollout:
        """The episode in `row` as it stands, as a reward sees it."""
        state = self.state
        start, stop = int(state.prompt_length[row]), int(state.length[row])
        rollout = Rollout(
            prompt_tokens=state.tokens[row, :start].copy(),
            tokens=state.tokens[row, start:stop].copy(),
            metadata=self._prompts[row].metadata,
            end=END_OF_CODE[state.end[row]],
            is_action=state.is_action[row, start:stop].copy() if state.reply is not None else None,
            decode=self.vocabulary.decode,
            episode=int(self.number[row]),
            asked=self._prompts[row].text,
        )
        rollout.session = self.session(row)
        return rollout

    def episode(
        self,
        row: int,
        *,
        rollout: Rollout | None = None,
        score: Score = UNSCORED,
        log_probs: npt.NDArray[np.float32] | None = None,
        completion_index: int = 0,
        version: int = 0,
        action_masks: tuple[bytes, ...] | None = None,
    ) -> Episode:
        """The episode in `row`, which has ended; the rest of what an `Episode` holds is known to others."""
        state, paid = self.state, self._token_rewards
        return Episode(
            rollout=self.rollout(row) if rollout is None else rollout,
            score=score,
            log_probs=log_probs,
            token_rewards=None if paid is None else paid[row, : state.num_actions[row]].copy(),
            truncated=self.is_truncated(row),
            prompt_index=int(self.prompt_index[row]),
            group=int(self.group[row]),
            failed_replies=int(self._failed_replies[row]),
            completion_index=completion_index,
            version=version,
            action_masks=action_masks,
        )

    def is_truncated(self, row: int) -> bool:
        """Whether the text in `row` was cut off, and is to be valued instead of scored."""
        return self.state.is_truncated(row)

    def save(self, rows: IntArray) -> SavedEpisodes:
        """Copy some rows out; `restore` puts them back, into the same rows or others, or one into many."""
        return SavedEpisodes(
            self.state.save(rows),
            [self._prompts[row] for row in rows.tolist()],
            self.prompt_index[rows],
            self.group[rows],
            None if self._token_rewards is None else self._token_rewards[rows],
            self._failed_replies[rows],
            [self.sessions.copy(number) for number in self.number[rows].tolist()],
        )

    def restore(self, rows: IntArray, saved: SavedEpisodes) -> None:
        """Put saved rows back: one each, or a single one copied into all of them.

        Each goes on as an episode of its own, with a new `number`.
        """
        ours, theirs = (None if paid is None else paid.shape[1] for paid in (self._token_rewards, saved.token_rewards))
        if ours != theirs:
            raise ValueError(
                f"the saved rows have room for {theirs} rewards of single tokens, these for {ours}: they come from "
                "another kind of environment"
            )
        self.leave(rows)
        self.state.restore(rows, saved.state)
        self.prompt_index[rows] = saved.prompt_index
        self.group[rows] = saved.group
        self.number[rows] = [new_episode() for _ in rows]
        self._failed_replies[rows] = saved.failed_replies
        if self._token_rewards is not None:
            self._token_rewards[rows] = saved.token_rewards
        for place, row in enumerate(rows.tolist()):
            source = place if len(saved) > 1 else 0
            self._prompts[row] = saved.prompts[source]
            if self.sessions.kept:
                number = int(self.number[row])
                self.sessions.restore(number, saved.sessions[source], self.rollout(row), self._prompts[row])

    def ended(self, rows: IntArray) -> IntArray:
        """Those of `rows` whose episode is over."""
        ended: IntArray = rows[self.state.end[rows] != RUNNING]
        return ended

    def _over(self, state: TokenState, rows: IntArray) -> BoolArray:
        answer: BoolArray = self._ask("over", rows)
        return answer

    def _ask(self, method: Literal["over", "token_reward", "action_mask"], rows: IntArray) -> Any:
        """Ask the task about several episodes; an error in its answer is not that of one of them."""
        try:
            return getattr(self.task, method)(self, rows)
        except Exception as error:
            raise TaskError(
                f"`{method}` of the task {self.task.name} raised {type(error).__name__}: {error} (asked about rows "
                f"{rows.tolist()}). The step was left in the middle: mend the task, and reset the rows before another"
            ) from error

    def _reply(self, state: TokenState, row: int) -> IntArray | Later | None:
        rollout = self.rollout(row)
        self.task.replies.called()
        if self.task.slow_replies:
            for turn in rollout.turns:
                turn.text  # noqa: B018  (read here: a tokenizer may serve one thread only)
            self._background.ask(row, rollout, self.task.reply)
            return LATER
        return self._settled(Asked(rollout, row).answered_by(self.task.reply))

    def _settled(self, asked: Asked) -> IntArray | None:
        """The tokens of a reply; of one that has failed, what answers failures."""
        replies, error = self.task.replies, asked.error
        if error is None:
            try:
                tokens = None if asked.reply is None else self._reply_tokens(asked.reply, asked.rollout)
            except Exception as unusable:
                error = unusable
        if error is not None:
            self._failed_replies[asked.row] += 1
            what = "its episode ended there" if self._answer_to_failure is None else "was answered by on_reply_error"
            replies.failed(Failure.of(asked.rollout, error), what, error)
            return self._answer_to_failure
        replies.succeeded()
        return tokens

    def _note_left_out(self) -> None:
        for row, length in self.state.left_out.items():
            self.task.replies.left_out(length, int(self.state.length[row]), self.state.context)

    def _reply_tokens(self, reply: str | Sequence[int] | Sequence[Message], rollout: Rollout | None = None) -> IntArray:
        if isinstance(reply, str):
            # In the middle of a text, the special tokens that a tokenizer puts around one would be out of place.
            return self.vocabulary.encode(reply, add_special_tokens=False)
        if rollout is not None and isinstance(reply, Sequence) and len(reply) and isinstance(reply[0], Mapping):
            return self.vocabulary.encode_turn(reply, ended=rollout.end is End.EOS)  # type: ignore[arg-type]
        return as_token_ids(reply, self.vocabulary.size, "a task's reply")

    def _checked_answer(self) -> IntArray | None:
        """The tokens of the task's `on_reply_error`."""
        answer = self.task.on_reply_error
        if answer is not None and not isinstance(answer, str):
            raise TypeError(
                f"on_reply_error of the task {self.task.name} is {answer!r}; expected the text that answers the agent "
                "when `reply` fails, or None to end the episode there"
            )
        return None if answer is None else self._reply_tokens(answer)
