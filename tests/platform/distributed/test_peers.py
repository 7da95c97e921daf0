"""The connections between processes: who is lost, who only ends, and what strangers may say."""

import selectors
import socket

import pytest

from lamina.platform.distributed import peers
from lamina.platform.distributed.peers import Peers, Place


class Wire:
    """Process 0 and its selector; `join` adds a process."""

    def __init__(self):
        self.now = 0.0
        self.members = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.first = self.add(Place(0, 3, "token", listener))

    def add(self, place):
        selector = selectors.DefaultSelector()
        self.members.append((Peers(place, selector, self.now), selector))
        return self.members[-1][0]

    def dial(self, line):
        connection = socket.create_connection(self.address)
        connection.sendall(line)
        return connection

    def join(self, process):
        connection = self.dial(f"hello token {process}\n".encode())
        return self.add(Place(process, 3, "token", connection))

    def pass_time(self, seconds=0.0, silent=()):
        for _ in range(4):  # a message to process 0 and on to the others
            for member, selector in self.members:
                for key, _ in selector.select(0.02):
                    key.data(self.now)
                if member not in silent:
                    member.beat(self.now)
        self.now += seconds

    def close(self):
        for member, selector in self.members:
            member.close()
            selector.close()


@pytest.fixture
def wire():
    made = Wire()
    yield made
    made.close()


def leave(wire, process):
    member, selector = wire.members.pop(process)
    member.close()
    selector.close()


@pytest.mark.slow
def test_processes_that_live_lose_nobody(wire):
    wire.join(1), wire.join(2)
    for _ in range(30):
        wire.pass_time(peers.INTERVAL)
    assert all(member.lost is None for member, _ in wire.members)


def test_a_process_that_goes_without_a_word_is_lost_to_all(wire):
    wire.join(1), wire.join(2)
    wire.pass_time()
    leave(wire, 1)
    wire.pass_time()
    assert [member.lost for member, _ in wire.members] == [(1, "its connection closed")] * 2


def test_the_end_of_process_0_is_seen_by_all(wire):
    wire.join(1), wire.join(2)
    wire.pass_time()
    leave(wire, 0)
    wire.pass_time()
    assert [member.lost for member, _ in wire.members] == [(0, "its connection closed")] * 2


def test_a_process_that_has_said_its_exit_code_may_go(wire):
    one = wire.join(1)
    wire.join(2)
    wire.pass_time()
    one.tell("ending 1 3")
    wire.pass_time()
    leave(wire, 1)
    wire.pass_time()
    assert [member.lost for member, _ in wire.members] == [None, None]
    assert [member.endings for member, _ in wire.members] == [{1: 3}, {1: 3}]


def test_a_process_that_comes_late_hears_who_has_ended(wire):
    wire.join(1).tell("ending 1 2")
    wire.pass_time()
    late = wire.join(2)
    wire.pass_time()
    assert late.endings == {1: 2}


def test_silence_counts_as_an_end(wire):
    quiet = wire.join(1)
    wire.join(2)
    while wire.now <= peers.SILENCE + 2 * peers.INTERVAL:
        wire.pass_time(peers.INTERVAL, silent=(quiet,))
    assert wire.first.lost == (1, "no sign of life for 20 s")


@pytest.mark.parametrize(
    "line",
    [b"hello wrong 1\n", b"\n", b"lost 1 x\n", b"\xff\x00\n", b"x" * 4000, b"hello token 1e9\n"],
)
def test_strangers_are_shown_the_door(wire, line):
    one = wire.join(1)
    wire.pass_time()
    with wire.dial(line) as stranger:
        wire.pass_time()
        wire.pass_time()
        stranger.settimeout(5)
        assert stranger.recv(10) == b""
    assert wire.first.lost is None
    assert one.lost is None
