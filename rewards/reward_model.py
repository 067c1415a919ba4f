"""What a trained model thinks of a text: `RewardModel`, of one model or of several."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rewards.base import Reward
from rewards.combine import Ensemble
from rewards.members import have_one_base, over_one_base, share_equal_weights
from rewards.named import register_reward
from rewards.portions import portions
from rewards.rollout import Rollout
from rewards.score import Score
from rewards.weights import cast_weights, lent_to

Asked = str | Sequence[Mapping[str, Any]]

START = "reward_start"
"""Where the configuration of a reward model says which weights it began with."""
MEAN, DEVIATION = "reward_mean", "reward_deviation"
"""Where the configuration of a reward model keeps the mean of its values of reference texts, and their deviation."""


def written_out(asked: Asked, answer: str, tokenizer: Any) -> str:
    """A prompt and an answer as a reward model reads them: by its chat template, where it has one.

    Examples:
        >>> from types import SimpleNamespace
        >>> plain = SimpleNamespace(chat_template=None)
        >>> written_out("6 * 7 = ", "42", plain)
        '6 * 7 = 42'
        >>> written_out([{"role": "user", "content": "6 * 7?"}], "42", plain)
        'user: 6 * 7?\\n\\nassistant: 42'
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(each) for each in asked]
        answered = [*messages, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(answered, tokenize=False))
    if isinstance(asked, str):
        return asked + answer
    return "\n\n".join([*(f"{each['role']}: {each['content']}" for each in asked), f"assistant: {answer}"])


def tokens_of(text: str, tokenizer: Any, max_length: int) -> list[int]:
    """Its tokens; of a longer text the last ones, where the answer stands.

    Tokens that fill up batches are left out at the end, as models would not look at them.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids.pop()
    return ids[-max_length:]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars and reports, which are of no news where a model is loaded or written as it should."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class Member:
    """One reward model, in memory.

    Args:
        folder: a model for sequence classification with one value, and its tokenizer, as transformers saves them; or
            its id on the hub.
        max_length: of a text, in tokens.
        dtype: of its weights.
        device: where it computes.

    Attributes:
        adapter: which of the model's adapters it is, where several members are one model.
    """

    def __init__(self, folder: str, max_length: int, dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        with quietly():
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
        if model.config.num_labels != 1:
            raise ValueError(
                f"{folder} gives {model.config.num_labels} values of a text, but a reward model gives one: train one "
                "with llm-env reward-model"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        self.model = model.to(device).eval()
        self.adapter: str | None = None
        self.max_length = max_length
        self.mean = float(getattr(model.config, MEAN, 0.0))
        self.deviation = float(getattr(model.config, DEVIATION, 1.0))

    def values(self, texts: Sequence[tuple[Asked, str]], batch_size: int) -> np.ndarray:
        """`[len(texts)]` its values of prompts with answers; texts of like lengths are read together."""
        import torch

        tokens = [
            tokens_of(written_out(asked, answer, self.tokenizer), self.tokenizer, self.max_length)
            for asked, answer in texts
        ]
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        found = np.zeros(len(tokens))
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)
        with torch.no_grad():
            for begin, end in portions([len(tokens[index]) for index in order], batch_size):
                chosen = order[begin:end]
                found[chosen] = values_of(self.model, [tokens[index] for index in chosen]).float().cpu().numpy()
        return found


def loaded(folders: Sequence[str], max_length: int, dtype: str, device: str) -> list[Member]:
    """Several members; what they have in common is in memory once."""
    if have_one_base(folders):
        return _over_one_base(folders, max_length, dtype, device)
    members: list[Member] = []
    for folder in folders:
        member = Member(folder, max_length, dtype, device)
        if members:
            share_equal_weights(member.model, members[0].model)
        members.append(member)
    return members


def _over_one_base(folders: Sequence[str], max_length: int, dtype: str, device: str) -> list[Member]:
    import torch
    from transformers import AutoConfig

    first = Member(folders[0], max_length, "float32", "cpu")  # in bfloat16, adapters could not be taken out again
    first.model = cast_weights(over_one_base(first.model, folders), getattr(torch, dtype)).to(device).eval()
    members = []
    for number, folder in enumerate(folders):
        config = AutoConfig.from_pretrained(folder)
        member = copy.copy(first)
        member.adapter = str(number)
        member.mean, member.deviation = float(getattr(config, MEAN, 0.0)), float(getattr(config, DEVIATION, 1.0))
        members.append(member)
    return members


def averaged(members: Iterable[Member]) -> Member:
    """One model with the means of all their weights, standardised by the means of what they are standardised by.

    It makes sense of models that have begun with the same weights, as those of `llm-env reward-model` have.
    """
    import torch

    each = iter(members)
    first = next(each)
    means, deviations = [first.mean], [first.deviation]
    for other in each:  # one after the other, so that no more than two are in memory
        if getattr(other.model.config, START, None) != getattr(first.model.config, START, None):
            raise ValueError(
                "how='weights' takes the mean of weights, but these reward models have not begun with the same ones: "
                "use how='mean'"
            )
        means.append(other.mean)
        deviations.append(other.deviation)
        with torch.no_grad():
            for name, weight in first.model.named_parameters():
                weight.lerp_(other.model.get_parameter(name), 1 / len(means))
    first.mean, first.deviation = float(np.mean(means)), float(np.mean(deviations))
    return first


def values_of(model: Any, tokens: Sequence[Sequence[int]]) -> Any:
    """`[len(tokens)]` a model's values of texts, filled up to the longest of them."""
    import torch

    longest = max(1, *map(len, tokens))
    pad = model.config.pad_token_id
    ids = torch.tensor([[*each, *[pad] * (longest - len(each))] for each in tokens], device=model.device)
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in tokens], device=model.device)
    return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


