"""Settings and connections: what the environment says, and what it must not say."""

from __future__ import annotations

import msgspec
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from db.connect import TIMEOUTS, ProcessKind, connect_async, conninfo, harden
from db.connect import connect as connect_as
from db.errors import SettingsError
from db.settings import ProviderEndpoint, Secret, Settings, load_settings
from tests.conftest import Connect

URL = "postgresql://someone:secret@db.example:6432/surety"
KINDS: tuple[ProcessKind, ...] = ("api", "webhook", "worker", "analyst", "auditor")


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"SURETY_API_PROT": "1"}, "SURETY_API_PROT is not a variable of Surety; did you mean SURETY_API_PORT?"),
        ({"SURETY_API_PORT": "many"}, "SURETY_API_PORT: Expected `int`"),
        ({"SURETY_API_PORT": "65536"}, "SURETY_API_PORT: Expected `int` <= 65535"),
        *(
            ({name: value}, f"{name}: Expected `float` <= ")
            for name in (
                *("SURETY_ADDRESS_RATE", "SURETY_PROVIDER_RATE", "SURETY_PROVIDER_TIMEOUT", "SURETY_ACTION_SECONDS"),
                "SURETY_STALL_SECONDS",
            )
            for value in ("inf", "1e308")
        ),
        ({"DATABASE_URL": "no address"}, "DATABASE_URL: Expected a database's address"),
        (
            {"SURETY_TRUSTED_PROXIES": "10.0.0.1, proxy.internal"},
            "SURETY_TRUSTED_PROXIES: Expected addresses and networks, such as 10.0.0.7",
        ),
        (
            {"SURETY_TRUSTED_PROXIES": "10.0.0.1, proxy.internal"},
            "got 'proxy.internal'",
        ),
        ({"SURETY_TRUSTED_PROXIES": "10.1.2.3/8"}, "got '10.1.2.3/8'; did you mean 10.0.0.0/8?"),
        ({"SURETY_TRUSTED_PROXIES": "10.0.0.1;10.0.0.2"}, "got '10.0.0.1;10.0.0.2'"),
        ({"SURETY_TRUSTED_PROXIES": "10.0.0.1:443"}, "got '10.0.0.1:443'"),
        ({"SURETY_TRUSTED_PROXIES": "*"}, "got '*'"),
        ({"SURETY_TRUSTED_PROXIES": "0.0.0.0/0"}, "got '0.0.0.0/0', with which any client could forge its own"),
        ({"SURETY_TRUSTED_PROXIES": "10.0.0.0/8,128.0.0.0/1"}, "got '128.0.0.0/1', with which any client could forge"),
        ({"SURETY_TRUSTED_PROXIES": "::/0"}, "got '::/0', with which any client could forge its own"),
        ({"SURETY_TRUSTED_PROXIES": "::ffff:0:0/96"}, "got '::ffff:0:0/96', with which any client could forge its own"),
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str], complaint: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(environment)
    assert complaint in str(error.value)
    assert "secret" not in str(error.value)


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL is not set"):
        load_settings({}).require("database_url")


def test_foreign_and_empty_variables_are_ignored() -> None:
    assert load_settings({"HOME": "/", "STRIPE_CLI": "x", "SURETY_API_PORT": ""}) == Settings()


def test_text_is_converted_to_the_type_of_the_setting() -> None:
    assert load_settings({"SURETY_API_PORT": "9000"}).surety_api_port == 9000


def test_secrets_are_never_printed() -> None:
    settings = load_settings(
        {"DATABASE_URL": URL, "STRIPE_API_KEY": "sk_secret", "STRIPE_WEBHOOK_SECRET": "whsec_secret"}
    )
    for shown in (repr(settings), str(settings), f"{settings.stripe_api_key}", repr(msgspec.structs.asdict(settings))):
        assert "secret" not in shown.replace("stripe_webhook_secret", "")


