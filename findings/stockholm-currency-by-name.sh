#!/bin/sh
# Surprise: a currency named by a string has two decimals, whatever the currency. 1000 minor units of "JPY" are 10 yen.
# Expected: "JPY" and the library's own JPY object mean the same currency, which has no minor unit (1000 yen).
# Seen with: stockholm 0.5.7, Python 3.11, November 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check stockholm==0.5.7
cat > "$folder/seen" <<'SEEN'
from_sub_units(1000, "JPY") = 10.00 JPY
from_sub_units(1000, JPY)   = 1000 JPY
Money(1000, "JPY").sub_units = 100000
Money(1000, JPY).sub_units   = 1000
SEEN
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/now"
from stockholm import Money
from stockholm.currency import JPY

print('from_sub_units(1000, "JPY") =', Money.from_sub_units(1000, "JPY"))
print("from_sub_units(1000, JPY)   =", Money.from_sub_units(1000, JPY))
print('Money(1000, "JPY").sub_units =', Money(1000, "JPY").sub_units)
print("Money(1000, JPY).sub_units   =", Money(1000, JPY).sub_units)
PYTHON
diff "$folder/seen" "$folder/now"
