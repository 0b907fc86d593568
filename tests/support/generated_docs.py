"""The generated parts of README.md and docs/: `python -m tests.support.generated_docs` writes them.

Each part stands between `<!-- generated: NAME -->` and `<!-- generated end -->`, and comes from rows of a deployed
database or from tables in the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psycopg

from app.web.problems import PROBLEM_TYPES
from db.deploy.deploy import deploy
from db.embedded.databases import temporary_database
from db.embedded.server import EmbeddedServer
from jobs.handlers.table import HANDLER_TABLE
from jobs.stripe.client import API_VERSION
from jobs.stripe.key_check import PERMISSIONS, KeyPermission
from jobs.stripe.webhook_events import ACCESS_EVENTS, RELEVANT_EVENTS

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "app" / "api" / "introduction.md", *sorted((ROOT / "docs").rglob("*.md")))
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- generated end -->)", re.DOTALL)
CAPTURED_POSITION = 7
"""surety.states.position of confirmed: the first state in which money was captured."""

Connection = psycopg.Connection[tuple[Any, ...]]


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; None is shown as a dash."""
    titles = list(headings)
    lines = [titles, ["---"] * len(titles), *rows]
    shown = (["–" if cell in {None, ""} else str(cell) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in shown) + "\n"


def diagram(arrows: Iterable[tuple[str, str]]) -> str:
    """A Mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", "    direction LR", *(f"    {a} --> {b}" for a, b in arrows), "```"]
    return "\n".join(lines) + "\n"


def states(conn: Connection) -> str:
    """Two diagrams, before the capture and after it: 56 arrows are not readable in one. Then the table of states."""
    rows = conn.execute(
        """
        select t.from_state, t.to_state, f.position < %s
        from surety.transitions as t
        join surety.states as f on f.state = t.from_state
        join surety.states as e on e.state = t.to_state
        order by f.position, e.position
        """,
        (CAPTURED_POSITION,),
    ).fetchall()
    before = [(a, b) for a, b, is_before in rows if is_before]
    after = [(a, b) for a, b, is_before in rows if not is_before]
    meanings = conn.execute("select state, status, meaning from surety.states order by position").fetchall()
    return "\n".join((
        "Until the money is captured:\n",
        diagram([("[*]", "initiated"), *before]),
        "Afterwards. A payment that ended can still turn out to have succeeded:\n",
        diagram(after),
        table(("state", "status", "meaning"), meanings),
    ))  # fmt: skip


def statuses(conn: Connection) -> str:
    """The statuses of payments, with the meanings of their states."""
    rows = conn.execute(
        """
        select '`' || status || '`', string_agg(meaning, '; or ' order by position) from surety.states
        group by status order by min(position)
        """
    ).fetchall()
    return table(("status", "meaning"), rows)


def refund_states(conn: Connection) -> str:
    """The diagram and table of refunds."""
    arrows = conn.execute(
        """
        select t.from_state, t.to_state
        from surety.refund_transitions as t
        join surety.refund_states as f on f.state = t.from_state
        join surety.refund_states as e on e.state = t.to_state
        order by f.position, e.position
        """
    ).fetchall()
    meanings = conn.execute("select state, meaning from surety.refund_states order by position").fetchall()
    return diagram([("[*]", "pending"), *((a, b) for a, b in arrows)]) + "\n" + table(("state", "meaning"), meanings)


def dispute_statuses(conn: Connection) -> str:
    """The statuses of disputes."""
    rows = conn.execute(
        """
        select status, case when takes_evidence then 'yes' end, meaning
        from surety.dispute_statuses order by position
        """
    ).fetchall()
    return table(("status", "takes evidence", "meaning"), rows)


def fact_kinds(conn: Connection) -> str:
    """The kinds of facts, by family and rank."""
    rows = conn.execute(
        "select kind, family, rank, evidences, meaning from surety.fact_kinds order by family, rank, kind"
    ).fetchall()
    return table(("kind", "family", "rank", "proves the state", "meaning"), rows)


def currencies(conn: Connection) -> str:
    """The rules of each currency, in minor units."""
    rows = conn.execute(
        "select currency, exponent, minimum_minor, maximum_minor, step_minor, fee_fixed_minor"
        " from surety.currencies order by currency"
    ).fetchall()
    return table(("currency", "decimals", "smallest", "largest", "multiple of", "our fixed fee"), rows)


def mandatory_steps(conn: Connection) -> str:
    """The canonical path of each rail."""
    rows = conn.execute(
        """
        select rail, capture_method, string_agg(state, ' → ' order by position)
        from surety.mandatory_steps group by rail, capture_method order by rail desc, capture_method
        """
    ).fetchall()
    return table(("rail", "capture", "mandatory steps"), rows)


def account_kinds(conn: Connection) -> str:
    """The chart of accounts."""
    rows = conn.execute(
        """
        select kind, owner, normal_side, meaning from ledger.account_kinds
        order by array_position(array['merchant', 'provider', 'platform'], owner), kind
        """
    ).fetchall()
    return table(("account", "owner", "normal side", "meaning"), rows)


def rules(conn: Connection) -> str:
    """The transfers of each rule."""
    rows = conn.execute(
        "select case leg when 1 then rule else '' end, debit, credit, amount from ledger.rules order by rule, leg"
    ).fetchall()
    lines = [[rule or " ", *rest] for rule, *rest in rows]
    return table(("rule", "debit", "credit", "amount"), lines)


def events(_: Connection) -> str:
    """Which event leads to which handler, and what that does."""
    lines = [
        (
            ", ".join(f"`{kind}`" for kind in row.events),
            f"`{row.name}`",
            f"`{row.function}`",
            row.provider_call,
            row.leads_to,
        )
        for row in HANDLER_TABLE
    ]
    return table(("event", "handler", "SQL function", "call to the provider", "leads to"), lines)


def merchant_events(conn: Connection) -> str:
    """The types of events that merchants see."""
    rows = conn.execute(
        "select '`' || type || '`', meaning from outbox.event_types where is_for_merchants order by type"
    ).fetchall()
    return table(("type", "meaning"), rows)


def invariants(conn: Connection) -> str:
    """Every invariant, by the view that lists its violations."""
    rows = conn.execute(
        """
        select '`invariant.' || c.relname || '`', obj_description(c.oid)
        from pg_class as c
        where c.relnamespace = 'invariant'::regnamespace and c.relkind = 'v'
        order by c.relname
        """
    ).fetchall()
    return table(("view", "invariant"), rows)


def problems(_: Connection) -> str:
    """The types of problem documents."""
    rows = [(f"`{name}`", kind.status, kind.title) for name, kind in PROBLEM_TYPES.items()]
    return table(("type", "HTTP status", "meaning"), rows)


def key_permissions(_: Connection) -> str:
    """The permissions of a restricted key, a row for each resource: write includes read."""
    needed: dict[str, list[KeyPermission]] = {}
    for permission in PERMISSIONS:
        needed.setdefault(permission.resource, []).append(permission)
    rows = [
        (resource, max(one.access for one in wanted), ", ".join(one.purpose for one in wanted), f"`{wanted[0].name}`")
        for resource, wanted in needed.items()
    ]
    return table(("resource in Stripe's dashboard", "access", "to", "name in Stripe's refusals"), rows)


def webhook_endpoint(_: Connection) -> str:
    """The command that creates the webhook endpoint: our API version, and the events that `apply_webhooks` reads."""
    parts = [
        "curl https://api.stripe.com/v1/webhook_endpoints --user sk_live_…:",
        f"--data url=https://pay.example.com/stripe --data api_version={API_VERSION}",
        *(f"--data 'enabled_events[]={type}'" for type in sorted(RELEVANT_EVENTS | ACCESS_EVENTS)),
    ]
    return "```sh\n" + " \\\n    ".join(parts) + "\n```\n"


def decisions(_: Connection) -> str:
    """Every decision by its title."""
    paths = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    titles = [(path, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")) for path in paths]
    return "".join(f"- [{title}]({path.name})\n" for path, title in titles)


PARTS: dict[str, Callable[[Connection], str]] = {
    part.__name__: part
    for part in (
        states, statuses, refund_states, dispute_statuses, fact_kinds, currencies, mandatory_steps, account_kinds,
        rules, events, merchant_events, invariants, problems, key_permissions, webhook_endpoint,
        decisions,
    )
}  # fmt: skip


def regenerated(text: str, conn: Connection) -> str:
    """A document with its generated parts as they should be."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]](conn)}{part[3]}", text)


if __name__ == "__main__":
    with EmbeddedServer() as server, temporary_database(server.url, "surety_documents") as url:
        deploy(url)
        with psycopg.connect(url) as connection:
            for document in DOCUMENTS:
                document.write_text(regenerated(document.read_text(encoding="utf-8"), connection), encoding="utf-8")
