"""What is not finite is left out: optimizer steps, and batches without rewards. Too many in a row end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tensordict import TensorDictBase

from llm_env.files import replace_file

Tensor = torch.Tensor

KEPT = 10
"""How many offending batches are kept."""

REWARD = "reward"
"""The name under which failures of the reward are counted."""

_STEP_HINTS = """\
  - a lower learning rate: --actor.learning-rate, --critic.learning-rate, with some --actor.warmup
  - shorter gradients: --actor.max-gradient-norm, --critic.max-gradient-norm
  - full precision: --model.dtype float32 and --model.autocast off
  - smaller rewards: --reward.scale or --reward.clip, if their size is far from 1
"""
_REWARD_HINTS = """\
  - a reward function that gives a finite number for any text, also for an empty one
  - --task.reward-timeout, if it is one that may hang
"""


class TrainingDiverged(RuntimeError):
    """Too many times in a row a loss, a gradient or a reward was not finite."""


class StepCheck:
    """Asked before each optimizer step whether it may be taken, and told of rewards that are not numbers.

    A step whose loss or gradient norms are not finite is counted, and its mini-batch is kept in `out/skipped` with a
    small JSON beside it that says why: the newest ten, and of one row of failures the first ten. Each optimizer, and
    the reward, has a row of its own, for the good steps of one say nothing about the others. After `max_skipped` in a
    row of any of them, `TrainingDiverged` is raised.

    Args:
        out: the run's folder.
        max_skipped: how many in a row end the run.

    Attributes:
        skipped: how many steps were refused so far.
        unscored: how many batches were lost so far to rewards that are not numbers.
        in_a_row: how many failures each has had since its last good one, by name; those that have had none are missing.

    Examples:
        >>> import tempfile
        >>> from tensordict import TensorDict
        >>> check = StepCheck(Path(tempfile.mkdtemp()), max_skipped=5)
        >>> batch = TensorDict({"reward": torch.tensor([1.0, float("inf")])}, batch_size=2)
        >>> check.allows(torch.tensor(0.5), {"actor": 1.0}, batch, iteration=1)
        True
        >>> check.allows(torch.tensor(float("nan")), {"actor": 1.0}, batch, iteration=1)
        False
        >>> check.skipped, check.in_a_row
        (1, {'actor': 1})
    """

    def __init__(self, out: Path, max_skipped: int) -> None:
        if max_skipped < 1:
            raise ValueError(f"max_skipped must be at least 1 (the first bad step ends the run), got {max_skipped}")
        self.folder = out / "skipped"
        self.max_skipped = max_skipped
        self.skipped = 0
        self.unscored = 0
        self.in_a_row: dict[str, int] = {}
        self._first: dict[str, str] = {}  # the JSON of the first failure of each row
        self._iteration = -1
        self._of_iteration = 0

    def allows(
        self, loss: Tensor, gradient_norms: Mapping[str, Tensor | float], batch: TensorDictBase, iteration: int
    ) -> bool:
        """True if the step may be taken; False if it must be left out, gradients and all.

        If the gradients of some of the optimizers are finite, the failure is not counted as theirs.

        Args:
            loss: of the mini-batch, any shape.
            gradient_norms: of each optimizer that is about to step, by its name.
            batch: the mini-batch, as it is to be kept if it is to blame.
            iteration: which one.
        """
        numbers = [loss.detach().double().flatten()]
        numbers += [
            torch.as_tensor(norm, dtype=torch.float64, device=loss.device).flatten() for norm in gradient_norms.values()
        ]
        if bool(torch.cat(numbers).isfinite().all()):  # the only place that waits for the device
            for name in gradient_norms:
                self.in_a_row.pop(name, None)
            return True
        self.skipped += 1
        bad = [name for name, norm in gradient_norms.items() if not math.isfinite(norm)]
        reason = {
            "iteration": iteration,
            "where": " and ".join(gradient_norms),
            "why": _in_words(loss, list(gradient_norms.values())),
        }
        self._count(bad or list(gradient_norms), reason, batch)
        return False

    def reward_failed(self, error: Exception, iteration: int) -> None:
        """A batch could not be learned from, as its rewards were not numbers."""
        self.unscored += 1
        self._count([REWARD], {"iteration": iteration, "where": REWARD, "why": str(error)}, None)

    def reward_is_fine(self) -> None:
        """A batch had rewards: the row of those that had none has ended."""
        self.in_a_row.pop(REWARD, None)

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON can hold them."""
        return {
            "skipped": self.skipped,
            "unscored": self.unscored,
            "in_a_row": dict(self.in_a_row),
            "first": dict(self._first),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where another check was."""
        self.skipped, self.unscored = state["skipped"], state["unscored"]
        self.in_a_row, self._first = dict(state["in_a_row"]), dict(state["first"])

    def _count(self, names: Sequence[str], reason: dict[str, Any], batch: TensorDictBase | None) -> None:
        """One more failure in the rows of these; too many end the run."""
        iteration = reason["iteration"]
        self._of_iteration = self._of_iteration + 1 if iteration == self._iteration else 1
        self._iteration = iteration
        for name in names:
            self.in_a_row[name] = self.in_a_row.get(name, 0) + 1
        if min(self.in_a_row[name] for name in names) <= KEPT:
            path = self._save(reason, batch)
            self._first |= {name: path.name for name in names if self.in_a_row[name] == 1}
        for name in names:
            if self.in_a_row[name] >= self.max_skipped:
                raise TrainingDiverged(self._advice(name, reason))

    def _advice(self, name: str, reason: Mapping[str, Any]) -> str:
        row, first = self.in_a_row[name], self.folder / self._first[name]
        last = f"iteration {reason['iteration']}): {reason['why']}"
        if name == REWARD:
            what = f"the rewards of {row} batches in a row were not numbers; the last ({last}"
            look = f"  - a look at the first of them: {first} says which text it was\n"
        else:
            what = f"{row} steps of the {name} in a row were not finite; the last ({last}"
            look = (
                f"  - a look at the first of them: {first} says what was not finite,\n"
                f"    and safetensors.torch.load_file({str(first.with_suffix('.safetensors'))!r}) is the batch\n"
            )
        return (
            f"{what}.\nWhat to try, the likeliest first:\n{_REWARD_HINTS if name == REWARD else _STEP_HINTS}{look}"
            f"Go on from the last checkpoint with --resume; --guard.max-skipped (now {self.max_skipped}) sets how "
            "many are borne."
        )

    def _save(self, reason: dict[str, Any], batch: TensorDictBase | None) -> Path:
        """Keep what is known of a failure; the path of its JSON."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"iteration-{self._iteration:06d}-{self._of_iteration}.json"
        if batch is not None:
            tensors = _flat(batch)
            reason["not_finite"] = {
                name: count for name, tensor in tensors.items() if (count := int((~tensor.isfinite()).sum()))
            }
            with replace_file(path.with_suffix(".safetensors")) as new:
                save_file(tensors, new)
        path.write_text(json.dumps(reason, indent=2) + "\n", encoding="utf-8")
        for old in sorted(self.folder.glob("iteration-*.json"), key=_order)[:-KEPT]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)
        return path


def _order(path: Path) -> tuple[int, int]:
    _, iteration, number = path.stem.split("-")
    return int(iteration), int(number)


def _flat(batch: TensorDictBase) -> dict[str, Tensor]:
    """The tensors of a batch by their nested keys, joined by dots; entries that are no tensors are left out."""
    flat = {}
    for key, value in batch.items(include_nested=True, leaves_only=True):
        if isinstance(value, Tensor):
            name = key if isinstance(key, str) else ".".join(key)
            # A copy: safetensors refuses tensors that share their memory.
            flat[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return flat


def _in_words(loss: Tensor, gradient_norms: Sequence[Tensor | float]) -> str:
    parts = []
    bad = int((~loss.isfinite()).sum())
    if bad:
        parts.append(f"the loss is {float(loss):g}" if loss.numel() == 1 else f"{bad} of {loss.numel()} losses")
    norms = [float(norm) for norm in gradient_norms]
    if not all(map(math.isfinite, norms)):
        parts.append("the gradient norm is " + ", ".join(f"{norm:g}" for norm in norms))
    return " and ".join(parts)
