"""Modules that are imported for what they register: a user's own, and all of one of our rooms."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
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
                f"--module is {name}, but Python finds no module {error.name} from {os.getcwd()}: "
                f"expected a name as in `import {name}`"
            ) from error
        raise


@functools.cache
def import_modules_in(package: str) -> None:
    """Import all modules of a package, which register what they define; so a new file is enough to add to it.

    Examples:
        >>> import_modules_in("agents.config")
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
