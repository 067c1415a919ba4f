"""PPO on texts of many lengths: the update without padding beside that with it, and iterations beside TRL's.

    python examples/benchmarks/ragged.py --json

The update: lengths are uniform in 8 to 128 tokens. Both ways learn from the same batch in turns, in random
mini-batches; the median of the rounds' own ratios counts. What packing can gain is what padding costs: the tokens with
padding over those without (the padding ratio). Log-probs are computed for real tokens only, either way: there is
nothing to gain in them, and they are a fifth of SmolLM2's work.

Groups (`shared_over_apart`): eight texts after each prompt, which all layers but attention then read once, beside as
many texts after prompts of their own; prompts of 96 tokens, texts of 8 to 64. `tokens_apart_over_shared` is what that
can gain.

Going on (`going_on_over_batches`, with `--going-on`): texts end when the model ends them, see below.

Iterations (`ragged_speedup_over_trl_*`): as in ppo_throughput.py, but texts end when the model ends them, after 128
tokens at most. Of SmolLM2 a copy is taken that ends a text as readily as it writes a common word, so lengths are as
ragged as can be; the tiny model's weights are random, and it ends one of a hundred tokens. Both sides draw their own
texts: what counts are seconds for each token written. TRL 1.12 is in an environment of its own, see trl_side.py. Each
round begins both anew in processes of their own, one after the other, and leaves out their first iterations: with
SmolLM2, both at once need more memory than many machines have.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from ppo_shared import (
    DTYPES,
    LEARNING_RATE,
    SHAPES,
    OddIds,
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
    trl_workers,
    vllm_version,
)
from trl_side import TRLWorker

from agents.algorithms.scoring import GRAPH
from agents.config import TrainConfig
from agents.rollouts.collector import Batch
from agents.run.parts import Run, build
from llm_env.models import load_model, load_tokenizer, load_vocabulary, model_folder

SHORTEST, LONGEST, PROMPT = 8, 128, 4
BATCH = {"tiny": 128, "smollm2": 32}
MINIBATCH = {"tiny": 32, "smollm2": 8}
REPEATS = {"tiny": 3, "smollm2": 1}
GROUP, GROUPS, LONG_PROMPT = 8, {"tiny": 8, "smollm2": 2}, 96
TIMED = 2
"""Iterations of a round beside TRL."""
COMMON = " the"
CRITICS = {"same_work": "separate", "default": "shared"}


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


def groups(name: str, rounds: int, device: str, dtype: str) -> Results:
    """What it gains to read a prompt once that several texts have."""
    rng = np.random.default_rng(0)
    count = GROUP * GROUPS[name]
    shape = Shape(SHAPES[name].model, count, LONG_PROMPT, 64)
    run = open_run(configuration(shape, model__autocast="on" if dtype == "bf16" else "off", device=device))
    batch = texts(run, [(LONG_PROMPT, size) for size in rng.integers(8, 65, size=count).tolist()])
    data = {"apart": batch, "shared": dataclasses.replace(batch, data=batch.data.clone())}
    tokens = data["shared"].data["tokens"]
    tokens[:, :LONG_PROMPT] = tokens[::GROUP, :LONG_PROMPT].repeat_interleave(GROUP, 0)
    scored = {way: run.algorithm.score(each).exclude(*GRAPH) for way, each in data.items()}
    seconds = take_turns({way: _turn(run, each, True, 1, device) for way, each in scored.items()}, rounds)
    run.close()
    whole = int(batch.data["length"].sum())
    label = label_of(name, dtype)
    return {
        f"shared_over_apart{label}": ratio_of(seconds["apart"], seconds["shared"]),
        f"tokens_apart_over_shared{label}": round(whole / (whole - (count - GROUPS[name]) * LONG_PROMPT), 3),
    }


def _turn(run: Run, data: object, packed: bool, repeats: int, device: str) -> Turn:
    def turn() -> float:
        run.algorithm.network.backbone.packing = packed
        start = clock(device)
        for _ in range(repeats):
            run.algorithm.learn(data)
        return (clock(device) - start) / repeats

    return turn


def going_on(name: str, rounds: int, device: str, dtype: str, folder: Path) -> Results:
    """Tokens written per second where texts go on with new weights, over those where a batch waits for its longest."""
    how = configuration(_ends_by_itself(name, folder), model__dtype=DTYPES[dtype], device=device)
    runs = {way: build(how.replace(rollout__go_on=way == "going_on")) for way in ("batches", "going_on")}
    for run in runs.values():  # until long texts end, too
        run.algorithm.collector.collect()

    def turn(run: Run) -> float:
        start = clock(device)
        batch = run.algorithm.collector.collect()
        return (clock(device) - start) / batch.written_tokens

    seconds = take_turns({way: lambda run=run: turn(run) for way, run in runs.items()}, rounds)
    for run in runs.values():
        run.close()
    return {f"going_on_over_batches{label_of(name, dtype)}": ratio_of(seconds["batches"], seconds["going_on"])}


def _ends_by_itself(name: str, folder: Path) -> Shape:
    """Texts that the model ends."""
    if name == "tiny":
        return Shape("tiny", BATCH[name], PROMPT, LONGEST - PROMPT)
    if not (folder / "config.json").exists():
        end_often(SHAPES[name].model, folder)
    return Shape(str(folder), BATCH[name], PROMPT, LONGEST - PROMPT)


def beside_trl(name: str, rounds: int, dtype: str, folder: Path) -> Results:
    """Seconds of an iteration for each token written, beside TRL's: a critic of its own in both, and our default."""
    shape = _ends_by_itself(name, folder)
    engine = "vllm" if name == "smollm2" and vllm_version() else "transformers"
    how = configuration(shape, model__dtype=DTYPES[dtype], rollout__engine=engine)
    seconds: dict[str, list[float]] = {"trl": [], **{way: [] for way in CRITICS}}
    lengths: list[int] = []
    for number in range(rounds):
        seconds["trl"].append(_theirs(how.replace(seed=number), shape))
        for way, critic in CRITICS.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as apart:
                took, written = apart.submit(_ours, how.replace(seed=number, model__critic=critic)).result()
            seconds[way].append(took)
            lengths += written
        say(f"round {number + 1}: {', '.join(f'{way} {of[-1]:.4f}' for way, of in seconds.items())} s a token")
    label = label_of(name)
    return {
        f"ragged_dtype{label}": dtype,
        f"ragged_mean_length{label}": round(float(np.mean(lengths)), 1),
        f"ragged_tokens_per_s_trl{label}": round(1 / median(seconds["trl"]), 1),
        **{f"ragged_speedup_over_trl_{way}{label}": ratio_of(seconds["trl"], seconds[way]) for way in CRITICS},
        **{f"ragged_tokens_per_s_{way}{label}": round(1 / median(seconds[way]), 1) for way in CRITICS},
    }


