"""TRL's RewardTrainer or DPOTrainer on pairs of token ids. `preferences.py` starts this file in TRL's own environment.

It is given a JSON file; `Work` says what is in it. It prints a JSON object: the seconds of `trainer.train()`, and the
loss of each step. The gradients of the first batch, before any step, it writes into a file. It knows nothing of our
packages.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

REPLIES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # stdout now is stderr: only the answer may reach the other side
os.environ["WANDB_DISABLED"] = "true"

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer  # noqa: E402


@dataclass
class Work:
    """What to do.

    Attributes:
        kind: "reward-model" or "dpo".
        model: a folder: of a model for sequence classification, or of a language model.
        rows: prompt_ids, chosen_ids, rejected_ids of each pair, in the order in which they are learned from.
        batch_size: pairs in a step.
        micro_batch_size: pairs that are in memory at once.
        learning_rate: constant.
        center: of the reward model's loss.
        beta: of DPO.
        reference: of DPO, if it is another than the model.
        gradients: where to write those of the first batch; None does not compute them.
        threads: of torch.
    """

    kind: str
    model: str
    rows: list[dict[str, list[int]]]
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    center: float
    beta: float
    reference: str | None
    gradients: str | None
    threads: int


class InOrder:
    """A trainer that takes its pairs in the order in which they are given."""

    train_dataset: Any

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if dataset is None else dataset)


class InOrderReward(InOrder, RewardTrainer):
    """Of the reward model."""


class InOrderDPO(InOrder, DPOTrainer):
    """Of the policy."""

    def _prepare_dataset(self, dataset: Any, *given: Any, **how: Any) -> Any:
        return dataset  # which is of tokens already; the other trainer sees that by itself


def trainer_of(work: Work, folder: str) -> Any:
    """TRL's trainer."""
    same: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": work.micro_batch_size,
        "gradient_accumulation_steps": work.batch_size // work.micro_batch_size,
        "num_train_epochs": 1,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,  # it would only cost time
        "max_length": None,
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    if work.kind == "dpo":
        model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
        rows = Dataset.from_list(work.rows)
        how = DPOConfig(**same, beta=work.beta)
        other = work.reference and AutoModelForCausalLM.from_pretrained(work.reference, dtype=torch.float32)
        return InOrderDPO(model=model, ref_model=other, args=how, train_dataset=rows, processing_class=tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(work.model, dtype=torch.float32)
    rows = Dataset.from_list(
        [
            {f"{name}_ids": row["prompt_ids"] + row[f"{name}_ids"] for name in ("chosen", "rejected")}
            for row in work.rows
        ]
    )
    how = RewardConfig(**same, center_rewards_coefficient=work.center)
    return InOrderReward(model=model, args=how, train_dataset=rows, processing_class=tokenizer)


def main() -> None:
    """Do the work."""
    with open(sys.argv[1], encoding="utf-8") as file:
        work = Work(**json.load(file))
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(work, folder)
        if work.gradients is not None:
            model = trainer.model.eval()
            trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).backward()
            gradients = {name: w.grad.contiguous() for name, w in model.named_parameters() if w.grad is not None}
            save_file(gradients, work.gradients)
            model.zero_grad()
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    REPLIES.write(json.dumps({"seconds": seconds, "losses": losses}) + "\n")


if __name__ == "__main__":
    main()