@register_reward("reward_model")
class RewardModel(Reward):
    """The value that a reward model gives a text after its prompt; of several models, what they make of it together.

    Any model for sequence classification with one output will do, such as those of `llm-env reward-model` and of TRL.
    A model reads the prompt as the task wrote it, by its own chat template. Values are standardised where the model
    knows its mean and deviation of reference texts, as ours do; so members of an ensemble count alike.

    Parts of an ensemble's score are its "disagreement" (the members' standard deviation), and with `held_out` what the
    last member thinks, "held_out": it is never optimised, so when it falls while the reward rises, the policy has
    found what the others are wrong about.

    Args:
        path: a model's folder or hub id; several with commas between them, or in a list; or a folder of members, or of
            rounds (round-1, round-2 and so on) with members, of which the last round counts.
        how: the members make one score, see `rewards.Ensemble`; or "weights": one model with the means of their
            weights, which costs no more than one, and knows of no disagreement.
        k: see there, too.
        steps: what ends a step, such as a line break. Each step is then paid when it is written, by how much it has
            raised the value of the text so far; together they are paid what the text is worth.
        held_out: the last member is an alarm and no judge.
        batch_size: texts that are read at once.
        max_length: tokens of a text; of longer ones the beginning is left out.
        dtype: of the weights, such as "bfloat16".
        device: such as "cuda"; by default a GPU where there is one.
        offload: keep the weights in the machine's memory, and on the device only while texts are scored.

    Examples:
        >>> RewardModel("no-such-folder")
        Traceback (most recent call last):
        FileNotFoundError: there is no reward model in no-such-folder: expected ...
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        how: Literal["mean", "min", "mean-std", "weights"] = "mean-std",
        k: float = 2.0,
        steps: str | None = None,
        held_out: bool = False,
        batch_size: int = 32,
        max_length: int = 1024,
        dtype: str = "float32",
        device: str | None = None,
        offload: bool = False,
    ) -> None:
        self.paths = members_in(path)
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size and max_length must be at least 1, got {batch_size} and {max_length}")
        if held_out and len(self.paths) < 2:
            raise ValueError(f"held_out sets one of several members aside, but {path!r} is a single reward model")
        self.held_out = held_out
        if steps == "":
            raise ValueError("steps is empty, expected what ends a step, such as a line break")
        self.how, self.steps = how, steps
        self._rule = Ensemble([_nothing] * (len(self.paths) - held_out), "mean" if how == "weights" else how, k)
        self.batch_size = batch_size
        self._how = (max_length, dtype, device)
        self.offload = offload
        self._members: list[Member] = []

    def __reduce__(self) -> tuple[Any, ...]:
        max_length, dtype, device = self._how
        rest = {"held_out": self.held_out, "batch_size": self.batch_size, "max_length": max_length, "dtype": dtype}
        rest["offload"] = self.offload
        given = {"how": self.how, "k": self._rule.k, "steps": self.steps, "device": device, **rest}
        return _made, (self.paths, given)

    @property
    def device(self) -> str:
        """Where it computes."""
        import torch

        return self._how[2] or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def members(self) -> list[Member]:
        """The models, which are loaded when they are first asked for."""
        if not self._members:
            max_length, dtype, _ = self._how
            device = "cpu" if self.offload else self.device
            if self.how == "weights":
                each = (Member(path, max_length, dtype, device) for path in self.paths)
                judges = itertools.islice(each, len(self.paths) - self.held_out)
                self._members = [averaged(judges), *each]
            else:
                self._members = loaded(self.paths, max_length, dtype, device)
        return self._members

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score several rollouts."""
        return self._of_texts(rollouts) if self.steps is None else self._of_steps(rollouts, self.steps)

    def _of_texts(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """What whole texts are worth."""
        texts = [(rollout.asked, rollout.text) for rollout in rollouts]
        with lent_to(self.device, *(member.model for member in self.members)):
            each = [(member.values(texts, self.batch_size) - member.mean) / member.deviation for member in self.members]
        return [self._together(rollout, *values) for rollout, *values in zip(rollouts, *each, strict=True)]

    def _of_steps(self, rollouts: Sequence[Rollout], mark: str) -> list[Score]:
        """What each step adds to the value, where it ends."""
        ends = [rollout.steps(mark) or [0] for rollout in rollouts]
        texts = [rollout.before(end) for rollout, of in zip(rollouts, ends, strict=True) for end in of]
        whole = self._of_texts(texts)
        scores, at = [], 0
        for rollout, of in zip(rollouts, ends, strict=True):
            here = whole[at : at + len(of)]
            at += len(of)
            if not rollout.num_actions:
                scores.append(here[-1])
                continue
            paid = np.zeros(rollout.num_actions)
            paid[np.array(of) - 1] = np.diff([score.value for score in here], prepend=0.0)
            scores.append(Score(0.0, {**here[-1].parts, "steps": float(len(of))}, paid))
        return scores

    def close(self) -> None:
        """Free the models; they are loaded again when they are needed."""
        self._members = []

    def _together(self, rollout: Rollout, *values: float) -> Score:
        judges = [Score(float(value)) for value in (values[:-1] if self.held_out else values)]
        parts = {"held_out": float(values[-1])} if self.held_out else {}
        if len(judges) > 1:
            parts["disagreement"] = float(np.std([score.value for score in judges]))
        return Score(self._rule.combine(judges, rollout)[0], parts)


def members_in(path: str | Sequence[str]) -> list[str]:
    """The folders of the members; those of one folder by their names, and of a folder of rounds the last round's.

    Examples:
        >>> members_in("org/one, org/two")
        ['org/one', 'org/two']
    """
    names = [name.strip() for name in path.split(",")] if isinstance(path, str) else [str(each) for each in path]
    if not all(names) or not names:
        raise ValueError(f"expected the folder of a reward model, or several with commas between them, got {path!r}")
    if len(names) == 1 and not (Path(names[0]) / "config.json").is_file():
        rounds = sorted(Path(names[0]).glob("round-*"), key=lambda each: int(each.name.removeprefix("round-")))
        folder = rounds[-1] if rounds else Path(names[0])
        members = sorted(str(each.parent) for each in folder.glob("member-*/config.json"))
        if members:
            return members
    for name in names:
        if not (Path(name) / "config.json").is_file() and (Path(name).exists() or name.count("/") != 1):
            raise FileNotFoundError(
                f"there is no reward model in {name}: expected a folder with a config.json, one with folders member-1, "
                "member-2 and so on, or the id of a model on the hub"
            )
    return names


def _made(paths: list[str], given: dict[str, Any]) -> RewardModel:
    return RewardModel(paths, **given)


def _nothing(rollout: Rollout) -> float:
    return 0.0
