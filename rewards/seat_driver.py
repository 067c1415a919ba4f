"""What runs inside the sandbox, in a Python of its own: does what it is told on stdin, and answers on stdout.

This file is also imported outside, for the way that values travel: it imports nothing that is not in the interpreter's
own library, and nothing of this project.
"""

import json
import math
from typing import Any


def pack(value: Any, depth: int = 0) -> Any:
    """Plain data as JSON can hold it: `[its type, its content]`. Anything else is a TypeError.

    Examples:
        >>> unpack(pack({"a": [(1, 2.5), {3}, None, b"x"]}))
        {'a': [(1, 2.5), {3}, None, b'x']}
    """
    kind = type(value)
    if depth > 50:
        raise TypeError("the value is nested more than fifty deep")
    if value is None or kind is bool or kind is str or kind is int:
        return value
    if kind is float:
        return ["float", value if math.isfinite(value) else str(value)]
    if kind is complex:
        return ["complex", str(value)]
    if kind is bytes or kind is bytearray:
        return ["bytes", value.hex()]
    if kind is list or kind is tuple or kind is set or kind is frozenset:
        return [kind.__name__, [pack(each, depth + 1) for each in value]]
    if kind is dict:
        return ["dict", [[pack(key, depth + 1), pack(each, depth + 1)] for key, each in value.items()]]
    if kind.__name__ in ("range", "generator", "map", "filter", "zip", "dict_keys", "dict_values", "dict_items"):
        raise TypeError(f"a {kind.__name__} was returned where a list, or other plain data, is expected")
    raise TypeError(f"{kind.__name__} objects are no plain data, so they cannot be compared from outside")


def unpack(packed: Any, depth: int = 0) -> Any:
    """The plain data again; of anything else that was sent, a ValueError."""
    if packed is None or isinstance(packed, bool | str | int):
        return packed
    if depth > 60 or not (isinstance(packed, list) and len(packed) == 2 and isinstance(packed[0], str)):
        raise ValueError("what was sent is no packed value")
    kind, content = packed
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {unpack(key, depth + 1): unpack(value, depth + 1) for key, value in content}
    make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return make(unpack(each, depth + 1) for each in content)


def serve() -> None:
    """Do what is asked, line after line, until stdin ends."""
    import os
    import random

    asked = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # what a program prints is no answer
        os.dup2(null, number)
    names: dict[str, Any] = {"__name__": "program"}
    random.seed(0)

    def answer(token: str, **what: Any) -> None:
        answers.write(json.dumps({"token": token, **what}) + "\n")
        answers.flush()

    def outside(token: str, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            answer(token, ask=name, given=pack([list(args), kwargs]))
            got = json.loads(asked.readline())
            if "error" in got:
                import builtins

                kind = getattr(builtins, got["error"], RuntimeError)
                raise kind(got["message"])
            return unpack(got["value"])

        return call

    for line in asked:
        request = json.loads(line)
        token = request["token"]
        try:
            for name in request.get("outside", ()):
                names[name] = outside(token, name)
            value = None
            if "code" in request:
                exec(compile(request["code"], "program", "exec"), names)
            else:
                args, kwargs = unpack(request["given"])
                value = names[request["call"]](*args, **kwargs)
            answer(token, value=pack(value))
        except BaseException as error:
            try:
                what = str(error)[:500]
            except BaseException:
                what = ""
            answer(token, error=type(error).__name__, message=what)


if __name__ == "__main__":
    serve()
