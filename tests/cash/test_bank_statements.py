"""Bank statements: read from each format, imported once, matched to payouts."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.cli.conftest import Run, refused, run, said
from tests.support.payments import Connection, violations

__all__ = ["run"]

IBAN = "DE02120300000000202051"


def payout(
    conn: Connection,
    payout_id: str,
    amount: int,
    arrival: str = "2026-11-20",
    *,
    trace: str | None = None,
    status: str = "paid",
    currency: str = "eur",
) -> None:
    """Record a payout with its balance transaction."""
    common = {"provider": "stripe", "account": "", "livemode": False, "source": "poll", "currency": currency}
    data = {
        "status": status, "trace_id": trace, "automatic": True,
        "arrival_date": int(datetime.fromisoformat(f"{arrival}T00:00:00+00:00").timestamp()),
    }  # fmt: skip
    kind = "payout_failed" if status == "failed" else "payout"
    facts: list[dict[str, Any]] = [
        common | {"object_id": payout_id, "kind": kind, "amount_minor": amount, "data": data,
                  "occurred_at": "2026-11-18T00:00:00Z"},
        common | {"object_id": f"txn_{payout_id}", "kind": "money", "amount_minor": -amount,
                  "occurred_at": "2026-11-18T00:00:00Z",
                  "data": {"category": "payout", "fee": 0, "net": -amount}},
    ]  # fmt: skip
    conn.execute("select surety.record_facts(%s, 'test')", (Jsonb(facts),))


def entry(
    amount: str,
    *,
    day: str = "2026-11-20",
    direction: str = "CRDT",
    text: str = "STRIPE PAYOUT",
    reference: str = "",
    status: str = "BOOK",
    details: str = "",
    more: str = "",
) -> str:
    """A camt.053 entry in the form of 001.02."""
    return (
        f'<Ntry><Amt Ccy="EUR">{amount}</Amt><CdtDbtInd>{direction}</CdtDbtInd>{more}<Sts>{status}</Sts>'
        f"<BookgDt><Dt>{day}</Dt></BookgDt><ValDt><Dt>{day}</Dt></ValDt>"
        + (f"<AcctSvcrRef>{reference}</AcctSvcrRef>" if reference else "")
        + f"<NtryDtls>{details or f'<TxDtls><RmtInf><Ustrd>{text}</Ustrd></RmtInf></TxDtls>'}</NtryDtls></Ntry>"
    )


def statement(
    *entries: str,
    reference: str = "S1",
    sequence: int = 1,
    opening: str = "0.00",
    closing: str | None = None,
    days: tuple[str, str] = ("2026-11-20", "2026-11-20"),
    iban: str = IBAN,
) -> str:
    """A statement; without a closing balance none is checked."""
    balances = f"""<Bal><Tp><CdOrPrtry><Cd>OPBD</Cd></CdOrPrtry></Tp><Amt Ccy="EUR">{opening}</Amt>
        <CdtDbtInd>CRDT</CdtDbtInd><Dt><Dt>{days[0]}</Dt></Dt></Bal>"""
    if closing is not None:
        balances += f"""<Bal><Tp><CdOrPrtry><Cd>CLBD</Cd></CdOrPrtry></Tp><Amt Ccy="EUR">{closing}</Amt>
        <CdtDbtInd>CRDT</CdtDbtInd><Dt><Dt>{days[1]}</Dt></Dt></Bal>"""
    return f"""<Stmt><Id>{reference}</Id><ElctrncSeqNb>{sequence}</ElctrncSeqNb>
        <CreDtTm>2026-11-21T06:00:00</CreDtTm>
        <FrToDt><FrDtTm>{days[0]}T00:00:00</FrDtTm><ToDtTm>{days[1]}T23:59:59</ToDtTm></FrToDt>
        <Acct><Id><IBAN>{iban}</IBAN></Id><Ccy>EUR</Ccy></Acct>{balances}{"".join(entries)}</Stmt>"""


def camt(*statements: str, version: str = "02") -> str:
    """A camt.053 file."""
    head = "<GrpHdr><MsgId>M1</MsgId><CreDtTm>2026-11-21T06:00:00</CreDtTm></GrpHdr>"
    namespace = f"urn:iso:std:iso:20022:tech:xsd:camt.053.001.{version}"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Document xmlns="{namespace}">'
        f"<BkToCstmrStmt>{head}{''.join(statements)}</BkToCstmrStmt></Document>"
    )


class Imports:
    """Imports contents as files of increasing numbers."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder, self.count = run, folder, 0

    def __call__(self, content: str, *options: str) -> dict[str, Any]:
        shown = json.loads(said(self.run("bank-statements", "import", self.write(content), *options, "--json")))
        return shown or {}

    def write(self, content: str) -> str:
        self.count += 1
        path = self.folder / f"{self.count}.txt"
        path.write_text(content, encoding="utf-8")
        return str(path)


@pytest.fixture
def imports(run: Run, tmp_path: Path) -> Imports:
    return Imports(run, tmp_path)


def matches(conn: Connection) -> list[tuple[str, int, str]]:
    query = "select payout_id, amount_minor, matched_by from surety.bank_line_payouts order by 1, 2, 3"
    return conn.execute(query).fetchall()


def open_kinds(conn: Connection) -> list[str]:
    query = "select kind from surety.discrepancies where closed_at is null order by kind, subject"
    return [row[0] for row in conn.execute(query)]


def bank_balance(conn: Connection) -> dict[str, int]:
    """What the ledger has at the bank and in transit."""
    rows = conn.execute(
        """
        select kind, sum(amount)::bigint
        from (
            select split_part(debit_account, ':', 1) as kind, amount_minor as amount from ledger.transfers
            union all
            select split_part(credit_account, ':', 1), -amount_minor from ledger.transfers
        ) as legs
        where kind in ('bank', 'in_transit') group by kind
        """
    ).fetchall()
    return {kind: amount for kind, amount in rows if amount}


@pytest.mark.parametrize("version", ["02", "08"])
def test_a_payout_is_matched_by_its_trace_id_and_posts_the_bank_leg(
    conn: Connection, imports: Imports, version: str
) -> None:
    payout(conn, "po_1", 9680, trace="021000021234567")
    payout(conn, "po_2", 9680, trace="021000029999999")
    assert bank_balance(conn) == {"in_transit": 19360}
    content = camt(statement(entry("96.80", text="PAYOUT 021000029999999")), version=version)
    if version == "08":
        content = content.replace("<Sts>BOOK</Sts>", "<Sts><Cd>BOOK</Cd></Sts>")
    done = imports(content)
    assert (done["line_count"], done["matched"], done["unmatched"]) == (1, 1, 0)
    assert matches(conn) == [("po_2", 9680, "trace_id")]
    assert bank_balance(conn) == {"bank": 9680, "in_transit": 9680}
    assert not violations(conn)


def test_a_file_that_was_imported_changes_nothing(conn: Connection, imports: Imports) -> None:
    payout(conn, "po_1", 9680)
    content = camt(statement(entry("96.80"), entry("96.80")))
    assert imports(content)["new_line_count"] == 2
    assert imports(content) == {}
    assert "imported before" in said(imports.run("bank-statements", "import", imports.write(content)))
    assert bank_balance(conn) == {"bank": 9680}
    assert conn.execute("select count(*) from surety.staged_bank_lines").fetchone() == (0,)


def test_overlapping_statements_bring_each_line_once(conn: Connection, imports: Imports) -> None:
    first = statement(entry("1.00"), entry("1.00"), entry("2.00", reference="R2"))
    assert imports(camt(first))["new_line_count"] == 3
    again = statement(
        entry("1.00"), entry("1.00"), entry("2.00", reference="R2", text="other words"), entry("5.00"),
        reference="MONTH", sequence=7, days=("2026-11-01", "2026-11-30"),
    )  # fmt: skip
    assert imports(camt(again))["new_line_count"] == 1
    assert conn.execute("select array_agg(amount_minor order by amount_minor) from surety.bank_lines").fetchone() == (
        [100, 100, 200, 500],
    )


