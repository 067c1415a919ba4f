"""The help texts of settings: the docstrings under the fields of a dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap


def help_texts(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, or of one that it extends, as one paragraph; or none.

    Examples:
        >>> from agents.config import LogConfig
        >>> help_texts(LogConfig)["tensorboard"]
        "Write TensorBoard files into the run's folder, too."
    """
    texts = {}
    for each in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        definition = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, below in zip(definition.body, definition.body[1:], strict=False):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts
