"""Signs of life between the processes of a run: one connection from each to process 0.

Each line is a message: "hello TOKEN NUMBER" opens a connection, an empty line is a sign of life,
"ending NUMBER CODE" tells that a process is about to leave with an exit code, and "lost NUMBER WHY"
that one has gone without that.
"""

import contextlib
import hmac
import json
import re
import secrets
import selectors
import socket
from typing import NamedTuple

INTERVAL = 2.0
"""Seconds between two signs of life."""

SILENCE = 20.0
"""Seconds without one after which a process counts as gone: a host that lost its power or network.
The end of a mere process shows at once, for its system closes the connection."""

LONGEST = 1000  # bytes of a message
KEY = "lamina/watch"
CONNECT_SECONDS = 20.0


class Place(NamedTuple):
    """A process's place in its run, and its socket to the others.

    Attributes:
        process: its number.
        of: how many there are.
        token: what a connection to process 0 has to know.
        socket: process 0: where the others connect; else: connected to process 0.
    """

    process: int
    of: int
    token: str
    socket: socket.socket


def meet() -> Place:
    """Agrees with the other processes on a connection, once jax's processes have met.

    Process 0 listens on a free port and tells it through jax's coordination service.

    Raises:
        OSError: process 0 can't be reached there.
    """
    from jax._src import distributed  # the only door to the service's key-value store

    jax_state = distributed.global_state
    process, of, client = jax_state.process_id, jax_state.num_processes, jax_state.client
    assert client is not None, "the processes have not met yet"
    host = str(jax_state.coordinator_address).rpartition(":")[0].strip("[]")
    if process == 0:
        token, listener = secrets.token_hex(16), _listen(host)
        text = json.dumps({"port": listener.getsockname()[1], "token": token})
        client.key_value_set(KEY, text)
        return Place(process, of, token, listener)
    text = client.blocking_key_value_get(KEY, int(CONNECT_SECONDS * 1000))
    found = json.loads(text)
    connection = socket.create_connection((host, found["port"]), timeout=CONNECT_SECONDS)
    connection.sendall(f"hello {found['token']} {process}\n".encode())
    return Place(process, of, found["token"], connection)


def _listen(host: str) -> socket.socket:
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=socket.SOMAXCONN
        )
    return socket.create_server(("", 0), backlog=socket.SOMAXCONN)


class Connection:
    """One end of a connection, which never blocks.

    Args:
        connected: the socket.
        now: seconds.
        process: who is at the other end; None: not known yet.
    """

    def __init__(self, connected: socket.socket, now: float, process: int | None = None):
        connected.setblocking(False)
        self.socket, self.heard, self.process = connected, now, process
        self._rest = b""

    def send(self, line: str) -> None:
        """Sends a message; one that doesn't get through shows as silence."""
        with contextlib.suppress(OSError):
            self.socket.send(line.encode()[: LONGEST - 1] + b"\n")

    def receive(self, now: float) -> list[str] | None:
        """Returns the messages that have come, or None if the other end has gone."""
        try:
            data = self.socket.recv(4096)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LONGEST:
            return None
        self.heard = now
        return [line.decode(errors="replace") for line in whole]

    def close(self) -> None:
        """Closes it, once what was sent is on its way."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()


class Peers:
    """The other processes of a run as one of them knows them.

    Process 0 hears from all, and tells each what the others need to know; the others hear from
    process 0 alone.

    Args:
        place: this process's place and socket.
        selector: where the sockets are registered, each with `receive` as its data.
        now: seconds.
    """

    def __init__(self, place: Place, selector: selectors.BaseSelector, now: float):
        self.place = place
        self.endings: dict[int, int] = {}
        self.lost: tuple[int, str] | None = None
        self._selector = selector
        self._sent = now
        self._connections: list[Connection] = []
        if place.process:
            self._add(Connection(place.socket, now, 0))
        else:
            place.socket.setblocking(False)
            selector.register(place.socket, selectors.EVENT_READ, self._accept)

    def tell(self, line: str) -> None:
        """Sends a message to all that are connected."""
        for connection in self._connections:
            if connection.process is not None:
                connection.send(line)

    def beat(self, now: float) -> None:
        """Sends a sign of life where it is time for one, and looks for processes that went quiet.

        Args:
            now: seconds.
        """
        if now - self._sent >= INTERVAL:
            self._sent = now
            self.tell("")
        for connection in tuple(self._connections):
            if now - connection.heard > SILENCE:
                self._drop(connection, f"no sign of life for {SILENCE:.0f} s")

    def close(self) -> None:
        """Closes all connections."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self.place.socket.close()

    def _add(self, connection: Connection) -> None:
        self._connections.append(connection)
        receive = lambda now: self._receive(connection, now)
        self._selector.register(connection.socket, selectors.EVENT_READ, receive)

    def _accept(self, now: float) -> None:
        with contextlib.suppress(OSError):
            self._add(Connection(self.place.socket.accept()[0], now))

    def _receive(self, connection: Connection, now: float) -> None:
        lines = connection.receive(now)
        if lines is None:
            self._drop(connection, "its connection closed")
            return
        for line in lines:
            if connection.process is None:
                if not self._greet(connection, line):
                    self._drop(connection, "")
                    return
            else:
                self._understand(line)

    def _greet(self, connection: Connection, line: str) -> bool:
        """Whether a new connection's first line is that of a process of this run."""
        found = re.fullmatch(r"hello (\w+) ([0-9]{1,6})", line, re.ASCII)
        if found is None or not hmac.compare_digest(found[1], self.place.token):
            return False
        connection.process = int(found[2])
        for process, code in self.endings.items():
            connection.send(f"ending {process} {code}")
        return True

    def _understand(self, line: str) -> None:
        if ending := re.fullmatch(r"ending ([0-9]{1,6}) ([0-9]{1,3})", line, re.ASCII):
            self.endings[int(ending[1])] = int(ending[2])
        elif gone := re.fullmatch(r"lost ([0-9]{1,6}) (.+)", line, re.ASCII):
            self.lost = self.lost or (int(gone[1]), gone[2])
        else:
            return
        if self.place.process == 0:
            self.tell(line)

    def _drop(self, connection: Connection, why: str) -> None:
        """Forgets a connection; a process that had not said that it would end is lost."""
        self._selector.unregister(connection.socket)
        self._connections.remove(connection)
        connection.close()
        process = connection.process
        if process is not None and process not in self.endings and self.lost is None:
            self.lost = (process, why)
            if self.place.process == 0:
                self.tell(f"lost {process} {why}")
