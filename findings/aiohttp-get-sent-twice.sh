#!/bin/sh
# Surprise: aiohttp's client sends a GET twice if the server ends the connection without an answer, even a fresh one.
# Expected: one attempt and an error, as for a POST, or as in httpx. HTTP allows a client to repeat a GET, but mostly
# over a kept connection that has become stale; here none was kept, and no option of the session prevents it.
# Seen with: aiohttp 3.14.5, httpx 0.28.1, Python 3.11, November 2026.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check aiohttp==3.14.5 httpx==0.28.1
cat > "$folder/seen" <<'SEEN'
aiohttp POST: ServerDisconnectedError, arrived 1 times
aiohttp GET: ServerDisconnectedError, arrived 2 times
httpx POST: RemoteProtocolError, arrived 1 times
httpx GET: RemoteProtocolError, arrived 1 times
SEEN
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/now"
import asyncio

import aiohttp
import httpx

arrived = 0


async def count_and_hang_up(reader, writer):
    global arrived
    await reader.readuntil(b"\r\n\r\n")
    arrived += 1
    writer.close()


async def with_aiohttp(method, url):
    async with aiohttp.ClientSession() as session, session.request(method, url):
        pass


async def with_httpx(method, url):
    async with httpx.AsyncClient() as client:
        await client.request(method, url)


async def main():
    global arrived
    server = await asyncio.start_server(count_and_hang_up, "127.0.0.1", 0)
    url = "http://{}:{}/".format(*server.sockets[0].getsockname())
    for name, request in (("aiohttp", with_aiohttp), ("httpx", with_httpx)):
        for method in ("POST", "GET"):
            arrived = 0
            try:
                await request(method, url)
            except Exception as error:
                print(f"{name} {method}: {type(error).__name__}, arrived {arrived} times")


asyncio.run(main())
PYTHON
diff "$folder/seen" "$folder/now"
