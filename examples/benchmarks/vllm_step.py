"""What it costs to let an outside agent choose every token, beside vLLM's own `LLM.generate`, which chooses by itself.

    python examples/benchmarks/vllm_step.py
    python examples/benchmarks/vllm_step.py --json

Ways to write the same number of tokens after the same prompts, in tokens per second:

    generate      bare `LLM.generate`, with the log-probs of the sampled tokens, texts not decoded
    step          `TokenVectorEnv(engine=...)`: every token is drawn by an agent outside, from the logits in the
                  observation; prompts, infos and rewards as in training
    collect       `VLLMEngine.generate`, then rewards, then a TensorDict
    transformers  as "step", on `TransformersEngine`
    turns         `engine.write` of a task that answers twice while a text is written, beside `engine.generate` of texts
                  of the same lengths, on both engines: all tokens of a text, and those that the model chose alone
    resubmit      `LLM.generate` of one token, again and again, with prefix caching: what stepping vLLM takes without us

All ways take turns in every round, in one process; figures are medians over the rounds, and ratios are medians of each
round's own ratio. Episodes never end before their budget, in any of the ways. A weight update (with its parity check,
and without) is timed beside a bare copy of the same bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from llm_env import TokenVectorEnv
from llm_env.engines import Job, Sampling, make_engine
from llm_env.engines.sampling import choose
from llm_env.models import load_model, model_folder
from llm_env.tasks import Reverse, Sentiment, Task
from llm_env.tokens.prompts import Prompt, TokenizedPrompts
from rewards import Rollout

Way = Callable[[], int]  # writes texts, and returns how many tokens they have
DTYPES = {"tiny": torch.float32, "smollm2-135m": torch.bfloat16}
LABELS = {"tiny": "tiny", "smollm2-135m": "smollm2"}
REPLY_TOKENS = 4
RESUBMITTED = 8  # tokens: resubmitting is far too slow for whole texts


def task_of(model: str, tokens: int) -> Task:
    task: Task = Reverse(6) if model == "tiny" else Sentiment()
    task.max_new_tokens = tokens
    return task


def stepping(env: TokenVectorEnv) -> Way:
    """An agent outside the environment, which samples from what it observes."""
    rng = np.random.default_rng(0)
    ends = list(env.mdp.vocabulary.eos_tokens)

    def play() -> int:
        observation, _ = env.reset()
        written, running = 0, True
        while running:
            logits = torch.from_numpy(observation["logits"])
            logits[:, ends] = -torch.inf  # every text shall use up its budget
            actions, _ = choose(logits, Sampling(), rng.random(env.num_envs))
            observation, _, terminated, truncated, _ = env.step(actions.numpy())
            written += env.num_envs
            running = not (terminated | truncated).any()
        return written

    return play


def collecting(engine: Any, task: Task, prompts: list[Prompt], prompt_ids: list[np.ndarray], tokens: int) -> Way:
    vocabulary, reward = engine.vocabulary, task.as_reward()

    def collect() -> int:
        rows, rewards = [], []
        for done in engine.stream(prompt_ids, Sampling(max_new_tokens=tokens, ignore_eos=True)):
            ids, prompt = prompt_ids[done.prompt_index], prompts[done.prompt_index]
            rollout = Rollout(
                prompt=prompt.text, tokens=done.tokens, prompt_tokens=ids, metadata=prompt.metadata, end=done.end,
                decode=vocabulary.decode,
            )  # fmt: skip
            rewards.append(reward([rollout])[0].total)
            rows.append((ids, done))
        width = max(len(ids) + len(done.tokens) for ids, done in rows)
        whole = torch.full((len(rows), width), vocabulary.pad_token)
        log_probs, mask = torch.zeros(len(rows), tokens), torch.zeros(len(rows), tokens, dtype=torch.bool)
        for row, (ids, done) in enumerate(rows):
            whole[row, : len(ids) + len(done.tokens)] = torch.from_numpy(np.concatenate([ids, done.tokens]))
            log_probs[row, : len(done.tokens)] = torch.from_numpy(done.log_probs)
            mask[row, : len(done.tokens)] = True
        batch = TensorDict(
            {
                "tokens": whole,
                "prompt_length": torch.tensor([len(ids) for ids, _ in rows]),
                "action_log_prob": log_probs,
                "mask": mask,
                "reward": torch.tensor(rewards),
            },
            batch_size=[len(rows)],
        )
        return int(batch["mask"].sum())

    return collect


class TwoReplies(Task):
    """Two short answers, each at the end of a turn; the model itself draws what ends it, at any time."""

    def __init__(self, tokens: int, reply: list[int], ends: list[list[int]]) -> None:
        super().__init__(num_train=1)
        self.max_new_tokens = tokens
        self.stop = ends
        self._reply = reply

    def reply(self, rollout: Rollout) -> list[int]:
        return self._reply if sum(turn.who == "task" for turn in rollout.turns) < 2 else []


def turns(kind: str, model: str, num: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median ratios of the tokens per second of a task that replies to those of `generate`, at the same lengths."""
    plain = task_of(model, tokens)
    engine = make_engine(kind, model, num_slots=num, context=plain.max_prompt_tokens + 2 * tokens, dtype=DTYPES[model])
    prompts = [engine.vocabulary.encode(prompt.text) for prompt in plain.prompts("train")[: 2 * num]]
    reply = engine.vocabulary.encode("ok, now go on then")[:REPLY_TOKENS].tolist()
    # Tokens that are one in five of those that the model writes: nearly every text then has two turns to answer.
    drawn = engine.generate(prompts, Sampling(max_new_tokens=tokens, ignore_eos=True, seed=0))
    counts = np.bincount(np.concatenate([episode.tokens for episode in drawn]), minlength=engine.vocab_size)
    likely = np.argsort(-counts)
    ends = likely[np.cumsum(counts[likely]) > 4 / 5 * counts.sum()]
    task = TwoReplies(tokens, reply, [[int(token)] for token in ends if counts[token]])
    texts = TokenizedPrompts([Prompt("")] * len(prompts), prompts)
    jobs = [Job(index, index, index) for index in range(len(prompts))]

    def with_replies() -> tuple[int, int]:
        episodes = [episode for _, episode in engine.write(task, texts, jobs, Sampling())]
        return sum(len(e.tokens) for e in episodes), sum(e.rollout.num_actions for e in episodes)

    def without() -> int:
        how = Sampling(max_new_tokens=tokens + 2 * len(reply), ignore_eos=True)
        return sum(len(episode.tokens) for episode in engine.generate(prompts, how))

    ratios: dict[str, list[float]] = {"turns": [], "turns_own_tokens": []}
    for turn in range(rounds + 1):
        start = time.perf_counter()
        all_tokens, own_tokens = with_replies()
        middle = time.perf_counter()
        written = without()
        rate = written / (time.perf_counter() - middle)
        if turn:
            ratios["turns"].append(all_tokens / (middle - start) / rate)
            ratios["turns_own_tokens"].append(own_tokens / (middle - start) / rate)
    engine.close()
    label = f"{kind}_{LABELS[model]}_b{num}"
    return {f"{name}_over_generate_{label}": round(statistics.median(r), 3) for name, r in ratios.items()}


