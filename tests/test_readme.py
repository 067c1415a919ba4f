"""Every Python snippet of the documents runs, in order, as it stands, and what they point at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "llm_env/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
SNIPPETS = {
    f"{name}-{number}": snippet
    for name, text in TEXTS.items()
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(name: str) -> None:
    exec(compile(SNIPPETS[name], name, "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_files_it_names_exist(name: str) -> None:
    folder = (ROOT / name).parent
    for path in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", TEXTS[name]):
        assert (folder / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make (\w[\w-]*)", TEXTS[name], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 16
