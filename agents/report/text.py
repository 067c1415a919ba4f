"""How numbers and texts are written on a screen: short, on one line, and unable to move the cursor."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from rich.text import Text

LONGEST = 400
"""Characters of a sample that are shown."""


def short(value: float) -> str:
    """Three digits, or all of those before the point.

    Examples:
        >>> short(0.12345), short(5321.4)
        ('0.123', '5,321')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def literal(text: str, encoding: str = "utf-8") -> str:
    """One line in which every character can be seen: what would move the cursor is written as its escape.

    Examples:
        >>> print(literal("two\\nlines"), literal("é", "ascii"))
        two\\nlines \\xe9
    """
    seen = "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )
    return seen.encode(encoding, "backslashreplace").decode(encoding)


def literal_lines(text: str, encoding: str = "utf-8") -> str:
    """The same line by line: line breaks stay."""
    return "\n".join(literal(line, encoding) for line in text.split("\n"))


def sample_line(sample: Mapping[str, Any], encoding: str = "utf-8") -> Text:
    """A text that the policy wrote, with its prompt and reward, on one line.

    Examples:
        >>> sample_line({"prompt": "ab>", "transcript": "ba", "reward": 0.5}).plain
        '  sample (reward 0.5): ab> | ba'
    """
    reward = sample.get("reward")
    prompt, text = (literal(str(sample.get(key, "")), encoding) for key in ("prompt", "transcript"))
    # The end of a long prompt matters most, and the beginning of a long text.
    prompt = prompt if len(prompt) <= LONGEST else "..." + prompt[-LONGEST:]
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    return Text.assemble(
        ("  sample" if reward is None else f"  sample (reward {short(float(reward))})", "cyan"),
        ": ",
        (prompt, "dim"),
        (" | ", "cyan"),
        text,
    )