def bare_vllm(model: str, num: int, context: int) -> Any:
    from vllm import LLM

    return LLM(
        str(model_folder(model)), skip_tokenizer_init=True, dtype=str(DTYPES[model]).removeprefix("torch."),
        max_model_len=context, max_num_seqs=num, enforce_eager=True, enable_prefix_caching=True,
        kv_cache_memory_bytes=2**30, gpu_memory_utilization=0.01, logprobs_mode="processed_logprobs",
    )  # fmt: skip


def generating(llm: Any, prompt_ids: list[np.ndarray], tokens: int) -> Way:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=tokens, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)

    def generate() -> int:
        prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in prompt_ids]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def resubmitting(llm: Any, prompt_ids: list[np.ndarray]) -> Way:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=1, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)

    def resubmit() -> int:
        texts = [ids.tolist() for ids in prompt_ids]
        for _ in range(RESUBMITTED):
            outputs = llm.generate([TokensPrompt(prompt_token_ids=text) for text in texts], params, use_tqdm=False)
            for text, output in zip(texts, outputs, strict=True):
                text.append(output.outputs[0].token_ids[0])
        return RESUBMITTED * len(texts)

    return resubmit


def measure(model: str, num: int, tokens: int, rounds: int, slow: bool) -> dict[str, list[float]]:
    """Tokens per second in each round, by way."""
    task = task_of(model, tokens)
    context = task.max_prompt_tokens + tokens
    engine = make_engine("vllm", model, num_slots=2 * num, context=context, dtype=DTYPES[model])
    env = TokenVectorEnv(task, num, engine=engine, observe="logits", copy=False)
    env.reset(seed=0)
    prompts = [env.mdp.prompt(row) for row in range(num)]
    prompt_ids = [env.mdp.prompts.tokens[int(index)] for index in env.mdp.prompt_index]
    llm = bare_vllm(model, num, context)
    ways = {
        "generate": generating(llm, prompt_ids, tokens),
        "step": stepping(env),
        "collect": collecting(engine, task, prompts, prompt_ids, tokens),
    }
    if slow:
        other = make_engine("transformers", model, num_slots=num, context=context, dtype=DTYPES[model])
        ways["transformers"] = stepping(TokenVectorEnv(task, num, engine=other, observe="logits", copy=False))
        ways["resubmit"] = resubmitting(llm, prompt_ids)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            written = way()
            if turn:  # the first round warms up
                rates[name].append(written / (time.perf_counter() - start))
    engine.close()
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    return rates


