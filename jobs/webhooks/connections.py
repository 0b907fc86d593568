"""Connections to merchants' endpoints: to addresses that were checked, without a proxy, for one batch.

The name is resolved here and each of its addresses checked. The connection is opened to a checked address itself, so
that no second look-up can lead elsewhere, and the address of the open socket is checked again.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

from db.settings import IpAddress, WebhookNetworks
from jobs.stripe.connections import ConnectionPool, KeptConnection
from jobs.webhooks.addresses import AddressRefused, checked_address

CONNECT_SECONDS_MAX = 10.0
RESPONSE_BYTES_MAX = 65_536
ADDRESSES_MAX = 4
# Look-ups of slow names take up these threads alone.
RESOLVER_THREADS = 32


class Resolver:
    """Looks up names in threads of its own."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, "webhook-names")

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host. Raises OSError."""

        def look_up() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(each[4][0]) for each in found))

        return await asyncio.get_running_loop().run_in_executor(self._threads, look_up)

    def close(self) -> None:
        """End the threads; those that are looking up go on alone."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class EndpointConnection(KeptConnection):
    """A connection to an endpoint, whose answers are short."""

    response_bytes_max = RESPONSE_BYTES_MAX


class EndpointConnections(ConnectionPool):
    """Connections to the server of one endpoint. Raises ValueError for an address that can't be read."""

    def __init__(self, url: str, tls: ssl.SSLContext, resolver: Resolver, allowed: WebhookNetworks) -> None:
        super().__init__(url, tls, CONNECT_SECONDS_MAX)
        self._resolver = resolver
        self._allowed = allowed

    async def _open_connection(self) -> KeptConnection:
        """Raises OSError; AddressRefused if none of the host's addresses may be reached."""
        found = await self._resolver.addresses(self._host, self._port)
        addresses: list[IpAddress] = []
        refusal: AddressRefused | None = None
        for text in found[:ADDRESSES_MAX]:
            try:
                addresses.append(checked_address(text, self._allowed))
            except AddressRefused as error:
                refusal = error
        # A name with a public and a private address is refused: it may be on its way from one to the other.
        if refusal is not None or not addresses:
            raise refusal or OSError("the name has no address")
        failure: OSError | None = None
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_SECONDS_MAX / len(addresses)):
                    return await self._connect_to(address)
            except OSError as error:  # Also TimeoutError.
                failure = error
        assert failure is not None
        raise failure

    async def _connect_to(self, address: IpAddress) -> KeptConnection:
        transport, connection = await asyncio.get_running_loop().create_connection(
            EndpointConnection,
            str(address),
            self._port,
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        try:
            checked_address(transport.get_extra_info("peername")[0], self._allowed)
        except BaseException:
            transport.abort()
            raise
        return connection
