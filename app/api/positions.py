"""The header Surety-Position in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from db.replication import TOKEN

POSITION_PATTERN = f"^{TOKEN.pattern.decode()}$"
POSITION_PARAMETER: dict[str, Any] = {
    "name": "Surety-Position",
    "in": "header",
    "required": False,
    "description": "That of an answer to a write: the read shows its change. Without it, every change answered before.",
    "schema": {"type": "string", "pattern": POSITION_PATTERN},
}
