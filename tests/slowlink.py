"""Several hosts on one machine: network namespaces, joined by fast links and by slow, lossy ones.

A slow link is made of two TUN devices, each in a namespace: what is sent into one is read here, delayed, held to a
rate, sometimes dropped, and written into the other. Linux has `tc netem` for that, but not in every kernel.

All addresses are of 198.18.0.0/15, which is set aside for measuring networks, and no namespace has a default route.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path

HOST = "198.18.0.1"
"""Address of the namespace that the others are joined to."""

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_LARGEST = 65536
_numbers = count()


@dataclass(frozen=True)
class Quality:
    """Of one direction of a link.

    Attributes:
        rate: bytes a second.
        delay_s: from the moment a packet has been sent whole until it is there.
        loss: share of the packets that are dropped.
        queue_bytes: that wait to be sent, at most; what comes then is dropped, as routers do.
    """

    rate: float = 125_000.0
    delay_s: float = 0.1
    loss: float = 0.01
    queue_bytes: int = 64_000


@dataclass
class Direction:
    """Packets on their way; what happens to them follows from when they come and from the seed."""

    quality: Quality
    seed: int
    passed: int = 0
    passed_bytes: int = 0
    lost: int = 0
    overflowed: int = 0
    _free_at: float = 0.0  # when the last packet will have been sent
    _on_the_way: deque[tuple[float, bytes]] = field(default_factory=deque)  # (arrival, packet)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def take(self, packet: bytes, now: float) -> None:
        """A packet comes in."""
        if self._random.random() < self.quality.loss:
            self.lost += 1
        elif max(0.0, self._free_at - now) * self.quality.rate + len(packet) > self.quality.queue_bytes:
            self.overflowed += 1
        else:
            self._free_at = max(now, self._free_at) + len(packet) / self.quality.rate
            self._on_the_way.append((self._free_at + self.quality.delay_s, packet))

    def give(self, now: float) -> Iterator[bytes]:
        """The packets that have arrived, in the order in which they came in."""
        while self._on_the_way and self._on_the_way[0][0] <= now:
            _, packet = self._on_the_way.popleft()
            self.passed += 1
            self.passed_bytes += len(packet)
            yield packet

    def next_at(self) -> float | None:
        """When the next packet arrives; None = none is on its way."""
        return self._on_the_way[0][0] if self._on_the_way else None


class SlowLink:
    """Carries packets between two TUN devices, in a thread, until it is closed."""

    def __init__(self, ends: tuple[int, int], there: Direction, back: Direction):
        self.there, self.back = there, back
        self._ends = ends
        self._closing, self._close = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        ways = ((self._ends[0], self._ends[1], self.there), (self._ends[1], self._ends[0], self.back))
        while True:
            waits = [at - time.monotonic() for _, _, way in ways if (at := way.next_at()) is not None]
            ready, _, _ = select.select([self._closing, *self._ends], [], [], max(0.0, min(waits)) if waits else None)
            if self._closing in ready:
                return
            for source, target, way in ways:
                if source in ready:
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            way.take(os.read(source, _LARGEST), time.monotonic())
                for packet in way.give(time.monotonic()):
                    with contextlib.suppress(
                        OSError
                    ):  # the other end is down, or its queue is full: the packet is lost
                        os.write(target, packet)

    def close(self) -> None:
        """End the thread, and with the files the devices."""
        os.write(self._close, b".")
        self._thread.join()
        for end in (*self._ends, self._closing, self._close):
            os.close(end)


class Network:
    """Namespaces around one in the middle, which is `HOST` for all of them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._prefix = f"flexfed-{os.getpid()}-{next(_numbers)}"
        self._num_links = 0
        self.middle = self._space("middle")
        ip("-n", self.middle, "addr", "add", f"{HOST}/32", "dev", "lo")

    def close(self) -> None:
        """Remove everything; nothing stays behind, whatever happened."""
        self._stack.close()

    def _space(self, name: str) -> str:
        space = f"{self._prefix}-{name}"
        ip("netns", "add", space)
        self._stack.callback(ip, "netns", "delete", space)
        ip("-n", space, "link", "set", "lo", "up")
        return space

    def fast(self, name: str) -> str:
        """One more namespace, joined by a virtual cable; its name."""
        space, (near, far) = self._space(name), self._devices()
        ip("-n", self.middle, "link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        self._join(space, near, far)
        return space

    def slow(self, name: str, quality: Quality, seed: int = 0) -> tuple[str, SlowLink]:
        """One more, joined by a slow link; its name, and the link: "there" is towards it."""
        space, (near, far) = self._space(name), self._devices()
        ends = []
        for device, place in ((near, self.middle), (far, space)):
            ends.append(open_tun(device))
            ip("link", "set", device, "netns", place)  # the open file goes on carrying its packets
        link = SlowLink((ends[0], ends[1]), Direction(quality, seed), Direction(quality, seed + 1))
        self._stack.callback(link.close)
        self._join(space, near, far)
        return space, link

    def _devices(self) -> tuple[str, str]:
        self._num_links += 1
        serial = f"{os.getpid() % 100_000}-{self._num_links}"  # names of devices have 15 letters at most
        return f"fn{serial}", f"ff{serial}"

    def _join(self, space: str, near: str, far: str) -> None:
        address = f"198.18.{self._num_links}.2"
        ip("-n", self.middle, "link", "set", near, "up")
        ip("-n", space, "link", "set", far, "up")
        ip("-n", space, "addr", "add", f"{address}/32", "dev", far)
        ip("-n", self.middle, "route", "add", f"{address}/32", "dev", near)
        ip("-n", space, "route", "add", f"{HOST}/32", "dev", far)


@contextlib.contextmanager
def a_network() -> Iterator[Network]:
    """A network that is gone afterwards."""
    network = Network()
    try:
        yield network
    finally:
        network.close()


@cache
def why_not() -> str:
    """Why no network can be made here; '' = it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    try:
        with a_network() as network:
            network.fast("a")
            network.slow("b", Quality())
    except (OSError, RuntimeError) as reason:
        return f"network namespaces cannot be made here: {reason}"
    return ""


def ip(*args: str) -> str:
    """Run `ip`.

    Raises:
        RuntimeError: it failed; says how.
    """
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"`ip {' '.join(args)}`: {done.stderr.strip()}")
    return done.stdout


def open_tun(name: str) -> int:
    """Make a TUN device; it lasts as long as the file that is returned."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(file)
        raise
    return file


def socket_in(space: str, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    """A socket that lives in a namespace, used from here: a thread goes there to make it."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def go() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/run/netns/{space}").open() as place:
            if libc.setns(place.fileno(), _CLONE_NEWNET):
                failed.append(OSError(ctypes.get_errno(), f"no way into {space}"))
            else:
                made.append(socket.socket(socket.AF_INET, kind))

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