def updating(model: str, rounds: int) -> dict[str, float]:
    """Seconds of a weight update and of a bare copy, and the median of their ratio."""
    trained = load_model(model, dtype=DTYPES[model])
    weights = dict(trained.named_parameters())
    target = [weight.detach().clone() for weight in weights.values()]
    engines = {
        "checked": make_engine("vllm", model, num_slots=1, context=32, dtype=DTYPES[model]),
        "unchecked": make_engine("vllm", model, num_slots=1, context=32, dtype=DTYPES[model], tolerance=math.inf),
    }
    took: dict[str, list[float]] = {"copy": [], **{name: [] for name in engines}}
    for turn in range(rounds + 1):
        start = time.perf_counter()
        with torch.no_grad():
            for ours, theirs in zip(target, weights.values(), strict=True):
                ours.copy_(theirs)
        took["copy"].append(time.perf_counter() - start)
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.load_weights(weights, version=turn)
            took[name].append(time.perf_counter() - start)
    for engine in engines.values():
        engine.close()
    median = {name: statistics.median(seconds[1:]) for name, seconds in took.items()}
    label = LABELS[model]
    return {
        f"weight_copy_seconds_{label}": round(median["copy"], 5),
        f"weight_update_seconds_{label}": round(median["checked"], 4),
        f"weight_update_over_copy_{label}": round(median["checked"] / median["copy"], 2),
        f"weight_update_unchecked_over_copy_{label}": round(median["unchecked"] / median["copy"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an episode")
    parser.add_argument("--tiny", type=int, nargs="*", default=[8, 32, 128], help="batch sizes of the tiny model")
    parser.add_argument("--smollm2", type=int, nargs="*", default=[8, 32], help="batch sizes of SmolLM2-135M")
    parser.add_argument("--fast", action="store_true", help="leave out the slow ways")
    args = parser.parse_args()

    results: dict[str, float] = {
        "episode_tokens": args.tokens, "rounds": args.rounds, "threads": torch.get_num_threads(),
    }  # fmt: skip
    table = []
    for model, sizes in (("tiny", args.tiny), ("smollm2-135m", args.smollm2)):
        for num in sizes:
            rates = measure(model, num, args.tokens, args.rounds, not args.fast)
            label = f"{LABELS[model]}_b{num}"
            results |= {f"{way}_tokens_per_s_{label}": round(statistics.median(r), 1) for way, r in rates.items()}
            for way in rates.keys() - {"generate"}:
                ratios = [ours / theirs for ours, theirs in zip(rates[way], rates["generate"], strict=True)]
                results[f"{way}_over_generate_{label}"] = round(statistics.median(ratios), 3)
            table.append((label, list(rates)))
            for kind in ("vllm",) if args.fast else ("vllm", "transformers"):
                results |= turns(kind, model, num, args.tokens, args.rounds)
        if sizes:
            results |= updating(model, args.rounds)
    if args.json:
        print(json.dumps(results))
        return
    print(f"tokens per second, episodes of {args.tokens} tokens, median of {args.rounds} rounds (x: over generate)\n")
    for label, ways in table:
        cells = [f"{way} {results[f'{way}_tokens_per_s_{label}']:.0f}" for way in ways]
        ratios = [f" (x{results[f'{way}_over_generate_{label}']:.2f})" if way != "generate" else "" for way in ways]
        print(f"{label:>14}  " + "   ".join(cell + ratio for cell, ratio in zip(cells, ratios, strict=True)))
    print()
    for name, value in results.items():
        if name.startswith(("weight", "turns")):
            print(f"{name} {value}")


if __name__ == "__main__":
    main()
