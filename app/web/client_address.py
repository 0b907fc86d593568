"""The client's address: the peer of the connection, or the address that a trusted proxy names in X-Forwarded-For.

A proxy appends the address of its own peer to that header, so only entries to the right of all untrusted ones can be
believed. `Forwarded` (RFC 7239) is ignored: two headers could contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from db.settings import IpAddress, TrustedProxies, parse_address

# An address, or one with a port: 192.0.2.1:443, [2001:db8::1]:443.
ENTRY = re.compile(rb"\[([0-9A-Fa-f:.]{2,45})\](?::\d{1,5})?|([0-9.]{7,15})(?::\d{1,5})?|([0-9A-Fa-f:.]{2,45})")


def client_address(peer: str, headers: Iterable[tuple[bytes, bytes]], proxies: TrustedProxies) -> str:
    """The right-most address of peer and X-Forwarded-For that is no trusted proxy; the left-most if all are.

    An entry that is no address, and all entries to the left of it, are ignored: the result is then the proxy that
    passed it on. An IPv4 address written as IPv6 (::ffff:192.0.2.1) becomes IPv4.
    """
    if not proxies.networks and not peer.startswith("::ffff:"):
        return peer
    try:
        client = parse_address(peer)
    except ValueError:
        return peer
    if proxies.trusts(client):
        given = b",".join(value for name, value in headers if name == b"x-forwarded-for")
        for entry in reversed(given.split(b",")):
            forwarded = parse_entry(entry.strip(b" \t"))
            if forwarded is None:
                break
            client = forwarded
            if not proxies.trusts(client):
                break
    return str(client)


def parse_entry(entry: bytes) -> IpAddress | None:
    """The address of an entry; None if it is none."""
    matched = ENTRY.fullmatch(entry)
    if matched is None:
        return None
    try:
        return parse_address(matched[matched.lastindex or 0].decode())
    except ValueError:
        return None
