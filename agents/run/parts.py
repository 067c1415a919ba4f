"""From a configuration to the parts of a run.

`build_parts` makes what every kind of training needs: the task, the network, an engine, and who judges the policy.
`build` puts an algorithm on top; the warm start does without one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import algorithm_class, check_algorithm
from agents.config import ModelConfig, TrainConfig
from agents.config.arguments import nested
from agents.config.files import ConfigError
from agents.config.modules import import_module_of
from agents.networks.network import Network
from agents.networks.ranks import ALONE, Ranks
from agents.rollouts.collector import Collector, Filter, not_cut, not_uniform, part_below
from agents.rollouts.stream import Stream, stream_seed
from agents.rollouts.workers import Workers
from agents.rollouts.workers.worker import Scribe
from agents.rollouts.writers import EngineWriter, PolicyWriter
from agents.run.evaluate import Evaluator
from agents.run.links import check_links, make_links
from agents.run.precision import Speeds, choose_precision
from agents.run.supervised import Supervised
from llm_env.engines import Engine, Sampling, engine_names, make_engine
from llm_env.engines.base import EngineBase
from llm_env.engines.transformers import TransformersEngine
from llm_env.mdp.core import TokenMDP
from llm_env.mdp.options import MDPOptions
from llm_env.models import load_model, load_tokenizer
from llm_env.tasks import Task, make_task
from rewards import make_reward
from rewards.registry import UnknownNameError


@dataclass(frozen=True, eq=False)
class Parts:
    """What every kind of training needs: a policy, the task that it learns, and who judges it.

    Attributes:
        source: the name or the folder of the model that it began with.
        mdp: the task and its training prompts.
        network: learns.
        tokenizer: of the model.
        engine: writes the texts; or processes with one each.
        evaluator: judges the policy on held-out prompts; None if the task has none.
        shares_weights: the engine computes with the very weights that learn.
        speeds: what the precision was chosen by; None if the configuration has said it.
    """

    source: str
    mdp: TokenMDP
    network: Network
    tokenizer: Any
    engine: Engine | Workers
    evaluator: Evaluator | None
    shares_weights: bool
    speeds: Speeds | None

    def update_engine(self) -> None:
        """Let the engine compute with the policy's present weights."""
        if not self.shares_weights:
            self.engine.load_weights(self.network.engine_weights(), version=self.engine.version + 1)

    def close(self) -> None:
        """Free the engine, and the processes that rewards run in."""
        self.mdp.close()
        if self.evaluator is not None:
            self.evaluator.writer.mdp.close()
        self.engine.close()


@dataclass(frozen=True, eq=False)
class Run(Parts):
    """The parts of a run, and the algorithm on top of them; `build` makes one.

    Attributes:
        algorithm: collects texts and learns from them.
    """

    algorithm: Algorithm


def build(config: TrainConfig, model: str | Path | None = None, ranks: Ranks = ALONE) -> Run:
    """Put a run together.

    Args:
        config: what it is.
        model: begin with this model (a name or folder) instead of `config.model.name`.
        ranks: processes that learn together, of which this is the first; the others `join`.

    Examples:
        >>> run = build(TrainConfig(iterations=2).replace(task__args={"length": 2}, rollout__batch_size=8))
        >>> for metrics in run.algorithm:  # a loop of your own
        ...     run.update_engine()
        >>> metrics["iteration"], metrics["episodes"]
        (2, 8)
        >>> run.close()
    """
    check_algorithm(config)
    parts = build_parts(config, model, ranks)
    config = dataclasses.replace(config, model=parts.network.config)  # with the precision that was chosen, if any was
    # In bfloat16 a token computed after those before it, and all of them in one pass, differ by a hundredth of a nat.
    exact = config.model.dtype == "float32" and not parts.network.config.in_bfloat16
    try:
        algorithm = algorithm_class(config.algo)(
            config,
            parts.network,
            make_collector(config, parts),
            trusted=_is_plain(config) and exact and not (config.rollout.ahead or config.rollout.go_on),
            **config.algo_args,
        )
    except BaseException:
        parts.close()
        raise
    return Run(**{field.name: getattr(parts, field.name) for field in fields(parts)}, algorithm=algorithm)


@dataclass(frozen=True)
class Invitation:
    """What a process must know to learn together with the first one: see `join`.

    Attributes:
        config: of the run.
        source: the model.
        supervised: what is learned is to write given texts, as in a warm start.
    """

    config: TrainConfig
    source: str
    supervised: bool


