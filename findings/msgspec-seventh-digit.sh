#!/bin/sh
# Surprise: msgspec rounds a time's seventh digit up. The last instant of a year becomes the next year, and the last
# instant of a day becomes that day's midnight, a day earlier.
# Expected: digits beyond microseconds are cut off, as datetime.fromisoformat does. RFC 3339 allows any number of digits.
# Seen with: msgspec 0.22.0, Python 3.11, November 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check msgspec==0.22.0
cat > "$folder/seen" <<'SEEN'
2026-12-31T23:59:59.9999995Z  msgspec 2027-01-01 00:00:00+00:00  datetime 2026-12-31 23:59:59.999999+00:00
2026-12-31T23:59:59.9999994Z  msgspec 2026-12-31 23:59:59.999999+00:00  datetime 2026-12-31 23:59:59.999999+00:00
23:59:59.9999995  msgspec 00:00:00  datetime 23:59:59.999999
SEEN
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/now"
import datetime

import msgspec

for text in ("2026-12-31T23:59:59.9999995Z", "2026-12-31T23:59:59.9999994Z"):
    decoded = msgspec.json.decode(f'"{text}"', type=datetime.datetime)
    print(f"{text}  msgspec {decoded}  datetime {datetime.datetime.fromisoformat(text)}")
text = "23:59:59.9999995"
decoded = msgspec.json.decode(f'"{text}"', type=datetime.time)
print(f"{text}  msgspec {decoded}  datetime {datetime.time.fromisoformat(text)}")
PYTHON
diff "$folder/seen" "$folder/now"