def _theirs(config: TrainConfig, shape: Shape) -> float:
    """Seconds for a token of TRL's, from its second iteration on, in a process that then ends."""
    task = OddIds(shape.prompt, shape.response, shape.model)
    vocabulary = load_vocabulary(config.model.name)
    prompts = [vocabulary.encode(prompt.text).tolist() for prompt in task.prompts("train")]
    with TRLWorker() as worker:
        worker.setup(
            model=str(model_folder(config.model.name)), prompts=prompts, answers=prompts, batch_size=shape.batch,
            epochs=1, response_length=shape.response, minibatches=1, learning_rate=LEARNING_RATE,
            dtype=config.model.dtype, threads=torch.get_num_threads(), seed=config.seed,
        )  # fmt: skip
        before = worker.iterate()
        timed = [worker.iterate() for _ in range(TIMED)]
    return sum(each["seconds"] for each in timed) / (timed[-1]["tokens"] - before["tokens"])


def _ours(config: TrainConfig) -> tuple[float, list[int]]:
    """The same of ours, and the lengths of its texts."""
    run = build(config)
    iterate(run)
    start = clock("cpu")
    batches = [iterate(run) for _ in range(TIMED)]
    took = clock("cpu") - start
    lengths = [PROMPT + episode.rollout.num_actions for batch in batches for episode in batch.episodes]
    run.close()
    return took / sum(batch.written_tokens for batch in batches), lengths


def iterate(run: Run) -> Batch:
    run.algorithm.step()
    run.update_engine()
    assert run.algorithm.batch is not None
    return run.algorithm.batch


def end_often(name: str, folder: Path) -> None:
    """A copy of a model, in which the end of a text is as likely as a common word is."""
    model, tokenizer = load_model(name, dtype=torch.float32), load_tokenizer(name)
    (word,) = tokenizer(COMMON, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[tokenizer.eos_token_id] = rows[word]
    tokenizer.pad_token = tokenizer.unk_token or "<|endoftext|>"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5, help="of the two, in turns")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--going-on", action="store_true", help="measure writing with --rollout.go-on, too")
    parser.add_argument("--only-trl", action="store_true", help="leave the update out")
    parser.add_argument(
        "--trl-dtype", choices=("fp32", "bf16"), default="bf16", help="of SmolLM2 beside TRL, and going on"
    )
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    found: Results = {}
    with contextlib.ExitStack() as stack:
        # Tried before anything is measured.
        has_trl = not options.no_trl and options.device == "cpu" and bool(trl_workers(1, stack))
    for name in options.models:
        if not options.only_trl:
            say(f"{name}: {BATCH[name]} texts of {SHORTEST} to {LONGEST} tokens")
            found |= measure(name, options.rounds, options.device, options.dtype)
            found |= groups(name, options.rounds, options.device, options.dtype)
        dtype = "fp32" if name == "tiny" else options.trl_dtype
        with tempfile.TemporaryDirectory() as folder:
            if options.going_on:
                say(f"{name}: texts that go on with new weights")
                found |= going_on(name, options.rounds, options.device, dtype, Path(folder))
            if has_trl:
                say(f"{name}: iterations beside TRL's")
                found |= beside_trl(name, options.rounds, dtype, Path(folder))
    found |= about()
    if options.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:48} {value}")


if __name__ == "__main__":
    main()
