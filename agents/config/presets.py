"""Named configurations to begin with: `llm-env train --preset NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agents.config import TrainConfig


@dataclass(frozen=True)
class Preset:
    """A configuration, and a sentence that says what it is for."""

    description: str
    config: TrainConfig


PRESETS: dict[str, Preset] = {
    "reverse-tiny": Preset(
        "Teach a tiny model to reverse six letters, in minutes on two CPU cores.",
        TrainConfig().replace(
            out=Path("runs/reverse-tiny"),
            iterations=120,
            rollout__batch_size=128,
            task__name="Reverse",
            # Each right letter is paid where it is written: what a critic can foresee is a large share of it.
            task__args={"length": 6, "alphabet": "abcd", "dense": True},
            sft__steps=30,
            # Much is tried at first, or wrong letters become certain before the right ones were ever written.
            loss__entropy=0.4,
            loss__entropy_decay="linear",
            actor__learning_rate=1e-3,
            evaluation__every=10,
            evaluation__stop_at=0.97,
        ),
    ),
    "maze-tiny": Preset(
        "Teach a tiny model its way through a maze, in minutes on two CPU cores.",
        TrainConfig().replace(
            out=Path("runs/maze-tiny"),
            iterations=60,
            task__name="Maze",
            task__args={"size": 4},
            sft__steps=300,
            sft__stop_at=0.45,
            sft__evaluate_every=5,
            evaluation__every=10,
        ),
    ),
    "calculator-tiny": Preset(
        "Teach a tiny model to use a calculator for sums that it cannot do, in minutes.",
        TrainConfig().replace(
            out=Path("runs/calculator-tiny"),
            iterations=100,
            rollout__batch_size=128,
            task__name="CalculatorSums",
            task__args={"digits": 4},
            # A few demonstrations, until some calls are right; the rest is learned from the score.
            sft__answer="turns",
            sft__steps=600,
            sft__stop_at=0.13,
            sft__stop_within=0.05,
            sft__evaluate_every=10,
            actor__learning_rate=1e-3,
            evaluation__every=10,
            evaluation__prompts=128,
            evaluation__stop_at=0.93,
        ),
    ),
    "countdown-tiny": Preset(
        "Teach a tiny model to make a target of two numbers, in minutes on two CPU cores.",
        TrainConfig().replace(
            out=Path("runs/countdown-tiny"),
            iterations=100,
            rollout__batch_size=128,
            task__name="Countdown",
            task__args={"count": 2, "largest": 20, "brief": True, "format_score": 0.0},
            sft__steps=600,
            sft__stop_at=0.3,
            sft__evaluate_every=10,
            loss__entropy=0.05,
            loss__entropy_decay="linear",
            actor__learning_rate=1e-3,
            evaluation__every=10,
            evaluation__prompts=128,
            evaluation__stop_at=0.95,
        ),
    ),
    "functions-tiny": Preset(
        "Teach a tiny model to write programs, which a sandbox tests, in minutes.",
        TrainConfig().replace(
            out=Path("runs/functions-tiny"),
            iterations=100,
            rollout__batch_size=128,
            task__name="Functions",
            sft__steps=600,
            sft__stop_at=0.3,
            sft__evaluate_every=10,
            loss__entropy=0.1,
            loss__entropy_decay="linear",
            actor__learning_rate=1e-3,
            evaluation__every=10,
            evaluation__prompts=128,
            evaluation__stop_at=0.95,
        ),
    ),
    "nim-tiny": Preset(
        "Teach a tiny model to win at Nim, in minutes on two CPU cores.",
        TrainConfig().replace(
            out=Path("runs/nim-tiny"),
            iterations=100,
            rollout__batch_size=128,
            task__name="Nim",
            sft__steps=300,
            sft__stop_at=0.45,
            sft__evaluate_every=10,
            actor__learning_rate=1e-3,
            evaluation__every=10,
            evaluation__stop_at=0.95,
        ),
    ),
    "reversal-smollm2": Preset(
        "Teach SmolLM2-135M to turn lists of words round; vLLM writes the texts.",
        TrainConfig().replace(
            out=Path("runs/reversal-smollm2"),
            iterations=40,
            task__name="ReasoningGym",
            task__args={
                "dataset": "word_sequence_reversal",
                "config.min_words": 3,
                "config.max_words": 4,
                "tags": False,
                "num_train": 4096,
                "num_test": 128,
            },
            task__max_new_tokens=24,
            task__chat=False,
            model__name="smollm2-135m",
            model__autocast="auto",
            rollout__batch_size=128,
            rollout__engine="vllm",
            rollout__engine_dtype="bfloat16",
            sft__steps=24,
            sft__batch_size=32,
            sft__stop_at=0.12,
            sft__stop_within=0.1,
            sft__evaluate_every=4,
            actor__learning_rate=1e-4,
            actor__epochs=1,
            actor__minibatches=4,
            actor__micro_batch_size=32,
            evaluation__every=5,
            evaluation__prompts=128,
            evaluation__stop_at=0.9,
        ),
    ),
    "sentiment-smollm2": Preset(
        "Teach SmolLM2-135M to write cheerful reviews; vLLM writes the texts.",
        TrainConfig().replace(
            out=Path("runs/sentiment-smollm2"),
            iterations=10,
            task__name="Sentiment",
            model__name="smollm2-135m",
            model__autocast="auto",
            model__reference_dtype="bfloat16",
            rollout__batch_size=64,
            rollout__engine="vllm",
            rollout__engine_dtype="bfloat16",
            kl__beta=0.025,
            actor__learning_rate=8e-5,
            actor__warmup=4,
            actor__decay="linear",
            actor__epochs=1,
            actor__minibatches=2,
            actor__micro_batch_size=32,
            loss__target_kl=None,
            evaluation__every=5,
            evaluation__prompts=40,
            log__samples_every=5,
        ),
    ),
}
