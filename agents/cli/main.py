"""The command `llm-env`: trains, and lists what there is to choose from."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from agents.config.files import ConfigError
from rewards.registry import did_you_mean

USAGE = """\
usage: llm-env COMMAND [OPTIONS]

Reinforcement learning on language models.

  train        train a model on a task
  worker       write texts for a run on another machine
  sft          only the supervised warm start of a run
  best         keep the best of scored texts, to fine-tune on
  pairs        make pairs, of which one text is preferred, from texts and their scores
  label        say yourself which of two texts is better, key by key
  reward-model train reward models on which of two texts is preferred
  dpo          train a policy on such pairs directly
  rlhf         texts, pairs, reward models and a policy that learns from them, in rounds
  report       one page of a run, or of several beside each other: curves, and texts token by token
  compare      runs beside each other as a table, with intervals over their seeds
  watch        follow a run that goes on in another process
  play         take the model's place: write an episode of a task yourself, with a model at hand
  eval         judge a model, or a run's, on a task
  score        score texts that were written elsewhere
  presets      list the named configurations to begin with
  tasks        list the tasks, and what each can be told; or show one: llm-env tasks Reverse length 6
  rewards      list the rewards that any task can be given
  algorithms   list the algorithms
  metrics      list the numbers that a run logs, and what they mean
  plan         whether a run fits into a machine, and how long an iteration takes, before it is begun
  doctor       what is installed, what this machine is good at, and whether everything works on it

