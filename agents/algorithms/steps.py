"""Optimizer steps whose loss or gradient is not finite are left out; too many in a row end the run."""

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


_STEP_HINTS = """\
  - a lower learning rate: --actor.learning-rate, --critic.learning-rate, with some --actor.warmup
  - shorter gradients: --actor.max-gradient-norm, --critic.max-gradient-norm
  - full precision: --model.dtype float32, and no --model.autocast
  - smaller rewards: --reward.scale or --reward.clip, if their size is far from 1
"""
_REWARD_HINTS = """\
  - a reward function that gives a finite number for any text, also for an empty one
  - --task.reward-timeout, if it is one that may hang
"""


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class StepCheck:
    """Asked before each optimizer step whether it may be taken.

    A step whose loss or gradient norms are not finite is counted, and its mini-batch is kept in `out/skipped` with a
    small JSON beside it that says why: the newest ten, and of one row of failures the first ten. After `max_skipped`
    in a row, `TrainingDiverged` is raised.

    Args:
        out: the run's folder.
        max_skipped: how many in a row end the run.

    Attributes:
        skipped: how many steps were refused so far.
        in_a_row: how many of them since the last good one.

    Examples:
        >>> import tempfile
        >>> from tensordict import TensorDict
        >>> check = StepCheck(Path(tempfile.mkdtemp()), max_skipped=5)
        >>> batch = TensorDict({"reward": torch.tensor([1.0, float("inf")])}, batch_size=2)
        >>> check.allows(torch.tensor(0.5), [1.0], batch, iteration=1, where="policy")
        True
        >>> check.allows(torch.tensor(float("nan")), [1.0], batch, iteration=1, where="policy")
        False
        >>> check.skipped, check.in_a_row
        (1, 1)
    """

    def __init__(self, out: Path, max_skipped: int) -> None:
        if max_skipped < 1:
            raise ValueError(f"max_skipped must be at least 1 (the first bad step ends the run), got {max_skipped}")
        self.folder = out / "skipped"
        self.max_skipped = max_skipped
        self.skipped = 0
        self.in_a_row = 0
        self._iteration = -1
        self._of_iteration = 0
        self._first = ""

    def allows(
        self,
        loss: Tensor,
        gradient_norms: Sequence[Tensor | float],
        batch: TensorDictBase,
        iteration: int,
        where: str,
    ) -> bool:
        """True if the step may be taken; False if it must be left out, gradients and all.

        Args:
            loss: of the mini-batch, any shape.
            gradient_norms: one for each optimizer; none if they are not computed yet.
            batch: the mini-batch, as it is to be kept if it is to blame.
            iteration: which one.
            where: what was about to be done, such as "policy"; if it begins with "reward", the advice is about rewards.
        """
        numbers = [loss.detach().double().flatten()]
        numbers += [torch.as_tensor(norm, dtype=torch.float64, device=loss.device).flatten() for norm in gradient_norms]
        if bool(torch.cat(numbers).isfinite().all()):  # the only place that waits for the device
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        self._of_iteration = self._of_iteration + 1 if iteration == self._iteration else 1
        self._iteration = iteration
        why = _in_words(loss, gradient_norms)
        if self.in_a_row <= KEPT:
            path = self._save(batch, {"iteration": iteration, "where": where, "why": why})
            if self.in_a_row == 1:
                self._first = path.name
        if self.in_a_row >= self.max_skipped:
            first = self.folder / self._first
            raise TrainingDiverged(
                f"{self.in_a_row} steps in a row were not finite; the last ({where}, iteration {iteration}): {why}.\n"
                f"What to try, the likeliest first:\n{_REWARD_HINTS if where.startswith('reward') else _STEP_HINTS}"
                f"  - a look at the first of them: {first.with_suffix('.json')} says what was not finite,\n"
                f"    and safetensors.torch.load_file({str(first)!r}) is the batch\n"
                f"Go on from the last checkpoint with --resume; --guard.max-skipped (now {self.max_skipped}) sets how "
                "many are borne."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON can hold them."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where another check was."""
        self.skipped, self.in_a_row, self._first = state["skipped"], state["in_a_row"], state["first"]

    def _save(self, batch: TensorDictBase, reason: dict[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"iteration-{self._iteration:06d}-{self._of_iteration}.safetensors"
        tensors = _flat(batch)
        reason["not_finite"] = {
            name: count for name, tensor in tensors.items() if (count := int((~tensor.isfinite()).sum()))
        }
        with replace_file(path) as new:
            save_file(tensors, new)
        path.with_suffix(".json").write_text(json.dumps(reason, indent=2) + "\n", encoding="utf-8")
        order = sorted(self.folder.glob("iteration-*.safetensors"), key=_order)
        for old in order[:-KEPT]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
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
