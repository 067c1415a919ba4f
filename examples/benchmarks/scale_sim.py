"""What more processes would bring: iterations simulated from parts that are measured here, and checked with two.

    python examples/benchmarks/scale_sim.py --json

Every process that writes has as many texts in an iteration, whatever their number; so with n of them, and n that learn,
an iteration would best take as long as with one (weak scaling). What keeps it from that:

    stragglers    a batch is there when the last process has written its last text: lengths are drawn (log-normal)
    one learner   the first process takes in, scores and packs all texts by itself
    exchange      those that learn gather weights and sum gradients, and weights are sent to all that write

A process writes n texts in `read * n + sum over steps of (step + text * texts that go on)` seconds. These numbers, what
a text costs the first process, and what a token costs to learn from, are measured on the tiny model, one thread each;
then the iteration of two real processes is foretold, and measured. `--model FOLDER` takes them from what `llm-env plan`
counts instead: of a model and GPUs that need not be here. Two minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from ppo_shared import Results, Shape, about, configuration, say
from workers import iterate

from agents.config.machine import Machine
from agents.rollouts.packing import pack
from agents.run.parts import build
from agents.run.plan import Shape as ModelShape
from llm_env.engines import Sampling

COUNTS = (1, 2, 4, 8, 16, 32, 64)
ITERATIONS = 40
MODEL, PROMPT, RESPONSE, TEXTS = "tiny", 12, 64, 64


@dataclass(frozen=True)
class Parts:
    """Seconds that the parts of an iteration take.

    Attributes:
        read: a prompt, by the engine.
        step: a step of the engine, however few texts go on.
        text: each text in such a step.
        handle: a text, taken in, scored and packed by the first process.
        learn: a token, scored and learned from by one process.
        publish: the weights, sent to those that write.
        exchange: of all weights, gathered twice, and of their gradients, summed, in a pass over some of the texts; it
            goes on while the model computes.
        passes: of each process that learns.
    """

    read: float
    step: float
    text: float
    handle: float
    learn: float
    publish: float
    exchange: float = 0.0
    passes: int = 1


def simulate(parts: Parts, lengths: np.ndarray, prompt: int, *, learners: int) -> dict[str, float]:
    """Seconds of an iteration, one after the other and ahead.

    Args:
        parts: what it is made of.
        lengths: `[processes, texts]` in tokens.
        prompt: tokens of a prompt.
        learners: how many processes learn.
    """
    steps = np.arange(lengths.max())
    active = (lengths[:, :, None] > steps).sum(1)  # [processes, steps] texts that go on
    writing = parts.read * lengths.shape[1] + ((active > 0) * parts.step + parts.text * active).sum(1)
    handling = parts.handle * lengths.size
    computing = parts.learn * (lengths.sum() + prompt * lengths.size) / learners
    learning = max(computing, parts.passes * parts.exchange * (learners - 1) / learners)
    # Texts are taken in while others are written; ahead, while the model learns, the next ones are written.
    return {
        "in turn": parts.publish + max(float(writing.max()), handling) + learning,
        "ahead": max(parts.publish + float(writing.max()), handling + learning),
    }


def weak_scaling(parts: Parts, mean: float, longest: int, texts: int, prompt: int) -> dict[str, dict[int, float]]:
    """Seconds of an iteration by how many processes there are, the mean of some iterations."""
    found: dict[str, dict[int, float]] = {"in turn": {}, "ahead": {}}
    for count in COUNTS:
        rng = np.random.default_rng(0)
        took: dict[str, list[float]] = {"in turn": [], "ahead": []}
        for _ in range(ITERATIONS):
            lengths = np.clip(rng.lognormal(np.log(mean), 0.6, size=(count, texts)).astype(int), 1, longest)
            for name, seconds in simulate(parts, lengths, prompt, learners=count).items():
                took[name].append(seconds)
        for name, seconds in took.items():
            found[name][count] = statistics.mean(seconds)
    return found


# Parts that are measured.


def timed(work: Callable[[], object], rounds: int = 5) -> float:
    """The median of some rounds, after one that warms up."""
    took = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def measured() -> Parts:
    """On the tiny model."""
    seeds = itertools.count()

    def writes(texts: int, response: int) -> float:
        run = build(configuration(Shape(MODEL, texts, PROMPT, response)))
        run.engine.vocabulary.eos_tokens = ()
        indices = np.arange(texts)
        mdp = run.mdp
        took = timed(lambda: run.algorithm.collector.writer.episodes(indices, indices, Sampling(seed=next(seeds))))
        run.close()
        assert mdp.max_new_tokens == response
        return took

    many, few, short = writes(TEXTS, RESPONSE), writes(TEXTS // 4, RESPONSE), writes(TEXTS, RESPONSE // 8)
    a_step_of_many = (many - short) / (RESPONSE - RESPONSE // 8)
    text = max(0.0, (many - few) / (0.75 * TEXTS * RESPONSE))
    read = max(0.0, (short - a_step_of_many * (RESPONSE // 8)) / TEXTS)
    run = build(configuration(Shape(MODEL, TEXTS, PROMPT, RESPONSE)))
    indices, mdp = np.arange(TEXTS), run.mdp
    sent = pickle.dumps(run.algorithm.collector.writer.episodes(indices, indices, Sampling(seed=next(seeds))))
    # What the first process does with texts that others have written.
    taken = timed(lambda: pack(mdp.score_written(enumerate(pickle.loads(sent))), mdp.vocabulary.pad_token))
    handle = taken / TEXTS
    rows = iterate(run, 6)[1:]
    learn = statistics.median(row["time/score"] + row["time/update"] for row in rows) / (TEXTS * (PROMPT + RESPONSE))
    run.close()
    run = build(configuration(Shape(MODEL, TEXTS, PROMPT, RESPONSE), workers=1))
    publish = timed(run.update_engine)
    run.close()
    return Parts(read, a_step_of_many - text * TEXTS, text, handle, learn, publish)


def two_processes(parts: Parts) -> tuple[float, float]:
    """An iteration in which two write and one learns: foretold, and measured."""
    run = build(configuration(Shape(MODEL, 2 * TEXTS, PROMPT, RESPONSE), workers=2))
    iterate(run, 2)
    start = time.perf_counter()
    iterations = len(iterate(run, 8))
    took = (time.perf_counter() - start) / iterations
    episodes = run.algorithm.batch
    assert episodes is not None
    lengths = np.array([episode.rollout.num_actions for episode in episodes.episodes]).reshape(2, TEXTS)
    run.close()
    return simulate(parts, lengths, PROMPT, learners=1)["in turn"], took


def planned(model: str, machine: Machine, link: float, texts: int) -> Parts:
    """By what `llm-env plan` counts, in bfloat16, with a reference; and by three guesses.

    Those are 10 ms of overhead in a step, 0.5 ms of the first process for a text, and 32 texts a pass.
    """
    shape = ModelShape.of(model)
    rate, size = 1e12 * machine.tflops * machine.gpus, 2 * shape.parameters
    forward = 2 * shape.parameters / rate
    return Parts(
        read=forward * PROMPT * 16,
        step=0.01 + size / (1e9 * machine.bandwidth * machine.gpus),
        text=forward,
        handle=0.0005,
        learn=(3 + 2) * forward,
        publish=size / (1e9 * link * machine.gpus),
        exchange=3 * size / (1e9 * link * machine.gpus),
        passes=math.ceil(texts / 32),
    )


def main() -> None:
    """Measure or plan, simulate, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="plan for this one (a folder with its config.json) in place of measuring")
    parser.add_argument("--gpus", type=int, default=1, help="with --model: GPUs of a process that writes or learns")
    parser.add_argument("--tflops", type=float, default=300.0, help="with --model: of each")
    parser.add_argument("--bandwidth", type=float, default=2000.0, help="with --model: of the memory of each, GB/s")
    parser.add_argument(
        "--link", type=float, default=50.0, help="with --model: of each GPU to those of other processes, GB/s"
    )
    parser.add_argument("--texts", type=int, default=64, help="of each process that writes")
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flat: Results = {}
    if options.model:
        machine = Machine(gpus=options.gpus, tflops=options.tflops, bandwidth=options.bandwidth)
        parts, mean, longest, prompt = (
            planned(options.model, machine, options.link, options.texts),
            400.0,
            1024,
            16 * PROMPT,
        )
    else:
        say("measuring the parts")
        parts, mean, longest, prompt = measured(), RESPONSE / 2, RESPONSE, PROMPT
        say("two processes")
        foretold, took = two_processes(parts)
        flat |= {"two_processes_foretold_over_measured": round(foretold / took, 3), "two_processes_seconds": took}
    found = weak_scaling(parts, mean, longest, options.texts, prompt)
    for name, seconds in found.items():
        label = name.replace(" ", "_")
        flat[f"weak_scaling_{label}"] = round(min(seconds[1] / each for each in seconds.values()), 3)
        flat |= {f"seconds_{label}_{count}": round(each, 4) for count, each in seconds.items()}
    flat |= {f"part_{name}": value for name, value in asdict(parts).items()}
    if options.json:
        print(json.dumps(flat | about()))
        return
    print(f"\n{'processes':<12}" + "".join(f"{count:>9}" for count in COUNTS))
    for name, seconds in found.items():
        print(f"{name + ', s':<12}" + "".join(f"{seconds[count]:>9.3f}" for count in COUNTS))
        print(f"{'  scaling':<12}" + "".join(f"{seconds[1] / seconds[count]:>9.3f}" for count in COUNTS))
    print()
    for key, value in flat.items():
        if not key.startswith("seconds"):
            print(f"{key:40} {value:.6g}")


if __name__ == "__main__":
    main()
