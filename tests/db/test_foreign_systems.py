"""Another system on the same account at the provider."""

from __future__ import annotations

from tests.support.payments import Connection, fact, ledger_of, money, record, violations


def test_another_system_on_the_account_is_one_discrepancy_and_closed_once(conn: Connection) -> None:
    def another_payment(number: int, account: str = "") -> None:
        charged = fact(None, "captured", f"ch_theirs{number}", 5000, account=account)
        record(conn, [charged, money(None, f"txn_theirs{number}", "charge", 5000, 175, account=account)])
        conn.execute("update surety.clock set ahead = ahead + interval '16 minutes'")
        conn.execute("select surety.retry_unmatched_facts()")

    conn.execute("update surety.environment set kind = 'test'")
    conn.execute("insert into surety.clock (ahead) values ('0')")
    another_payment(1)
    another_payment(2)
    opened = "select id, kind, subject, severity from surety.discrepancies where closed_at is null"
    [(discrepancy, *found)] = conn.execute(opened).fetchall()
    assert found == ["foreign", "stripe/", "warning"]
    resolve = "select outcome from surety.resolve_discrepancy(%s, 'explained', 'the old shop', 'operator:ada')"
    assert conn.execute(resolve, (discrepancy,)).fetchall() == [("resolved",)]
    another_payment(3)
    assert conn.execute(opened).fetchall() == []
    another_payment(4, "acct_other")
    assert [row[2] for row in conn.execute(opened)] == ["stripe/acct_other"]
    assert ledger_of(conn)["suspense"] == 4 * 4825
    assert not violations(conn)