def test_equal_lines_of_consecutive_statements_are_two(conn: Connection, imports: Imports) -> None:
    imports(camt(statement(entry("1.00"), sequence=1, opening="0.00", closing="1.00")))
    done = imports(camt(statement(entry("1.00"), reference="S2", sequence=2, opening="1.00", closing="2.00")))
    assert done["new_line_count"] == 1
    assert "amount" not in open_kinds(conn)


def test_a_missing_statement_is_a_discrepancy_until_it_is_imported(conn: Connection, imports: Imports) -> None:
    def of_day(day: int, opening: int) -> str:
        at = f"2026-11-{day}"
        return camt(
            statement(
                entry("1.00", day=at), reference=f"S{day}", sequence=day, days=(at, at),
                opening=f"{opening}.00", closing=f"{opening + 1}.00",
            )
        )  # fmt: skip

    imports(of_day(16, 0))
    imports(of_day(18, 2))
    assert open_kinds(conn).count("missing_here") == 1
    [(detail,)] = conn.execute("select detail from surety.discrepancies where kind = 'missing_here'").fetchall()
    assert "between number 16 and 18 are missing" in detail
    imports(of_day(17, 1))
    assert "missing_here" not in open_kinds(conn)


def test_balances_that_do_not_add_up_are_a_discrepancy_with_both_values(conn: Connection, imports: Imports) -> None:
    imports(camt(statement(entry("1.00"), opening="5.00", closing="7.00")))
    [(field,)] = conn.execute("select fields -> 0 from surety.discrepancies where kind = 'amount'").fetchall()
    assert (field["here"], field["there"]) == (600, 700)


def test_a_batch_entry_is_split_where_its_details_add_up(conn: Connection, imports: Imports) -> None:
    def detail(amount: str, name: str) -> str:
        return f'<TxDtls><Refs><EndToEndId>{name}</EndToEndId></Refs><Amt Ccy="EUR">{amount}</Amt></TxDtls>'

    payout(conn, "po_1", 3000, trace="TRACE0001")
    batch = detail("30.00", "TRACE0001") + detail("12.00", "OTHER0001")
    imports(camt(statement(entry("42.00", details=batch), opening="0.00", closing="42.00")))
    assert matches(conn) == [("po_1", 3000, "trace_id")]
    imports(camt(statement(entry("43.00", details=batch), reference="S2", sequence=2, opening="42.00")))
    lines = conn.execute("select amount_minor, part from surety.bank_lines order by place, part, id").fetchall()
    assert sorted(lines) == [(1200, 2), (3000, 1), (4300, 0)]


def test_a_reversal_has_the_direction_that_it_says(conn: Connection, imports: Imports) -> None:
    payout(conn, "po_1", 500, trace="TRACE0001")
    imports(camt(statement(entry("5.00", text="TRACE0001"))))
    assert bank_balance(conn) == {"bank": 500}
    payout(conn, "po_1", 500, trace="TRACE0001", status="failed")
    back = entry("5.00", direction="DBIT", more="<RvslInd>true</RvslInd>", text="TRACE0001", day="2026-11-23")
    imports(camt(statement(back, reference="S2", sequence=2, days=("2026-11-23", "2026-11-23"))))
    assert conn.execute("select matched_minor, expected_minor from surety.payouts").fetchall() == [(0, 0)]
    assert bank_balance(conn) == {"in_transit": 500}, "until the provider's balance transaction comes"
    assert "unmatched_cash" not in open_kinds(conn)


def test_lines_are_matched_by_amount_and_the_nearest_banking_day(conn: Connection, imports: Imports) -> None:
    payout(conn, "po_1", 700, "2026-11-17")
    payout(conn, "po_2", 700, "2026-11-20")
    payout(conn, "po_3", 700, "2026-11-02")
    # A Monday: one banking day after Friday, the 20th.
    imports(camt(statement(entry("7.00", day="2026-11-23"), days=("2026-11-23", "2026-11-23"))))
    assert matches(conn) == [("po_2", 700, "amount")]
    assert open_kinds(conn).count("unmatched_cash") == 2, "po_1 and po_3 should be at the bank by now"


