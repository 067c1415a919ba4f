"""The module of a user, which is imported for what it registers."""

from __future__ import annotations

import importlib
import os
import sys

from agents.config import TrainConfig
from agents.config.files import ConfigError


def import_module_of(config: TrainConfig) -> None:
    """Import `config.module`, if it is set, so that what it registers is known by its name.

    A module that is a file in the current folder is found, too, whichever way Python was started.
    """
    name = config.module
    if name is None:
        return
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"--module is {name}, but Python finds no module {error.name} from {os.getcwd()}: expected a name "
                f"as in `import {name.removesuffix('.py').replace('/', '.')}`, of a file there or an installed package"
            ) from error
        raise
