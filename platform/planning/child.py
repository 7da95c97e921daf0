"""The process that compiles: it loads libtpu, and may be ended once it has told enough."""

import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.planning import facts
from lamina.platform.training import compiled, experiment
from lamina.sharding.pods import topologies
from lamina.sharding.pods.buffers import Memory


def compile_step(
    connection: Connection, config: str, trust: Sequence[str], name: str, slices: int, folder: str
) -> None:
    """Compiles the training step of a config for a topology, and tells what it learns as it goes.

    It sends ("facts", `Facts`), and then ("memory", `Memory`) when the whole compilation is done,
    or ("refused", message) if the compiler doesn't take the program, or ("mistake", message), or
    ("bug", traceback). The compiler writes its files into the folder meanwhile.

    Args:
        connection: to the parent.
        config: resolved, as JSON.
        trust: packages whose factories it may name.
        name: of the topology.
        slices: of it.
        folder: for the compiler's files and messages.
    """
    log = os.open(Path(folder) / "compiler.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)  # libtpu writes to both from C++
    os.dup2(log, 2)
    try:
        connection.send(_compile(connection, config, trust, name, slices, folder))
    except (UserError, ValueError) as error:
        connection.send(("mistake", str(error)))
    except Exception:
        connection.send(("bug", traceback.format_exc()))


def _compile(connection, config, trust, name, slices, folder):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    wanted = topologies.topology(name, slices)
    devices = topologies.devices(wanted)
    resolved = FrozenConfigDict(configs.from_json(config).to_dict())
    dataset, _ = experiment.open_stand_in(resolved.data, trust)
    parts = experiment.assemble(resolved, trust, devices, dataset)
    connection.send(("facts", facts.gather(parts, topologies.layout(parts.mesh, wanted))))
    jitted, arguments = compiled.single_step(parts)
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
        program = jitted.lower(*arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return "refused", str(error)
    told = program.memory_analysis()
    return (
        "memory",
        Memory(
            arguments=told.argument_size_in_bytes,
            outputs=told.output_size_in_bytes - told.alias_size_in_bytes,
            temporary=told.temp_size_in_bytes,
            activations=0,
            code=told.generated_code_size_in_bytes,
        ),
    )
