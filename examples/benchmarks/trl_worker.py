"""TRL's PPO one iteration at a time, for the benchmarks beside it. `trl_side.py` starts this file in TRL's own venv.

It reads commands, one JSON object a line, from stdin, and answers each by one on stdout; whatever TRL prints goes to
stderr. It knows nothing of our packages: models are folders, prompts and answers are token ids.

    {"cmd": "setup", ...}     the fields of `Setup`; may be given again, for the next run in the same process
    {"cmd": "iterate"}        one PPO iteration; its seconds, tokens and metrics
    {"cmd": "evaluate", "prompts": [[ids]], "answers": [[ids]], "greedy": true, "seed": 0}
    {"cmd": "memory"}
    {"cmd": "quit"}

`PPOTrainer.train()` is one long loop. It is left as it is: commands are served from inside it, where it asks its data
loader for the next batch (`Gate`). What one "iterate" times is therefore one full turn of TRL's own loop.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPLIES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # stdout, from C as well, now is stderr: only replies may reach the other side

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    get_constant_schedule,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402

Ids = list[int]
TRLS_OWN = SimpleNamespace(gc=ppo_trainer.gc, forward=ppo_trainer.forward, generate=ppo_trainer.batch_generation)


@dataclass
class Setup:
    """One run. What is called after a field of `PPOConfig` means the same; the defaults are TRL's, but temperature.

    Attributes:
        model: a folder; actor, reference and the critic's backbone are three copies of it.
        prompts: token ids; TRL shuffles them and deals them again when all are used.
        answers: one for each prompt. The reward is 1 for the answer followed by the end-of-sequence token, else 0, and
            responses end there. None: responses have `response_length` tokens whatever they say, and the reward is the
            share of odd ids, which costs nothing.
        batch_size: episodes an iteration; `minibatches` optimizer steps in each of `epochs`, without accumulation.
        learning_rate: constant, of actor and critic.
        value_learning_rate: of the critic, if another.
        dtype: of all weights. TRL's own `bf16=True` does nothing on CPU.
        stub_gc: leave out TRL's calls of gc.collect().
        options: further fields of `PPOConfig`.
    """

    model: str
    prompts: list[Ids]
    response_length: int
    batch_size: int
    answers: list[Ids] | None = None
    epochs: int = 4
    minibatches: int = 1
    learning_rate: float = 3e-6
    value_learning_rate: float | None = None
    dtype: str = "float32"
    kl_coef: float = 0.05
    cliprange: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0
    seed: int = 0
    threads: int = 2
    stub_gc: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answers is not None and len(self.answers) != len(self.prompts):
            raise ValueError(f"got {len(self.prompts)} prompts but {len(self.answers)} answers: give one for each")
        if len(self.prompts) < self.batch_size:
            raise ValueError(f"got {len(self.prompts)} prompts, fewer than a batch of {self.batch_size}: give more")

    def config(self, folder: str) -> PPOConfig:
        same = ("response_length", "learning_rate", "kl_coef", "cliprange", "gamma", "lam", "temperature", "seed")
        settings: dict[str, Any] = {
            **{name: getattr(self, name) for name in same},
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": 1,  # with more, TRL takes fewer optimizer steps than it says
            "num_ppo_epochs": self.epochs,
            "num_mini_batches": self.minibatches,
            "lr_scheduler_type": "constant",  # how many iterations there will be is not known here
            "total_episodes": 10**6 * self.batch_size,
            "stop_token": None if self.answers is None else "eos",
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "num_sample_generations": 0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return PPOConfig(**{**settings, **self.options})


class TokenReward(torch.nn.Module):
    """What TRL takes for a reward model; the reward is read off the tokens.

    TRL calls the backbone and then `score`, and looks at the last token of each response: every position has the
    reward of the whole.
    """

    base_model_prefix = "backbone"

    def __init__(self, setup: Setup, eos: int) -> None:
        super().__init__()
        self.score = torch.nn.Identity()
        self.context = 0  # columns of the prompts of this batch
        self.tokens = 0  # generated so far, ends included, padding not
        self.answers = None
        if setup.answers is not None:
            rows = zip(setup.prompts, setup.answers, strict=True)
            self.answers = {tuple(prompt): (*answer, eos) for prompt, answer in rows}

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        responses, kept = input_ids[:, self.context :], attention_mask[:, self.context :]
        self.tokens += int(kept.sum())
        if self.answers is None:
            rewards = (responses % 2 * kept).sum(1) / kept.sum(1)
        else:
            matches = []
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
                text = [(token, i >= self.context) for i, token in enumerate(ids) if mask[i]]
                prompt = tuple(token for token, generated in text if not generated)
                matches.append(tuple(token for token, generated in text if generated) == self.answers[prompt])
            rewards = torch.tensor(matches, dtype=torch.float32)
        return SimpleNamespace(hidden_states=[rewards.float()[:, None, None].expand(*input_ids.shape, 1)])


class Trainer(PPOTrainer):
    """Keeps the metrics instead of printing them."""

    metrics: dict[str, float]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.metrics = logs


class Clock:
    """When the parts of an iteration began."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.perf_counter())

    def watch(self) -> None:
        """See TRL pass from the rollout to scoring, and from there to the update."""

        def generate(*args: Any, **kwargs: Any) -> Any:
            done = TRLS_OWN.generate(*args, **kwargs)
            self.mark("score")
            return done

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.mark("update")
            return TRLS_OWN.forward(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward = generate, forward

    def seconds(self) -> dict[str, float]:
        """Of the whole and of its parts."""
        start, score, update, end = (self.marks[name] for name in ("start", "score", "update", "end"))
        return {
            "seconds": end - start,
            "rollout_seconds": score - start,
            "score_seconds": update - score,
            "update_seconds": end - update,
        }


class NextSetup(Exception):
    """Leaves TRL's loop for another run; its argument is the command."""


class Gate:
    """TRL's data loader, at which commands are served until one asks for an iteration."""

    def __init__(self, trainer: Trainer, reward: TokenReward, setup: Setup) -> None:
        self.trainer, self.reward, self.setup = trainer, reward, setup
        self.batches = trainer.dataloader
        self.clock: Clock | None = None
        self.iteration = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:  # the next batch is fetched before the clock stops: each turn pays for one
            if self.clock:
                self.clock.mark("end")
                reply(self.report(self.clock))
            self.serve()
            self.reward.context = batch["input_ids"].shape[1]
            self.iteration += 1
            self.clock = Clock()
            self.clock.watch()
            self.clock.mark("start")
            yield batch

    def report(self, clock: Clock) -> dict[str, Any]:
        metrics = self.trainer.metrics
        return {
            "iteration": self.iteration,
            **clock.seconds(),
            "tokens": self.reward.tokens,
            "reward_mean": metrics["objective/scores"],
            "metrics": metrics,
        }

    def serve(self) -> None:
        for command in commands():
            name = command.pop("cmd")
            if name == "iterate":
                return
            if name == "evaluate":
                reply(evaluate(self.trainer.policy_model, self.trainer.processing_class, self.setup, **command))
            elif name == "setup":
                raise NextSetup(command)
            else:
                raise ValueError(f"unknown command {name!r}; known are setup, iterate, evaluate, memory and quit")
        raise SystemExit


@torch.no_grad()
def evaluate(
    policy: Any, tokenizer: Any, setup: Setup, prompts: list[Ids], answers: list[Ids], greedy: bool, seed: int = 0
) -> dict[str, float]:
    """The share of prompts after which the policy writes the answer and ends. Training's random numbers stay as is."""
    sampling: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    if not greedy:
        sampling["temperature"] = setup.temperature
    config = GenerationConfig(
        max_new_tokens=max(map(len, answers)) + 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    right, size = 0, 256
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in range(0, len(prompts), size):
            batch = tokenizer.pad({"input_ids": prompts[i : i + size]}, return_tensors="pt")
            written = policy.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :].tolist()
            expected = [[*answer, tokenizer.eos_token_id] for answer in answers[i : i + size]]
            right += sum(row[: len(answer)] == answer for row, answer in zip(written, expected, strict=True))
    return {"accuracy": right / len(prompts)}


def trainer_of(setup: Setup, folder: str) -> tuple[Trainer, TokenReward]:
    torch.set_num_threads(setup.threads)
    config = setup.config(folder)
    set_seed(setup.seed)  # of the critic's new head, and of the minibatches, for which TRL forgets numpy's
    dtype = getattr(torch, setup.dtype)
    policy = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype)
    critic = AutoModelForSequenceClassification.from_pretrained(setup.model, num_labels=1, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(setup.model, padding_side="left")
    if setup.answers is None:
        # TRL ends a text at a padding token; a new one, outside the model's vocabulary, is never sampled. TRL itself
        # forgets the model's own eos when given no stop token, so responses have their full length.
        tokenizer.add_special_tokens({"pad_token": "<never sampled>"})
    elif tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(f"the tokenizer in {setup.model} needs a padding token other than its end-of-sequence token")
    optimizers = (None, None)
    if setup.value_learning_rate is not None:
        groups = [{"params": policy.parameters()}, {"params": critic.parameters(), "lr": setup.value_learning_rate}]
        optimizer = torch.optim.AdamW(groups, lr=setup.learning_rate, weight_decay=0.0, fused=True)
        optimizers = (optimizer, get_constant_schedule(optimizer))
    reward = TokenReward(setup, tokenizer.eos_token_id)
    trainer = Trainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        train_dataset=Dataset.from_dict({"input_ids": setup.prompts}),
        value_model=critic,
        optimizers=optimizers,
    )
    ppo_trainer.gc = SimpleNamespace(collect=lambda: 0) if setup.stub_gc else TRLS_OWN.gc
    return trainer, reward


