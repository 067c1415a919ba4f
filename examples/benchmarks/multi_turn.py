"""Writing texts of several turns, with a calculator's replies, beside writing as many tokens in one turn.

    python examples/benchmarks/multi_turn.py --json

The language model reads and is asked for every token; which one is taken is scripted, so that all ways write the same
tokens in as many steps. Three ways take turns, and the median of several rounds counts: one turn; several
turns with a calculator; several turns with a calculator that takes a while.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_env import Task, TokenMDP
from llm_env.engines.sampling import Sampling
from llm_env.engines.transformers import TransformersEngine
from llm_env.engines.writing import EngineChooser, Job, write
from llm_env.tasks import Tools

CALL = "<calculator>12*(7+5)</calculator>"


class Scripted(EngineChooser):
    """Lets the model choose, and then takes the script's tokens."""

    def __init__(self, script: np.ndarray, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.script = script

    def choose(self, state: Any, rows: Any, allowed: Any) -> Any:
        """The next of the script."""
        _, log_probs = super().choose(state, rows, allowed)
        return self.script[state.num_actions[rows] % len(self.script)], log_probs


class Slow:
    """A calculator that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, text: str) -> str:
        """The same result each time."""
        time.sleep(self.seconds)
        return "144"


def task(seconds: float | None, calls: int) -> Task:
    """With a calculator, or in one turn."""
    if seconds is None:
        from llm_env.tasks import Addition

        return Addition()
    made = Tools("Addition", tools={"calculator": Slow(seconds)}, calls=calls, explain=False)
    made.slow_replies = seconds > 0
    return made


def speed(engine: TransformersEngine, made: Task, slots: int, texts: int, tokens: int) -> float:
    """Tokens of the agent a second."""
    mdp = TokenMDP(made, slots, model=engine.vocabulary, max_new_tokens=tokens, context=engine.context)
    script = engine.vocabulary.encode(CALL, add_special_tokens=False)
    claimed = engine.claim(slots)
    chooser = Scripted(script, engine, claimed, Sampling(seed=0), engine.context)
    jobs: Sequence[Job] = [Job(0, number, number) for number in range(texts)]
    began = time.perf_counter()
    written = sum(episode.rollout.num_actions for _, episode in write(mdp.episodes, jobs, chooser))
    seconds = time.perf_counter() - began
    engine.release(claimed)
    mdp.close()
    assert written == texts * tokens
    return written / seconds


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that the slow calculator takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()

    engine = TransformersEngine(options.model, num_slots=options.slots, context=512)
    length = len(engine.vocabulary.encode(CALL, add_special_tokens=False))
    tokens = length * (options.calls + 1) - 1  # the last call is cut off by the budget
    ways = {"one_turn": None, "calculator": 0.0, "slow_calculator": options.delay}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, seconds in ways.items():
            rate = speed(engine, task(seconds, options.calls), options.slots, options.texts, tokens)
            if number:  # the first round warms up
                rates[name].append(rate)
    found = {f"{name}_tokens_per_second": statistics.median(each) for name, each in rates.items()}
    base = found["one_turn_tokens_per_second"]
    found |= {f"{name}_over_one_turn": found[f"{name}_tokens_per_second"] / base for name in list(ways)[1:]}
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:36} {value:10.2f}")


if __name__ == "__main__":
    main()
