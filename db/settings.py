"""Typed settings from the environment. A wrong, missing or misspelt variable is an error that names it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from db.errors import SettingsError
from db.secret_files import read_secret_files

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
TimeoutSeconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
ActionSeconds = Annotated[float, msgspec.Meta(gt=0, le=30 * 86_400)]
StallSeconds = Annotated[float, msgspec.Meta(ge=1, le=3600)]
PerSecond = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]
PollSeconds = Annotated[int, msgspec.Meta(ge=1, le=3600)]
IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

IPV4_AS_IPV6 = IPv6Network("::ffff:0:0/96")


class Secret:
    """A text that only `secret.reveal()` returns."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


class DatabaseAddress(Secret):
    """The address of a database, with its password."""

    __slots__ = ()

    def __init__(self, value: str) -> None:
        try:
            conninfo_to_dict(value)
        except ProgrammingError:
            raise ValueError("Expected a database's address, such as postgresql://user:password@host/name") from None
        super().__init__(value)


class TrustedProxies:
    """Addresses and networks of proxies, separated by commas. Their X-Forwarded-For is believed."""

    __slots__ = ("networks",)

    def __init__(self, value: str) -> None:
        self.networks = tuple(parse_proxies(entry.strip()) for entry in value.split(",") if entry.strip())

    def trusts(self, address: IpAddress) -> bool:
        """Whether the address is one of a trusted proxy."""
        return any(address in network for network in self.networks)


def parse_network(entry: str) -> IpNetwork:
    """An address or a network; IPv4 written as IPv6 becomes IPv4. Raises ValueError that names the entry."""
    try:
        network: IpNetwork = ip_network(entry)
    except ValueError:
        try:
            suggestion = f"; did you mean {ip_network(entry, strict=False)}?"
        except ValueError:
            suggestion = ""
        raise ValueError(
            f"Expected addresses and networks, such as 10.0.0.7, 10.1.0.0/16, 2001:db8::/64, got {entry!r}{suggestion}"
        ) from None
    if isinstance(network, IPv6Network) and network.subnet_of(IPV4_AS_IPV6):
        return IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def parse_proxies(entry: str) -> IpNetwork:
    """The address or network of proxies. Raises ValueError that names the entry.

    Private networks are allowed whole (10.0.0.0/8, fc00::/7), larger ones are not.
    """
    network = parse_network(entry)
    if network.prefixlen < (8 if isinstance(network, IPv4Network) else 7):
        raise ValueError(f"Expected the proxies' addresses, got {entry!r}, with which any client could forge its own")
    return network


class WebhookNetworks:
    """Addresses and networks, separated by commas, that merchants' webhooks may reach although they are not public."""

    __slots__ = ("networks",)

    def __init__(self, value: str) -> None:
        self.networks = tuple(parse_network(entry.strip()) for entry in value.split(",") if entry.strip())

    def allows(self, address: IpAddress) -> bool:
        """Whether the address is in one of the networks."""
        return any(address in network for network in self.networks)


def parse_address(text: str) -> IpAddress:
    """An address; IPv4 written as IPv6 becomes IPv4. Raises ValueError."""
    address = ip_address(text)
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


# Whether the secret and restricted keys of Stripe's with this prefix move real money.
LIVEMODE_BY_PREFIX = {"sk_live_": True, "rk_live_": True, "sk_test_": False, "rk_test_": False}
MISTAKEN_KEYS = {
    "pk_": "a publishable key",
    "whsec_": "the secret of a webhook endpoint",
    "sty_": "a key of Surety's own API",
}
WEBHOOK_SECRET = re.compile(r"whsec_[!-+\--~]+")
TEST_SANDBOX_KEY = "sk_test_sandbox"
# No key of Stripe's has this form.
LIVE_SANDBOX_KEY = re.compile(r"[sr]k_live_sandbox(_[0-9A-Za-z_]*)?")


