"""`llm-env tasks NAME`: what a task asks, a right answer to it, what that is worth, and how long they are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np

from agents.config.arguments import nested
from agents.config.files import ConfigError
from agents.run.score_texts import TextScorer, WrittenText
from llm_env.models import load_vocabulary
from llm_env.tasks import Task, make_task
from llm_env.tokens.prompts import Prompt, TokenizedPrompts
from llm_env.tokens.vocabulary import Vocabulary

SHOWN = 3
MEASURED = 256  # prompts, for their lengths


def shown(name: str, arguments: dict[str, object], model: str = "tiny") -> str:
    """A task in words, with a few of its prompts.

    Args:
        name: of the task.
        arguments: of the task.
        model: whose tokenizer counts the tokens.

    Examples:
        >>> print(shown("Copy", {"length": 3}))
        Copy: Write the word again.
        train      4,096 prompts, of 10 tokens by the tokenizer of tiny
        test       256 prompts, of 10 tokens by the tokenizer of tiny
        an agent   writes 4 tokens at most
        a critic   is told right_so_far, right_share
        <BLANKLINE>
        prompt     copy wqn:
        answer     wqn   (score 1, 3 tokens)
        <BLANKLINE>
        prompt     copy hib:
        answer     hib   (score 1, 3 tokens)
        <BLANKLINE>
        prompt     copy bae:
        answer     bae   (score 1, 3 tokens)
    """
    task = make_task(name, nested(arguments))
    vocabulary = load_vocabulary(model)
    scorer = _scorer(task, vocabulary)
    bound = task.bind(vocabulary) if scorer is None else scorer.task
    lines = [f"{name}: {(inspect.getdoc(type(task)) or '').partition(chr(10))[0]}"]
    prompts: Sequence[Prompt] = []
    for split in ("train", "test"):
        try:
            prompts = task.prompts(split)
        except ValueError:  # it has none
            continue
        lines.append(_line(split, f"{len(prompts):,} prompts, of {_lengths(prompts, bound, vocabulary, model)}"))
    replies = f", and is replied {bound.max_reply_tokens} at most" if bound.overrides("reply") else ""
    lines.append(_line("an agent", f"writes {bound.max_new_tokens} tokens at most{replies}"))
    if bound.hint_names:
        lines.append(_line("a critic", f"is told {', '.join(bound.hint_names)}"))
    for index, prompt in enumerate(prompts[:SHOWN]):
        lines += ["", _line("prompt", prompt.written)]
        answer = prompt.metadata.get("answer")
        if isinstance(answer, list | tuple):
            lines.append(_line("answer", "   ".join(map(str, answer))))
        elif answer is not None:
            worth = "" if scorer is None else f"   ({_worth(scorer, prompts, index, str(answer), vocabulary)})"
            lines.append(_line("answer", f"{answer}{worth}"))
    if scorer is not None:
        scorer.close()
    return "\n".join(line.rstrip() for line in lines)


def _scorer(task: Task, vocabulary: Vocabulary) -> TextScorer | None:
    """None for a task that cannot score a text by itself, or has no reward of its own."""
    try:
        return TextScorer(task, vocabulary)
    except (ConfigError, NotImplementedError):
        return None


def _worth(scorer: TextScorer, prompts: Sequence[Prompt], index: int, answer: str, vocabulary: Vocabulary) -> str:
    """What an answer is paid, and whether it can be written at all."""
    [row] = scorer.scores(prompts, [WrittenText(index, answer)])
    tokens, most = len(vocabulary.encode(answer)), scorer.task.max_new_tokens
    return f"score {row['score']:.3g}, {tokens} tokens" + (
        f": more than the {most} it may have" if tokens > most else ""
    )


def _lengths(prompts: Sequence[Prompt], task: Task, vocabulary: Vocabulary, model: str) -> str:
    tokens = TokenizedPrompts.encode(prompts[:MEASURED], vocabulary, task.chat).tokens
    shortest, middle, longest = np.percentile([len(ids) for ids in tokens], [0, 50, 100]).astype(int).tolist()
    count = f"{longest} tokens" if shortest == longest else f"{shortest} to {longest} tokens, {middle} as a rule,"
    return f"{count} by the tokenizer of {model}"


def _line(label: str, text: str) -> str:
    """A label, and its text beside it; the further lines of a text stand below its first."""
    first, *more = text.split("\n")
    return "\n".join([f"{label:<10} {first}", *(f"{'':<10} {line}" for line in more)])
