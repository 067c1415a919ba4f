"""The house: imports go downwards, from room to room and from module to module; files are small and none is dead.

The imports are read from the sources, and all of them count: those inside functions and under `TYPE_CHECKING` too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rewards", "llm_env", "agents")

# From the ground up. A room may import the rooms of the rows above its own, and none beside it in the same row. The
# last room of a package is its front, `__init__.py`: it hands out what lies below, and nothing inside imports it.
ORDER = [
    {"rewards"},
    # llm_env
    {"llm_env.files", "llm_env.tokens"},
    {"llm_env.models", "llm_env.tasks"},
    {"llm_env.engines"},
    {"llm_env.mdp"},
    {"llm_env.envs"},
    {"llm_env.wrappers"},
    {"llm_env"},
    # agents
    {"agents.config", "agents.metrics", "agents.state"},
    {"agents.rollouts"},
    {"agents.networks"},
    {"agents.losses"},
    {"agents.algorithms"},
    {"agents.preferences"},
    {"agents.report"},
    {"agents.run"},
    {"agents.cli"},
    {"agents"},
]

# Rooms that could import more by the order above, and do with this little.
ONLY = {
    "llm_env.files": set(),
    "agents.config": {"llm_env.files", "rewards"},
    "agents.metrics": set(),
    "agents.state": {"llm_env.files"},
    "agents.report": {"agents.config", "agents.metrics", "llm_env.files", "llm_env.tokens"},
}

# Where modules are imported by a name that is no literal, which reading the sources cannot follow.
BY_NAME = {
    "agents": "its names, when they are first asked for: it is the front, above all rooms",
    "llm_env": "the same",
    "agents.config.modules": "a user's module",
    "rewards.registry": "the plug-ins of a room, for the registry in that room",
    "llm_env.engines.registry": "the package of an engine, inside its own room",
    "agents.report.log": "wandb, which is not ours",
}

# Modules that no other imports, because users start there. (Those that register what they define are found.)
NOT_IMPORTED = {
    "agents.cli.__main__": "python -m agents.cli",
    "llm_env.wrappers.torchrl": "users import it: it needs TorchRL, which the other wrappers do not",
}


class Import(NamedTuple):
    module: str
    line: int
    target: str
    name: str | None
    """What is taken out of `target`; None where the module itself is imported."""

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target}{f'.{self.name}' if self.name else ''}"


def sources() -> dict[str, str]:
    """The text of every module by its dotted name."""
    texts = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            texts[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return texts


SOURCES = sources()


def imports(texts: Mapping[str, str]) -> Iterator[Import]:
    """Every import of one of our modules by another."""
    for module, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in PACKAGES:
                        yield Import(module, node.lineno, alias.name, None)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}, line {node.lineno}: write the whole name of what is imported"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if whole in texts:
                        yield Import(module, node.lineno, whole, None)
                    elif (node.module or "").split(".")[0] in PACKAGES:
                        yield Import(module, node.lineno, node.module or "", alias.name)


def room(module: str) -> str:
    """The room a module lies in; `rewards` is flat, one room."""
    return "rewards" if module.startswith("rewards") else ".".join(module.split(".")[:2])


def upward(texts: Mapping[str, str]) -> list[str]:
    """Imports against the order, and those that a room which does with little has no need of."""
    level = {name: number for number, row in enumerate(ORDER) for name in row}
    wrong = []
    for each in imports(texts):
        above, below = room(each.module), room(each.target)
        if above != below and (level[below] >= level[above] or below not in ONLY.get(above, {below})):
            wrong.append(str(each))
    return wrong


def private(texts: Mapping[str, str]) -> list[str]:
    """Imports of names with an underscore in front from other modules."""
    parts = ((each, [*each.target.split("."), each.name or ""]) for each in imports(texts))
    return [str(each) for each, names in parts if any(name.startswith("_") for name in names)]


def circles(texts: Mapping[str, str]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    graph: dict[str, set[str]] = {module: set() for module in texts}
    for each in imports(texts):
        graph[each.module].add(each.target)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            place = stack.index(module)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1 or module in graph[module]:
                found.append(sorted(group))

    for module in graph:
        if module not in number:
            visit(module)
    return found


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in SOURCES} == set().union(*ORDER)


def test_imports_go_downwards() -> None:
    assert upward(SOURCES) == []


def test_no_module_imports_itself_through_others() -> None:
    assert circles(SOURCES) == []


def test_what_is_private_stays_in_its_module() -> None:
    assert private(SOURCES) == []


def test_imports_by_name_are_few() -> None:
    """What these import cannot be read here, so each has its reason in the table."""
    calling = {
        module
        for module, text in SOURCES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
    }
    assert calling == set(BY_NAME)


def test_no_file_is_long() -> None:
    assert {module: text.count("\n") for module, text in SOURCES.items() if text.count("\n") > 400} == {}


def test_no_module_is_dead() -> None:
    used = {each.target for each in imports(SOURCES)}
    packages = {module for module in SOURCES if (ROOT / module.replace(".", "/")).is_dir()}
    handed_out = {module for module in packages - set(NOT_IMPORTED) if module.count(".") <= 1}
    plug_ins = {module for module, text in SOURCES.items() if re.search(r"^@register_\w+", text, flags=re.MULTILINE)}
    found = plug_ins | {module.rpartition(".")[0] for module in plug_ins}
    assert set(SOURCES) - used - handed_out - found == set(NOT_IMPORTED)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("rewards.base", "from llm_env import End"),
        ("llm_env.tokens.state", "from agents.config import TrainConfig"),
        ("llm_env.tokens.state", "import llm_env.engines"),
        ("llm_env.tasks.base", "from llm_env.models import load_vocabulary"),  # beside it: neither sees the other
        ("llm_env.mdp.core", "def late():\n    from llm_env.envs.single import TokenEnv"),
        ("agents.algorithms.ppo", "from agents.report.log import RunLog"),
        ("agents.rollouts.packing", "if TYPE_CHECKING:\n    from agents.networks.network import Network"),
        ("agents.report.log", "from agents.networks.network import Network"),  # downwards, but more than it needs
        ("agents.run.loop", "import agents"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    found = upward({**SOURCES, module: f"{SOURCES[module]}\n{line}\n"})
    (new,) = set(found) - set(upward(SOURCES))
    assert new.startswith(f"{module}, line ")


def test_a_circle_is_found() -> None:
    late = f"{SOURCES['rewards.score']}\ndef late():\n    from rewards.guard import Guard\n"
    (group,) = circles({**SOURCES, "rewards.score": late})
    assert {"rewards.score", "rewards.guard", "rewards.base"} <= set(group)


def test_a_private_name_is_found() -> None:
    more = f"{SOURCES['agents.cli.main']}\nfrom llm_env.tasks.registry import _TASKS\n"
    (wrong,) = private({**SOURCES, "agents.cli.main": more})
    assert wrong.endswith("imports llm_env.tasks.registry._TASKS")
