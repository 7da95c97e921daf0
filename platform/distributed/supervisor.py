"""A small parent process for each process of a run, so that all end together when one dies.

When a process dies, jax in the others waits for it for minutes, or ends them from C++ where no
Python can catch it. So with several processes `lamina run` forks before it imports jax: the child
trains; the parent, which only listens, tells the other parents that it lives (peers.py), ends the
child when another process has gone, and exits with 75. It passes signals on, and says in the run
folder what happened.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from lamina.platform.distributed import cluster as clusters
from lamina.platform.distributed import peers
from lamina.platform.distributed.cluster import Cluster
from lamina.platform.errors import InterruptedRun, LaminaError

GRACE = 20.0
"""Seconds that a process has to end by itself once another has said that it ends with an error."""

ENDING = 30.0
"""Seconds that a child has for its last work once it has told its exit code."""

CRASH = 3.0
"""Seconds in which a loss of another process may still turn up as the cause of a crash here."""

FAREWELL = 0.3
"""Seconds that a child outlives its parent: the others learn of its end before jax there does."""

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


Body = Callable[[Callable[[], None]], int]
"""Trains, and returns an exit code; it is given what joins the other processes."""


def supervise(cluster: Cluster, workdir: str, body: Body) -> int:
    """Runs `body` in a child process, and returns its exit code.

    It returns twice, in the child and in the parent, each with the exit code to leave with.

    Args:
        cluster: the processes of the run.
        workdir: the run folder, for its `status.json`.
        body: calls what it is given once, before jax makes its devices.

    Raises:
        InterruptedRun: in the parent: another process has gone.
        LaminaError: in the child: what `body` raises.
    """
    if threading.current_thread() is not threading.main_thread():
        # No signals can be passed on from here: jax's own ways must do.
        return body(lambda: clusters.join(cluster))
    sys.stdout.flush()
    sys.stderr.flush()
    above, below = socket.socketpair()
    # A signal that comes while there are two processes waits until each knows which it is.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [*PASSED_ON, signal.SIGCHLD])
    child = os.fork()
    if child == 0:
        above.close()
        os.setpgid(0, 0)  # a terminal's interrupt comes to the parent alone, which passes it on
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return _as_child(cluster, below, body)
    below.close()
    with contextlib.closing(Supervisor(child, above)) as supervisor:
        with _passing_signals_on(child, supervisor.wake):
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            code = supervisor.wait()
        if supervisor.message:
            _write_status(workdir, supervisor.process, supervisor.message)
            raise InterruptedRun(supervisor.message)
    return code


@contextlib.contextmanager
def _passing_signals_on(child: int, wake: socket.socket) -> Iterator[None]:
    """Sends what signals come to the child, and wakes the supervisor when the child has ended."""

    def handle(number: int, frame: object) -> None:
        del frame
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    before = {number: signal.signal(number, handle) for number in (*PASSED_ON, signal.SIGCHLD)}
    waking = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(waking)
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_child(cluster: Cluster, below: socket.socket, body: Body) -> int:
    def join() -> None:
        clusters.join(cluster)
        _send_place(below)

    code = 1
    try:
        _end_with(below)
        code = body(join)
        return code
    except LaminaError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        raise
    finally:
        with contextlib.suppress(OSError):
            below.send(json.dumps({"ending": code}).encode() + b"\n")


def _send_place(below: socket.socket) -> None:
    """Meets the other processes, and hands the connection to the parent."""
    import jax

    if jax.process_count() == 1:
        return
    try:
        place = peers.meet()
    except OSError as error:
        print(
            f"lamina run: process 0 can't be reached for signs of life ({error}): when another "
            "process dies, this one may wait for minutes",
            file=sys.stderr,
        )
        return
    known = {"process": place.process, "of": place.of, "token": place.token}
    socket.send_fds(below, [json.dumps(known).encode() + b"\n"], [place.socket.fileno()])
    place.socket.close()


def _end_with(below: socket.socket) -> None:
    """Has this process end when its parent has died."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while below.recv(1):
                pass
        time.sleep(FAREWELL)
        os._exit(InterruptedRun.exit_code)

    threading.Thread(target=wait, name="lamina_parent", daemon=True).start()