def livemode_of_key(key: Secret) -> bool:
    """Whether a secret or restricted key of Stripe's moves real money. Raises SettingsError for any other text."""
    text = key.reveal()
    for prefix, livemode in LIVEMODE_BY_PREFIX.items():
        if text.startswith(prefix):
            return livemode
    mistake = next((what for prefix, what in MISTAKEN_KEYS.items() if text.startswith(prefix)), "no key of Stripe's")
    raise SettingsError(
        f"STRIPE_API_KEY is {mistake}: set a secret or restricted key, which begins with"
        f" {', '.join(LIVEMODE_BY_PREFIX)}"
    )


class ProviderEndpoint(msgspec.Struct, frozen=True):
    """The address of Stripe's API and our key; `url` is None for Stripe itself, else the address of the sandbox."""

    url: str | None
    key: Secret

    @property
    def livemode(self) -> bool:
        """The mode of the key. A live key for a sandbox moves no real money, but its objects have `livemode`."""
        return livemode_of_key(self.key)

    def require_mode(self, livemode: bool) -> None:
        """Raises SettingsError unless the key has the mode of the database."""
        if self.livemode == livemode:
            return
        ours, theirs = ("live", "test") if self.livemode else ("test", "live")
        given = "STRIPE_API_KEY"
        remedy = f"set a {theirs} key (sk_{theirs}_… or rk_{theirs}_…)"
        if self.url is not None:
            given += f" ({TEST_SANDBOX_KEY}, unless set)" if self.key.reveal() == TEST_SANDBOX_KEY else ""
            remedy = "set sk_live_sandbox, for a sandbox in live mode" if livemode else "unset it"
        raise SettingsError(
            f"{given} is a {ours} key, but the database is in {theirs} mode (surety mode): {remedy}, or use another"
            " database"
        )


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="upper", kw_only=True):
    """The variables, each under its own name in lower case. A secret may be in the file that NAME_FILE names.

    The addresses of the processes are those of logins of their own; without one a process uses DATABASE_URL and takes
    its role. SURETY_READER_DATABASE_URL is a replica from which the API answers reads. STRIPE_WEBHOOK_SECRET may hold
    several secrets, separated by commas, so that one can be replaced while both are active. SURETY_TRUSTED_PROXIES
    names the proxies whose X-Forwarded-For is believed.

    SURETY_POOL_MODE=transaction lets API and receiver use a connection pooler in transaction mode.

    SURETY_ADDRESS_RATE bounds the failed authentications per second of a client's address in a process of the API; 0
    means no bound.

    SURETY_ACCOUNT_KEYS encrypts bank account numbers; see db/account_numbers.py.

    For the command line: SURETY_OPERATOR_KEY is an operator's personal key, SURETY_OPERATOR_KEY_FILE a file with it.

    For the workers, in seconds: SURETY_PROVIDER_TIMEOUT bounds a call to the provider. SURETY_POLL_SECONDS is the
    interval of polling. SURETY_ACTION_SECONDS is the time a payer has to act. SURETY_STALL_SECONDS is the time after
    which a stalled worker ends itself, so that its supervisor replaces it. SURETY_PROVIDER_RATE bounds the requests per
    second and account; 0 means no bound. Without it Stripe's own limits apply, and the sandbox has none.

    For merchants' webhooks, in the workers: SURETY_WEBHOOK_KEY opens their signing secrets; several keys, separated by
    commas, so that one can be replaced, the new one first. SURETY_WEBHOOK_NETWORKS names networks that they may reach
    although those are not public.
    """

    database_url: DatabaseAddress | None = None
    surety_api_database_url: DatabaseAddress | None = None
    surety_reader_database_url: DatabaseAddress | None = None
    surety_webhook_database_url: DatabaseAddress | None = None
    surety_worker_database_url: DatabaseAddress | None = None
    surety_analyst_database_url: DatabaseAddress | None = None
    surety_auditor_database_url: DatabaseAddress | None = None
    surety_pool_mode: Literal["session", "transaction"] = "session"

    stripe_api_key: Secret | None = None
    stripe_webhook_secret: Secret | None = None
    surety_sandbox_url: str | None = None

    surety_host: str = "127.0.0.1"
    surety_api_port: Port = 8000
    surety_webhook_port: Port = 8001
    surety_sandbox_port: Port = 8002
    surety_trusted_proxies: TrustedProxies | None = None
    surety_address_rate: PerSecond = 20.0

    surety_provider_timeout: TimeoutSeconds = 20.0
    surety_provider_rate: PerSecond | None = None
    surety_poll_seconds: PollSeconds = 60
    surety_action_seconds: ActionSeconds = 86_400.0
    surety_stall_seconds: StallSeconds = 30.0

    surety_account_keys: Secret | None = None
    surety_webhook_key: Secret | None = None
    surety_webhook_networks: WebhookNetworks | None = None

    surety_operator_key: Secret | None = None
    surety_operator_key_file: Path | None = None

    surety_pg_bin: Path | None = None

    @property
    def webhook_secrets(self) -> tuple[Secret, ...]:
        """The secrets that are active; raises SettingsError if there is none, or for a text that is no such secret."""
        given = self.require("stripe_webhook_secret").reveal()
        secrets = tuple(Secret(part.strip()) for part in given.split(",") if part.strip())
        if not secrets:
            raise SettingsError("STRIPE_WEBHOOK_SECRET holds no secret")
        for place, secret in enumerate(secrets, start=1):
            if not WEBHOOK_SECRET.fullmatch(secret.reveal()):
                raise SettingsError(
                    f"STRIPE_WEBHOOK_SECRET: secret {place} of {len(secrets)} is not the signing secret of an endpoint:"
                    " each begins with whsec_, and commas separate them"
                )
        return secrets

    @property
    def trusted_proxies(self) -> TrustedProxies:
        """The proxies whose X-Forwarded-For is believed; none by default."""
        return self.surety_trusted_proxies or TrustedProxies("")

    @property
    def provider(self) -> ProviderEndpoint:
        """The provider of the workers: the sandbox if named, else Stripe.

        Raises SettingsError if neither is, for a text that is no secret key, and for a real live key for a sandbox.
        """
        if self.surety_sandbox_url is None:
            if self.stripe_api_key is None:
                raise SettingsError("set STRIPE_API_KEY, or SURETY_SANDBOX_URL for the sandbox")
            livemode_of_key(self.stripe_api_key)
            return ProviderEndpoint(None, self.stripe_api_key)
        key = self.stripe_api_key or Secret(TEST_SANDBOX_KEY)
        if livemode_of_key(key) and not LIVE_SANDBOX_KEY.fullmatch(key.reveal()):
            raise SettingsError(
                "SURETY_SANDBOX_URL is set, but STRIPE_API_KEY is a live key, which must not be sent to a sandbox;"
                " a sandbox in live mode takes sk_live_sandbox"
            )
        return ProviderEndpoint(self.surety_sandbox_url, key)

    def require(self, name: str) -> Secret:
        """A secret or address; raises SettingsError if it isn't set."""
        value: Secret | None = getattr(self, name)
        if value is None:
            raise SettingsError(f"{name.upper()} is not set")
        return value


