"""The classic pipeline, from a language model to one that pleases: SFT, pairs, reward models, PPO, and DPO beside it.

    python examples/rlhf_end_to_end.py

Everything is done by the commands of `llm-env`, as you would; they are printed. The texts are words of an invented
language. What people like of them is known here (`Words.score`, the gold reward), so that one can see what a policy has
come to when it pleases a reward model: the pairs are compared by it, and every fourth is labelled the wrong way round.
No other stage sees it. Seven minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from agents.cli import main as llm_env
from llm_env import Prompt, Task, register_task
from rewards import Rollout

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@register_task
class Words(Task):
    """Words of twelve letters. In the language some letters often follow others; people like some of these steps.

    Args:
        length: of a word.
        letters: of the alphabet.
    """

    num_train = 4096
    num_test = 128
    max_prompt_tokens = 6

    def __init__(self, length: int = 12, letters: int = 8) -> None:
        super().__init__()
        rng = np.random.default_rng(7)
        self.length = length
        self.alphabet = LETTERS[:letters]
        self.max_new_tokens = length + 1
        self.often = rng.dirichlet(np.full(letters, 0.5), size=letters)
        self.liked = rng.normal(size=(letters, letters))

    def sample(self, rng: np.random.Generator) -> Prompt:
        """A first letter, a number that makes it one of many, and a word of the language under "answer"."""
        letters = [int(rng.integers(len(self.alphabet)))]
        while len(letters) < self.length:
            letters.append(int(rng.choice(len(self.alphabet), p=self.often[letters[-1]])))
        word = "".join(self.alphabet[letter] for letter in letters)
        return Prompt(f"{int(rng.integers(1000)):03d}{word[0]}:", {"answer": word})

    def score(self, rollout: Rollout) -> float:
        """How well people like a word: its steps, less what nobody would say, and what is no word of this length."""
        letters = [self.alphabet.index(letter) for letter in rollout.text if letter in self.alphabet]
        steps = list(pairwise(letters))
        liked = sum(self.liked[step] - 3.0 * (self.often[step] < 0.02) for step in steps) / (self.length - 1)
        return float(liked - 0.5 * abs(len(rollout.text) - self.length))


TASK = ("--task.name", "Words")


def run(*arguments: object) -> None:
    """One command of `llm-env`."""
    words = [str(word) for word in arguments]
    print(f"\n$ llm-env {' '.join(words)}", flush=True)
    if status := llm_env(words):
        raise SystemExit(status)


def gold(model: Path, texts: Path) -> float:
    """The mean gold reward of a model's texts."""
    run("eval", model, *TASK, "--prompts", 128, "--samples", 4, "--out", texts)
    scored = [json.loads(line) for line in texts.read_text().splitlines()]
    return float(np.mean([text["score"] for text in scored if text["sample"] is not None]))


def pipeline(
    out: Path, seed: int = 0, *, steps: int = 400, pairs: int = 2048, iterations: int = 40, members: int = 4
) -> dict[str, float]:
    """All stages; the gold reward after each."""
    sft = out / "sft" / "model"
    found = {}
    how = ("--seed", seed, "--rollout.batch-size", 128, "--iterations", iterations)
    run("sft", *TASK, *how, "--out", out / "sft", "--sft.steps", steps, "--sft.learning-rate", 1e-3)
    found["after SFT"] = gold(sft, out / "sft.jsonl")

    many = ("--prompts", 512, "--samples", pairs // 256)
    run("eval", sft, *TASK, "--split", "train", *many, "--seed", seed, "--out", out / "texts.jsonl")
    run("pairs", "--texts", out / "texts.jsonl", "--out", out / "pairs.jsonl", "--noise", 0.25, "--seed", seed)

    learn = ("--pairs", out / "pairs.jsonl", "--seed", seed, "--max-length", 32, "--batch-size", 8)
    for name, count in (("one", 1), ("several", members)):
        longer = ("--members", count, "--epochs", 4, "--learning-rate", 3e-4)
        run("reward-model", *learn, *longer, "--model", sft, "--out", out / name)
        reward = ("--task.reward", "reward_model", "--task.reward-args", "path", out / name)
        run("train", *TASK, *reward, *how, "--model.name", sft, "--out", out / f"ppo-{name}", "--evaluation.every", 10)
        title = "a reward model" if count == 1 else f"{count} reward models"
        found[f"PPO with {title}"] = gold(out / f"ppo-{name}" / "model", out / f"ppo-{name}.jsonl")

    run("dpo", *learn, "--out", out / "dpo", "--model", sft, "--learning-rate", 1e-4, "--epochs", 2)
    found["DPO"] = gold(out / "dpo" / "model", out / "dpo.jsonl")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    found = pipeline(options.out, options.seed)
    print(f"\n{'':28}gold reward")
    for name, value in found.items():
        print(f"{name:28}{value:11.3f}")


if __name__ == "__main__":
    main()
