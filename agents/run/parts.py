"""From a configuration to the parts of a run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import algorithm_class, check_algorithm
from agents.config import ModelConfig, TrainConfig
from agents.config.modules import import_module_of
from agents.networks.network import Network
from agents.rollouts.collector import Collector, Filter, not_cut, not_uniform
from agents.rollouts.writers import EnginePolicy, EngineRollouts, Rollouts, StepRollouts, needs_steps
from agents.run.evaluate import Evaluator
from llm_env import TorchRLTokenEnv
from llm_env.engines import Engine, make_engine
from llm_env.engines.transformers import TransformersEngine
from llm_env.mdp.core import TokenMDP
from llm_env.mdp.options import MDPOptions
from llm_env.models import load_model, load_tokenizer
from llm_env.tasks import Task, make_task


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The parts of a run, put together.

    Attributes:
        algorithm: learns.
        evaluator: judges it on held-out prompts; None if the task has none.
        engine: writes the texts.
        tokenizer: of the model.
        shares_weights: the engine computes with the very weights that learn.
    """

    algorithm: Algorithm
    evaluator: Evaluator | None
    engine: Engine
    tokenizer: Any
    shares_weights: bool

    def update_engine(self) -> None:
        """Let the engine compute with the policy's present weights."""
        if not self.shares_weights:
            self.engine.load_weights(self.algorithm.network.engine_weights(), version=self.engine.version + 1)

    def close(self) -> None:
        """Free the engine, and the processes that rewards run in."""
        self.algorithm.collector.rollouts.mdp.close()
        if self.evaluator is not None:
            self.evaluator.rollouts.mdp.close()
        self.engine.close()


def build(config: TrainConfig, model: str | Path | None = None) -> Run:
    """Put a run together.

    Args:
        config: what it is.
        model: begin with this model (a name or folder) instead of `config.model.name`.
    """
    check_algorithm(config)
    seed_everything(config.seed)
    source = str(model or config.model.name)
    # The task comes before the models: what is wrong with it should be said before anything heavy is done.
    task, rollout = make_task_of(config), config.rollout
    mdp = TokenMDP(task, **mdp_options(config, model=source))
    step_by_step = needs_steps(mdp)
    judged = has_held_out(task, config.evaluation.split)

    network = Network(load(config, source), config.model, rollout.temperature).eval()
    tokenizer = load_tokenizer(source)
    slots = rollout.slots or rollout.batch_size
    shares = rollout.engine == "transformers" and rollout.engine_dtype is None
    # Stepping, each environment keeps its slots for as long as it lives.
    engine = make_engine_of(
        config, network, tokenizer, source, context=mdp.context, slots=slots * (1 + judged if step_by_step else 1)
    )

    def rollouts(split: str) -> Rollouts:
        if step_by_step:
            env = TorchRLTokenEnv(task, slots, **mdp_options(config, split, engine=engine, observe="logits"))
            return StepRollouts(env, EnginePolicy(env))
        own = mdp if split == "train" else TokenMDP(task, **mdp_options(config, split, model=source))
        return EngineRollouts(own, engine)

    filters: list[Filter] = [not_cut] * rollout.drop_truncated + [not_uniform] * rollout.drop_uniform_groups
    collector = Collector(
        rollouts("train"),
        rollout.batch_size,
        temperature=rollout.temperature,
        seed=config.seed,
        over_sample=rollout.over_sample,
        filters=filters,
    )
    trusted = shares and not config.model.autocast
    algorithm = algorithm_class(config.algo)(config, network, collector, trusted=trusted, **config.algo_args)
    evaluator = None
    if judged:
        evaluator = Evaluator(
            rollouts(config.evaluation.split), config.evaluation.prompts, rollout.temperature, config.seed
        )
    run = Run(algorithm, evaluator, engine, tokenizer, shares)
    run.update_engine()  # an engine that has made its own model need not have made the same: random weights have a seed
    return run


def seed_everything(seed: int) -> None:
    """The global random generators: nothing here needs more than torch's, but rewards and libraries may."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def make_task_of(config: TrainConfig) -> Task:
    """The task, from its name and arguments."""
    import_module_of(config)
    return make_task(config.task.name, config.task.args)


def mdp_options(config: TrainConfig, split: str = "train", **more: Any) -> MDPOptions:
    """What the environment's core is told: by the configuration, and more."""
    task = config.task
    options: MDPOptions = {
        "split": split,
        "shuffle": split == "train",
        "completions_per_prompt": config.rollout.completions_per_prompt if split == "train" else 1,
        "context": task.context,
        "max_new_tokens": task.max_new_tokens,
        "drop_long_prompts": task.drop_long_prompts,
        "reward_timeout": task.reward_timeout,
    }
    return cast(MDPOptions, {**options, **more})


def has_held_out(task: Task, split: str) -> bool:
    """Whether there are prompts to judge by; a split that was asked for by name must be there."""
    try:
        task.prompts(split)
    except ValueError:
        if split != "test":
            raise
        return False
    return True


def load(config: TrainConfig, source: str) -> Any:
    """The language model."""
    model: ModelConfig = config.model
    return load_model(source, dtype=getattr(torch, model.dtype), device=config.device, seed=config.seed)


def make_engine_of(
    config: TrainConfig, network: Network, tokenizer: Any, source: str, *, context: int, slots: int
) -> Engine:
    """The engine: on the trained weights themselves, or with a copy in a precision of its own."""
    rollout = config.rollout
    if rollout.engine == "transformers" and rollout.engine_dtype is None:
        return TransformersEngine(network.engine_model(), tokenizer, num_slots=slots, context=context)
    options: dict[str, Any] = {"dtype": getattr(torch, rollout.engine_dtype or config.model.dtype)}
    if rollout.engine == "transformers":
        options["device"] = config.device
    return make_engine(rollout.engine, source, num_slots=slots, context=context, **options)