def test_one_line_pays_several_payouts_and_one_payout_comes_in_several_lines(
    conn: Connection, imports: Imports
) -> None:
    for name, amount in (("po_1", 1100), ("po_2", 2200), ("po_3", 9100)):
        payout(conn, name, amount)
    done = imports(camt(statement(entry("33.00"), entry("40.00"), entry("51.00"), opening="0.00", closing="124.00")))
    assert (done["matched"], done["unmatched"]) == (3, 0)
    assert matches(conn) == [
        ("po_1", 1100, "several_payouts"),
        ("po_2", 2200, "several_payouts"),
        ("po_3", 4000, "several_lines"),
        ("po_3", 5100, "several_lines"),
    ]
    assert bank_balance(conn) == {"bank": 12400}


def test_an_unmatched_line_is_a_discrepancy_until_its_payout_is_known(conn: Connection, imports: Imports) -> None:
    imports(camt(statement(entry("96.80"))))
    assert open_kinds(conn) == ["unmatched_cash"]
    payout(conn, "po_1", 9680)
    conn.execute("select surety.match_bank_lines()")
    assert open_kinds(conn) == []
    assert bank_balance(conn) == {"bank": 9680}


def test_an_amount_that_differs_at_the_bank_is_a_discrepancy_with_both_values(
    conn: Connection, imports: Imports
) -> None:
    payout(conn, "po_1", 9680, trace="TRACE0001")
    imports(camt(statement(entry("96.00", text="TRACE0001"))))
    [(field,)] = conn.execute("select fields -> 0 from surety.discrepancies where kind = 'unmatched_cash'").fetchall()
    assert (field["here"], field["there"]) == (9680, 9600)
    assert bank_balance(conn) == {"bank": 9600, "in_transit": 80}


def test_pending_entries_are_skipped_and_wrong_ones_refused_by_name(conn: Connection, imports: Imports) -> None:
    done = imports(
        camt(statement(entry("1.00", status="PDNG"), entry("x.00"), entry("2.00", direction="UP"), entry("3.00")))
    )
    assert (done["line_count"], done["skipped_count"], done["refused_count"]) == (1, 1, 2)
    shown = json.loads(said(imports.run("bank-statements", "show", done["id"], "--json")))
    assert [(one["place"], one["field"], one["value"]) for one in shown["refused"]] == [
        (2, "Amt", "x.00"),
        (3, "CdtDbtInd", "UP"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<a/>", "no camt.053 file"),
        (camt(statement(entry("1.00")))[:-30], "damaged or cut off"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + camt().partition("\n")[2], "document type or entities"),
        ("hello", "neither camt.053 nor BAI2"),
        ("01,A,B,261120,0600,1,,,2/\n02,A,B,1,261120,,EUR,2/\n", "it has no trailer"),
        ("01,A,B,261120,0600,1,,,2/\n02,A,B,4,261120,,EUR,2/\n", "this group is a test"),
    ],
)
def test_a_damaged_file_is_refused_as_a_whole(conn: Connection, imports: Imports, content: str, message: str) -> None:
    assert message in refused(imports.run("bank-statements", "import", imports.write(content)))
    assert conn.execute("select count(*) from surety.bank_files").fetchone() == (0,)


BAI2 = """01,122099999,123456789,261121,0200,1,,,2/
02,031001234,122099999,1,261120,2359,EUR,2/
03,0975312468,,010,500000,,,015,524680,,/
88,100,30000,2,,400,5320,1/
16,142,20000,V,261120,,BREF1,021000021234567,STRIPE PAYOUT/
16,195,10000,D,2,0,4000,1,6000,BREF2,,WIRE, WITH / AND ,/
88,MORE TEXT/
16,451,5320,,,,CARD FEES/
16,890,,,,,NOTE/
49,1095320,8/
98,1095320,1,10/
99,1095320,1,12/
"""


