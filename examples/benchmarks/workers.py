"""Processes that write texts: two beside one, and writing while the model learns beside one after the other.

    python examples/benchmarks/workers.py --json

Every process computes with one thread, the learner too, so this needs two cores that have nothing else to do. Three
minutes for the tiny model; a quarter of an hour for SmolLM2, or five minutes with `--rounds 1`.

    two over one       tokens a second that two processes write, over those of one, the same batches in turns
    two apart over one the same of two programs with an engine each that know nothing of one another: what the machine
                       gives, whose cores share its memory
    ahead over in turn seconds of an iteration in which one writes and then the other learns, over those of one in which
                       the next batch is written meanwhile; so much is written that both take as long
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import torch
from ppo_shared import Results, Shape, about, clock, configuration, label_of, median, ratio_of, say, take_turns

from agents.config import TrainConfig
from agents.run.parts import Run, build
from llm_env.engines import Sampling, make_engine

SHAPES = {"tiny": Shape("tiny", 128, 12, 64), "smollm2": Shape("smollm2-135m", 32, 24, 64)}
LEARNED = {"tiny": 64, "smollm2": 4}
"""Texts that are learned from in an iteration of the second part."""


def written(run: Run, count: int, seeds: itertools.count[int]) -> float:
    """Tokens a second."""
    indices = np.arange(count) % len(run.mdp.prompts)
    start = clock("cpu")
    episodes = run.algorithm.collector.writer.episodes(indices, indices, Sampling(seed=next(seeds)))
    return sum(episode.rollout.num_actions for episode in episodes) / (clock("cpu") - start)


def two_over_one(name: str, rounds: int) -> Results:
    """How much faster two processes write than one."""
    shape = SHAPES[name]
    runs = {count: build(configuration(shape, workers=count)) for count in (1, 2)}
    # Each has the same seeds, so both write the same.
    seeds = {count: itertools.count() for count in runs}
    speeds = take_turns(
        {str(count): lambda count=count: written(runs[count], shape.batch, seeds[count]) for count in runs}, rounds
    )
    for run in runs.values():
        run.close()
    label = label_of(name)
    return {
        f"two_workers_over_one{label}": ratio_of(speeds["2"], speeds["1"]),
        **{f"written_tokens_per_s_{count}{label}": median(speeds[str(count)]) for count in runs},
    }


def two_apart_over_one(name: str, rounds: int) -> Results:
    """The same for two programs that have nothing to do with each other."""
    context, shape = get_context("spawn"), SHAPES[name]
    pipes = [context.Pipe() for _ in range(2)]
    programs = [context.Process(target=_write_alone, args=(theirs, shape), daemon=True) for _, theirs in pipes]
    for program in programs:
        program.start()
    ours = [pipe for pipe, _ in pipes]
    seeds = itertools.count()

    def speed(pipes: Sequence[Connection]) -> float:
        start, seed = clock("cpu"), next(seeds)
        for pipe in pipes:
            pipe.send((shape.batch // len(pipes), seed))
        return sum(pipe.recv() for pipe in pipes) / (clock("cpu") - start)

    speed(ours)  # until both are there
    speeds = take_turns({"one": lambda: speed(ours[:1]), "two": lambda: speed(ours)}, rounds)
    for program in programs:
        program.terminate()
    return {f"two_apart_over_one{label_of(name)}": ratio_of(speeds["two"], speeds["one"])}


def _write_alone(pipe: Connection, shape: Shape) -> None:
    torch.set_num_threads(1)
    context = shape.prompt + shape.response
    engine = make_engine("transformers", shape.model, num_slots=shape.batch, context=context, dtype=torch.float32)
    prompts = np.random.default_rng(0).integers(3, 100, (shape.batch, shape.prompt))
    while True:
        count, seed = pipe.recv()
        sampling = Sampling(max_new_tokens=shape.response, seed=seed, ignore_eos=True)
        pipe.send(sum(len(text.tokens) for text in engine.generate(list(prompts[:count]), sampling)))


def ahead_over_in_turn(name: str, rounds: int, iterations: int) -> Results:
    """How much faster iterations are whose texts are written while the model learns from those before."""
    shape = SHAPES[name]
    config = configuration(
        Shape(shape.model, LEARNED[name], shape.prompt, shape.response), workers=1, rollout__slots=shape.batch
    )
    writes, learns = _shares(config, 3)
    config = config.replace(rollout__over_sample=max(1.0, learns / writes))
    writes, learns = _shares(config, 3)
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for ahead, of in seconds.items():
            run = build(config.replace(rollout__ahead=ahead))
            iterate(run, 2)
            start = clock("cpu")
            iterate(run, iterations)
            of.append((clock("cpu") - start) / iterations)
            run.close()
    label = label_of(name)
    return {
        f"ahead_over_in_turn{label}": ratio_of(seconds[0], seconds[1]),
        f"writing_over_learning{label}": round(writes / learns, 3),
        f"iteration_seconds_in_turn{label}": median(seconds[0]),
        f"iteration_seconds_ahead{label}": median(seconds[1]),
    }


def _shares(config: TrainConfig, iterations: int) -> tuple[float, float]:
    """Seconds of an iteration that go into writing, and into all else."""
    run = build(config)
    rows = iterate(run, iterations + 1)[1:]
    run.close()
    writes = statistics.median(row["time/rollout"] for row in rows)
    return writes, statistics.median(row["time/total"] - row["time/rollout"] for row in rows)


def iterate(run: Run, iterations: int) -> list[dict[str, float]]:
    rows = []
    for _ in range(iterations):
        rows.append(run.algorithm.step())
        run.update_engine()
    return rows


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5, help="of the two, in turns")
    parser.add_argument("--iterations", type=int, default=4, help="in a round of the second part")
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: Results = {}
    for name in options.models:
        say(f"{name}: two processes that write, and one")
        found |= two_over_one(name, options.rounds) | two_apart_over_one(name, options.rounds)
        say(f"{name}: writing while the model learns, and one after the other")
        found |= ahead_over_in_turn(name, max(1, math.ceil(options.rounds / 2)), options.iterations)
    found |= about()
    if options.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:48} {value}")


if __name__ == "__main__":
    main()
