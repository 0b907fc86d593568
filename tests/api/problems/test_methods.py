"""OPTIONS, HEAD and 405 agree with each other and with the routes, on every path of the application."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from app.api.openapi import documentation_routes
from app.api.routes import ROUTES
from app.web.routing import PATH_PARAMETER
from tests.support.http_client import Merchant, problem

ASSET = "/assets/swagger-ui.css"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND")


def methods_by_path() -> dict[str, set[str]]:
    """Every path, its parameters filled in, and its methods."""
    found = defaultdict(set, {ASSET: {"GET"}, "/assets/none.js": {"GET"}})
    for row in [*ROUTES, *documentation_routes(ROUTES)]:
        found[PATH_PARAMETER.sub("unknown_1", row.path)].add(row.method)
    return found


@pytest.mark.parametrize("ending", ["", "/", "?limit=1"])
@pytest.mark.parametrize("path", methods_by_path())
def test_options_head_and_405_agree_on_every_path(merchant: Merchant, path: str, ending: str) -> None:
    methods = methods_by_path()[path]
    known = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    allow = ", ".join(sorted(known))
    options = merchant.client.options(path + ending)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allow, b"")
    statuses = {}
    for method in METHODS:
        answer = merchant.client.request(method, path + ending)
        statuses[method] = answer.status_code
        assert (answer.status_code == 405) == (method not in known), method
        assert re.fullmatch("req_[0-9a-f]{24}", answer.headers["request-id"])
        if answer.status_code == 405:
            assert answer.headers["allow"] == allow
            if method != "HEAD":
                assert problem(answer, 405, "method-not-allowed")["detail"] == f"here are only {allow}"
    assert statuses["HEAD"] == statuses["GET"]


@pytest.mark.parametrize("path", ["/docs/none", "/docs/openapi.yaml", "/assets/none.js", "/assets/%2e%2e/x", "/none"])
def test_unknown_path_gets_the_same_problem_whatever_the_method(merchant: Merchant, path: str) -> None:
    for method in ("GET", "OPTIONS", "POST") if "/assets/" not in path else ("GET",):
        problem(merchant.client.request(method, path), 404, "not-found")
    head = merchant.client.head(path)
    assert (head.status_code, head.headers["content-type"]) == (404, "application/problem+json")
