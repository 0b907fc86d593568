"""Ids in paths. A text that can't be an id is replaced by the empty text, which is no object's id."""

from __future__ import annotations

import re

from app.web.requests import HttpRequest

PAYMENT_ID = re.compile("pay_[0-9a-f]{24}")
REFUND_ID = re.compile("ref_[0-9a-f]{24}")
DISPUTE_ID = re.compile("dp_[0-9a-f]{24}")
CUSTOMER_ID = re.compile("cus_[0-9a-f]{24}")
METHOD_ID = re.compile("spm_[0-9a-f]{24}")
EVENT_ID = re.compile("evt_[0-9a-f]{24}")
DISCREPANCY_ID = re.compile("dis_[0-9a-f]{24}")
ENDPOINT_ID = re.compile("we_[0-9a-f]{24}")
LETTER_ID = re.compile("dl_[0-9a-f]{24}")


def id_or_empty(request: HttpRequest, pattern: re.Pattern[str], name: str | None = None) -> str:
    """The id in the path, or the empty text if it can't be one. `name` is needed in a path with several."""
    given = request.path_parameter(name)
    return given if pattern.fullmatch(given) else ""