def test_a_bai2_file_is_read_with_signs_by_type_code_and_its_totals_are_checked(
    conn: Connection, imports: Imports
) -> None:
    payout(conn, "po_1", 20000, trace="021000021234567")
    done = imports(BAI2)
    assert (done["line_count"], done["skipped_count"], done["matched"]) == (3, 1, 1)
    lines = conn.execute(
        "select amount_minor, bank_reference, description, code from surety.bank_lines order by place"
    ).fetchall()
    assert lines == [
        (20000, "BREF1", "STRIPE PAYOUT", "142"),
        (10000, "BREF2", "WIRE, WITH / AND MORE TEXT", "195"),
        (-5320, "", "CARD FEES", "451"),
    ]
    assert open_kinds(conn) == ["unmatched_cash", "unmatched_cash"], "the balances add up"
    wrong = BAI2.replace("16,451,5320", "16,451,5321")
    message = refused(imports.run("bank-statements", "import", imports.write(wrong)))
    assert "add up to 1095320, they add up to 1095321" in message
    imports(wrong, "--accept-totals")


def test_a_csv_file_is_read_by_a_named_mapping(conn: Connection, imports: Imports, run: Run) -> None:
    payout(conn, "po_1", 123450)
    said(
        run(
            *("bank-statements", "map", "my-bank", "--booked", "Buchungstag", "--amount", "Betrag"),
            *("--currency", "EUR", "--reference", "Referenz", "--text", "Zweck", "--date-format", "%d.%m.%Y"),
            *("--decimal", ",", "--delimiter", ";"),
        )
    )
    content = (
        "Buchungstag;Betrag;Referenz;Zweck;Mehr\n20.11.2026;1.234,50;R1;Stripe;x\n"
        "32.11.2026;1,00;R2;a;x\n20.11.2026;1,2345;R3;b;x\n20.11.2026;1,00\n"
    )
    done = imports(content, "--mapping", "my-bank", "--account", IBAN)
    assert (done["line_count"], done["matched"], done["refused_count"]) == (1, 1, 3)
    rows = conn.execute("select place, field, value from surety.refused_bank_entries order by 1").fetchall()
    assert rows == [(3, "Buchungstag", "32.11.2026"), (4, "Betrag", "1,2345"), (5, "row", "2")]
    path = imports.write("a;b\n1;2\n")
    message = refused(run("bank-statements", "import", path, "--mapping", "my-bank", "--account", IBAN))
    assert "has no column Buchungstag, Betrag" in message


def test_several_accounts_and_currencies_stay_apart(conn: Connection, imports: Imports) -> None:
    payout(conn, "po_1", 100, currency="usd")
    done = imports(
        camt(
            statement(entry("1.00")),
            statement(entry("1.00"), reference="S9", iban="DE00999999999999999999"),
            statement(entry("1.00").replace("EUR", "USD"), reference="S3", iban="X").replace("EUR", "USD"),
        )
    )
    assert (done["statement_count"], done["matched"]) == (3, 1)
    accounts = json.loads(said(imports.run("bank-statements", "accounts", "--json")))
    assert sorted((one["hint"], one["currency"]) for one in accounts) == [
        ("2051", "eur"), ("9999", "eur"), ("X", "usd")
    ]  # fmt: skip


def test_lines_without_the_payers_text_are_not_the_providers(conn: Connection, imports: Imports, run: Run) -> None:
    imports(camt(statement(entry("1.00", text="RENT"), entry("2.00"))))
    [account] = json.loads(said(run("bank-statements", "accounts", "--json")))
    said(run("bank-statements", "set-account", account["id"], "--payer-text", "Stripe"))
    assert conn.execute("select description, state from surety.bank_lines order by place").fetchall() == [
        ("RENT", "other"),
        ("STRIPE PAYOUT", "unmatched"),
    ]
    assert open_kinds(conn) == ["unmatched_cash"]


def test_a_file_that_is_damaged_at_its_end_leaves_nothing_staged(conn: Connection, imports: Imports) -> None:
    content = camt(statement(entry("1.00"), entry("2.00")))[:-40]
    refused(imports.run("bank-statements", "import", imports.write(content)))
    assert conn.execute("select count(*) from surety.staged_bank_lines").fetchone() == (0,)
