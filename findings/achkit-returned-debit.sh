#!/bin/sh
# Surprise: achkit's validate() refuses a valid NACHA file with the return of a debit (transaction code 26).
# Expected: a return counts in the control totals like the entry that it returns: 26 and 36 are debits, 21 and 31 credits.
# achkit counts codes that end in 7 or 8 (debits) and 2 or 3 (credits) alone, so a return's amount counts in no total.
# Seen with: achkit 0.2.0, Python 3.11, December 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check achkit==0.2.0
cat > "$folder/seen" <<'SEEN'
a debit of 123.54: valid
its return: total debit 12354 != 0
SEEN
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/now"
from achkit import validate

HEADERS = [
    "101 021000021 0114015332612011016A094101FIRST BANK             SECOND BANK",
    "5225ADAS BOOKS                          987654321 PPDBOOKS           261202   1011401530000001",
]
DEBIT = "627021000021111122223        0000012354ORDER 17       GRACE HOPPER            0011401530000042"
RETURNED = "626021000021111122223        0000012354ORDER 17       GRACE HOPPER            1011401530000042"
REASON = "799R01021000020000001      02100002                                            011401530000042"


def file(*records):
    totals = f"{len(records):06}0002100002000000012354000000000000"
    controls = [
        f"8225{totals}987654321                          011401530000001",
        f"900000100000100{totals}",
    ]
    lines = [line.ljust(94) for line in (*HEADERS, *records, *controls)]
    return "\n".join(lines + ["9" * 94] * (10 - len(lines)))


for name, data in (("a debit of 123.54", file(DEBIT)), ("its return", file(RETURNED, REASON))):
    errors = validate(data)["errors"]
    print(f"{name}: {errors[0]['message'] if errors else 'valid'}")
PYTHON
diff "$folder/seen" "$folder/now"
