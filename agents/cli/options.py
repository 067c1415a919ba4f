"""From a command line to the configuration of a run: defaults, then a preset, a file and flags; the later ones win."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from agents.config import Scalar, TrainConfig
from agents.config.explain import help_texts
from agents.config.files import ConfigError, check_config, load_config, read_value, refuse_a_second_run, refuse_changes
from agents.config.modules import import_module_of
from agents.config.presets import PRESETS
from rewards.registry import did_you_mean

Own = TypeVar("Own")


@dataclass(frozen=True)
class Options:
    """What a command line says."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]  # no prefix: --seed, not --settings.seed
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Begin with one of the presets above, in place of the usual defaults."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None
    """Then take what this YAML file says; it may name a few settings only. Flags win over both."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in --out. Only these may change: iterations (unless a learning rate decays), log, checkpoint,
    sft.checkpoint-every, guard, evaluation.stop-at."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def read_options(
    arguments: Sequence[str],
    program: str = "llm-env train",
    defaults: TrainConfig | None = None,
    *,
    begins: bool = True,
) -> Options:
    """What a command line asks for, checked. A run that is resumed keeps its own configuration.

    Args:
        arguments: the flags.
        program: the command, as help names it.
        defaults: what holds where neither flags nor a preset nor a file say otherwise.
        begins: whether a run is begun, for which its folder must be free.
    """
    preset, file = value_of(arguments, "--preset"), value_of(arguments, "--config")
    if preset is not None and preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS, count=1, cutoff=0.3)
        raise ConfigError(f"unknown preset {preset!r}; {hint}There are:\n{list_of_presets()}")

    def with_file(base: TrainConfig) -> TrainConfig:
        return load_config(Path(file), base) if file else base

    base = with_file(PRESETS[preset].config if preset else defaults or TrainConfig())
    options = _parse(arguments, base, program)
    out = options.settings.out
    if options.resume:
        saved = _config_of_run(out)
        options = _parse(arguments, with_file(saved), program)  # of the preset only the folder's name was needed
        refuse_changes(saved, options.settings)
        # The folder may have been moved since.
        options = replace(options, settings=options.settings.replace(out=out))
    else:
        if begins:
            refuse_a_second_run(out)
        if (fitting := _as_the_flags_want_it(base, options.settings)) != base:
            options = _parse(arguments, fitting, program)
    check_config(options.settings)
    from agents.algorithms.registry import check_algorithm  # imports torch: --help and slips in flags do without

    check_algorithm(options.settings)
    return options


def split_options(
    arguments: Sequence[str], own: Own, program: str, description: str, of_the_rest: str
) -> tuple[Own, list[str]]:
    """Flags of a command's own, and those that it has from `llm-env train`, which are left for `read_options`.

    Args:
        arguments: all flags.
        own: its own options, with their defaults.
        program: the command, as help names it.
        description: what it does, for help.
        of_the_rest: what help says of the other flags.
    """
    asks = {"-h", "--help"} & set(arguments)
    parser: dict[str, Any] = {
        "default": own,
        "prog": program,
        "registry": flag_registry(),
        "description": description,
    }
    if asks:
        print(f"{of_the_rest} Besides:\n")
        tyro.cli(type(own), args=["--help"], **parser)
    found, rest = tyro.cli(type(own), args=list(arguments), return_unknown_args=True, **parser)
    return found, list(rest)


def list_of_presets() -> str:
    """The presets, a line each."""
    return "\n".join(f"  {name:<18} {preset.description}" for name, preset in PRESETS.items())


def _as_the_flags_want_it(base: TrainConfig, wanted: TrainConfig) -> TrainConfig:
    """The preset or file without what nothing reads any more under the flags, as under another algorithm, and without
    the arguments of an algorithm, task or reward that the flags replace.

    Those settings are as by default. Flags are put on top of it once more, so that one without effect is still refused,
    as is what had none in the preset or file itself.
    """
    from agents.algorithms.registry import unread_settings  # imports torch: --help and slips in flags do without

    unread_before = unread_settings(base)
    changes = {name: value for name, value in unread_settings(wanted).items() if name not in unread_before}
    if wanted.algo != base.algo:
        changes["algo_args"] = {}
    if wanted.task.name != base.task.name:
        changes["task.args"] = {}
    if wanted.task.reward != base.task.reward:
        changes["task.reward_args"] = {}
    return base.replace(**{name.replace(".", "__"): value for name, value in changes.items()})


_WHAT = {
    "llm-env train": "Train a language model on a task.",
    "llm-env sft": "Only the warm start of a run.",
    "llm-env rlhf": "How the policy learns that is to please reward models.",
    "llm-env plan": "The run that is planned.",
}


def _parse(arguments: Sequence[str], base: TrainConfig, program: str) -> Options:
    what = _WHAT[program]
    return tyro.cli(
        Options,
        args=arguments,
        default=Options(base),
        prog=program,
        description=f"{what} Defaults shown are those of --preset and --config. Presets:\n{list_of_presets()}",
        registry=flag_registry(),
    )


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """What a flag says, before all are read: the defaults of the others depend on it."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == name:
            found = next(iter(arguments[place + 1 :]), None)
        elif argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
    return found


