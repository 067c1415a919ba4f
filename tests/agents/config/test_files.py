"""Configurations: files give back what was saved, and mistakes are named with what to do."""

from __future__ import annotations

import dataclasses
import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.config import TrainConfig
from agents.config.files import ConfigError, check_config, describe, differences, load_config, read_value, save_config
from agents.config.presets import PRESETS
from agents.config.ranges import BelowOne, Count

# Strategies for every type that a field has.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
YAML_TRAPS = st.sampled_from(
    ["no", "yes", "on", "null", "~", "", "1e-4", "0x1f", "010", "1:30", "2024-01-01", "- a: b", "\x85"]
)
NUMBERS = st.floats(allow_nan=False)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    origin, members = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return st.builds(kind, **{name: values_of(hint) for name, hint in get_type_hints(kind).items()})
    if origin is Literal:
        return st.sampled_from(members)
    if origin is dict:
        return st.dictionaries(values_of(members[0]), values_of(members[1]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, members))
    if members:
        return st.one_of(*map(values_of, members))
    plain = {int: st.integers(), float: NUMBERS, bool: st.booleans(), str: WORDS | YAML_TRAPS, type(None): st.none()}
    return st.text(string.ascii_letters + "/.~ ", min_size=1).map(Path) if kind is Path else plain[kind]


@given(config=values_of(TrainConfig))
@settings(max_examples=60, deadline=None)
def test_a_file_gives_back_what_was_saved(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    loaded = load_config(path)
    assert loaded == config
    assert repr(loaded) == repr(config), "1 == 1.0 == True, but they are not the same"
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_a_file_may_name_some_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path, "actor: {learning_rate: 1e-4}\nloss: {importance_cap: none}\ntask: {args: {alphabet: no, n: 1e3}}"
    )
    base = TrainConfig().replace(seed=7, actor__epochs=9, actor__learning_rate=1.0)
    expected = base.replace(
        actor__learning_rate=1e-4, loss__importance_cap=None, task__args={"alphabet": "no", "n": 1000.0}
    )
    assert load_config(path, base) == expected
    assert set(differences(base, expected)) == {"actor.learning_rate", "loss.importance_cap", "task.args"}
    assert load_config(write(tmp_path, "# nothing\n")) == TrainConfig()
    assert load_config(write(tmp_path, "actor: {learning_rate: 1}")).actor.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations: many", "iterations is 'many', expected a whole number"),
        ("iterations: 1.5", "iterations is 1.5, expected a whole number"),
        ("iterations: true", "iterations is True, expected a whole number"),
        ("kl: {where: rewards}", "kl.where is 'rewards', expected one of reward, loss; did you mean 'reward'?"),
        ("loss: {terms: {extra: much}}", "loss.terms.extra is 'much', expected a number"),
        ("loss: {value_clip: some}", "loss.value_clip is 'some', expected a number or none"),
        ("log: {display: 1}", "log.display is 1, expected true or false"),
        ("out: 3", "out is 3, expected a path"),
        ("actor: {betas: [0.9]}", r"actor.betas is [0.9], expected a list of 2 values, each a number"),
        ("actor: {betas: [0.9, high]}", r"actor.betas[1] is 'high', expected a number"),
        ("task: {args: [length, 6]}", "task.args is ['length', 6], expected a mapping"),
        ("task: Reverse", "task is 'Reverse', expected a mapping of fields"),
        ("model: {lora: {rang: 8}}", "unknown field model.lora.rang; did you mean 'model.lora.rank'"),
        ("learning_rate: 1e-4", "unknown field learning_rate; did you mean 'sft.learning_rate' or 'actor"),
        ("zzz: 1", "unknown field zzz; known: algo, algo_args, module, seed"),
        ("- a", "the file is ['a'], expected a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no configuration file"):
        load_config(tmp_path / "nowhere.yaml")


