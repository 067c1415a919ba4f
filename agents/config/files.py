"""Configurations as YAML, and what is checked before a run begins.

A file may name only some fields; the others stay as they are. Types and choices are read off the dataclasses, so that
a field added to them can be set from a file at once.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from agents.config import TrainConfig
from agents.config.checks import flag, flatten, problems
from llm_env.files import replace_file
from rewards.registry import did_you_mean

# By these a folder is known to hold a run, or something that a run there would take for its own, or replace.
RUN_FILES = ("config.yaml", "metrics.jsonl", "checkpoints", "sft", "best", "model")

# What falls along a schedule that ends with the run, unless it is constant.
DECAYS = ("actor.decay", "critic.decay", "loss.entropy_decay")

# What a resumed run may be told anew. Everything else decides what it learns.
FREE_ON_RESUME = (
    *("iterations", "out", "log.", "checkpoint.", "guard.", "evaluation.stop_at", "sft.checkpoint_every"),
    *("worker_cpus", "worker_gpus", "ray", "listen", "rollout.tensor_parallel"),
)

# Says that the run in this folder failed before its first checkpoint, and why: there is nothing to go on from.
FAILED = "failed.txt"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which field, what was expected, and what to do."""


def save_config(config: TrainConfig, path: Path) -> None:
    """Write all fields as YAML, whole or not at all."""
    # No allow_unicode: with it PyYAML writes some line breaks as they are, and reads them as spaces.
    text = yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False)
    with replace_file(path) as new:
        new.write_text(text, encoding="utf-8")


def load_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """Read a YAML file; fields that it does not name are those of `base` (by default, the defaults)."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    try:
        config: TrainConfig = read_value(TrainConfig, {} if values is None else values, "", base or TrainConfig())
        return config
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def refuse_a_second_run(out: Path) -> None:
    """Raise if a folder holds a run already: another one there would take what is left of it for its own.

    A run that failed before its first checkpoint does not count: whoever has mended the mistake begins again.
    """
    if (out / FAILED).exists():
        return
    found = [name for name in RUN_FILES if (out / name).exists()]
    if found:
        raise ConfigError(
            f"{out} holds a run already ({', '.join(found)}): go on with it (--resume), or use another folder (--out)"
        )


def refuse_changes(saved: TrainConfig, wanted: TrainConfig) -> None:
    """Raise if a run that is resumed was told anything that decides what it learns, and is told otherwise now.

    Where it was left to the run to choose a precision (`--model.autocast auto`), the saved one is what it has chosen.
    """
    changed = {
        name: (before, now)
        for name, (before, now) in differences(saved, wanted).items()
        if not name.startswith(FREE_ON_RESUME) and (name, now) != ("model.autocast", "auto")
    }
    if changed:
        listed = "\n".join(f"  {flag(name)} is {now}, was {before}" for name, (before, now) in changed.items())
        raise ConfigError(
            f"a resumed run goes on as it was told in the beginning, but here\n{listed}\n"
            f"Leave these out, or begin another run with another --out"
        )
    settings = dict(flatten(saved))
    falling = [name for name in DECAYS if settings[name] != "constant"]
    if falling and wanted.iterations != saved.iterations:
        decays = " and ".join(f"{flag(name)} is {settings[name]}" for name in falling)
        raise ConfigError(
            f"--iterations is {wanted.iterations}, was {saved.iterations}, but {decays}: what falls to 0 at the last "
            f"iteration would jump if that were another one. Leave --iterations out; or begin another run, with "
            f"another --out, from the model of this one: --model.name {wanted.out / 'model'}"
        )


def check_config(config: TrainConfig) -> None:
    """Raise a `ConfigError` that lists all that is wrong: types, choices, numbers out of range, contradictions."""
    read_value(TrainConfig, _plain(config), "", config)
    complain(list(problems(config)))


def complain(found: Sequence[str]) -> None:
    """Raise a `ConfigError` that lists all that was found to be wrong, if anything was."""
    if found:
        raise ConfigError(found[0] if len(found) == 1 else "\n  ".join([f"{len(found)} things are wrong:", *found]))


def differences(one: TrainConfig, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, by their dotted names, with the values of both."""
    theirs = dict(flatten(other))
    return {name: (value, theirs[name]) for name, value in flatten(one) if value != theirs[name]}


def read_value(kind: Any, value: Any, name: str, base: Any = None) -> Any:
    """A value as the type of its field.

    Args:
        kind: the type.
        value: what a file or a flag says.
        name: of the field, with dots, for the message of the `ConfigError` that is raised if it does not fit.
        base: for dataclasses, the instance that has the fields which `value` leaves out.
    """
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, name, base)
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return read_value(members[0], value, name)
    if origin in (Union, types.UnionType):
        for member in members:
            try:
                return read_value(member, value, name)
            except ConfigError:
                continue
        if type(None) in members and isinstance(value, str) and value.lower() == "none":
            return None
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in members):
            return value
    elif origin is dict and isinstance(value, Mapping):
        key_kind, value_kind = members
        return {read_value(key_kind, k, name): read_value(value_kind, v, f"{name}.{k}") for k, v in value.items()}
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(members):
        return tuple(read_value(m, v, f"{name}[{i}]") for i, (m, v) in enumerate(zip(members, value, strict=True)))
    elif kind is Path and isinstance(value, str | Path):
        return Path(value)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind or (kind is type(None) and value is None):
        return value
    hint = did_you_mean(str(value), map(str, members), count=1, cutoff=0.6) if origin is Literal else ""
    raise ConfigError(f"{name} is {value!r}, expected {describe(kind)}; {hint}".rstrip("; "))


def describe(kind: Any) -> str:
    """A type in words.

    Examples:
        >>> describe(float | None), describe(Literal["a", "b"])
        ('a number or none', 'one of a, b')
    """
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(members[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(map(str, members))
    if origin is tuple:
        return f"a list of {len(members)} values, each {describe(members[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "none"}
    return words.get(kind, "a mapping of names to values" if origin is dict else "a path")


def _read_dataclass(kind: Any, values: Any, name: str, base: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name or 'the file'} is {values!r}, expected a mapping of fields to values")
    hints = get_type_hints(kind)
    prefix = name + "." if name else ""
    changes = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(_unknown(f"{prefix}{key}", [prefix + known for known in hints]))
        inner = None if base is None else getattr(base, key)
        changes[key] = read_value(hints[key], value, prefix + key, inner)
    return kind(**changes) if base is None else dataclasses.replace(base, **changes)


def _unknown(name: str, known: list[str]) -> str:
    everywhere = [path for path, _ in flatten(TrainConfig())]
    last = name.rpartition(".")[2]
    elsewhere = [path for path in everywhere if path.rpartition(".")[2] == last]  # right, but in another part
    hint = did_you_mean(name, elsewhere, cutoff=0.0) or did_you_mean(name, [*known, *everywhere], cutoff=0.6)
    return f"unknown field {name}; " + (hint.strip() or f"known: {', '.join(known)}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number and `no` is a word, as in YAML 1.2; PyYAML alone reads 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