def _config_of_run(out: Path) -> TrainConfig:
    path = out / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no run to resume in {out} (no {path.name}): check --out, or leave out --resume")
    return load_config(path)


def flag_registry() -> ConstructorRegistry:
    """How parts of the configuration, optional values and mappings are written as flags."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def part(info: StructTypeInfo) -> StructConstructorSpec | None:
        """Tyro's own breaks a help text where the docstring has its line ends."""
        if not (is_dataclass(info.type) and isinstance(info.default, info.type)):
            return None
        texts = help_texts(info.type)
        fields = [
            StructFieldSpec(name, kind, getattr(info.default, name), texts.get(name))
            for name, kind in get_type_hints(info.type, include_extras=True).items()
        ]
        return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """Tyro's own wants "None", with a capital, and shows the type as {None}|INT."""
        members = [member for member in get_args(info.type) if member is not type(None)]
        if get_origin(info.type) not in (Union, types.UnionType) or info.type == Scalar or len(members) != 1:
            return None
        kind = get_args(members[0])[0] if get_origin(members[0]) is Annotated else members[0]
        given = {"true": True, "false": False} if kind is bool else {str(choice): choice for choice in get_args(kind)}
        choices = tuple(given) if given else None
        names = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}

        def read(strings: list[str]) -> Any:
            return None if strings[0].lower() == "none" else given[strings[0]] if choices else kind(strings[0])

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join((*choices, "none")) + "}" if choices else f"{names[kind]}|none",
            instance_from_str=read,
            is_instance=lambda value: (
                value is None or (value in given.values() if choices else isinstance(value, kind))
            ),
            str_from_instance=lambda value: [str(value).lower() if value is None or kind is bool else str(value)],
            choices=(*choices, "none") if choices else None,
        )

    @registry.primitive_rule
    def mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
        if get_origin(info.type) is not dict:
            return None
        kind = get_args(info.type)[1]
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME VALUE ...]",
            instance_from_str=lambda strings: {n: read_value(kind, v, n) for n, v in _read_pairs(strings).items()},
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [str(part) for pair in value.items() for part in pair] or ["none"],
        )

    return registry


def read_task(arguments: Sequence[str]) -> tuple[str, dict[str, object], str]:
    """A task's name, its arguments and a model, as `llm-env tasks NAME [ARGUMENT VALUE ...] [--model M] [--module M]`.

    Examples:
        >>> read_task(["Reverse", "length", "6", "--model", "tiny"])
        ('Reverse', {'length': 6}, 'tiny')
    """
    words = [word for word in arguments if word != "--traceback"]
    named = {"--model": "tiny", "--module": ""}
    for flag in named:
        if flag in words:
            place = words.index(flag)
            if place + 1 == len(words):
                raise ConfigError(f"{flag} is the last word: expected a name after it")
            named[flag] = words[place + 1]
            del words[place : place + 2]
    name, *rest = words
    if unknown := [word for word in words if word.startswith("--")]:
        raise ConfigError(
            f"llm-env tasks {name} takes the task's arguments, --model and --module, got {unknown[0]}: for example, "
            "llm-env tasks Reverse length 6 --model tiny"
        )
    import_module_of(TrainConfig(module=named["--module"] or None))
    try:
        return name, dict(_read_pairs(rest)), named["--model"]
    except ValueError as error:
        raise ConfigError(f"llm-env tasks {name}: {error}") from error


def _read_pairs(strings: list[str]) -> dict[str, Scalar]:
    if strings == ["none"]:  # as --help shows it
        return {}
    if len(strings) % 2:
        raise ValueError(f"expected names and values by turns, such as: length 6; got {' '.join(strings)}")
    return {name: _scalar(value) for name, value in zip(strings[::2], strings[1::2], strict=True)}


def _scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def model_of(name: str) -> str:
    """The model that is meant: of a run's folder the best one, or else the last."""
    folder = Path(name)
    if not (folder / "config.yaml").is_file():
        return name
    for kept in ("best", "model"):
        if (folder / kept / "config.json").is_file():
            return str(folder / kept)
    raise ConfigError(f"{folder} holds a run, but no model yet: judge it when it has written one (best/ or model/)")
