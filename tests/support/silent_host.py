"""A host that accepts connections and never answers, as a machine that hangs."""

from __future__ import annotations

import socket


class SilentHost:
    """A port of loopback that refuses connections until `fall_silent`, then accepts and never answers."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    def fall_silent(self) -> None:
        """Begin to accept: the kernel does, and nothing is ever read."""
        self._socket.listen(1024)

    def close(self) -> None:
        """Refuse connections again."""
        self._socket.close()
