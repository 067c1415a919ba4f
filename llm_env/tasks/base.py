"""What a task is: its prompts, when an episode of it ends, and what the text is worth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from llm_env.tasks.replies import Replies
from llm_env.tokens.arrays import BoolArray, FloatArray, IntArray
from llm_env.tokens.chat import Message
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.state import TokenState
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Reward, Rollout, Score, as_reward

Splits = Mapping[str, Sequence[Prompt]]
_PATIENCE = 1000  # so many repeated samples in a row mean that a task has no further prompts


class Episodes(Protocol):
    """The episodes that a task is asked about while they are being written, side by side in rows.

    Attributes:
        state: their tokens, see `TokenState`.

    Examples:
        >>> class FirstWord(Task):
        ...     def over(self, episodes, rows):
        ...         return np.array([" " in episodes.rollout(row).text for row in rows])
        ...     def token_reward(self, episodes, rows):
        ...         return np.array([-0.01 * len(episodes.prompt(row).metadata["answer"]) for row in rows])
    """

    state: TokenState

    def prompt(self, row: int) -> Prompt:
        """The prompt of the episode in a row, with its metadata."""

    def session(self, row: int) -> Any:
        """What the task keeps for the episode in a row, see `Task.session`."""

    def rollout(self, row: int) -> Rollout:
        """The episode in a row as it stands, as a reward sees it."""


class TaskError(RuntimeError):
    """A method of a task that decides about running episodes has failed; the error itself is the `__cause__`.

    `over`, `token_reward` and `action_mask` are asked about many episodes at once: which of them is at fault cannot be
    told, so none is passed over. A `reply` that fails costs its own episode only, see `Task.on_reply_error`.

    Examples:
        >>> from llm_env import Prompt, TokenMDP
        >>> class Broken(Task):
        ...     def splits(self):
        ...         return {"train": [Prompt("1+1=")]}
        ...     def score(self, rollout):
        ...         return 1.0
        ...     def over(self, episodes, rows):
        ...         return 1 / 0
        >>> mdp = TokenMDP(Broken())
        >>> _ = mdp.reset()
        >>> try:
        ...     mdp.step([5])
        ... except TaskError as error:
        ...     print(str(error).partition(" (")[0])
        `over` of the task Broken raised ZeroDivisionError: division by zero
    """


class Task:
    """A language task. Subclass it and say where prompts come from and how a finished text is scored.

    Prompts: write `sample(rng)`, which makes up one prompt, or `splits()`, which returns those you have.
    Score: set `reward` to a reward (or a sum of them), or write `score(rollout)`.

    Class attributes (an instance may set its own):
        max_new_tokens: how many tokens the agent may write in an episode.
        max_prompt_tokens: the longest prompt expected.
        max_reply_tokens: how many tokens the task replies in an episode, at most, all replies together. The default
            context is the sum of the three; a reply that finds no room in the context ends its episode.
        stop: strings, or sequences of token ids, that end the text.
        when_cut: what becomes of a text that has used up its budget, or the context. "score": it is taken as it stands,
            scored, and the episode terminates. "bootstrap": it is not scored, the episode is truncated, and the learner
            is to value its last state. Never both: a score and a bootstrapped value would count the text twice.
        chat: prompts go through the tokenizer's chat template; None: where the tokenizer has one.
        slow_replies: `reply` waits for something, such as a process or a network: it is called in a thread of its own,
            and other texts go on meanwhile. It must be safe to call for several episodes at once.
        reply_timeout: seconds after which a slow reply has failed; None: never.
        on_reply_error: what the agent is answered when `reply` fails; None: the episode ends there.
        hint_names: what `hints` tells the critic about a state, a name for each number.
        reward: the reward of a finished rollout. One that is made of the task's own methods (a sum of them, say) is
            best made in `setup`: what is made in `__init__` belongs to a task that has no vocabulary yet.
        num_train: how many prompts `sample` makes for the split "train".
        num_test: how many for the held-out split "test". No training prompt repeats one of them.
        seed: of the prompts made. It is not the seed of the environment: the task stays the same between runs.

    Args:
        num_train: in place of the class's.
        num_test: in place of the class's.
        seed: in place of the class's.

    Examples:
        >>> class Shout(Task):
        ...     max_new_tokens = 8
        ...     def sample(self, rng):
        ...         word = "".join(rng.choice(list("abc"), size=4))
        ...         return Prompt(f"shout {word}: ", {"answer": word.upper()})
        ...     def score(self, rollout):
        ...         return float(rollout.text == rollout.metadata["answer"])
        >>> task = Shout(num_train=5, num_test=2)
        >>> len(task.prompts("train")), len(task.prompts("test"))
        (5, 2)
    """

    max_new_tokens: int = 64
    max_prompt_tokens: int = 192
    max_reply_tokens: int = 0
    stop: Sequence[str | Sequence[int]] = ()
    when_cut: Literal["score", "bootstrap"] = "score"
    chat: bool | None = False
    slow_replies: bool = False
    reply_timeout: float | None = None
    on_reply_error: str | None = None
    hint_names: Sequence[str] = ()
    reward: Reward | Callable[[Rollout], float] | None = None

    name: ClassVar[str]
    num_train: int = 4096
    num_test: int = 256
    seed: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __init__(self, *, num_train: int | None = None, num_test: int | None = None, seed: int | None = None) -> None:
        self.num_train = self.num_train if num_train is None else num_train
        self.num_test = self.num_test if num_test is None else num_test
        self.seed = self.seed if seed is None else seed
        if self.num_train < 1 or self.num_test < 0:
            raise ValueError(
                f"num_train must be at least 1 and num_test at least 0, got {self.num_train} and {self.num_test}"
            )

    # What a task writes.

    def sample(self, rng: np.random.Generator) -> Prompt:
        """Make up one prompt."""
        raise NotImplementedError(f"the task {self.name} has neither `sample` nor `splits`: write one of them")

    def splits(self) -> Splits:
        """The prompts, by split: "train", and under other names those held out.

        Whatever this returns, training prompts that repeat a held-out one are left out.
        """
        wanted = self.num_train + self.num_test
        rng = np.random.default_rng(self.seed)
        found: dict[str, Prompt] = {}
        repeated = 0
        while len(found) < wanted and repeated < _PATIENCE:
            prompt = Prompt.of(self.sample(rng))
            repeated = repeated + 1 if prompt.identity in found else 0
            found.setdefault(prompt.identity, prompt)
        prompts = list(found.values())
        # The held-out prompts come first, so that asking for more training prompts does not change them.
        held_out = self.num_test if len(prompts) == wanted else min(self.num_test, len(prompts) // 5)
        return {"train": prompts[held_out:], "test": prompts[:held_out]}

    def score(self, rollout: Rollout) -> float | Score:
        """What a finished text is worth. Not called where `reward` is set.

        It is asked of the very task that `reply` and the others are asked of, with its vocabulary, and finds what they
        and `setup` have written on `self`; `rollout.episode` says which episode it is.
        """
        raise NotImplementedError

    # What a task may write.

    def setup(self, vocabulary: Vocabulary) -> None:
        """Prepare for the tokens of one environment; `self.vocabulary` is set by then."""

    def session(self, prompt: Prompt) -> Any:
        """Begin what this task keeps for one episode: a game's board, a tool's state, a conversation.

        `reply` and `score` find it under `rollout.session`, and those that are asked about many episodes under
        `episodes.session(row)`. Once the episode has been scored, or is given up, its `close()` is called, if it has
        one. Where an episode is copied (`TokenMDP.save`), it is copied by `copy.deepcopy`; one that cannot be copied is
        begun anew, and told the agent's turns again by `reply`.

        What it does at random it must draw from what the prompt says (a seed in the metadata), or two runs with one
        seed differ.

        Examples:
            >>> class HigherOrLower(Task):
            ...     stop, max_reply_tokens = ("!",), 40
            ...     def sample(self, rng):
            ...         return Prompt("Guess: ", {"secret": int(rng.integers(1, 10))})
            ...     def session(self, prompt):
            ...         return {"guesses": 0, **prompt.metadata}
            ...     def reply(self, rollout):
            ...         rollout.session["guesses"] += 1
            ...         guess, secret = int(rollout.turns[-1].text), rollout.session["secret"]
            ...         return None if guess == secret else "higher: " if guess < secret else "lower: "
            ...     def score(self, rollout):
            ...         return 1 / rollout.session["guesses"]
        """
        raise NotImplementedError

    def over(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """`[len(rows)]` which of these episodes the task ends after the step that they have just made.

        As it speaks of many episodes at once, an error in it is no affair of one of them: it ends the program. So do
        errors in `token_reward` and `action_mask`.
        """
        raise NotImplementedError

    def reply(self, rollout: Rollout) -> str | Sequence[int] | Sequence[Message] | None:
        """The answer to an agent that has ended its turn (a tool's output, the next question), or None to end there.

        It is called only when a turn ends, with what was written so far: `rollout.turns`, of which the last is the one
        that has ended. The episode goes on after a reply. A string is encoded as it is; chat messages, such as
        `[{"role": "user", "content": "Go on."}]`, go through the model's own chat template. Say in `max_reply_tokens`
        how much room replies need.

        What it remembers of an episode is best a `session`. What it keeps elsewhere, it finds again under
        `rollout.episode`. A number that it does not know comes
        with the first turn of an episode, or with a copy of one (see `rewards.Rollout`), which has more turns already.

        If it raises, or gives anything but text, token ids or None, the episode goes on or ends as `on_reply_error`
        says, the failure is counted in `replies` and logged (logger "llm_env"), and the other episodes do not notice.
        A `reply` that has failed twenty times by the same error and never worked is an `AlwaysFailsError`.
        """
        raise NotImplementedError

    def token_reward(self, episodes: Episodes, rows: IntArray) -> FloatArray:
        """`[len(rows)]` reward of the step that these episodes have just made, besides the score at the end."""
        raise NotImplementedError

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """`[len(rows), vocab_size]` which tokens may be chosen next in these episodes, at least one in each."""
        raise NotImplementedError

    def hints(self, rollout: Rollout) -> Sequence[float]:
        """What the critic may know about a state, and the policy does not see: a number for each of `hint_names`.

        A task mostly knows on the way what it will pay for at the end: whether all is right so far, how far the goal
        is. A critic that is told so need not find it out, and says at once which token was a mistake. The policy is
        paid as before: hints change no reward, and nobody needs them once it is trained.

        It is asked about each state of a finished episode that a critic learns from, as the episode stood then
        (`rollout.before`); `rollout.end` is "running" but in the last. That is once a token, each time with all the
        text up to there: where texts are long, keep it cheap.

        Examples:
            >>> class Spell(Task):
            ...     hint_names = ("right_so_far",)
            ...     def hints(self, rollout):
            ...         return [rollout.metadata["answer"].startswith(rollout.text)]
            >>> written = Rollout.of("ct", metadata={"answer": "cat"})
            >>> [Spell().hints(written.before(action)) for action in range(3)]
            [[True], [True], [False]]
        """
        raise NotImplementedError

    def deal(self, indices: IntArray, groups: IntArray) -> IntArray:
        """Choose other training prompts than those that are next in order, as a curriculum does.

        Args:
            indices: the prompts that are next, by their numbers in the split "train".
            groups: which of them are to be the same prompt.

        Returns:
            As many numbers of prompts, alike where the groups are.
        """
        raise NotImplementedError

    def finished(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
        """Take note of texts of the split "train" that have been scored.

        What a task learns from them, it keeps for `--resume` in a `state_dict`, which `load_state_dict` takes back.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What this task must remember when a run is resumed, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember it."""

    # What the library asks of a task.

    def prompts(self, split: str) -> Sequence[Prompt]:
        """The prompts of one split."""
        if split not in self._splits:
            raise ValueError(f"the task {self.name} has no split {split!r}; it has {sorted(self._splits)}")
        prompts = self._splits[split]
        if not len(prompts):
            raise ValueError(f"the split {split!r} of the task {self.name} has no prompts")
        return prompts

    def bind(self, vocabulary: Vocabulary) -> Self:
        """A copy of this task, set up for a vocabulary (one task may serve several environments).

        It shares what this task holds, but counts its own replies; and a method of this task that is kept in an
        attribute, such as `self.reward = self.judge`, becomes the copy's.
        """
        if self.overrides("hints") != bool(self.hint_names):
            raise ValueError(
                f"the task {self.name} has hint_names {tuple(self.hint_names)} and "
                f"{'a' if self.overrides('hints') else 'no'} method `hints`: write both, with a name for each number "
                "that `hints` gives, or neither"
            )
        bound = type(self).__new__(type(self))
        self._splits  # noqa: B018  (made once, shared by the copies)
        for name, value in self.__dict__.items():
            own = inspect.ismethod(value) and value.__self__ is self
            bound.__dict__[name] = value.__func__.__get__(bound) if own else value
        bound.__dict__.pop("replies", None)
        bound.vocabulary = vocabulary
        bound.setup(vocabulary)
        return bound

    def overrides(self, method: str) -> bool:
        """Whether this task writes one of the optional methods."""
        return getattr(type(self), method) is not getattr(Task, method)

    @cached_property
    def replies(self) -> Replies:
        """How this task's replies went so far."""
        return Replies(self.name)

    def default_context(self, max_new_tokens: int) -> int:
        """How many tokens a prompt, this many of the agent's and all replies may have together."""
        if self.overrides("reply") and self.max_reply_tokens < 1:
            raise ValueError(
                f"the task {self.name} replies, but has max_reply_tokens={self.max_reply_tokens}, so that the default "
                "context has no room for what it replies: set max_reply_tokens to how many tokens all replies of an "
                "episode may have together, or give a context"
            )
        return self.max_prompt_tokens + max_new_tokens + self.max_reply_tokens

    def as_reward(self) -> Reward:
        """The reward of this task: `reward` if set, else `score`."""
        # A plain function in the class body is a reward too; looked up on an instance it would become a method.
        static = inspect.getattr_static(self, "reward")
        given = static if inspect.isfunction(static) else self.reward
        if given is not None:
            return as_reward(given)
        if not self.overrides("score"):
            raise NotImplementedError(f"the task {self.name} has neither `reward` nor `score`: write one of them")
        return as_reward(self.score)

    vocabulary: Vocabulary

    @cached_property
    def _splits(self) -> Splits:
        splits = {name: [Prompt.of(row) for row in rows] for name, rows in self.splits().items()}
        held_out = {prompt.identity for name, prompts in splits.items() if name != "train" for prompt in prompts}
        if "train" in splits and held_out:
            splits["train"] = [prompt for prompt in splits["train"] if prompt.identity not in held_out]
        return splits
