"""docs/go-live.md fits the code: limits of the proxy, the webhook endpoint, the example of a request."""

from __future__ import annotations

import json
import re
import shlex
from urllib.parse import urlencode

from app.api.create_payment import BODY_BYTES_MAX as REQUEST_BYTES_MAX
from app.api.schemas.payments import NewPayment
from app.connection_limits import ConnectionLimits
from app.receiver import BODY_BYTES_MAX as EVENT_BYTES_MAX
from app.web.validation import violation_checker
from tests.project.test_prose import ROOT
from tests.support.stripe_description import check_request

TEXT = (ROOT / "docs" / "go-live.md").read_text(encoding="utf-8")
KEEP_ALIVE_SECONDS = 75


def block(language: str) -> str:
    """The only block of code in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


def test_limits_of_the_proxy_fit_those_of_the_processes() -> None:
    nginx = block("nginx")
    limits = ConnectionLimits()
    bodies = {int(n) * {"k": 1024, "m": 1024**2}[unit] for n, unit in re.findall(r"body_size (\d+)([km])", nginx)}
    assert bodies == {EVENT_BYTES_MAX, REQUEST_BYTES_MAX}
    (number, size) = re.findall(r"large_client_header_buffers (\d+) (\d+)k", nginx)[0]
    assert (int(number) * int(size) * 1024, int(size) * 1024) == (limits.head_bytes, limits.target_bytes)
    assert {int(seconds) for seconds in re.findall(r"client_\w+_timeout (\d+)s", nginx)} == {
        limits.head_seconds,
        limits.body_seconds,
    }
    keep_alive = [int(seconds) for seconds in re.findall(r"keepalive_timeout (\d+)s", nginx)]
    assert len(keep_alive) == 2 and max(keep_alive) < KEEP_ALIVE_SECONDS
    assert f"timeout_keep_alive={KEEP_ALIVE_SECONDS}," in (ROOT / "app" / "web" / "serving.py").read_text()


def test_command_for_the_webhook_endpoint_is_one_that_stripe_takes() -> None:
    words = shlex.split(block("sh").replace("\\\n", " "))
    assert words[:2] == ["curl", "https://api.stripe.com/v1/webhook_endpoints"]
    given = [words[at + 1].partition("=") for at, word in enumerate(words) if word == "--data"]
    # The published description lags behind the newest version.
    fields = [(name, value) for name, _, value in given if name != "api_version"]
    assert len(given) - len(fields) == 1 and len(fields) > 20
    headers = {"Authorization": "Basic …", "Idempotency-Key": "1", "Content-Type": "application/x-www-form-urlencoded"}
    check_request("POST", "/v1/webhook_endpoints", headers, urlencode([*fields, ("connect", "true")]))


def test_request_of_the_merchants_server_is_one_that_the_api_takes() -> None:
    body = json.loads(block("http").partition("\n\n")[2])
    assert violation_checker(NewPayment)(body) == []