# The secrets of the processes. A person's key has rules of its own (app/cli/identity.py).
SECRETS = tuple(
    field.encode_name
    for field in msgspec.structs.fields(Settings)
    if "Secret" in str(field.type) or "DatabaseAddress" in str(field.type)
    if field.encode_name != "SURETY_OPERATOR_KEY"
)
SECRET_FILES = frozenset(f"{name}_FILE" for name in SECRETS)


def load_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings; an empty variable counts as not set. Raises SettingsError."""
    known = {field.encode_name for field in msgspec.structs.fields(Settings)}
    given = {
        name: value
        for name, value in environment.items()
        if value and (name in known or (name.startswith("SURETY_") and name not in SECRET_FILES))
    }
    given |= read_secret_files(SECRETS, environment)
    for name in sorted(given.keys() - known):
        likely = difflib.get_close_matches(name, known | SECRET_FILES, n=1)
        raise SettingsError(f"{name} is not a variable of Surety" + (f"; did you mean {likely[0]}?" if likely else ""))
    try:
        return msgspec.convert(given, Settings, strict=False, dec_hook=convert_text)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise SettingsError(f"{path.rstrip('`')}: {problem}") from None


def convert_text(kind: type, value: Any) -> Any:
    """Convert a text to a type of our own."""
    return kind(value)
