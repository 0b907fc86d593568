"""Addresses that merchants' webhooks may reach: public ones, and those of SURETY_WEBHOOK_NETWORKS.

The tables are IANA's registries of special-purpose addresses, with what cloud providers use for their own services.
They stand here because the standard library's `is_global` differs between its versions. An IPv6 address that holds an
IPv4 address (mapped, 6to4, NAT64, Teredo) is refused whatever it holds, as all of IPv6 outside 2000::/3 is.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address

from db.settings import IpAddress, WebhookNetworks

SPECIAL_IPV4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers; Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's services of the host
        "169.254.0.0/16",  # link-local; metadata of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
GLOBAL_IPV6 = IPv6Network("2000::/3")
SPECIAL_IPV6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)


class AddressRefused(OSError):
    """The address is private or special, and not allowed by SURETY_WEBHOOK_NETWORKS."""

    def __init__(self, address: IpAddress) -> None:
        super().__init__(f"{address} is not a public address")


def is_public(address: IpAddress) -> bool:
    """Whether the address is one of the public internet."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in SPECIAL_IPV4)
    return address in GLOBAL_IPV6 and not any(address in network for network in SPECIAL_IPV6)


def checked_address(text: str, allowed: WebhookNetworks) -> IpAddress:
    """An address as the resolver or a socket says it, without its zone. Raises AddressRefused."""
    address = ip_address(text.partition("%")[0])
    if not isinstance(address, IPv4Address) and address.ipv4_mapped is not None and "%" not in text:
        # A mapped address reaches the IPv4 address in it.
        address = address.ipv4_mapped
    if "%" in text or not (is_public(address) or allowed.allows(address)):
        raise AddressRefused(address)
    return address