class Supervisor:
    """Waits for the child, and for what happens to the other processes.

    Args:
        child: its process id.
        above: the parent's end of the connection to it.

    Attributes:
        wake: a byte to it ends a wait.
        message: why the run was interrupted, where the child itself couldn't say it; else "".
    """

    def __init__(self, child: int, above: socket.socket):
        self.child, self.above = child, above
        self.message = ""
        self._peers: peers.Peers | None = None
        self._announced: int | None = None  # the child's exit code, as it told it
        self._announced_at = self._lost_at = float("inf")  # when it did, and a process was lost
        self._deadline = float("inf")
        self._selector = selectors.DefaultSelector()
        self._woken, self.wake = socket.socketpair()
        for end in (self._woken, self.wake, above):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda now: self._woken.recv(64))
        self._selector.register(above, selectors.EVENT_READ, self._hear_child)

    @property
    def process(self) -> int:
        """This process's number; 0 as long as the processes have not met."""
        return self._peers.place.process if self._peers is not None else 0

    def close(self) -> None:
        """Closes all connections."""
        if self._peers is not None:
            self._peers.close()
        self._selector.close()
        for end in (self._woken, self.wake, self.above):
            end.close()

    def wait(self) -> int:
        """Waits until the child has ended, or ends it; returns the exit code to leave with."""
        ended, status = 0, 0
        while not ended and not self._must_end():
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if not ended:
                self._turn()
        if not ended:
            os.kill(self.child, signal.SIGKILL)
            _, status = os.waitpid(self.child, 0)
        if self.message:
            return InterruptedRun.exit_code
        self._hear_child(time.monotonic())
        code = os.waitstatus_to_exitcode(status) if self._announced is None else self._announced
        if code not in (0, InterruptedRun.exit_code):
            self._look_for_a_cause(code)
        if self.message:
            return InterruptedRun.exit_code
        return 128 - code if code < 0 else code

    def _turn(self) -> None:
        """Waits for a moment, and takes in what has come."""
        events = self._selector.select(peers.INTERVAL / 4)
        now = time.monotonic()
        for key, _ in events:
            key.data(now)
        if self._peers is not None:
            self._peers.beat(now)
            if self._peers.lost:
                self._lost_at = min(self._lost_at, now)

    def _must_end(self) -> bool:
        """Whether the child has to be ended now; `message` says why, if others are the reason."""
        now = time.monotonic()
        if self._announced is not None:
            # What it still does at its end may wait for a process that won't come.
            lost = self._peers is not None and self._peers.lost
            return now > (self._deadline - ENDING + CRASH if lost else self._deadline)
        if self._peers is None:
            return False
        if self._peers.lost:
            self.message = self._explain(*self._peers.lost)
            return True
        failed = [(process, code) for process, code in self._peers.endings.items() if code]
        if not failed:
            return False
        self._deadline = min(self._deadline, now + GRACE)
        if now > self._deadline:
            self.message = self._explain(failed[0][0], f"exit code {failed[0][1]}")
        return now > self._deadline

    def _look_for_a_cause(self, code: int) -> None:
        """Finds out whether a child has failed because another process is gone, and tells them.

        Args:
            code: the child's exit code, or minus a signal.
        """
        if self._lost_at - self._announced_at > CRASH:
            return  # the others ended because this one had failed
        stopped = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
        if self._peers is not None:
            until = time.monotonic() + CRASH
            while not stopped and self._peers.lost is None and time.monotonic() < until:
                self._turn()
            if self._peers.lost is not None:
                self.message = self._explain(*self._peers.lost)
                return
            if self._announced is None:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                self._peers.tell(f"lost {self._peers.place.process} {how}")
        if stopped:
            name = signal.Signals(-code).name
            self.message = f"stopped by {name}: the same command resumes"

    def _explain(self, process: int, why: str) -> str:
        assert self._peers is not None
        return (
            f"process {process} of {self._peers.place.of} has ended ({why}), so this one stops: "
            "the same command resumes"
        )

    def _hear_child(self, now: float) -> None:
        """Takes in what the child tells: its place among the processes, and its exit code."""
        while True:
            try:
                data, sockets, _, _ = socket.recv_fds(self.above, 4096, 1)
            except OSError:
                return
            if not data:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(self.above)
                return
            for found in map(json.loads, data.splitlines()):
                if "ending" in found:
                    self._announced = found["ending"]
                    self._announced_at = now
                    self._deadline = now + ENDING
                    if self._peers is not None:
                        self._peers.tell(f"ending {self._peers.place.process} {self._announced}")
                else:
                    place = peers.Place(**found, socket=socket.socket(fileno=sockets[0]))
                    self._peers = peers.Peers(place, self._selector, now)


def _write_status(workdir: str, process: int, message: str) -> None:
    """Notes in the run folder why the run stopped, unless another session goes on there already."""
    from lamina.platform.checkpoints import lock
    from lamina.platform.reporting import folder, report, storage

    if storage.is_remote(workdir) and process:
        return  # there is no lock that would tell whether another session has begun
    with contextlib.suppress(OSError, LaminaError):
        if folder.read_status(workdir)["state"] not in (folder.KILLED, "running", "failed"):
            return
        with lock.hold(workdir):
            folder.write_status(workdir, "interrupted", message)
            report.render(workdir)
