"""Early fraud warnings: what an issuer suspects before anybody disputes. They move no money."""

from app.sandbox.memory import StoredObject
from app.sandbox.world import World

KIND = "radar.early_fraud_warning"


def warn(world: World, charge: StoredObject) -> StoredObject:
    """The issuer believes that the charge was fraudulent."""
    id, created = world.memory.unused_id("issfr", charge.id), world.unix_seconds()
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
    warning = world.memory.save(StoredObject(id, KIND, charge.account, created, body, parent=charge.id))
    world.emit("radar.early_fraud_warning.created", warning)
    return warning


def close_warnings(world: World, charge: StoredObject) -> None:
    """Nothing can be done about a warning once the charge is refunded or disputed."""
    for warning in world.memory.children(charge.id, KIND):
        if warning.body["actionable"]:
            warning.body["actionable"] = False
            world.memory.save(warning)
            world.emit("radar.early_fraud_warning.updated", warning, {"actionable": True})
