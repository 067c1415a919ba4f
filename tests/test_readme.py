"""Every Python snippet of the documents runs as it stands, each command line can be read, what they point at exists."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.algorithms import advantages
from agents.algorithms import registry as algorithms
from agents.losses import registry as losses
from agents.losses import terms
from agents.metrics import table
from llm_env.engines import registry as engines
from llm_env.tasks import registry as tasks
from llm_env.tasks import tools
from rewards import named

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".docs/pages").rglob("*.md"))
DOCUMENTS = ("README.md", "llm_env/README.md", "agents/report/README.md", *PAGES)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}


def blocks(language: str) -> dict[str, str]:
    """The blocks of code in all documents, those in tabs too."""
    return {
        f"{name}-{number}": textwrap.dedent(block)
        for name, text in TEXTS.items()
        for number, block in enumerate(
            re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)
        )
    }


SNIPPETS = blocks("python")
COMMANDS = {
    f"{name}-{number}": line
    for name, block in blocks("console").items()
    for number, line in enumerate(block.splitlines())
    if re.match(r"(PYTHONPATH=\S+ )?llm-env ", line)
}


@pytest.fixture(scope="module", autouse=True)
def as_it_was() -> Iterator[None]:
    """What snippets register is gone afterwards: other tests of this process go through all names there are."""
    registries: list[Any] = [
        *(advantages._ESTIMATORS, algorithms._ALGORITHMS, losses._LOSSES, terms._TERMS),
        *(engines._ENGINES, tasks._TASKS, tools._TOOLS, named._REWARDS),
    ]
    for registry in registries:
        registry.names()  # imports what is registered when it is first asked for
    tables = [registry._things for registry in registries] + [table._METRICS]
    before = [dict(each) for each in tables]
    yield
    for each, names in zip(tables, before, strict=True):
        each.clear()
        each.update(names)


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(name: str) -> None:
    exec(compile(SNIPPETS[name], name, "exec"), {"__name__": "readme"})


class Read(Exception):
    """A command line has been read, and nothing done."""


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tyro = pytest.importorskip("tyro")
    from agents.cli.main import main

    read = tyro.cli

    def only_read(*args: Any, **kwargs: Any) -> None:
        read(*args, **kwargs)
        raise Read

    monkeypatch.setattr(tyro, "cli", only_read)
    words = shlex.split(COMMANDS[name], comments=True)
    given = words[words.index("llm-env") + 1 :]
    if given[0] in ("metrics", "presets", "tasks", "algorithms", "rewards", "doctor"):
        return  # they have no flags, and tests of their own
    if "--help" in given:
        with pytest.raises(SystemExit, match="0"):
            main(given)
        return
    with pytest.raises(Read):
        main(given)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_files_it_names_exist(name: str) -> None:
    folder = (ROOT / name).parent
    for path in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", TEXTS[name]):
        there = folder / path if "/pictures/" not in path else ROOT / ".pictures" / Path(path).name
        assert there.exists(), path
    for path in re.findall(r"`((?:examples|agents|rewards|llm_env)/[\w/-]+\.\w+)`", TEXTS[name]):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make (\w[\w-]*)", TEXTS[name], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 30
    assert len(COMMANDS) >= 40
    assert len(PAGES) >= 20
