"""Where one program waits for others."""

from __future__ import annotations

import secrets
from typing import NamedTuple

KEY = "LLM_ENV_KEY"
"""The environment variable with the secret of a program and the processes that come to it."""


class Address(NamedTuple):
    """A host and a port.

    Examples:
        >>> Address.read("10.0.0.1:7000")
        Address(host='10.0.0.1', port=7000)
        >>> print(Address("::1", 7000))
        [::1]:7000
    """

    host: str
    port: int

    @classmethod
    def read(cls, text: str) -> Address:
        """From HOST:PORT.

        Raises:
            ValueError: it is none.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("expected HOST:PORT, such as 10.0.0.1:7000")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def new_key() -> str:
    """A secret that nobody guesses."""
    return secrets.token_hex(16)
