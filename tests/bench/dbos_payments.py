# mypy: disable-error-code="untyped-decorator"
"""The same payments as a DBOS workflow: `python -m tests.bench.dbos_payments api | webhooks | worker [PORT]`.

    api        POST /v1/payments puts a workflow into the queue
    webhooks   POST /stripe checks the signature and sends what the workflow waits for
    worker     runs workflows: create the PaymentIntent, confirm it, wait for both webhooks, fetch the balance
               transaction until its money is available

Written as in DBOS's documentation. The workflow is the only record of the payment: there is no ledger, no audit trail.
Its packages are not among the project's; dbos_services.py installs them for these processes alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from typing import Any

import stripe
import uvicorn
from dbos import DBOS, DBOSClient, DBOSConfig  # type: ignore[import-not-found]
from starlette.applications import Starlette  # type: ignore[import-not-found]
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import JSONResponse, Response  # type: ignore[import-not-found]
from starlette.routing import Route  # type: ignore[import-not-found]

NAME = "payments"
VERSION = "1"
QUEUE = "payments"
WORKER_CONCURRENCY = 200
AWAITED_EVENTS = ("payment_intent.succeeded", "charge.updated")
WAIT_SECONDS_MAX = 3600

stripe.enable_telemetry = False
provider = stripe.StripeClient(
    "sk_test_sandbox",
    base_addresses={"api": os.environ["SANDBOX_URL"]},
    max_network_retries=0,
)


@DBOS.step(retries_allowed=True)
def create_intent(payment_id: str, order: dict[str, Any]) -> str:
    """The id of the new PaymentIntent."""
    intent = provider.v1.payment_intents.create(
        {
            "amount": order["amount"],
            "currency": order["currency"],
            "payment_method": order["payment_method"]["token"],
            "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
            "capture_method": "automatic_async",
            "metadata": {"payment": payment_id},
        },
        {"idempotency_key": f"{payment_id}:create"},
    )
    return intent.id


@DBOS.step(retries_allowed=True)
def confirm_intent(payment_id: str, intent_id: str, order: dict[str, Any]) -> str:
    """The intent's status after the attempt to charge it."""
    intent = provider.v1.payment_intents.confirm(
        intent_id,
        {"return_url": order["return_url"]},
        {"idempotency_key": f"{payment_id}:confirm"},
    )
    return intent.status


@DBOS.step(retries_allowed=True)
def fetch_balance_transaction(transaction_id: str) -> dict[str, Any]:
    """Status, amounts and the time when the money is available."""
    line = provider.v1.balance_transactions.retrieve(transaction_id)
    return {"status": line.status, "net": line.net, "fee": line.fee, "available_on": line.available_on}


@DBOS.workflow()
def pay(payment_id: str, order: dict[str, Any]) -> dict[str, Any]:
    """A payment, until its money is available."""
    intent_id = create_intent(payment_id, order)
    confirm_intent(payment_id, intent_id, order)
    received = {topic: DBOS.recv(topic, WAIT_SECONDS_MAX) for topic in AWAITED_EVENTS}
    while True:
        line: dict[str, Any] = fetch_balance_transaction(received["charge.updated"]["balance_transaction"])
        if line["status"] == "available":
            return line
        DBOS.sleep(1)


def create_api(client: DBOSClient) -> Starlette:
    """POST /v1/payments."""

    async def accept(request: Request) -> Response:
        payment_id = f"pay_{uuid.uuid4().hex}"
        await client.enqueue_async(
            {"workflow_name": pay.__qualname__, "queue_name": QUEUE, "workflow_id": payment_id, "app_version": VERSION},
            payment_id,
            await request.json(),
        )
        return JSONResponse({"id": payment_id}, 201)

    return Starlette(routes=[Route("/v1/payments", accept, methods=["POST"])])


def create_receiver(client: DBOSClient) -> Starlette:
    """POST /stripe."""

    async def receive(request: Request) -> Response:
        body = (await request.body()).decode()
        stripe.WebhookSignature.verify_header(
            body, request.headers["Stripe-Signature"], os.environ["STRIPE_WEBHOOK_SECRET"]
        )
        event = json.loads(body)
        if event["type"] in AWAITED_EVENTS:
            subject = event["data"]["object"]
            message = {"balance_transaction": subject.get("balance_transaction")}
            await client.send_async(subject["metadata"]["payment"], message, event["type"], event["id"])
        return Response()

    return Starlette(routes=[Route("/stripe", receive, methods=["POST"])])


def main(role: str, port: int) -> None:
    """One of the processes."""
    database = os.environ["DATABASE_URL"]
    if role == "worker":
        config: DBOSConfig = {
            "name": NAME,
            "system_database_url": database,
            "application_version": VERSION,
            "executor_id": f"worker-{os.getpid()}",
            "console_log_level": "WARNING",
        }

        async def work() -> None:
            DBOS(config=config)
            DBOS.launch()
            await DBOS.register_queue_async(QUEUE, worker_concurrency=WORKER_CONCURRENCY)
            await asyncio.Event().wait()

        asyncio.run(work())
    else:
        client = DBOSClient(system_database_url=database, application_name=NAME)
        app = create_api(client) if role == "api" else create_receiver(client)
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
