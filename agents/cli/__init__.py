"""The command `llm-env`."""

from agents.cli.main import main

__all__ = ["main"]