To begin:                       llm-env train --preset reverse-tiny
All that a run can be told:     llm-env train --help
"""

# What is missing where the bare library was installed.
EXTRA = ("tyro", "rich", "matplotlib", "tensorboard", "peft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `llm-env train --help | head`; Python would complain again when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        if "--traceback" in given:
            traceback.print_exc()
        _print_error(error)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, count=1, cutoff=0.6) or f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name!r}; {hint.strip()}")
    if name not in ("train", "sft") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"llm-env {name} is one process: start it without torchrun (train and sft may be several)")
    COMMANDS[name](rest)
    return 0


def _train(arguments: list[str]) -> None:
    from agents.cli.options import read_options

    options = read_options(arguments, "llm-env train")
    from agents.run.training import train  # takes seconds to import: not before the flags are known to be right

    train(options.settings, resume=options.resume)


def _sft(arguments: list[str]) -> None:
    from agents.cli.options import read_options

    options = read_options(arguments, "llm-env sft")
    from agents.run.training import fine_tune

    fine_tune(options.settings, resume=options.resume)


def _best(arguments: list[str]) -> None:
    from agents.cli.preferences import best

    best(arguments)


def _pairs(arguments: list[str]) -> None:
    from agents.cli.preferences import pairs

    pairs(arguments)


def _label(arguments: list[str]) -> None:
    from agents.cli.label import label

    label(arguments)


def _reward_model(arguments: list[str]) -> None:
    from agents.cli.preferences import reward_model

    reward_model(arguments)


def _dpo(arguments: list[str]) -> None:
    from agents.cli.preferences import dpo

    dpo(arguments)


def _rlhf(arguments: list[str]) -> None:
    from agents.cli.rlhf import rlhf

    rlhf(arguments)


def _report(arguments: list[str]) -> None:
    from agents.cli.report import report

    report(arguments)


def _compare(arguments: list[str]) -> None:
    from agents.cli.report import compare

    compare(arguments)


def _watch(arguments: list[str]) -> None:
    from agents.cli.report import watch

    watch(arguments)


def _play(arguments: list[str]) -> None:
    from agents.cli.play import play

    play(arguments)


def _eval(arguments: list[str]) -> None:
    from agents.cli.judge import evaluate

    evaluate(arguments)


def _score(arguments: list[str]) -> None:
    from agents.cli.score import score

    score(arguments)


def _presets(arguments: list[str]) -> None:
    _expect_nothing("presets", arguments)
    from agents.cli.options import list_of_presets

    print(list_of_presets())
    print("\nAll that one sets: llm-env train --preset NAME --help")


def _tasks(arguments: list[str]) -> None:
    from agents.cli.lists import list_of_tasks

    examples = [
        "llm-env train --task.name Reverse --task.args length 6",
        "llm-env train --task.name Dataset --task.args train data.jsonl --task.reward exact_match",
    ]
    if arguments and not arguments[0].startswith("-"):
        _show(arguments)
    else:
        _list("tasks", arguments, list_of_tasks, *examples)
        print("See what one asks: llm-env tasks Reverse length 6 --model smollm2-135m")


def _show(arguments: list[str]) -> None:
    from agents.cli.options import read_task
    from agents.cli.show import shown

    print(shown(*read_task(arguments)))


def _rewards(arguments: list[str]) -> None:
    from agents.cli.lists import list_of_rewards

    example = "llm-env train --task.reward exact_match --task.reward-args ignore_case true"
    _list("rewards", arguments, list_of_rewards, example)


def _algorithms(arguments: list[str]) -> None:
    from agents.cli.lists import list_of_algorithms

    _list("algorithms", arguments, list_of_algorithms, "llm-env train --algo rloo --rollout.completions-per-prompt 8")


def _metrics(arguments: list[str]) -> None:
    _expect_nothing("metrics", arguments)
    from agents.metrics.listing import list_of_metrics

    print(list_of_metrics())
    print("\nCapital letters stand for a name that a task or your own code makes up.")


def _plan(arguments: list[str]) -> None:
    from agents.cli.plan import plan

    plan(arguments)


def _worker(arguments: list[str]) -> None:
    from agents.cli.worker import worker

    worker(arguments)


def _doctor(arguments: list[str]) -> None:
    _expect_nothing("doctor", arguments)
    if {"-h", "--help"} & set(arguments):
        return
    from agents.run.doctor import examine

    failed = 0
    for finding in examine():
        print(finding, flush=True)
        failed += finding.state == "failed"
    if failed:
        raise ConfigError(f"{failed} of the checks failed: see above")


def _list(command: str, arguments: list[str], listing: Callable[[], str], *examples: str) -> None:
    from agents.cli.lists import import_module_named_in

    arguments = [argument for argument in arguments if argument != "--traceback"]
    if {"-h", "--help"} & set(arguments):
        print(f"usage: llm-env {command} [--module NAME]\n")
        arguments = []
    import_module_named_in(arguments, command)
    print(listing())
    print("\n" + "\n".join(f"Use one: {example}" for example in examples))
    print(f"Those of your own, too, which a module registers: llm-env {command} --module my_module")


def _expect_nothing(command: str, arguments: list[str]) -> None:
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if {"-h", "--help"} & set(arguments):
        print(f"usage: llm-env {command}\n")
    elif arguments:
        raise ConfigError(f"llm-env {command} takes no arguments, got {' '.join(arguments)}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sft": _sft,
    "best": _best,
    "pairs": _pairs,
    "label": _label,
    "reward-model": _reward_model,
    "dpo": _dpo,
    "rlhf": _rlhf,
    "report": _report,
    "compare": _compare,
    "watch": _watch,
    "play": _play,
    "eval": _eval,
    "score": _score,
    "presets": _presets,
    "tasks": _tasks,
    "rewards": _rewards,
    "algorithms": _algorithms,
    "metrics": _metrics,
    "worker": _worker,
    "plan": _plan,
    "doctor": _doctor,
}


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message says what to mend; anything else is a bug, and its traceback is wanted."""
    ours = type(error).__module__.partition(".")[0] in ("agents", "llm_env", "rewards")
    return ours or isinstance(error, ValueError | TypeError | KeyError | OSError | ImportError)


def _print_error(error: Exception) -> None:
    # str() of a KeyError is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRA:
        text = f"{error.name} is missing. Training needs more than the bare library: pip install 'llm-env[train]'"
    text = "\n".join([f"error: {text or type(error).__name__}", *getattr(error, "__notes__", ())])
    if not isinstance(error, ConfigError):
        text += "\n(--traceback shows where this came from)"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        text = f"\033[31m{text}\033[0m"
    print(text, file=sys.stderr)