def test_several_webhook_secrets_can_be_active() -> None:
    assert load_settings({"STRIPE_WEBHOOK_SECRET": "whsec_a, whsec_b,"}).webhook_secrets == (
        Secret("whsec_a"),
        Secret("whsec_b"),
    )


@pytest.mark.parametrize(
    ("given", "networks"),
    [
        ("", []),
        (" 10.0.0.7 ,, 10.1.0.0/16,", ["10.0.0.7/32", "10.1.0.0/16"]),
        ("2001:db8::7,2001:DB8:1::/48", ["2001:db8::7/128", "2001:db8:1::/48"]),
        ("::ffff:10.0.0.7, ::ffff:10.1.0.0/112", ["10.0.0.7/32", "10.1.0.0/16"]),
    ],
)
def test_trusted_proxies_are_addresses_and_networks(given: str, networks: list[str]) -> None:
    trusted = load_settings({"SURETY_TRUSTED_PROXIES": given}).trusted_proxies
    assert [str(network) for network in trusted.networks] == networks


@pytest.mark.parametrize("given", ["sk_live_1", "whsec_a whsec_b", "whsec_a,pk_x", "whsec_"])
def test_text_that_is_no_webhook_secret_is_refused_and_not_shown(given: str) -> None:
    with pytest.raises(SettingsError, match="each begins with whsec_") as refusal:
        assert load_settings({"STRIPE_WEBHOOK_SECRET": given}).webhook_secrets
    assert not [part for part in given.replace(",", " ").split() if part != "whsec_" and part in str(refusal.value)]


@pytest.mark.parametrize("given", [{}, {"STRIPE_WEBHOOK_SECRET": " , "}])
def test_a_receiver_without_a_secret_refuses_to_start(given: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="STRIPE_WEBHOOK_SECRET"):
        _ = load_settings(given).webhook_secrets


def test_a_worker_with_neither_sandbox_nor_key_refuses_to_start() -> None:
    with pytest.raises(SettingsError, match="STRIPE_API_KEY, or SURETY_SANDBOX_URL"):
        _ = load_settings({}).provider


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("pk_live_1secret1", "a publishable key"),
        ("whsec_1secret1", "the secret of a webhook endpoint"),
        ("sty_live_1secret1", "a key of Surety's own API"),
        ("my_sk_live_1secret1", "no key of Stripe's"),
        (" sk_live_1secret1", "no key of Stripe's"),
    ],
)
@pytest.mark.parametrize("sandbox", ["", "http://127.0.0.1:8002"])
def test_text_that_is_no_secret_key_is_refused_and_not_printed(key: str, what: str, sandbox: str) -> None:
    with pytest.raises(SettingsError) as error:
        _ = load_settings({"STRIPE_API_KEY": key, "SURETY_SANDBOX_URL": sandbox}).provider
    assert f"STRIPE_API_KEY is {what}" in str(error.value) and "sk_live_, rk_live_" in str(error.value)
    assert "secret1" not in str(error.value)


@pytest.mark.parametrize("prefix", ["sk", "rk"])
def test_key_of_the_other_mode_than_the_database_is_refused_and_not_printed(prefix: str) -> None:
    for ours, livemode in (("live", True), ("test", False)):
        # The prefix decides, not the rest of a key.
        provider = load_settings({"STRIPE_API_KEY": f"{prefix}_{ours}_1_live_test_secret1"}).provider
        assert provider.livemode is livemode
        provider.require_mode(livemode)
        with pytest.raises(SettingsError) as error:
            provider.require_mode(not livemode)
        theirs = "test" if livemode else "live"
        assert f"STRIPE_API_KEY is a {ours} key, but the database is in {theirs} mode" in str(error.value)
        assert f"set a {theirs} key" in str(error.value)
        assert "secret1" not in str(error.value)