def memory() -> dict[str, float]:
    """Resident memory of this process now and at its peak, in MB; outside Linux the peak alone.

    Not `ru_maxrss` where there is better: Linux carries it over from the process that started this one.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("peak_rss_mb", "VmHWM"), ("rss_mb", "VmRSS"))}


def commands() -> Iterator[dict[str, Any]]:
    """Those read from stdin; the ones that need no run are answered here."""
    for line in sys.stdin:
        command = json.loads(line)
        if command["cmd"] == "quit":
            return
        if command["cmd"] == "memory":
            reply({**memory(), "start_rss_mb": START_RSS_MB})
        else:
            yield command


def reply(message: dict[str, Any]) -> None:
    REPLIES.write(json.dumps(message) + "\n")


def run(command: dict[str, Any]) -> None:
    """Set a run up, and train until TRL's loop is left by an exception."""
    setup = Setup(**command)
    with tempfile.TemporaryDirectory() as folder:
        trainer, reward = trainer_of(setup, folder)
        trainer.dataloader = Gate(trainer, reward, setup)
        reply({"ok": True})
        trainer.train()


def main() -> None:
    reply({"ready": True})
    waiting = next(commands(), None)
    while waiting is not None:
        if waiting.pop("cmd") != "setup":
            raise ValueError("the first command must be setup")
        try:
            run(waiting)
        except NextSetup as request:
            waiting = {"cmd": "setup", **request.args[0]}


START_RSS_MB = memory()["peak_rss_mb"]

if __name__ == "__main__":
    main()
