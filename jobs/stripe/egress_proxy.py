"""A proxy through which calls leave the network: HTTPS_PROXY and NO_PROXY, as other programs read them.

The proxy opens a tunnel to the provider's server (CONNECT), and TLS is with that server. A plain `http:` address, such
as the sandbox's, is always reached directly.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from db.errors import SettingsError

HEAD_BYTES_MAX = 65_536


class ProxyRefusal(ConnectionError):
    """The proxy did not open a tunnel."""


class ProxyAnswer(asyncio.Protocol):
    """Reads the head of the proxy's answer."""

    def __init__(self) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the tunnel is open; fails with ProxyRefusal."""
        self._head = b""

    def data_received(self, data: bytes) -> None:
        self._head += data
        if self.opened.done() or (b"\r\n\r\n" not in self._head and len(self._head) <= HEAD_BYTES_MAX):
            return
        line = self._head.partition(b"\r\n")[0][:100].decode("latin-1")
        if re.match(r"HTTP/1\.[01] 2\d\d( |$)", line):
            self.opened.set_result(None)
        else:
            self.opened.set_exception(ProxyRefusal(f"the proxy answered {line}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ProxyRefusal("the proxy ended the connection"))


class EgressProxy:
    """The proxy at an address `http://[user:password@]host[:port]`."""

    def __init__(self, address: SplitResult) -> None:
        self._host, self._port = address.hostname or "", address.port or 80
        self._credentials = ""
        if address.username is not None:
            named = f"{unquote(address.username)}:{unquote(address.password or '')}"
            self._credentials = f"Proxy-Authorization: Basic {b64encode(named.encode()).decode()}\r\n"

    async def open_tunnel(self, host: str, port: int) -> asyncio.Transport:
        """A connection to that server by way of the proxy. Raises OSError."""
        transport, answer = await asyncio.get_running_loop().create_connection(ProxyAnswer, self._host, self._port)
        target = f"{host}:{port}"
        transport.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{self._credentials}\r\n".encode())
        try:
            await answer.opened
        except BaseException:
            transport.abort()
            raise
        return transport


def proxy_for(url: str) -> EgressProxy | None:
    """The proxy that the environment names for calls to `url`. Raises SettingsError for one of another kind."""
    target = urlsplit(url)
    if target.scheme != "https" or proxy_bypass(target.hostname or ""):
        return None
    named = getproxies()
    address = named.get("https") or named.get("all")
    if not address:
        return None
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme != "http" or not parts.hostname:
        raise SettingsError("HTTPS_PROXY is not the address of a proxy, http://host:port")
    return EgressProxy(parts)
