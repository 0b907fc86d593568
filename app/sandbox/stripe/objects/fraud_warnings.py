"""Early fraud warnings of an issuer, before a dispute. They move no money."""

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.events import emit

KIND = "radar.early_fraud_warning"


def warn(sandbox: Sandbox, charge: StoredObject) -> StoredObject:
    """Create a warning about a charge."""
    id, created = sandbox.memory.unused_id("issfr", charge.id), sandbox.unix_seconds()
    body = {
        "id": id,
        "object": KIND,
        "actionable": not (charge.body["refunded"] or charge.body["disputed"]),
        "charge": charge.id,
        "created": created,
        "fraud_type": "misc",
        "livemode": charge.body["livemode"],
        "payment_intent": charge.body["payment_intent"],
    }
    warning = sandbox.memory.save(StoredObject(id, KIND, charge.account, created, body, parent=charge.id))
    emit(sandbox, "radar.early_fraud_warning.created", warning)
    return warning


def close_warnings(sandbox: Sandbox, charge: StoredObject) -> None:
    """A refunded or disputed charge has no actionable warning."""
    for warning in sandbox.memory.children(charge.id, KIND):
        if warning.body["actionable"]:
            warning.body["actionable"] = False
            sandbox.memory.save(warning)
            emit(sandbox, "radar.early_fraud_warning.updated", warning, {"actionable": True})
