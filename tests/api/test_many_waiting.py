"""A thousand clients wait on one API process."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from app.web.database import CONNECTIONS_MAX
from app.web.serving import raise_open_files_limit
from tests.support.http_client import Connection, Merchant, ServerProcess, payment
from tests.support.sandbox_process import eventually

CLIENTS = 1000
# So many begin at once that the process is not overloaded.
BEGIN_AT_ONCE = 40
# Two of batching, those of both pools, one for the health check.
DATABASE_CONNECTIONS_MAX = 2 + 2 * CONNECTIONS_MAX + 1
# Kilobytes of one more held request, with its connection.
KILOBYTES_MAX = 60


class WaitingClient:
    """A client that makes a payment and waits for its end; it repeats a request that the process is too busy for."""

    def __init__(self, merchant: Merchant, number: int) -> None:
        self._address = merchant.client.base_url
        body = str(payment(reference=f"order-{number}")).replace("'", '"')
        self._request = (
            f"POST /v1/payments HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {merchant.key}\r\nPrefer: wait=30\r\n"
            "Content-Type: application/json\r\n"
            f"Idempotency-Key: many-{number}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()

    async def answer(self) -> str:
        """The answer, head and body."""
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        try:
            while True:
                writer.write(self._request)
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)content-length: (\d+)", head)
                assert length
                body = (await reader.readexactly(int(length[1]))).decode()
                if not head.startswith("HTTP/1.1 503"):
                    return head + body
                await asyncio.sleep(1)  # its Retry-After
        finally:
            writer.close()


def kilobytes(pid: int) -> int:
    """The memory that a process has in use."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


def connections(conn: Connection) -> int:
    """How many connections API processes have to this database."""
    [(count,)] = conn.execute(
        "select count(*) from pg_stat_activity where application_name = 'surety-api' and datname = current_database()"
    ).fetchall()
    return int(count)


def test_thousand_clients_wait_on_one_process(api: ServerProcess, merchant: Merchant) -> None:
    raise_open_files_limit()
    merchant.pay()
    merchant.get("/v1/payments")
    memory = kilobytes(api.process.pid)

    async def run() -> list[str]:
        clients: list[asyncio.Task[str]] = []
        while len(clients) < CLIENTS:
            clients += [
                asyncio.create_task(WaitingClient(merchant, len(clients) + n).answer()) for n in range(BEGIN_AT_ONCE)
            ]
            begun = len(clients) + 1
            await asyncio.to_thread(eventually, lambda begun=begun: merchant.count() == begun or None, 30)
        other = await asyncio.to_thread(merchant.get, "/v1/payments", limit=1)
        assert [one["status"] for one in other["data"]] == ["pending"]
        assert connections(merchant.conn) <= DATABASE_CONNECTIONS_MAX
        assert kilobytes(api.process.pid) - memory < CLIENTS * KILOBYTES_MAX
        assert not any(client.done() for client in clients)
        await asyncio.to_thread(
            merchant.conn.execute,
            "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
            " select id, 2, 'initiated', 'canceled', 'test', now(), 'test' from surety.payments where merchant_id = %s",
            (merchant.id,),
        )
        return await asyncio.gather(*clients)

    answers = asyncio.run(run())
    assert len({made for answer in answers for made in re.findall('"id":"(pay_[0-9a-f]+)"', answer)}) == CLIENTS
    for answer in answers:
        assert answer.startswith("HTTP/1.1 201"), answer
        assert '"status":"canceled"' in answer and "preference-applied: wait=30" in answer, answer
    assert connections(merchant.conn) <= DATABASE_CONNECTIONS_MAX
