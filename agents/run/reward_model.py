"""Reward models from pairs."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from agents.config.files import ConfigError
from agents.config.preferences import RewardModelConfig
from agents.preferences.pairs import Pair, folds_of
from agents.preferences.reward import RewardTrainer, last_layer
from agents.run.pairs import PairRun, begin
from llm_env.files import replace_file, replace_folder
from llm_env.models import load_tokenizer, model_folder
from rewards.members import ADAPTER, BASE, fingerprint
from rewards.reward_model import DEVIATION, MEAN, START, quietly

RESULTS = "reward-model.json"
"""What is known of a member; where it is there, the member is done."""


def train_reward_models(config: RewardModelConfig, resume: bool = False) -> list[dict[str, Any]]:
    """Train the members, one after the other; what was measured of each.

    Args:
        config: how.
        resume: go on where the same command was stopped; members that are done stay as they are.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> rows = [{"prompt": f"{n}: ", "chosen": "ab", "rejected": "cd"} for n in range(40)]
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
        >>> config = RewardModelConfig(folder / "pairs.jsonl", out=folder / "rm", batch_size=12, learning_rate=1e-3)
        >>> [found["accuracy"] for found in train_reward_models(config)]
        36 pairs to learn from, 4 held out
        member 1 of 1, step 1 of 3 ...
        [1.0]
    """
    both = config.head_only and config.lora_rank
    wrong = ["--head-only trains the last layer alone, and --lora-rank adapters: leave one of them out"] if both else []
    if len(config.models) > config.members:
        wrong.append(
            f"--models names {len(config.models)} models, and --members is {config.members}: each member begins with "
            f"one of them, so use --members {len(config.models)}"
        )
    train, test = begin(config, resume, wrong)
    folds = folds_of(train, config.members)
    if not all(folds):
        raise ConfigError(
            f"{len(train)} pairs are too few for {config.members} reward models with pairs of their own: use more "
            "pairs, or fewer --members"
        )
    return [_member(config, number, fold, test) for number, fold in enumerate(folds, start=1)]


def _member(config: RewardModelConfig, number: int, train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, Any]:
    folder = config.out / f"member-{number}"
    if (folder / RESULTS).is_file():
        print(f"member {number} is done already")
        return dict(json.loads((folder / RESULTS).read_text()))
    if config.models:
        config = dataclasses.replace(config, model=config.models[(number - 1) % len(config.models)])
    tokenizer = load_tokenizer(config.model)
    model = classifier(config, tokenizer)  # of one language model all begin with the same weights: they can be averaged
    start = fingerprint(model)
    base = fingerprint(model.get_base_model()) if config.lora_rank else None
    config = dataclasses.replace(config, seed=config.seed + number - 1)

    def export(measured: dict[str, float]) -> None:
        whole = copy.deepcopy(model).merge_and_unload() if config.lora_rank else model
        setattr(whole.config, MEAN, measured.get("mean", 0.0))
        setattr(whole.config, DEVIATION, max(1e-6, measured.get("deviation", 1.0)))
        setattr(whole.config, START, start)
        if base is not None:
            setattr(whole.config, BASE, base)
        with replace_folder(folder) as new, quietly():
            whole.save_pretrained(new)
            tokenizer.save_pretrained(new)
            if base is not None:  # so that an ensemble has to have the rest but once
                model.save_pretrained(new / ADAPTER)

    trainer = RewardTrainer(config, model, tokenizer, train, test)
    name = f"member {number} of {config.members}, "
    best = PairRun(trainer, folder.with_name(f"{folder.name}-checkpoints"), name, export).go()
    found = {"pairs": len(train), "held_out": len(test), **best}
    with replace_file(folder / RESULTS) as new:
        new.write_text(json.dumps(found, indent=2) + "\n")
    return found


def classifier(config: RewardModelConfig, tokenizer: Any) -> Any:
    """A language model with a new last layer that gives one value, of which the configured weights are trained."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(config.seed)
    with quietly():
        model = AutoModelForSequenceClassification.from_pretrained(
            model_folder(config.model), num_labels=1, dtype=torch.float32
        )
    model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    head = last_layer(model)
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
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
