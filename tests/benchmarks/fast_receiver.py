"""A receiver of webhooks that costs little: `python fast_receiver.py PORT`. GET answers with the
time at which each id was first taken, as {id: seconds since the epoch}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
taken: dict[str, float] = {}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if head.startswith("GET"):
                text = json.dumps(taken).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
            else:
                lines = dict(line.split(": ", 1) for line in head.lower().split("\r\n")[1:-2])
                await reader.readexactly(int(lines["content-length"]))
                taken.setdefault(lines.get("webhook-id", ""), time.time())
                writer.write(OK)
            await writer.drain()
    except asyncio.IncompleteReadError:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
