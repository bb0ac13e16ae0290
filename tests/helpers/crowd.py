"""A hostile crowd around a router, as a process of its own: engines, and clients that mean ill.

    python -m tests.helpers.crowd engines     # prints the ports of two engines
    python -m tests.helpers.crowd attack PORT # until it is killed

The second engine's answers depend on the prompt: ``endless`` has no end. Clients read nothing of
long streams, send half of 16 MB, and ask for what has no end.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import threading

SLOW_READERS, HALF_BODIES, BODY_BYTES = 30, 40, 16 << 20
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n"


def engines():
    from tests.helpers.mock_engine import MockEngine

    class Engine(MockEngine):
        async def _complete(self, writer, left, path, body, headers, trouble):
            if body.get("prompt") == "endless":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{")
                while not left.done():
                    writer.write(b'"x": "' + b"y" * 65536 + b'", ')
                    await writer.drain()
                    await asyncio.sleep(0.005)
                return False
            return await super()._complete(writer, left, path, body, headers, trouble)

        def events(self, path, body, headers, n):
            if n <= 100:
                return super().events(path, body, headers, n)
            # Long ones, so that what is not read fills every buffer soon.
            text = b"y" * (1 << 14)
            event = b'data: {"choices": [{"index": 0, "text": "' + text + b'"}]}\n\n'
            return itertools.repeat(event)

        async def _wait(self, left, wait_s):
            return await super()._wait(left, wait_s or 0.02)

    made = [Engine(f"e{k}", tokens=10_000_000) for k in range(2)]
    for engine in made:
        engine.__enter__()
    print(*(engine.port for engine in made), flush=True)
    sys.stdin.read()


async def attack(port):
    # The end of whoever started it is its own.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()

    async def again(one):
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await one()
            await asyncio.sleep(3.0)

    async def deaf():
        # What it is sent fills small buffers, and then the router waits for it.
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=1024)
        body = json.dumps({"prompt": "x", "max_tokens": 10_000_000, "stream": True})
        writer.write((HEAD.format(len(body)) + body).encode())
        await reader.readexactly(10)
        reader._transport.pause_reading()
        await asyncio.sleep(3600.0)

    async def half():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD.format(BODY_BYTES).encode() + b'{"prompt": "')
        for _ in range(BODY_BYTES // 2 >> 16):
            writer.write(b"x" * (1 << 16))
            await writer.drain()
        await reader.read(1)  # until the router has had enough
        writer.close()

    async def whole():
        """Valid JSON that takes long to read; the answer is short, for engines have one core."""
        content = b'{"prompt": "x", "max_tokens": 4, "y": [' + b"[]," * 400_000 + b"[]]}"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD.format(len(content)).encode() + content)
        await reader.read(1)
        writer.close()

    async def endless():
        body = b'{"prompt": "endless"}'
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD.format(len(body)).encode() + body)
        await reader.read(1)
        writer.close()

    kinds = [deaf] * SLOW_READERS + [half] * HALF_BODIES + [whole, endless]
    await asyncio.gather(*map(again, kinds))


if __name__ == "__main__":
    engines() if sys.argv[1] == "engines" else asyncio.run(attack(int(sys.argv[2])))
