"""`python -m jobs.stripe.merchant_account ACCOUNT`: whether a merchant may have this account at Stripe.

`surety merchants add` runs it in a process of its own, because only this package calls providers. It prints an
AccountCheck as JSON.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Literal

import msgspec
from msgspec import Struct

from db.errors import DatabaseClosed, SettingsError
from db.settings import load_settings
from jobs.database import open_database
from jobs.mode import require_open_database
from jobs.stripe.client import StripeGateway, open_stripe
from jobs.stripe.errors import PermissionMissing, ProviderError
from jobs.stripe.key_check import find_own_account


class AccountCheck(Struct):
    """The answer, and Stripe's words or the reason.

    connected   our key may act for this account
    own         it is the platform's own account
    refused     there is no such account, or it is not connected to the platform
    unknown     it could not be checked
    """

    result: Literal["connected", "own", "refused", "unknown"]
    detail: str = ""


async def check_merchant_account(account: str) -> AccountCheck:
    """Ask Stripe, by the key in the settings."""
    try:
        settings = load_settings()
        async with open_database(settings) as database, open_stripe(settings, database) as stripe:
            await require_open_database(settings, database)
            return await ask_about_account(stripe, account)
    except (SettingsError, DatabaseClosed) as error:
        return AccountCheck("unknown", str(error))


async def ask_about_account(stripe: StripeGateway, account: str) -> AccountCheck:
    """Ask Stripe for the platform's own account, and for this account's balance, which every worker reads too."""
    try:
        if await find_own_account(stripe) == account:
            return AccountCheck("own")
        await stripe.ask(account, "get", "/v1/balance", {})
    except PermissionMissing as error:
        return AccountCheck("unknown", str(error))
    except ProviderError as error:
        is_refused = error.status in {400, 403, 404}
        return AccountCheck("refused" if is_refused else "unknown", str(error))
    return AccountCheck("connected")


if __name__ == "__main__":
    logging.getLogger("stripe").setLevel(logging.WARNING)
    sys.stdout.write(msgspec.json.encode(asyncio.run(check_merchant_account(sys.argv[1]))).decode())
