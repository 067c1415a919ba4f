"""PPO's update on texts of many lengths: read one behind the other, beside padded to the longest.

    python examples/benchmarks/ragged.py --json

Lengths are uniform in 8 to 128 tokens. Both ways learn from the same batch in turns, in random mini-batches; the
median of the rounds' own ratios counts. What packing can gain is what padding costs: the tokens with padding over
those without (the padding ratio). Log-probs are computed for real tokens only, either way: there is nothing to gain in
them, and they are a fifth of SmolLM2's work.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from ppo_shared import (
    SHAPES,
    Results,
    Shape,
    Turn,
    about,
    clock,
    configuration,
    label_of,
    median,
    open_run,
    ratio_of,
    say,
    take_turns,
    texts,
)

from agents.algorithms.scoring import GRAPH
from agents.run.parts import Run

SHORTEST, LONGEST, PROMPT = 8, 128, 4
BATCH = {"tiny": 128, "smollm2": 32}
MINIBATCH = {"tiny": 32, "smollm2": 8}
REPEATS = {"tiny": 3, "smollm2": 1}


def measure(name: str, rounds: int, device: str, dtype: str) -> Results:
    """Ratios and speeds with one model."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, size=BATCH[name]).tolist()
    shape = Shape(SHAPES[name].model, BATCH[name], PROMPT, LONGEST - PROMPT)
    autocast = "on" if dtype == "bf16" else "off"
    run = open_run(
        configuration(shape, actor__minibatches=BATCH[name] // MINIBATCH[name], model__autocast=autocast, device=device)
    )
    data = run.algorithm.score(texts(run, [(PROMPT, length - PROMPT) for length in lengths])).exclude(*GRAPH)
    read: list[tuple[int, int]] = []  # tokens in each pass, with padding and without
    backbone = run.algorithm.network.backbone
    backbone.register_forward_pre_hook(
        lambda _, given: read.append((given[0].numel(), int((given[1].amax(1) + 1).sum())))
    )
    seconds = take_turns(
        {way: _turn(run, data, way == "packed", REPEATS[name], device) for way in ("padded", "packed")}, rounds
    )
    run.close()
    padding = sum(padded for padded, _ in read) / sum(real for _, real in read)
    gained, label = ratio_of(seconds["padded"], seconds["packed"]), label_of(name, dtype)
    return {
        f"packed_over_padded{label}": gained,
        f"padding_ratio{label}": round(padding, 3),
        f"packed_over_padded_per_padding_ratio{label}": round(gained / padding, 3),
        **{f"{way}_update_tokens_per_s{label}": round(sum(lengths) / median(of), 1) for way, of in seconds.items()},
    }


def _turn(run: Run, data: object, packed: bool, repeats: int, device: str) -> Turn:
    def turn() -> float:
        run.algorithm.network.backbone.packing = packed
        start = clock(device)
        for _ in range(repeats):
            run.algorithm.learn(data)
        return (clock(device) - start) / repeats

    return turn


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5, help="of the two, in turns")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    found: Results = {}
    for name in options.models:
        say(f"{name}: {BATCH[name]} texts of {SHORTEST} to {LONGEST} tokens")
        found |= measure(name, options.rounds, options.device, options.dtype)
    found |= about()
    if options.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:48} {value}")


if __name__ == "__main__":
    main()
