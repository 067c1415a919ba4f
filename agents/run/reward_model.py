"""Training reward models from beginning to end: checkpoints, the best of each, and what was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.config.checks import out_of_range
from agents.config.files import ConfigError, complain
from agents.config.reward_model import RewardModelConfig
from agents.preferences.pairs import Pair, folds_of, read_pairs
from agents.preferences.training import RewardTrainer
from agents.run.summary import rough_time
from agents.state.checkpoint import Checkpoint, latest_checkpoint, rng_state, save_checkpoint, set_rng_state
from llm_env.files import replace_file, replace_folder
from llm_env.models import load_tokenizer, model_folder
from rewards.reward_model import DEVIATION, MEAN, quietly

RESULTS = "reward-model.json"
"""What is known of a member; where it is there, the member is done."""


def train_reward_models(config: RewardModelConfig, resume: bool = False) -> list[dict[str, Any]]:
    """Train the members, one after the other; what was measured of each.

    Args:
        config: how.
        resume: go on where the same command was stopped; members that are done stay as they are.
    """
    complain([*out_of_range(config), *_contradictions(config)])
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }
    _claim(config.out, given, resume)
    pairs = read_pairs(config.pairs)
    train, test = pairs.split(config.validation, config.seed)
    folds = folds_of(train, config.members)
    if not all(folds) or (config.validation and not test):
        raise ConfigError(
            f"{config.pairs} has {len(pairs)} pairs of which {len(test)} are held out: too few for {config.members} "
            "reward models with pairs of their own. Use more pairs, fewer --members, or another --validation"
        )
    left_out = ", ".join(f"{count} left out for {reason}" for reason, count in pairs.left_out.items())
    print(f"{len(train)} pairs to learn from, {len(test)} held out" + (f"; {left_out}" if left_out else ""))
    for warning in pairs.warnings():
        print(f"warning: {warning}")
    found = []
    for number, fold in enumerate(folds, start=1):
        folder = config.out / f"member-{number}"
        if (folder / RESULTS).is_file():
            found.append(json.loads((folder / RESULTS).read_text()))
            print(f"member {number} is done already")
            continue
        member = dataclasses.replace(config, seed=config.seed + number - 1)
        found.append(_Member(member, folder, f"member {number} of {config.members}").train(fold, test))
    return found


class _Member:
    """One reward model on its way."""

    def __init__(self, config: RewardModelConfig, folder: Path, name: str) -> None:
        self.config = config
        self.folder = folder
        self.name = name
        self.checkpoints = folder.with_name(f"{folder.name}-checkpoints")
        self.tokenizer = load_tokenizer(config.model)
        self.model = classifier(config, self.tokenizer)
        self.best: dict[str, float] = {"loss": math.inf}

    def train(self, train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, Any]:
        """All steps that are left."""
        trainer = RewardTrainer(self.config, self.model, self.tokenizer, train, test)
        every = max(1, trainer.total // self.config.evaluations)
        self._resume(trainer)
        begun, first = time.perf_counter(), trainer.steps
        losses: list[float] = []
        while trainer.steps < trainer.total:
            taken = trainer.step()
            losses.append(taken["loss"])
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss of step {trainer.steps} is {losses[-1]}: try a lower --learning-rate")
            if trainer.steps % every and trainer.steps < trainer.total:
                continue
            seconds = (time.perf_counter() - begun) / (trainer.steps - first) * (trainer.total - trainer.steps)
            left = f"   about {rough_time(seconds)} left" if trainer.steps < trainer.total else ""
            said = f"{self.name}, step {trainer.steps} of {trainer.total}   loss {sum(losses) / len(losses):.4f}"
            self._judge(trainer, said, left)
            losses = []
            self._save(trainer)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        found = {"pairs": len(train), "held_out": len(test), **self.best, "members": self.config.members}
        with replace_file(self.folder / RESULTS) as new:
            new.write_text(json.dumps(found, indent=2) + "\n")
        return found

    def _judge(self, trainer: RewardTrainer, said: str, left: str) -> None:
        """Look at the held-out pairs; the model is kept if it is the best so far."""
        found = trainer.evaluate() if self.config.validation else {"loss": -float(trainer.steps)}
        if self.config.validation:
            said += f"   held-out loss {found['loss']:.4f}, accuracy {found['accuracy']:.3f} ± {found['interval']:.3f}"
        better = found["loss"] < self.best["loss"]
        if better:
            self.best = {**found, "step": trainer.steps}
            self._export()
        print(f"{said}{'   (best)' if better else ''}{left}", flush=True)

    def _export(self) -> None:
        """Write the model as transformers loads it."""
        model = self.model
        if hasattr(model, "peft_config"):
            import copy

            model = copy.deepcopy(model).merge_and_unload()
        setattr(model.config, MEAN, self.best.get("mean", 0.0))
        setattr(model.config, DEVIATION, max(1e-6, self.best.get("deviation", 1.0)))
        with replace_folder(self.folder) as new, quietly():
            model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)

    def _save(self, trainer: RewardTrainer) -> None:
        tensors, state = trainer.state()
        tensors["rng"] = rng_state()
        best = {name: value for name, value in self.best.items() if math.isfinite(value)}
        save_checkpoint(self.checkpoints, Checkpoint(trainer.steps, tensors, {**state, "best": best}), keep=1)

    def _resume(self, trainer: RewardTrainer) -> None:
        checkpoint, refused = latest_checkpoint(self.checkpoints)
        for reason in refused:
            print(f"warning: {reason}")
        if checkpoint is not None:
            trainer.load_state(checkpoint.tensors, checkpoint.state)
            set_rng_state(checkpoint.tensors["rng"])
            self.best = {"loss": math.inf, **checkpoint.state["best"]}
            print(f"{self.name}: going on from step {checkpoint.step}")


def classifier(config: RewardModelConfig, tokenizer: Any) -> Any:
    """A language model with a new last layer that gives one value, of which the configured weights are trained."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(config.seed)
    with quietly():
        model = AutoModelForSequenceClassification.from_pretrained(
            model_folder(config.model), num_labels=1, dtype=torch.float32
        )
    model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    head = _head(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if config.head_only:
        model.requires_grad_(False)
        head.requires_grad_(True)
    if config.lora_rank:
        import peft

        settings = peft.LoraConfig(
            task_type="SEQ_CLS", r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"
        )
        model = peft.get_peft_model(model, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def _contradictions(config: RewardModelConfig) -> Iterator[str]:
    if config.head_only and config.lora_rank:
        yield "--head-only trains the last layer alone, and --lora-rank adapters: leave one of them out"


def _head(model: Any) -> nn.Linear:
    last = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1]
    if not last:
        raise ConfigError(f"{type(model).__name__} has no last layer with one value: use another --model")
    return last[-1]


def _claim(out: Path, given: dict[str, Any], resume: bool) -> None:
    """Make the folder this command's own."""
    path = out / "reward-models.json"
    if path.is_file():
        before = json.loads(path.read_text())
        if not resume:
            raise ConfigError(f"{out} holds reward models already: go on with --resume, or use another --out")
        changed = [name for name in given if given[name] != before.get(name)]
        if changed:
            raise ConfigError(f"{out} was begun with another {', '.join(changed)}: go on as it was, or elsewhere")
    elif resume:
        raise ConfigError(f"there is nothing to resume in {out}: check --out, or leave out --resume")
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: use another --out")
    out.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as new:
        new.write_text(json.dumps(given, indent=2) + "\n")
