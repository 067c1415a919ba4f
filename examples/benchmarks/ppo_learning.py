"""How fast PPO learns beside TRL's PPO, from the same warm start: accuracy against tokens written, and against time.

    python examples/benchmarks/ppo_learning.py --png learning.png
    python examples/benchmarks/ppo_learning.py --json
    python examples/benchmarks/ppo_learning.py --no-trl --seeds 0

The tiny model reverses six letters; a text is right (reward 1) or wrong (0). For each seed, our warm start teaches it a
little from answers, and both trainers go on from that checkpoint: we with the settings of the preset reverse-tiny, TRL
with batches of 256 in 4 mini-batches, lambda 0.95, KL 0.05, clip range 0.2, and the learning rate (and number of
epochs, if several are given) that was best in a shorter sweep on the first seed.

Both take turns, a few iterations each, and are then judged on the same held-out prompts, sampled at temperature 1 and
greedy. Tokens are those that the policies wrote, ends included; seconds are those of the iterations, without judging.

`tokens_to_trl_final_over_trl` and `seconds_to_...`: where the line through our measured points first reaches the
sampled accuracy that TRL ends with, over what TRL has spent until then. Medians over the seeds, and `_seed0` for each;
null where it is never reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ppo_shared import Results, about, say, trl_workers
from trl_side import TRLWorker

from agents.config import TrainConfig
from agents.config.presets import PRESETS
from agents.report.display import Display
from agents.run.parts import build
from agents.run.warm_start import warm_start

LENGTH = 6
BLUE, ORANGE, INK, GRID = "#2563eb", "#d97706", "#2b2f36", "#e5e7eb"
COLORS = {"ours": BLUE, "trl": ORANGE}
NAMES = {"ours": "ours", "trl": "TRL"}


@dataclass(frozen=True)
class Point:
    """A policy, judged."""

    tokens: float
    seconds: float
    sampled: float
    greedy: float


Curve = list[Point]


class Ours:
    """Our PPO, some iterations at a time."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.run = build(config, folder)
        self.seconds = 0.0

    @property
    def tokens(self) -> int:
        return self.run.algorithm.tokens

    def iterate(self) -> None:
        start = time.perf_counter()
        self.run.algorithm.step()
        self.run.update_engine()
        self.seconds += time.perf_counter() - start

    def judge(self) -> Point:
        assert self.run.evaluator
        metrics = self.run.evaluator.evaluate().metrics
        return Point(self.tokens, self.seconds, metrics["eval/sampled"], metrics["eval/greedy"])

    def held_out(self) -> Any:
        """The prompts that it is judged on, and the answers, as token ids."""
        assert self.run.evaluator
        return question_ids(self.run.evaluator.writer.mdp, len(self.run.evaluator.indices))

    def to_learn(self) -> Any:
        """The prompts that it learns on, and the answers, as token ids."""
        mdp = self.run.algorithm.collector.writer.mdp
        return question_ids(mdp, len(mdp.prompts))


class TRL:
    """TRL's PPO likewise.

    Args:
        worker: its process.
        folder: of the model to begin with.
        questions: those to learn from and those held out.
        settings: what else its set-up takes.
    """

    def __init__(self, worker: TRLWorker, folder: Path, questions: Ours, **settings: Any) -> None:
        (prompts, answers), self.held_out = questions.to_learn(), questions.held_out()
        worker.setup(
            model=str(folder), prompts=prompts, answers=answers, response_length=LENGTH + 1, batch_size=256,
            minibatches=4, threads=torch.get_num_threads(), **settings,
        )  # fmt: skip
        self.worker, self.seconds, self.tokens = worker, 0.0, 0

    def iterate(self) -> None:
        answer = self.worker.iterate()
        self.seconds += answer["seconds"]
        self.tokens = answer["tokens"]

    def judge(self) -> Point:
        prompts, answers = self.held_out
        sampled, greedy = (self.worker.evaluate(prompts, answers, greedy=greedy) for greedy in (False, True))
        return Point(self.tokens, self.seconds, sampled, greedy)


