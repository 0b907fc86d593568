#!/bin/sh
# Surprise: workalendar's FederalReserveSystem closes the Friday before a holiday on a Saturday.
# Expected: the Federal Reserve Banks stay open on that Friday. Only a holiday on a Sunday moves, to the Monday.
# holidays' XFED (from 0.109 on) agrees with the Reserve Banks. A payment file planned by the other calendar is late.
# Seen with: workalendar 17.0.0, holidays 0.109, Python 3.11, November 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check workalendar==17.0.0 holidays==0.109
cat > "$folder/seen" <<'SEEN'
2026-07-03 Friday: closed in workalendar only
2027-06-18 Friday: closed in workalendar only
2027-12-24 Friday: closed in workalendar only
2027-12-31 Friday: closed in workalendar only
2028-11-10 Friday: closed in workalendar only
SEEN
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/now"
import holidays
from workalendar.usa import FederalReserveSystem

YEARS = range(2026, 2029)
fed = {day for day in holidays.financial_holidays("XFED", years=YEARS) if day.weekday() < 5}
calendar = FederalReserveSystem()
other = {day for year in YEARS for day, _ in calendar.holidays(year) if day.weekday() < 5}
for day in sorted(fed ^ other):
    print(f"{day} {day:%A}: closed in {'workalendar' if day in other else 'holidays'} only")
PYTHON
diff "$folder/seen" "$folder/now"
