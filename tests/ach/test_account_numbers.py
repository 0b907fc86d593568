from __future__ import annotations

import base64

import pytest

from db.account_numbers import (
    AccountKeys,
    AccountNumberUnreadable,
    check_account_number,
    last_four,
    new_account_key,
)
from db.errors import SettingsError, SuretyError
from db.settings import Secret, load_settings

# Fixed, because parallel test processes must collect the same parameters.
OLD, NEW = (f"{name}:{base64.b64encode(name.encode() * 11)[:43].decode()}=" for name in ("old", "new"))
NUMBER, ACCOUNT = "987654321012", "bac_1"


def test_a_number_is_opened_by_its_key_and_for_its_account_alone() -> None:
    keys = AccountKeys(Secret(OLD))
    sealed = keys.seal(NUMBER, ACCOUNT)
    assert NUMBER.encode() not in sealed
    assert keys.open(sealed, "old", ACCOUNT) == NUMBER
    for changed, key_id, account in (
        (sealed, "old", "bac_2"),
        (sealed[:-1] + bytes([sealed[-1] ^ 1]), "old", ACCOUNT),
        (b"", "old", ACCOUNT),
        (sealed, "new", ACCOUNT),
    ):
        with pytest.raises(AccountNumberUnreadable) as unreadable:
            keys.open(changed, key_id, account)
        assert NUMBER not in str(unreadable.value)


def test_equal_numbers_have_other_ciphertexts_and_equal_fingerprints() -> None:
    keys = AccountKeys(Secret(OLD))
    assert keys.seal(NUMBER, ACCOUNT) != keys.seal(NUMBER, ACCOUNT)
    assert keys.fingerprints("011401533", NUMBER) == keys.fingerprints("011401533", "9876-5432 1012")
    assert keys.fingerprints("011401533", NUMBER) != keys.fingerprints("021000021", NUMBER)
    assert AccountKeys(Secret(NEW)).fingerprints("011401533", NUMBER) != keys.fingerprints("011401533", NUMBER)


def test_after_a_rotation_the_first_key_encrypts_and_each_decrypts() -> None:
    old, both = AccountKeys(Secret(OLD)), AccountKeys(Secret(f"{NEW}, {OLD}"))
    sealed = old.seal(NUMBER, ACCOUNT)
    assert both.first == "new"
    assert both.open(sealed, "old", ACCOUNT) == NUMBER
    assert both.open(both.seal(NUMBER, ACCOUNT), "new", ACCOUNT) == NUMBER
    assert both.fingerprints("011401533", NUMBER)[1:] == old.fingerprints("011401533", NUMBER)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "key 1 must be NAME:BASE64"),
        (OLD.partition(":")[2], "key 1 must be NAME:BASE64"),
        (f"{OLD},", "key 2 must be NAME:BASE64"),
        (f"{OLD},{OLD}", "old is there twice"),
        ("old:c2hvcnQ=", "old must be 32 bytes"),
        ("old:%%%", "old must be 32 bytes"),
    ],
)
def test_keys_of_another_form_are_refused_without_being_shown(given: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        AccountKeys(Secret(given))
    assert OLD.partition(":")[2] not in str(refused.value)


def test_keys_come_from_the_environment_and_are_not_shown() -> None:
    settings = load_settings({"SURETY_ACCOUNT_KEYS": OLD})
    assert OLD.partition(":")[2] not in repr(settings)
    assert repr(AccountKeys(settings.require("surety_account_keys"))) == "AccountKeys(old)"


@pytest.mark.parametrize(
    ("number", "shown"), [(NUMBER, "1012"), ("12-34 5678", "5678"), ("1234", "34"), ("ab9876543", "6543")]
)
def test_an_account_is_shown_by_its_last_characters(number: str, shown: str) -> None:
    assert check_account_number(number) is None
    assert last_four(number) == shown


@pytest.mark.parametrize("number", ["", "123", "1" * 18, "12_34", "12345\n", "١٢٣٤٥", "- - - -"])
def test_account_numbers_of_another_form_are_refused(number: str) -> None:
    assert check_account_number(number) == "must have 4 to 17 digits, letters, spaces or hyphens"


def test_key_names_are_short_and_plain() -> None:
    with pytest.raises(SuretyError, match="NAME"):
        new_account_key("No Name")
