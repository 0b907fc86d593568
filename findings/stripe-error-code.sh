#!/bin/sh
# Surprise: StripeError.code is None for a 401, 403, 409, 429 or 500, although the answer names a code.
# Expected: error.code is the answer's error.code, as it is for a 400 or 402. The code is only at error.error.code.
# Also: a 409 with type idempotency_error is an APIError, not an IdempotencyError.
# Seen with: stripe 16.1.0, httpx 0.28.1, Python 3.11, November 2026. The answers have the form that Stripe documents.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check stripe==16.1.0 httpx==0.28.1
cat > "$folder/seen" <<'SEEN'
400 InvalidRequestError code=parameter_missing error.code=parameter_missing
401 AuthenticationError code=None error.code=api_key_expired
402 CardError code=card_declined error.code=card_declined
403 PermissionError code=None error.code=more_permissions_required
409 APIError code=None error.code=idempotency_key_in_use
429 RateLimitError code=None error.code=rate_limit
500 APIError code=None error.code=internal
SEEN
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/now"
import http.server
import json
import threading

import stripe

ERRORS = {
    400: ("invalid_request_error", "parameter_missing"),
    401: ("invalid_request_error", "api_key_expired"),
    402: ("card_error", "card_declined"),
    403: ("invalid_request_error", "more_permissions_required"),
    409: ("idempotency_error", "idempotency_key_in_use"),
    429: ("invalid_request_error", "rate_limit"),
    500: ("api_error", "internal"),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = int(self.path.rpartition("_")[2])
        kind, code = ERRORS[status]
        body = json.dumps({"error": {"type": kind, "code": code, "message": "as documented"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}"
client = stripe.StripeClient("sk_test_x", base_addresses={"api": url}, max_network_retries=0)
for status in ERRORS:
    try:
        client.v1.charges.retrieve(f"ch_{status}")
    except stripe.StripeError as error:
        print(f"{status} {type(error).__name__} code={error.code} error.code={error.error.code}")
PYTHON
diff "$folder/seen" "$folder/now"
