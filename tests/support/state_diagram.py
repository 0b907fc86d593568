"""The README's state diagram, drawn from the rows of surety.transitions.

`python -m tests.support.state_diagram` writes it there.

Two pictures, before the money is captured and after; in one, 56 arrows could not be read.
"""

from __future__ import annotations

from pathlib import Path

import psycopg

from db.deploy.deploy import deploy
from db.embedded import EmbeddedServer, temporary_database

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- states: drawn by python -m tests.support.state_diagram -->", "<!-- states end -->"
CAPTURED_POSITION = 7
"""surety.states.position of confirmed: the first state in which money was captured."""


def draw(conn: psycopg.Connection[tuple[object, ...]]) -> str:
    """The Markdown between the marks."""
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
    lines = [
        "Until the money is captured:",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    direction LR",
        "    [*] --> initiated",
    ]
    lines += [f"    {a} --> {b}" for a, b, is_before in rows if is_before]
    lines += ["```", "", "Afterwards (a payment that ended can still turn out to have succeeded):", "", "```mermaid"]
    lines += ["stateDiagram-v2", "    direction LR"]
    lines += [f"    {a} --> {b}" for a, b, is_before in rows if not is_before]
    lines += ["```", "", "| state | merchants see | meaning |", "|---|---|---|"]
    states = conn.execute("select state, status, meaning from surety.states order by position")
    lines += [f"| {state} | {status} | {meaning} |" for state, status, meaning in states]
    return "\n".join(lines)


def with_diagram(readme: str, diagram: str) -> str:
    """The README with this diagram between its marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{diagram}\n{END}{tail}"


if __name__ == "__main__":
    with EmbeddedServer() as server, temporary_database(server.url, "surety_diagram") as url:
        deploy(url)
        with psycopg.connect(url) as connection:
            README.write_text(with_diagram(README.read_text(), draw(connection)))
