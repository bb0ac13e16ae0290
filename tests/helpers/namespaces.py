"""Machines of their own on this one: network namespaces behind a switch that can cut one off."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from voltana_ctrl.engines.emulated import fleet as emulated

#: An emulated engine that others can reach, too.
_OPEN = """
import sys
from voltana_ctrl.engines.emulated import fleet
listen = fleet.listen
fleet.listen = lambda host, port, *, what: listen("0.0.0.0", port, what=what)
fleet.run_engine(sys.argv[1])
"""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Network:
    """One namespace per name, each with an address; who is cut off gets and sends no packet.

    What is sent to it is lost without a word, as behind a switch that has failed: its own link
    stays up, and nothing is refused.
    """

    def __init__(self, *names: str) -> None:
        self._tag = f"vc{os.getpid() % 10_000}"
        self._bridge = f"{self._tag}b"
        part = os.getpid() % 200
        self.ours = f"10.77.{part}.254"
        self.address = {name: f"10.77.{part}.{k + 1}" for k, name in enumerate(names)}
        self._number = {name: k for k, name in enumerate(names)}

    def __enter__(self) -> "Network":
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.ours}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for name, at in self.address.items():
                space, port = self._space(name), self._port(name)
                _ip("netns", "add", space)
                _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("link", "set", port, "up", "master", self._bridge)
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", space, "link", "set", "eth0", "up")
                _ip("-n", space, "addr", "add", f"{at}/24", "dev", "eth0")
        except OSError as error:
            self.__exit__()
            pytest.skip(f"needs network namespaces: {error}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.address:
            with contextlib.suppress(OSError):
                _ip("link", "del", self._port(name))
            with contextlib.suppress(OSError):
                _ip("netns", "del", self._space(name))
        with contextlib.suppress(OSError):
            _ip("link", "del", self._bridge)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _port(self, name: str) -> str:
        return f"{self._tag}p{self._number[name]}"

    def inside(self, name: str, *command: str) -> list[str]:
        """A command that runs there; the process is the command's own."""
        return ["ip", "netns", "exec", self._space(name), *command]

    def cut(self, name: str) -> None:
        """Lose every packet to and from it."""
        _ip("link", "set", self._port(name), "nomaster")

    def join(self, name: str) -> None:
        """Let packets pass again."""
        _ip("link", "set", self._port(name), "master", self._bridge)


class Relay(threading.Thread):
    """Passes bytes on to an address, each so many seconds late: few kernels can delay packets."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(daemon=True)
        self._to, self.delay_s, self.port = (host, port), 0.0, 0
        self._ready = threading.Event()

    def __enter__(self) -> "Relay":
        self.start()
        self._ready.wait(10.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self.join(10.0)

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "0.0.0.0", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ending.wait()
        server.close()
        passing = asyncio.all_tasks() - {asyncio.current_task()}
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
        await asyncio.sleep(0.1)  # until what they held is closed

    async def _serve(self, reader, writer) -> None:
        try:
            out_reader, out_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, out_writer), self._pass(out_reader, writer))

    async def _pass(self, reader, writer) -> None:
        try:
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            writer.close()


class SpreadFleet(emulated.EmulatedFleet):
    """Emulated engines in namespaces, in turn; reached by others at the address of theirs."""

    def __init__(self, network: Network, names: tuple[str, ...], *arguments, **settings) -> None:
        self._network, self._names = network, names
        super().__init__(*arguments, nodes=len(names), **settings)

    def at(self, instance: int) -> str:
        """Where an engine is."""
        return self._names[instance % len(self._names)]

    def _table(self, i, uuids, fpm, limits):
        text = super()._table(i, uuids, fpm, limits)
        return text.replace(self.urls[i], self.url(i))

    def url(self, i: int) -> str:
        """Address of an engine, for others."""
        return self.urls[i].replace("127.0.0.1", self._network.address[self.at(i)])

    def _spawn(self, settings):
        told = {name: getattr(settings, name) for name in type(settings).__slots__}
        i = self.settings.index(settings)
        command = [sys.executable, "-c", _OPEN, json.dumps(told)]
        return subprocess.Popen(
            self._network.inside(self.at(i), *command),
            env={**self.env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )

    def wait(self, instance: int, limit_s: float = 120.0) -> None:
        """Wait until an engine answers."""
        port, until_s = self.settings[instance].port, time.monotonic() + limit_s
        while time.monotonic() < until_s and self._processes[instance].poll() is None:
            at = self._network.address[self.at(instance)]
            with contextlib.suppress(OSError):
                socket.create_connection((at, port), timeout=1.0).close()
                return
            time.sleep(0.1)
        raise AssertionError(f"engine {instance} did not start")