def join(invitation: Invitation, ranks: Ranks) -> Algorithm | Supervised:
    """What another process has of a run: the network, a part of it, and what learns, which is never asked to write."""
    config = invitation.config
    seed_everything(config.seed)
    mdp = TokenMDP(make_task_of(config), **mdp_options(config, model=invitation.source))
    network = make_network(config, config.model, invitation.source, mdp, device="meta")
    network.shard(ranks, torch.device(config.device))
    if invitation.supervised:
        return Supervised(config.sft, network)
    collector = Collector(PolicyWriter(mdp, lambda data: data, num_rows=1), config.rollout.batch_size)
    return algorithm_class(config.algo)(config, network, collector, trusted=True, **config.algo_args)


def build_parts(
    config: TrainConfig, model: str | Path | None = None, ranks: Ranks = ALONE, *, supervised: bool = False
) -> Parts:
    """All of a run but its algorithm, with the global random generators seeded.

    Args:
        config: of the run.
        model: begin with this model (a name or folder) instead of `config.model.name`.
        ranks: processes that learn together, of which this is the first.
        supervised: what is learned is to write given texts.
    """
    seed_everything(config.seed)
    source = str(model or config.model.name)
    # The task comes before the models: what is wrong with it should be said before anything heavy is done.
    task, rollout = make_task_of(config), config.rollout
    mdp = TokenMDP(task, **mdp_options(config, model=source))
    judged = has_held_out(task, config.evaluation.split)

    undecided = config.model.autocast == "auto"
    how = dataclasses.replace(config.model, autocast="off") if undecided else config.model
    # What is to lie in parts on several GPUs may be too large for one.
    network = make_network(config, how, source, mdp, device="cpu" if ranks.size > 1 else config.device)
    with ranks.as_one():
        ranks.say(Invitation(dataclasses.replace(config, model=network.config), source, supervised))
        network.shard(ranks, torch.device(config.device))
    # Of weights in bfloat16 all products are in bfloat16 as well.
    speeds = choose_precision(config, network, mdp) if undecided and how.dtype == "float32" else None
    shares = shares_weights(config, ranks.size)
    tokenizer = load_tokenizer(source)
    engine: Engine | Workers
    slots = rollout.side_by_side
    if config.workers:
        engine = make_workers(config, network, task, source, context=mdp.context, learners=ranks.size)
    elif shares:
        engine = TransformersEngine(network.engine_model(), tokenizer, num_slots=slots, context=mdp.context)
    else:
        engine = make_engine_apart(config, source, context=mdp.context, slots=slots)
    evaluator = None
    if judged:
        held_out = TokenMDP(task, **mdp_options(config, config.evaluation.split, model=source))
        evaluator = Evaluator(
            make_writer(config, held_out, engine), config.evaluation.prompts, rollout.temperature, config.seed
        )
    parts = Parts(source, mdp, network, tokenizer, engine, evaluator, shares, speeds)
    # An engine that has loaded the model by itself may hold other weights: those of "tiny" depend on the seed.
    parts.update_engine()
    return parts


def make_network(config: TrainConfig, how: ModelConfig, source: str, mdp: TokenMDP, device: str) -> Network:
    """Actor, critic and reference, of the language model there."""
    return Network(
        load_model(source, dtype=getattr(torch, how.dtype), device=device, seed=config.seed),
        how,
        config.rollout.temperature,
        mdp.vocabulary,
        reference=config.keeps_reference,
        hints=len(mdp.task.hint_names) if how.hints else 0,
    ).eval()


def without_learning(config: TrainConfig) -> TrainConfig:
    """The same without what only reinforcement learning needs: a model for a critic, a reference, other processes."""
    config = config.replace(model__critic="shared", model__hints=False, model__reference="penalty", kl__beta=0.0)
    return config.replace(workers=0, rollout__ahead=0)


def make_collector(config: TrainConfig, parts: Parts) -> Collector:
    """What collects batches of texts after the training prompts."""
    rollout = config.rollout
    stream = None
    if rollout.go_on:
        if not isinstance(parts.engine, EngineBase | Workers):
            raise ConfigError(
                f"--rollout.go-on is on, but the engine {rollout.engine} is no EngineBase, whose texts can be paused: "
                "leave it out, or use --rollout.engine transformers"
            )
        sampling = Sampling(temperature=rollout.temperature, seed=stream_seed(config.seed))
        stream = Stream(parts.mdp, parts.engine, rollout.side_by_side, sampling)
    filters: list[Filter] = [not_cut] * rollout.drop_cut + [not_uniform] * rollout.drop_uniform_groups
    return Collector(
        make_writer(config, parts.mdp, parts.engine),
        rollout.batch_size,
        temperature=rollout.temperature,
        seed=config.seed,
        ahead=rollout.ahead,
        over_sample=rollout.over_sample,
        filters=filters,
        refuses=None if rollout.drop_part is None else part_below(rollout.drop_part, rollout.drop_below),
        stream=stream,
    )


