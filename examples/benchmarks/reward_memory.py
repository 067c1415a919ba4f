"""Memory of an ensemble of reward models beside one of them, as a reward holds them in a run.

    python examples/benchmarks/reward_memory.py --json

Members are trained with LoRA, on a few made-up pairs (what they think does not matter here). Each way is a process of
its own, which loads the members and scores 32 texts; what counts is the most memory that it ever had, above that of one
that has loaded nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ("house", "water", "light", "people", "the", "of", "and")
SCORE = """
import resource, sys
import peft, torch, transformers
from rewards import RewardModel, Rollout

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
texts = [Rollout.of("the house of water and light " * 4, f"{number}: ") for number in range(32)]
rewards = [RewardModel(paths.split(","), batch_size=8) for paths in sys.argv[1:]]
for reward in rewards:
    reward(texts)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def megabytes(*rewards: list[Path]) -> float:
    """The most that a process has with these rewards, each of its members."""
    paths = [",".join(map(str, members)) for members in rewards]
    done = subprocess.run([sys.executable, "-c", SCORE, *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs, out = Path(folder) / "pairs.jsonl", Path(folder) / "rm"
        rows = [{"prompt": f"{n}: ", "chosen": WORDS[n % 7], "rejected": WORDS[(n + 1) % 7]} for n in range(40)]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sizes = ["--members", options.members, "--lora-rank", options.lora_rank, "--batch-size", 8, "--evaluations", 1]
        words = ["reward-model", "--pairs", pairs, "--model", options.model, "--out", out, *sizes]
        subprocess.run([sys.executable, "-m", "agents.cli", *map(str, words)], check=True, stdout=sys.stderr)
        members = sorted(out.glob("member-?"))
        one, together = megabytes(members[:1]), megabytes(members)
        apart = megabytes(*([member] for member in members))
    found = {
        "members": options.members,
        "one_mb": one,
        "together_mb": together,
        "apart_mb": apart,
        "together_over_one": round(together / one, 3),
        "apart_over_one": round(apart / one, 3),
    }
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20} {value:10.3f}")


if __name__ == "__main__":
    main()
