"""Learning from pairs beside TRL 1.12: reward models and DPO on the same pairs, in turns.

    python examples/benchmarks/preferences.py --pairs PAIRS.jsonl --json

Both sides learn from the same tokens with the same batches, in float32 and without gradient checkpointing. What is
timed is the whole of it, from loaded models and tokens to the last step; with DPO that includes what the model of the
beginning thinks of the pairs, which ours computes once before the first step, and TRL in every step. Beside the times
stand the losses of the first step, which must be the same.

Ours reads both answers after one prompt as one row, see `agents/preferences/together.py`. How much that saves is a
matter of the pairs: `tokens_read_over_trl` says what is read of what TRL reads, padding included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from trl_side import trl_python

from agents.config import ModelConfig
from agents.config.preferences import DPOConfig, RewardModelConfig
from agents.networks.network import Network
from agents.preferences.dpo import DPOTrainer
from agents.preferences.pairs import Pair, read_pairs
from agents.preferences.reward import RewardTrainer
from agents.preferences.together import shared_by
from agents.run.reward_model import classifier
from llm_env.models import load_model, load_tokenizer, load_vocabulary, model_folder

KINDS = ("reward-model", "dpo")
WORKER = Path(__file__).with_name("trl_pairs.py")
RATE = 1e-6  # so small that both sides' weights stay what they were, whatever their schedules


class Side:
    """Ours: the trainers of `llm-env reward-model` and `llm-env dpo`, from the same tokens as TRL's.

    Args:
        model: its name or folder.
        pairs: to learn from.
        batch: pairs in a step.
        micro: pairs that are in memory at once.
        max_length: tokens of a text.
    """

    def __init__(self, model: str, pairs: list[Pair], batch: int, micro: int, max_length: int) -> None:
        self.model, self.pairs = model, pairs
        self.same: dict[str, Any] = {
            "pairs": Path("none"), "model": model, "batch_size": batch, "micro_batch_size": micro,
            "learning_rate": RATE, "max_length": max_length,
        }  # fmt: skip

    def trainer(self, kind: str) -> RewardTrainer | DPOTrainer:
        """A new one."""
        if kind == "reward-model":
            config, tokenizer = RewardModelConfig(**self.same), load_tokenizer(self.model)
            return RewardTrainer(config, classifier(config, tokenizer), tokenizer, self.pairs, [])
        vocabulary = load_vocabulary(self.model)
        how = ModelConfig(name=self.model, critic="shared", hints=False, reference="penalty")
        network = Network(load_model(self.model, dtype=torch.float32), how, vocabulary=vocabulary).eval()
        return DPOTrainer(DPOConfig(**self.same), network, vocabulary, self.pairs, [])

    def learn(self, kind: str) -> float:
        """All steps; the seconds they took, with what DPO computes before them."""
        begun = time.perf_counter()
        trainer = self.trainer(kind)
        if kind == "reward-model":
            begun = time.perf_counter()
        while trainer.steps < trainer.total:
            trainer.step()
        return time.perf_counter() - begun


def rows_of(trainer: RewardTrainer | DPOTrainer) -> list[dict[str, list[int]]]:
    """The tokens of the pairs, as TRL takes them."""
    rows = []
    for chosen, rejected in trainer._train:
        if isinstance(trainer, DPOTrainer):
            common = chosen.prompt
            chosen, rejected = chosen.tokens, rejected.tokens
        else:
            common = 0
        prompt, after = chosen[:common], (chosen[common:], rejected[common:])
        rows.append({"prompt_ids": prompt, "chosen_ids": after[0], "rejected_ids": after[1]})
    return rows


def beside(python: Path, work: dict[str, Any]) -> dict[str, Any]:
    """TRL's side, in its own process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(work, file)
        file.flush()
        done = subprocess.run([str(python), str(WORKER), file.name], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"TRL's process ended with {done.returncode}; it last said:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def read(rows: list[dict[str, list[int]]], micro: int) -> tuple[int, int]:
    """Tokens that ours reads, and that TRL does with its padding."""
    texts = [(row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]) for row in rows]
    ours = sum(len(one) + len(other) - shared_by(one, other) for one, other in texts)
    groups = [texts[begin : begin + micro] for begin in range(0, len(texts), micro)]
    return ours, sum(2 * len(group) * max(len(text) for pair in group for text in pair) for group in groups)


def measure(kind: str, side: Side, python: Path, rounds: int, threads: int) -> dict[str, float]:
    """Both sides in turns; the figures of one kind."""
    trainer, same = side.trainer(kind), side.same
    rows = rows_of(trainer)
    batch = same["batch_size"]
    with torch.no_grad():
        first = float(trainer.losses(range(min(batch, len(rows)))).mean())
    with tempfile.TemporaryDirectory() as folder:
        model = folder if kind == "reward-model" else str(model_folder(side.model))
        if isinstance(trainer, RewardTrainer):
            trainer.model.save_pretrained(folder)
            load_tokenizer(side.model).save_pretrained(folder)
        work = {
            "kind": kind, "model": model, "rows": rows, "batch_size": batch, "reference": None,
            "micro_batch_size": same["micro_batch_size"], "learning_rate": RATE, "center": 0.01, "beta": 0.1,
            "gradients": None, "threads": threads,
        }  # fmt: skip
        ours, theirs, loss = [], [], 0.0
        for number in range(rounds):
            ours.append(side.learn(kind))
            found = beside(python, work)
            theirs.append(found["seconds"])
            loss = found["losses"][0]
            print(f"{kind}, round {number + 1} of {rounds}: {ours[-1]:.1f} s, TRL {theirs[-1]:.1f} s", file=sys.stderr)
    read_by_ours, read_by_trl = read(rows, same["micro_batch_size"])
    name = kind.replace("-", "_")
    return {
        f"{name}_speedup": statistics.median(there / here for there, here in zip(theirs, ours, strict=True)),
        f"{name}_seconds": statistics.median(ours),
        f"{name}_trl_seconds": statistics.median(theirs),
        f"{name}_tokens_read_over_trl": read_by_ours / read_by_trl,
        f"{name}_first_loss": first,
        f"{name}_trl_first_loss": loss,
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=Path, required=True, help="a JSONL file, as llm-env reward-model reads it")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=64, help="how many of the pairs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure")
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = read_pairs(options.pairs).pairs[: options.count]
    side = Side(options.model, pairs, options.batch_size, options.micro_batch_size, options.max_length)
    python = trl_python()
    found: dict[str, float] = {"pairs": len(pairs), "threads": options.threads}
    for kind in options.kinds:
        found |= measure(kind, side, python, options.rounds, options.threads)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:36} {value:10.4g}")


if __name__ == "__main__":
    main()