GRPO = {"algo": "grpo", "rollout__completions_per_prompt": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__batch_size": 0}, "--rollout.batch-size is 0, expected at least 1"),
        ({"rollout__temperature": 0.0}, "--rollout.temperature is 0.0, expected a number above 0"),
        ({"rollout__over_sample": 0.5}, "--rollout.over-sample is 0.5, expected at least 1"),
        ({"actor__learning_rate": float("nan")}, "--actor.learning-rate is nan, expected 0 or more"),
        ({"critic__epochs": 0}, "--critic.epochs is 0, expected at least 1"),
        ({"advantage__gamma": 1.5}, "--advantage.gamma is 1.5, expected a number from 0 to 1"),
        ({"advantage__actor_lambda": -0.1}, "--advantage.actor-lambda is -0.1"),
        ({"loss__dual_clip": 1.0}, "--loss.dual-clip is 1.0, expected a number above 1"),
        ({"loss__clip_low": 2.0}, "--loss.clip-low is 2.0, expected a number above 0 and at most 1"),
        (
            {"actor__betas": (0.9, 1.0)},
            "--actor.betas is (0.9, 1.0), expected 2 values, each a number from 0 to",
        ),
        (
            {"loss__terms": {"extra": float("nan")}},
            "--loss.terms is {'extra': nan}, expected values that are each",
        ),
        ({"model__lora__dropout": 1.0}, "--model.lora.dropout is 1.0, expected a number from 0 to below 1"),
        ({"kl__target": 1.0}, "--kl.target is 1.0, but an adapted --kl.beta"),
        ({"kl__beta": 0.1, "kl__estimator": "k3"}, "--kl.estimator is k3, but a penalty in the reward is always k1"),
        (
            {"kl__beta": 0.1, "kl__where": "loss", "kl__estimator": "k1"},
            "--kl.estimator is k1, but in the loss it holds the policy to nothing: its gradient does not depend on the "
            "reference",
        ),
        ({"model__lora__rank": 8, "model__reference_dtype": "bfloat16"}, "but with LoRA the reference is the model"),
        (
            {"model__lora__rank": 8, "model__offload_reference": True, "device": "meta"},
            "with LoRA the reference is the",
        ),
        (
            {"model__offload_reference": True, "device": "meta"},
            "--model.offload-reference is on, but there is no refer",
        ),
        ({"model__offload_reference": True, "kl__beta": 0.1}, "--device is cpu, where the reference lies in any case"),
        (
            {"model__offload_reference": True, "kl__beta": 0.1, "device": "meta", "model__frozen_bits": 4},
            "but --model.frozen-bits is 4, and such weights stay",
        ),
        ({"rollout__tensor_parallel": 2}, "--rollout.tensor-parallel is 2, but the transformers engine"),
        (
            {"rollout__tensor_parallel": 4, "rollout__engine": "vllm", "workers": 1, "worker_gpus": 2, "ray": "auto"},
            "--rollout.tensor-parallel is 4, but each of --workers has 2 GPUs: use --worker-gpus 4",
        ),
        ({"rollout__completions_per_prompt": 5}, "--rollout.batch-size is 64, expected a multiple"),
        ({"rollout__drop_uniform_groups": True}, "--rollout.drop-uniform-groups needs groups"),
        ({"critic_warmup": 100}, "--critic-warmup is 100 of --iterations 100: the policy would never learn"),
        ({"device": "gpu"}, "--device is gpu, expected cpu, cuda"),
        ({"device": "cuda:99"}, "--device is cuda:99, but torch finds"),
        ({"model__critic": "none"}, "model.critic is 'none', expected one of fitted, shared, separate"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(TrainConfig().replace(**changes))


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)^2 things are wrong:.*--seed.*--kl.horizon"):
        check_config(TrainConfig().replace(seed=-1, kl__horizon=0))


def test_configurations_that_make_sense() -> None:
    check_config(TrainConfig())
    check_config(TrainConfig().replace(**GRPO))
    for preset in PRESETS.values():
        check_config(preset.config)


def test_annotated_types_are_read_and_described_as_what_they_are() -> None:
    assert read_value(Count | None, 3, "n") == 3
    assert read_value(tuple[BelowOne, BelowOne], [0, 1], "pair") == (0.0, 1.0)
    assert describe(Count | None) == "a whole number or none"
    with pytest.raises(ConfigError, match="n is 'x', expected a whole number"):
        read_value(Annotated[int, "a remark"], "x", "n")