def seed_everything(seed: int) -> None:
    """The global random generators: nothing here needs more than torch's, but rewards and libraries may."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def check_parts(config: TrainConfig) -> None:
    """Raise if there is no such task, reward, model or engine; to be called before anything is written."""
    make_task_of(config)
    check_links(config)
    try:
        load_tokenizer(config.model.name)
    except OSError as error:
        raise ConfigError(f"--model.name: {error}") from error
    if config.rollout.engine not in engine_names():
        raise UnknownNameError("engine", config.rollout.engine, engine_names())


def make_task_of(config: TrainConfig) -> Task:
    """The task, from its name and arguments, with the reward that is named in place of its own."""
    import_module_of(config)
    task = make_task(config.task.name, nested(config.task.args))
    if config.task.chat is not None:
        task.chat = config.task.chat
    if config.task.reward is not None:
        task.reward = make_reward(config.task.reward, nested(config.task.reward_args))
    try:
        task.as_reward()
    except NotImplementedError as error:
        raise ConfigError(
            f"--task.reward is none, but the task {task.name} has no reward of its own: name one, such as exact_match; "
            f"`llm-env rewards` lists them"
        ) from error
    if config.rollout.go_on and config.workers and (task.overrides("reply") or keeps_sessions(task)):
        raise ConfigError(
            f"--rollout.go-on is on, but a text of {task.name} cannot go on in another process, for the task "
            "replies or plays: use --workers 0, or leave it out"
        )
    return task


def mdp_options(config: TrainConfig, split: str = "train", **more: Any) -> MDPOptions:
    """The options of a `TokenMDP`, as the configuration says; `more` are added, or replace them."""
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


def make_engine_apart(config: TrainConfig, source: str, *, context: int, slots: int) -> Engine:
    """An engine with a copy of the weights."""
    rollout = config.rollout
    options: dict[str, Any] = {"dtype": getattr(torch, rollout.engine_dtype or config.model.dtype)}
    if rollout.engine == "transformers":
        options["device"] = config.device
    if rollout.tensor_parallel > 1:
        options["tensor_parallel"] = rollout.tensor_parallel
    return make_engine(rollout.engine, source, num_slots=slots, context=context, **options)


def make_workers(
    config: TrainConfig, network: Network, task: Task, source: str, *, context: int, learners: int = 1
) -> Workers:
    """Processes with an engine each, which write texts in parts of a batch."""
    slots = math.ceil(config.rollout.side_by_side / config.workers)
    sent = copy.copy(task)
    if not keeps_sessions(task):
        sent.reward = None  # texts are scored here: a reward may be large, or have a memory
    return Workers(
        functools.partial(make_scribe, config, sent, source, context=context, slots=slots),
        config.workers,
        network.engine_weights(),
        context=context,
        links=make_links(config, learners),
        patience=config.rollout.patience,
        copies=config.rollout.ahead + 1,
    )


def make_scribe(config: TrainConfig, task: Task, source: str, *, context: int, slots: int) -> Scribe:
    """What a process needs to write texts; to be called in it."""
    disable_progress_bar()
    import_module_of(config)
    seed_everything(config.seed)
    if config.worker_gpus or config.ray is not None:
        config = config.replace(device="cuda" if config.worker_gpus else "cpu")
    engine = make_engine_apart(config, source, context=context, slots=slots)
    if not keeps_sessions(task):
        return Scribe(engine, task.bind(engine.vocabulary))
    mdp = TokenMDP(task, **mdp_options(config, model=source))
    return Scribe(engine, mdp.task, mdp)


def make_writer(config: TrainConfig, mdp: TokenMDP, engine: Engine | Workers) -> EngineWriter:
    """Who writes the texts of a task; those of sessions are scored where they are."""
    return EngineWriter(mdp, engine, scored=config.workers > 0 and keeps_sessions(mdp.task))


def keeps_sessions(task: Task) -> bool:
    """Whether the task keeps something for each text, such as a game, which cannot go from process to process."""
    return task.overrides("session")


def shares_weights(config: TrainConfig, learners: int = 1) -> bool:
    """Whether the engine computes with the very weights that learn, and so needs none of its own."""
    return _is_plain(config) and not config.workers and learners == 1


def _is_plain(config: TrainConfig) -> bool:
    """Whether the engine computes as the learner does."""
    return config.rollout.engine == "transformers" and config.rollout.engine_dtype is None