def question_ids(mdp: Any, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers as token ids."""
    answers = [mdp.vocabulary.encode(prompt.metadata["answer"]).tolist() for prompt in mdp.prompts.prompts[:count]]
    return [tokens.tolist() for tokens in mdp.prompts.tokens[:count]], answers


def configuration(seed: int, sft_steps: int, prompts: int) -> TrainConfig:
    """Of our side, and of the warm start."""
    return PRESETS["reverse-tiny"].config.replace(
        seed=seed,
        sft__steps=sft_steps,
        task__args={"length": LENGTH, "num_test": prompts},
        evaluation__prompts=prompts,
    )


def learn(sides: dict[str, Ours | TRL], tokens: int, every: int) -> dict[str, Curve]:
    """Let all sides learn in turns, until each has written so many tokens."""
    curves = {name: [side.judge()] for name, side in sides.items()}
    while any(side.tokens < tokens for side in sides.values()):
        for name, side in sides.items():
            if side.tokens < tokens:
                for _ in range(every):
                    side.iterate()
                curves[name].append(side.judge())
                say(f"  {NAMES[name]:>4}  {_words(curves[name][-1])}")
    return curves


def sweep(worker: TRLWorker, folder: Path, ours: Ours, options: argparse.Namespace) -> tuple[dict[str, Any], Results]:
    """TRL's settings that lead to the highest sampled accuracy, and that of each."""
    choices = [(rate, epochs) for rate in options.trl_lr for epochs in options.trl_epochs]
    found: Results = {}
    reached: dict[tuple[float, int], float] = {}
    for rate, epochs in choices if len(choices) > 1 else ():
        say(f"TRL with learning rate {rate:g}, {epochs} epochs")
        side = TRL(worker, folder, ours, learning_rate=rate, epochs=epochs, seed=options.seeds[0])
        curve = learn({"trl": side}, options.sweep_tokens, options.every)["trl"]
        reached[rate, epochs] = curve[-1].sampled
        found[f"trl_sweep_sampled_lr{rate:g}_epochs{epochs}"] = round(curve[-1].sampled, 4)
    rate, epochs = max(reached, key=lambda choice: reached[choice]) if reached else choices[0]
    return {"learning_rate": rate, "epochs": epochs}, {**found, "trl_learning_rate": rate, "trl_epochs": epochs}


def reached_at(curve: Curve, accuracy: float, what: str) -> float:
    """Where the line through the points first reaches a sampled accuracy; infinity if it never does."""
    previous = curve[0]
    for point in curve:
        if point.sampled >= accuracy:
            before, after = getattr(previous, what), getattr(point, what)
            rise = point.sampled - previous.sampled
            share = (accuracy - previous.sampled) / rise if rise > 0 else 0.0
            return float(before + max(0.0, share) * (after - before))
        previous = point
    return math.inf


def summary(curves: dict[int, dict[str, Curve]]) -> Results:
    """The figures of all seeds, flat."""
    results: Results = {}
    ratios: dict[str, list[float]] = {}
    for seed, sides in curves.items():
        for side, curve in sides.items():
            results |= {
                f"{side}_{name}_seed{seed}": round(value, 4)
                for name, value in (
                    ("start_sampled", curve[0].sampled),
                    ("start_greedy", curve[0].greedy),
                    ("final_sampled", curve[-1].sampled),
                    ("final_greedy", curve[-1].greedy),
                    ("tokens", curve[-1].tokens),
                    ("seconds", curve[-1].seconds),
                )
            }
        if "trl" in sides:
            final = sides["trl"][-1]
            for what in ("tokens", "seconds"):
                name = f"{what}_to_trl_final"
                at = reached_at(sides["ours"], final.sampled, what)
                ratio = at / getattr(final, what)
                ratios.setdefault(f"{name}_over_trl", []).append(ratio)
                results[f"{name}_seed{seed}"] = _number(at)
                results[f"{name}_over_trl_seed{seed}"] = _number(ratio)
    for side in ("ours", "trl"):
        for name in ("final_sampled", "final_greedy"):
            values = [results[f"{side}_{name}_seed{seed}"] for seed, sides in curves.items() if side in sides]
            if values:
                results[f"{side}_{name}"] = round(statistics.median(values), 4)
    return results | {name: _number(statistics.median(values)) for name, values in ratios.items()}


def draw(curves: dict[int, dict[str, Curve]], path: Path) -> None:
    """Sampled and greedy accuracy, against tokens and seconds; a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    rows = (("sampled", "held-out accuracy, sampled at temperature 1"), ("greedy", "held-out accuracy, greedy"))
    columns = (("tokens", "tokens written"), ("seconds", "seconds of iterations"))
    panels = figure.subplots(2, 2, sharey=True, sharex="col")
    for panel_row, (how, y_label) in zip(panels, rows, strict=True):
        for panel, (what, x_label) in zip(panel_row, columns, strict=True):
            for seed, sides in curves.items():
                for side, curve in sides.items():
                    x, y = [getattr(p, what) for p in curve], [getattr(p, how) for p in curve]
                    label = NAMES[side] if seed == min(curves) else None
                    panel.plot(x, y, color=COLORS[side], marker=".", linewidth=1.4, alpha=0.85, label=label)
            panel.set_ylim(-0.02, 1.02)
            panel.set_xlim(left=0)
            panel.grid(color=GRID)
            panel.spines[["top", "right"]].set_visible(False)
            if what == "tokens":
                panel.set_ylabel(y_label, color=INK)
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            if how == "greedy":
                panel.set_xlabel(x_label, color=INK)
    panels[0][0].legend(frameon=False, loc="lower right")
    figure.suptitle(f"Reversing six letters from one warm start, seeds {', '.join(map(str, curves))}", color=INK)
    figure.savefig(path, dpi=120)


def show(results: Results, curves: dict[int, dict[str, Curve]]) -> None:
    for seed, sides in curves.items():
        for side, curve in sides.items():
            print(f"\n{NAMES[side]}, seed {seed}")
            for point in curve:
                print(f"  {_words(point)}")
    print()
    for name, value in results.items():
        print(f"{name:<48} {value}")
    if not any("trl" in sides for sides in curves.values()):
        print("\nwithout TRL: its curves, and what compares with them, are left out")


def _words(p: Point) -> str:
    return f"{p.tokens:8.0f} tokens {p.seconds:7.1f} s   sampled {p.sampled:.3f}   greedy {p.greedy:.3f}"


def _number(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object instead of a table")
    parser.add_argument("--png", type=Path, help="draw the curves to this file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--tokens", type=int, default=72_000, help="that each side writes")
    parser.add_argument("--every", type=int, default=2, help="iterations between evaluations")
    parser.add_argument("--prompts", type=int, default=1024, help="held-out prompts that policies are judged on")
    parser.add_argument("--sft-steps", type=int, default=PRESETS["reverse-tiny"].config.sft.steps)
    parser.add_argument(
        "--trl-lr", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4], help="several: the best is found"
    )
    parser.add_argument("--trl-epochs", type=int, nargs="+", default=[4], help="several: the best is taken")
    parser.add_argument("--sweep-tokens", type=int, default=36_000, help="for each setting of TRL that is tried")
    options = parser.parse_args(arguments)

    results: Results = {**about(), "tokens": options.tokens, "sft_steps": options.sft_steps, "prompts": options.prompts}
    curves: dict[int, dict[str, Curve]] = {}
    settings: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = [] if options.no_trl else trl_workers(1, stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for seed in options.seeds:
            config = configuration(seed, options.sft_steps, options.prompts)
            start = folder / f"seed{seed}"
            say(f"seed {seed}: warm start ...")
            warm_start(config, start, Display(config.sft.steps, "warm start", enabled=False))
            sides: dict[str, Ours | TRL] = {"ours": (ours := Ours(config, start))}
            if workers:
                if not settings:
                    settings, found = sweep(workers[0], start, ours, options)
                    results |= found
                sides["trl"] = TRL(workers[0], start, ours, seed=seed, **settings)
            say(f"seed {seed}: learning")
            curves[seed] = learn(sides, options.tokens, options.every)
            ours.run.close()
    results |= summary(curves)
    if options.png:
        draw(curves, options.png)
        say(f"the curves are in {options.png}")
    if options.json:
        print(json.dumps(results))
    else:
        show(results, curves)


if __name__ == "__main__":
    main()
