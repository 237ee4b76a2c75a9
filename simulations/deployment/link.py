"""Bad lines between network namespaces: a userspace link with latency, loss and a rate, packet by packet.

A kernel without `netem` cannot delay packets by itself. So each line is a pair of TUN devices, one in the
site's namespace and one in the server's, and this process carries every IP packet between them: it drops some
at random, lets the rest wait for the line's rate and its latency, and counts bytes. TCP, TLS and HTTP above
it are the kernel's and the product's own, which is what a proxy of connections could not offer.

    site namespace  [tun 10.77.N.2] ---- this process ---- [tun 10.77.N.1]  server namespace [10.77.0.1]

Only addresses of namespaces that this file makes; `Lines.close` removes them. Needs root, /dev/net/tun, `ip`.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import selectors
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

SERVER_ADDRESS = "10.77.0.1"
_TUNSETIFF, _TUN, _NO_INFO = 0x400454CA, 0x0001, 0x1000
_PACKET, _QUEUE = 65_536, 1000  # bytes read at once; packets that wait at most, as in netem


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _tun(name: str) -> int:
    """A new TUN device: its file."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN | _NO_INFO))
    return file


@dataclass
class Way:
    """One direction of a line. `bytes` and `packets` count what was offered, `lost` what was dropped."""

    source: int
    target: int
    free: float = 0.0  # when the line has sent what it was given
    waiting: int = 0
    bytes: int = 0
    packets: int = 0
    lost: int = 0
    overflowed: int = 0


class Lines:
    """A namespace for the server and one for each site, with a bad line between each site and the server."""

    def __init__(
        self, sites: Sequence[str], *, latency: float, loss: float, bits_per_second: float, seed: int = 0
    ) -> None:
        self._latency, self._loss, self._rate = latency, loss, bits_per_second
        self._chance = random.Random(seed)
        self._ending = threading.Event()
        self._files: list[int] = []
        self._names: list[str] = []
        self.up: dict[str, Way] = {}
        self.down: dict[str, Way] = {}
        mark = os.getpid() % 10_000
        self._space = {name: f"ft{mark}-{i}" for i, name in enumerate(["server", *sites])}
        try:
            for name in self._space.values():
                _ip("netns", "add", name)
                self._names.append(name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._space["server"], "addr", "add", f"{SERVER_ADDRESS}/32", "dev", "lo")
            for i, site in enumerate(sites, start=1):
                self._line(site, i, mark)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _line(self, site: str, number: int, mark: int) -> None:
        ends = []
        for side, own, other in (("s", 1, 2), ("n", 2, 1)):
            name = f"ft{side}{mark}{number}"
            file = _tun(name)
            self._files.append(file)
            ends.append(file)
            space = self._space["server" if side == "s" else site]
            _ip("link", "set", name, "netns", space)
            local, remote = f"10.77.{number}.{own}", f"10.77.{number}.{other}"
            _ip("-n", space, "addr", "add", local, "peer", remote, "dev", name)
            _ip("-n", space, "link", "set", name, "mtu", "1500", "up")
            if side == "n":
                _ip("-n", space, "route", "add", SERVER_ADDRESS, "dev", name, "src", local)
        server_end, site_end = ends
        self.up[site] = Way(site_end, server_end)
        self.down[site] = Way(server_end, site_end)

    def prefix(self, who: str) -> list[str]:
        """What to put before a command that belongs to `who`: a site, or anything else for the server."""
        return ["ip", "netns", "exec", self._space.get(who, self._space["server"])]

    def _carry(self) -> None:
        """Carries packets until `close`."""
        selector = selectors.DefaultSelector()
        ways = {way.source: way for way in (*self.up.values(), *self.down.values())}
        for file in ways:
            selector.register(file, selectors.EVENT_READ)
        queue: list[tuple[float, int, Way, bytes]] = []
        number = 0
        while not self._ending.is_set():
            wait = min(0.5, max(0.0, queue[0][0] - time.monotonic())) if queue else 0.5
            for key, _ in selector.select(wait):
                way = ways[key.fd]
                try:
                    packet = os.read(way.source, _PACKET)
                except OSError:
                    continue
                now = time.monotonic()
                way.packets, way.bytes = way.packets + 1, way.bytes + len(packet)
                if self._chance.random() < self._loss:
                    way.lost += 1
                    continue
                if way.waiting >= _QUEUE:
                    way.overflowed += 1
                    continue
                way.free = max(now, way.free) + 8 * len(packet) / self._rate
                way.waiting += 1
                number += 1
                heapq.heappush(queue, (way.free + self._latency, number, way, packet))
            now = time.monotonic()
            while queue and queue[0][0] <= now:
                _, _, way, packet = heapq.heappop(queue)
                way.waiting -= 1
                with contextlib.suppress(OSError):
                    os.write(way.target, packet)
        selector.close()

    def close(self) -> None:
        """Removes devices and namespaces."""
        self._ending.set()
        if getattr(self, "_thread", None) is not None:
            self._thread.join(5)
        for file in self._files:
            os.close(file)
        for name in self._names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