def test_sandbox_in_live_mode_takes_its_own_key_and_no_real_one() -> None:
    def provider(key: str) -> ProviderEndpoint:
        return load_settings({"SURETY_SANDBOX_URL": "http://127.0.0.1:8002", "STRIPE_API_KEY": key}).provider

    for key in ("sk_live_sandbox", "rk_live_sandbox_2", "sk_live_sandbox_"):
        assert provider(key).livemode
    for key in ("sk_live_1", "rk_live_1", "sk_live_sandboxed1", "sk_live_sandbox_é", "sk_live_51sk_live_sandbox"):
        with pytest.raises(SettingsError, match="must not be sent to a sandbox"):
            provider(key)
    with pytest.raises(SettingsError, match="sk_live_sandbox, for a sandbox in live mode"):
        provider("").require_mode(True)
    with pytest.raises(SettingsError, match="unset it"):
        provider("sk_live_sandbox").require_mode(False)


def test_sandbox_is_used_only_if_configured_and_never_with_a_live_key() -> None:
    sandbox = "http://127.0.0.1:8002"
    assert load_settings({"STRIPE_API_KEY": "sk_live_1"}).provider == ProviderEndpoint(None, Secret("sk_live_1"))
    assert load_settings({"SURETY_SANDBOX_URL": sandbox}).provider.url == sandbox
    with pytest.raises(SettingsError, match="live key"):
        _ = load_settings({"SURETY_SANDBOX_URL": sandbox, "STRIPE_API_KEY": "sk_live_1"}).provider


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_process_has_its_role_name_and_timeouts(kind: ProcessKind, connect: Connect) -> None:
    row = (
        connect(kind)
        .execute(
            "select current_user, current_setting('application_name'), current_setting('timezone'),"
            " current_setting('statement_timeout')::interval, current_setting('lock_timeout')::interval,"
            " current_setting('idle_in_transaction_session_timeout')::interval,"
            " %s::interval, %s::interval, %s::interval",
            TIMEOUTS[kind],
        )
        .fetchone()
    )
    assert row
    assert row[:3] == (f"surety_{kind}", f"surety-{kind}", "UTC")
    assert row[3:6] == row[6:]


def test_a_process_with_a_login_of_its_own_takes_no_role() -> None:
    settings = load_settings(
        {"DATABASE_URL": URL, "SURETY_API_DATABASE_URL": "postgresql://api_login@db.example/surety"}
    )
    api, worker = conninfo_to_dict(conninfo("api", settings)), conninfo_to_dict(conninfo("worker", settings))
    assert (api["user"], worker["user"]) == ("api_login", "someone")
    assert "role=" not in str(api["options"])
    assert "-c role=surety_worker" in str(worker["options"])


def test_dead_server_is_noticed_and_writers_require_the_primary() -> None:
    settings = load_settings({"DATABASE_URL": URL})
    api, analyst = conninfo_to_dict(conninfo("api", settings)), conninfo_to_dict(conninfo("analyst", settings))
    assert {"connect_timeout", "tcp_user_timeout", "keepalives_idle"} <= api.keys()
    assert (api["target_session_attrs"], analyst["target_session_attrs"]) == ("read-write", "any")


def test_options_in_the_address_take_precedence() -> None:
    given = conninfo_to_dict(harden(f"{URL}?connect_timeout=1&options=-c%20lock_timeout%3D7s", "api"))
    assert given["connect_timeout"] == "1"
    assert str(given["options"]).endswith("-c lock_timeout=7s")


def test_procrastinate_finds_its_tables(database: str) -> None:
    settings = load_settings({"DATABASE_URL": database})
    with psycopg.connect(conninfo("worker", settings, search_path="procrastinate")) as conn:
        assert conn.execute("select to_regclass('procrastinate_jobs') is not null").fetchone() == (True,)


async def test_connections_are_in_autocommit_mode(settings: Settings) -> None:
    with connect_as("api", settings) as conn:
        assert conn.autocommit
    async with await connect_async("api", settings) as aconn:
        assert aconn.autocommit
