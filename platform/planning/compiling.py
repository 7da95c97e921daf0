"""Compilation of a config's step for a topology, in a child that is ended when it has said enough.

Partitioning, scheduling and the assignment of buffers take seconds, the machine code after them
takes minutes and says nothing new. So by default the child is ended in between.
"""

import multiprocessing
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.planning.facts import Facts
from lamina.sharding.pods import topologies
from lamina.sharding.pods.buffers import Memory
from lamina.sharding.pods.topologies import Topology

POLL = 0.1
"""Seconds between two looks at what the child has done."""
PROGRAM = "*after_optimizations_after_buffer_assignment.txt"
ASSIGNMENT = "*after_optimizations-buffer-assignment.txt"


class Outcome(NamedTuple):
    """What the compiler made of a step.

    Attributes:
        facts: of the experiment.
        program: scheduled HLO text; "" if the compiler refused the program.
        assignment: of its buffers; likewise.
        refused: why it was refused; "" if it wasn't.
        memory: what a whole compilation reports, or None.
        seconds: it took, with the start of the child.
    """

    facts: Facts
    program: str
    assignment: str
    refused: str
    memory: Memory | None
    seconds: float


def require_compiler() -> None:
    """Raises a `UserError` where the TPU compiler isn't installed."""
    if topologies.compiler_missing():
        raise UserError(
            "the TPU compiler isn't installed: libtpu comes with `pip install lamina[tpu-aot]` "
            "(Linux on x86; half a gigabyte; no TPU is needed)"
        )


def topology(name: str, slices: int) -> Topology:
    """Returns the topology of two flags.

    Raises:
        UserError: there is no such topology.
    """
    if not name:
        raise UserError("--topology is missing: a slice of a pod, such as --topology=v5e:16x16")
    try:
        return topologies.topology(name, slices)
    except ValueError as error:
        raise UserError(str(error)) from error


class Compilation:
    """A child that compiles.

    Args:
        config: resolved.
        trust: packages whose factories it may name.
        wanted: what to compile for.
        full: whether to wait for the machine code too.
        folder: an empty folder for the compiler's files.
    """

    def __init__(
        self, config: Any, trust: Sequence[str], wanted: Topology, full: bool, folder: Path
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lamina.platform.planning.child"])
        self.full, self.folder = full, folder
        self.started = time.monotonic()
        self.connection, theirs = context.Pipe(duplex=False)
        from lamina.platform.planning import child

        text = configs.to_json(config)
        arguments = (theirs, text, tuple(trust), wanted.name, wanted.slices, str(folder))
        self.process = context.Process(target=child.compile_step, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.facts: Facts | None = None
        self.size = -1

    def poll(self) -> Outcome | None:
        """Returns the outcome as soon as there is one.

        Raises:
            UserError: the config doesn't fit the topology.
            RuntimeError: the child has died.
        """
        while self.connection.poll():
            try:
                kind, told = self.connection.recv()
            except EOFError:
                raise RuntimeError(f"the compiling process has died: {self._log()}") from None
            if kind == "facts":
                self.facts = told
            elif kind == "memory":
                return self._outcome(memory=told)
            elif kind == "refused":
                return self._outcome(refused=told)
            elif kind == "mistake":
                raise UserError(told)
            else:
                raise RuntimeError(f"in the compiling process: {told}")
        if not self.full and self.facts is not None and self._assigned():
            return self._outcome()
        if not self.process.is_alive() and not self.connection.poll():
            raise RuntimeError(f"the compiling process has died: {self._log()}")
        return None

    def end(self) -> None:
        """Ends the child."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _assigned(self) -> bool:
        """Whether the compiler has written its program with the buffers, to the end."""
        found = self._file(PROGRAM)
        size = found.stat().st_size if found else -1
        same, self.size = size == self.size, size
        if not same or found is None or size == 0 or self._file(ASSIGNMENT) is None:
            return False
        with found.open("rb") as file:
            file.seek(max(0, size - 8))
            return file.read().rstrip().endswith(b"}")

    def _file(self, pattern: str) -> Path | None:
        return max(self.folder.glob(pattern), key=lambda p: p.stat().st_size, default=None)

    def _outcome(self, refused: str = "", memory: Memory | None = None) -> Outcome:
        assert self.facts is not None
        read = lambda pattern: ((found := self._file(pattern)) and found.read_text()) or ""
        return Outcome(
            facts=self.facts,
            program="" if refused else read(PROGRAM),
            assignment="" if refused else read(ASSIGNMENT),
            refused=refused,
            memory=memory,
            seconds=time.monotonic() - self.started,
        )

    def _log(self) -> str:
        log = self.folder / "compiler.log"
        return log.read_text()[-2000:] if log.exists() else f"exit {self.process.exitcode}"


def compile_step(
    config: Any,
    trust: Sequence[str],
    wanted: Topology,
    full: bool = False,
    folder: Path | None = None,
) -> Outcome:
    """Compiles the training step of a resolved config.

    Args:
        config: resolved.
        trust: packages whose factories it may name.
        wanted: what to compile for.
        full: whether to wait for the machine code too.
        folder: for the compiler's files; default: a temporary one.

    Raises:
        UserError: the config doesn't fit the topology, or libtpu isn't installed.
    """
    require_compiler()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="lamina-compile-") as temporary:
            return compile_step(config, trust, wanted, full, Path(temporary))
    compilation = Compilation(config, trust, wanted, full, folder)
    try:
        while (outcome := compilation.poll()) is None:
            time.sleep(POLL)
        return outcome
    finally:
        compilation.end()


def demand(refused: str) -> tuple[float, float] | None:
    """Returns the bytes that a refused program needs and that there are; None if it doesn't say.

    Where the compiler says what temporaries alone need, the arguments aren't in it.
    """
    for pattern in (
        r"required[^()]*\(([\d.]+)([KMGT])\)[^()]*\(([\d.]+)([KMGT])\)",
        r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])",
    ):
        found = re.search(pattern, refused)
        if found:
            need, need_unit, limit, limit_unit = found.groups()
            return _bytes(need, need_unit), _bytes(limit, limit_unit)
    return None


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)
