#!/bin/sh
# Surprise: an entry of a camt.053 statement that is pending (PDNG) is a transaction like the booked ones.
# Expected: it is left out or marked. Here no column has the entry's status, so the amounts sum to more than the change
# of the booked balance, and the amount is counted again when the entry is booked.
# In the statement below the booked balance rises by 42.00, and the amounts sum to 49.00.
# Seen with: bankstatementparser 0.0.29, Python 3.11, December 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check bankstatementparser==0.0.29
cat > "$folder/seen" <<'SEEN'
42.00 7.00
sum 49.00, opening 0.00, closing 42.00
columns with a status: []
SEEN
cat > "$folder/statement.xml" <<'XML'
<?xml version="1.0" encoding="UTF-8"?>
<Document xmlns="urn:iso:std:iso:20022:tech:xsd:camt.053.001.08"><BkToCstmrStmt>
<GrpHdr><MsgId>M1</MsgId><CreDtTm>2026-11-21T06:00:00</CreDtTm></GrpHdr>
<Stmt><Id>S1</Id><CreDtTm>2026-11-21T06:00:00</CreDtTm>
<Acct><Id><IBAN>DE02120300000000202051</IBAN></Id><Ccy>EUR</Ccy></Acct>
<Bal><Tp><CdOrPrtry><Cd>OPBD</Cd></CdOrPrtry></Tp><Amt Ccy="EUR">0.00</Amt><CdtDbtInd>CRDT</CdtDbtInd>
<Dt><Dt>2026-11-20</Dt></Dt></Bal>
<Bal><Tp><CdOrPrtry><Cd>CLBD</Cd></CdOrPrtry></Tp><Amt Ccy="EUR">42.00</Amt><CdtDbtInd>CRDT</CdtDbtInd>
<Dt><Dt>2026-11-20</Dt></Dt></Bal>
<Ntry><Amt Ccy="EUR">42.00</Amt><CdtDbtInd>CRDT</CdtDbtInd><Sts><Cd>BOOK</Cd></Sts>
<BookgDt><Dt>2026-11-20</Dt></BookgDt><ValDt><Dt>2026-11-20</Dt></ValDt>
<BkTxCd><Prtry><Cd>166</Cd></Prtry></BkTxCd></Ntry>
<Ntry><Amt Ccy="EUR">7.00</Amt><CdtDbtInd>CRDT</CdtDbtInd><Sts><Cd>PDNG</Cd></Sts>
<ValDt><Dt>2026-11-23</Dt></ValDt><BkTxCd><Prtry><Cd>166</Cd></Prtry></BkTxCd></Ntry>
</Stmt></BkToCstmrStmt></Document>
XML
"$folder/venv/bin/python" - "$folder/statement.xml" <<'PYTHON' | tee "$folder/now"
import sys
from decimal import Decimal

from bankstatementparser import CamtParser

found = CamtParser(sys.argv[1]).parse()
amounts = [Decimal(str(amount)).quantize(Decimal("0.01")) for amount in found["Amount"]]
print(*amounts)
print(f"sum {sum(amounts)}, opening 0.00, closing 42.00")
print("columns with a status:", [name for name in found.columns if "stat" in name.lower() or name.lower() == "sts"])
PYTHON
diff "$folder/seen" "$folder/now"
