"""Early fraud warnings: what an issuer suspects before anybody disputes. They move no money."""

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.events import emit

KIND = "radar.early_fraud_warning"


def warn(sandbox: Sandbox, charge: StoredObject) -> StoredObject:
    """The issuer believes that the charge was fraudulent."""
    id, created = sandbox.memory.unused_id("issfr", charge.id), sandbox.unix_seconds()
    body = {
        "id": id,
        "object": KIND,
        "actionable": not (charge.body["refunded"] or charge.body["disputed"]),
        "charge": charge.id,
        "created": created,
        "fraud_type": "misc",
        "livemode": False,
        "payment_intent": charge.body["payment_intent"],
    }
    warning = sandbox.memory.save(StoredObject(id, KIND, charge.account, created, body, parent=charge.id))
    emit(sandbox, "radar.early_fraud_warning.created", warning)
    return warning


def close_warnings(sandbox: Sandbox, charge: StoredObject) -> None:
    """Nothing can be done about a warning once the charge is refunded or disputed."""
    for warning in sandbox.memory.children(charge.id, KIND):
        if warning.body["actionable"]:
            warning.body["actionable"] = False
            sandbox.memory.save(warning)
            emit(sandbox, "radar.early_fraud_warning.updated", warning, {"actionable": True})
