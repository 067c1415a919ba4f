"""Where in a text its answer stands."""

from __future__ import annotations

import re


def tagged_answer(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, or None without one.

    Examples:
        >>> tagged_answer("<answer>1</answer> no: <answer>2</answer>")
        '2'
    """
    tagged: list[str] = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return tagged[-1] if tagged else None
