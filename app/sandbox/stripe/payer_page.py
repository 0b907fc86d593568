"""The page where a payer completes 3-D Secure."""

from html import escape
from urllib.parse import urlencode, urlsplit

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import not_found
from app.sandbox.stripe.objects import intents

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>3-D Secure (sandbox)</title>
<style>body{{font:16px system-ui;margin:4rem auto;max-width:24rem}}button{{font:inherit;padding:.5rem 1rem}}</style>
<h1>3-D Secure</h1><p>{text}</p>{form}</html>"""

FORM = """<form method="post"><button name="outcome" value="approve">Approve</button>
<button name="outcome" value="decline">Decline</button></form>"""


def render_page(sandbox: Sandbox, intent_id: str, secret: str) -> str:
    """The question to the payer, or a note that it was answered."""
    body = _find_intent(sandbox, intent_id, secret).body
    amount = f"{body['amount']} minor units of {body['currency']}"
    if body["status"] == "requires_action":
        return PAGE.format(text=f"Do you approve the payment of {escape(amount)}?", form=FORM)
    return PAGE.format(text=f"Nothing to approve: the payment is {escape(body['status'])}.", form="")


def submit_answer(sandbox: Sandbox, intent_id: str, secret: str, outcome: str) -> str | None:
    """Apply the payer's answer; returns the merchant's return URL, if there is one."""
    intent = _find_intent(sandbox, intent_id, secret)
    action = intent.body["next_action"] or {}
    intents.complete_authentication(sandbox, intent, approved=outcome == "approve")
    back = action.get("redirect_to_url", {}).get("return_url")
    if back is None:
        return None
    failed = intent.body["status"] == "requires_payment_method"
    query = urlencode(
        {
            "payment_intent": intent_id,
            "payment_intent_client_secret": intent.body["client_secret"],
            "redirect_status": "failed" if failed else "succeeded",
        }
    )
    return f"{back}{'&' if urlsplit(back).query else '?'}{query}"


def _find_intent(sandbox: Sandbox, intent_id: str, secret: str) -> StoredObject:
    intent = sandbox.memory.find(intent_id)
    if intent is None or intent.kind != "payment_intent" or intents.page_secret(intent) != secret:
        raise not_found("payment_intent", intent_id)
    return intent
