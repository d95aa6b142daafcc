"""The slow link of the network tests: what it promises holds, on a clock of our own and between real namespaces."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import pytest
from slowlink import HOST, Direction, Network, Quality, a_network, ip, socket_in, why_not

STEP = 0.0011


def sent(way: Direction, sizes: list[int], every_s: float = 0.0) -> list[tuple[float, bytes]]:
    """(arrival, packet) of packets that come in one after the other, looked at every millisecond: `STEP`."""
    arrived, todo = [], [(i * every_s, bytes([i % 256]) * size) for i, size in enumerate(sizes)]
    for step in range(100_000):
        now = step / 1000
        while todo and todo[0][0] <= now + 1e-9:
            way.take(todo.pop(0)[1], now)
        arrived += [(now, packet) for packet in way.give(now)]
        if not todo and way.next_at() is None:
            break
    return arrived


def test_a_packet_takes_its_size_by_the_rate_and_the_delay() -> None:
    way = Direction(Quality(rate=1000, delay_s=0.1, loss=0.0), seed=0)
    assert sent(way, [500]) == [(pytest.approx(0.6, abs=STEP), bytes(500))]
    assert (way.passed, way.passed_bytes, way.lost, way.overflowed) == (1, 500, 0, 0)


def test_packets_queue_in_order_and_leave_at_the_rate() -> None:
    way = Direction(Quality(rate=10_000, delay_s=0.05, loss=0.0), seed=0)
    arrived = sent(way, [100, 200, 300])
    assert [at for at, _ in arrived] == pytest.approx([0.06, 0.08, 0.11], abs=STEP)
    assert [packet[0] for _, packet in arrived] == [0, 1, 2]


def test_a_link_that_was_idle_saves_nothing_up() -> None:
    way = Direction(Quality(rate=1000, delay_s=0.0, loss=0.0), seed=0)
    assert [at for at, _ in sent(way, [100, 100], every_s=5.0)] == pytest.approx([0.1, 5.1], abs=STEP)


def test_what_does_not_fit_the_queue_is_dropped() -> None:
    way = Direction(Quality(rate=1000, delay_s=0.0, loss=0.0, queue_bytes=1000), seed=0)
    assert [packet[0] for _, packet in sent(way, [400, 400, 400, 100])] == [0, 1, 3]
    assert way.overflowed == 1


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.3, 1.0])
def test_losses_are_as_many_as_asked_for_and_follow_from_the_seed(loss: float) -> None:
    ways = [Direction(Quality(rate=1e9, loss=loss, queue_bytes=10**9), seed) for seed in (1, 1, 2)]
    arrived = [[p for _, p in sent(way, [10 + i % 50 for i in range(10_000)])] for way in ways]
    assert arrived[0] == arrived[1]
    assert all(way.lost + way.passed == 10_000 for way in ways)
    deviation = (10_000 * loss * (1 - loss)) ** 0.5
    assert all(abs(way.lost - 10_000 * loss) <= 5 * deviation for way in ways)
    assert (arrived[0] == arrived[2]) == (loss in (0.0, 1.0))


# --- between namespaces -----------------------------------------------------------------------------------------


@pytest.fixture
def namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def network(namespaces: None) -> Iterator[Network]:
    with a_network() as network:
        yield network


def sockets(network: Network, space: str) -> tuple[socket.socket, socket.socket]:
    """One in the middle that is bound, and one beyond the link that is connected to it."""
    near, far = socket_in(network.middle), socket_in(space)
    near.bind((HOST, 0))
    near.settimeout(10)
    far.settimeout(10)
    far.connect(near.getsockname())
    return near, far


def test_packets_pass_both_ways_no_sooner_than_the_link_says(network: Network) -> None:
    quality = Quality(rate=100_000, delay_s=0.1, loss=0.0, queue_bytes=10**6)
    space, link = network.slow("node", quality)
    near, far = sockets(network, space)
    with near, far:
        began = time.monotonic()
        for number in range(50):
            far.send(bytes([number]) * 972)  # and 28 bytes of headers
        packets = [near.recv(2000) for _ in range(50)]
        there = time.monotonic() - began
        assert [packet[0] for packet in packets] == list(range(50))
        assert there >= 50 * 1000 / quality.rate + quality.delay_s  # 0.6 s; a busy machine may take longer
        assert there < 10
        began = time.monotonic()
        near.sendto(b"yes", far.getsockname())
        assert far.recv(10) == b"yes"
        assert time.monotonic() - began >= quality.delay_s
    assert link.back.passed >= 50
    assert link.back.passed_bytes >= 50_000
    assert link.there.passed >= 1


def test_a_tenth_of_the_packets_is_lost(network: Network) -> None:
    space, link = network.slow("node", Quality(rate=1e7, delay_s=0.0, loss=0.1, queue_bytes=10**6), seed=3)
    near, far = sockets(network, space)
    arrived: list[int] = []
    with near, far:
        for number in range(500):
            far.send(number.to_bytes(2, "big"))
            if number % 50 == 49:  # the sockets' own queues are short
                near.settimeout(0.5 if number == 499 else 0.02)
                with contextlib.suppress(TimeoutError):
                    while True:
                        arrived.append(int.from_bytes(near.recv(10), "big"))
    assert arrived == sorted(set(arrived))
    assert link.back.overflowed == 0
    assert len(arrived) + link.back.lost >= 500  # packets of the system's own may be among the lost
    assert 15 < link.back.lost < 85  # 50, and five deviations either way


def test_only_the_middle_can_be_reached_and_nothing_outside(network: Network) -> None:
    fast, (slow, _) = network.fast("fast"), network.slow("slow", Quality())
    for space in (fast, slow):
        near, far = sockets(network, space)
        with near, far:
            far.send(b"here")
            assert near.recv(10) == b"here" or space == slow
            other = "198.18.2.2" if space == fast else "198.18.1.2"
            for address in (other, "192.0.2.1"):
                with socket_in(space) as lost, pytest.raises(OSError, match="unreachable"):
                    lost.connect((address, 9))
    assert "default" not in ip("-n", network.middle, "route")


@pytest.mark.usefixtures("namespaces")
def test_nothing_stays_behind_also_when_the_test_fails() -> None:
    before = ip("netns", "list")

    def fail() -> None:
        with a_network() as network:
            network.fast("fast")
            network.slow("slow", Quality())
            assert network.middle in ip("netns", "list")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert ip("netns", "list") == before
    assert str(os.getpid()) not in ip("-brief", "link")
