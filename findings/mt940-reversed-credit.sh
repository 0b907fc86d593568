#!/bin/sh
# Surprise: a reversed credit (RC), which takes money off the account, has a positive amount.
# Expected: its amount is negative, as that of a debit (D). So the sum of the amounts is the change of the balance.
# In the statement below the account ends where it began, and the amounts sum to 200.
# Seen with: mt-940 5.1.1, Python 3.11, November 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mt-940==5.1.1
cat > "$folder/seen" <<'SEEN'
C 100.00
RC 100.00
D -50.00
RD 50.00
opening 1000.00, sum 200.00, closing 1000.00
SEEN
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/now"
import mt940

STATEMENT = """\
:20:STATEMENT
:25:NL08ABNA0123456789
:28C:1/1
:60F:C261101EUR1000,00
:61:2611021102C100,00NTRFREF1//B1
:61:2611031103RC100,00NTRFREF2//B2
:61:2611041104D50,00NTRFREF3//B3
:61:2611051105RD50,00NTRFREF4//B4
:62F:C261130EUR1000,00
"""
transactions = mt940.parse(STATEMENT)
for transaction in transactions:
    print(transaction.data["status"], transaction.data["amount"].amount)
total = sum(transaction.data["amount"].amount for transaction in transactions)
opening, closing = (transactions.data[f"final_{when}_balance"].amount.amount for when in ("opening", "closing"))
print(f"opening {opening}, sum {total}, closing {closing}")
PYTHON
diff "$folder/seen" "$folder/now"
