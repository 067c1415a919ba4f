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


RIGHT_SO_FAR = ("right_so_far", "right_share")
"""The names of what `right_so_far` gives."""


def right_so_far(text: str, answer: str) -> tuple[float, float]:
    """Hints for a critic where one text is right: whether this can still become it, and how much of it is there then.

    Examples:
        >>> right_so_far("ca", "cats"), right_so_far("cu", "cats")
        ((1.0, 0.5), (0.0, 0.0))
    """
    right = answer.startswith(text)
    return float(right), right * len(text) / max(1, len(answer))


def without_thoughts(text: str) -> str:
    """A text without what stands between `<think>` and `</think>`; a thought that does not end goes on to the end.

    Templates that begin the thought themselves leave a text with its end only.

    Examples:
        >>> without_thoughts("<think>7 or 8?</think>\\n8"), without_thoughts("7 or 8?</think>8")
        ('8', '8')
        >>> without_thoughts("<think>7 or 8"), without_thoughts("8 < 9")
        ('', '8 < 9')
    """
    before, ended, after = text.rpartition("</think>")
    if ended:
        spoken, opened, _ = before.partition("<think>")
        text = (spoken if opened else "") + after.lstrip()
    return text.partition("<think>")[0]
