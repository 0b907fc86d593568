"""Secrets in files: NAME_FILE names a file with the value of NAME. An error names the rule and shows no secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from db.errors import SettingsError
from db.secret_files import SECRET_BYTES_MAX
from db.settings import SECRETS, Secret, load_settings

URL = "postgresql://someone:sesame@db.example:6432/surety"


def secret_file(folder: Path, content: str | bytes, mode: int = 0o400) -> str:
    """The path of a file with this content and mode."""
    path = folder / f"secret-{os.urandom(4).hex()}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("name", SECRETS)
def test_every_secret_can_be_in_a_file(name: str, tmp_path: Path) -> None:
    value = URL if name.endswith("DATABASE_URL") else "whsec_sesame"
    settings = load_settings({f"{name}_FILE": secret_file(tmp_path, f"{value}\n")})
    assert settings.require(name.lower()).reveal() == value


def test_every_secret_of_a_process_is_in_the_list() -> None:
    assert set(SECRETS) >= {"DATABASE_URL", "SURETY_WORKER_DATABASE_URL", "STRIPE_API_KEY", "STRIPE_WEBHOOK_SECRET"}
    assert "SURETY_OPERATOR_KEY" not in SECRETS


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600, 0o640])
def test_owner_and_group_may_read_a_secret(mode: int, tmp_path: Path) -> None:
    given = {"STRIPE_API_KEY_FILE": secret_file(tmp_path, "sk_test_sesame", mode)}
    assert load_settings(given).stripe_api_key == Secret("sk_test_sesame")


@pytest.mark.parametrize("mode", [0o404, 0o644, 0o602, 0o660, 0o777])
def test_secret_that_others_may_read_or_the_group_may_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = secret_file(tmp_path, "sk_test_sesame", mode)
    with pytest.raises(SettingsError, match=rf"STRIPE_API_KEY_FILE: {path} has mode {mode:04o}: .*chmod 0400") as error:
        load_settings({"STRIPE_API_KEY_FILE": path})
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("sesame\nsesame2\n", "holds more than one line"),
        ("sesame\0", "characters that can't be printed"),
        (b"sesame\xff", "is not UTF-8"),
        ("s" * (SECRET_BYTES_MAX + 1), "is larger than 65536 bytes"),
    ],
)
def test_file_without_one_line_of_text_is_refused_and_not_shown(
    content: str | bytes, complaint: str, tmp_path: Path
) -> None:
    path = secret_file(tmp_path, content)
    with pytest.raises(SettingsError) as error:
        load_settings({"DATABASE_URL_FILE": path})
    assert str(error.value).startswith(f"DATABASE_URL_FILE: {path} ") and complaint in str(error.value)
    assert "sesame" not in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(SettingsError, match=rf"DATABASE_URL_FILE: {absent} can't be read: No such file"):
        load_settings({"DATABASE_URL_FILE": str(absent)})
    with pytest.raises(SettingsError, match=rf"DATABASE_URL_FILE: {tmp_path} is no regular file"):
        load_settings({"DATABASE_URL_FILE": str(tmp_path)})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_file_that_the_process_may_not_read_is_named_with_its_user(tmp_path: Path) -> None:
    path = secret_file(tmp_path, "sesame")
    os.seteuid(65534)
    try:
        with pytest.raises(SettingsError) as error:
            load_settings({"STRIPE_API_KEY_FILE": path})
    finally:
        os.seteuid(0)
    assert str(error.value) == f"STRIPE_API_KEY_FILE: {path} can't be read: Permission denied (as user 65534)"


def test_variable_and_file_together_are_refused(tmp_path: Path) -> None:
    given = {"DATABASE_URL": URL, "DATABASE_URL_FILE": secret_file(tmp_path, URL)}
    with pytest.raises(SettingsError, match="DATABASE_URL and DATABASE_URL_FILE are both set"):
        load_settings(given)
    assert load_settings(given | {"DATABASE_URL": ""}).database_url == Secret(URL)
    assert load_settings(given | {"DATABASE_URL_FILE": ""}).database_url == Secret(URL)


def test_wrong_value_and_misspelt_variable_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL: Expected a database's address"):
        load_settings({"DATABASE_URL_FILE": secret_file(tmp_path, "no address")})
    with pytest.raises(SettingsError, match=r"did you mean SURETY_API_DATABASE_URL_FILE\?"):
        load_settings({"SURETY_API_DATABASE_URL_FIL": secret_file(tmp_path, URL)})
