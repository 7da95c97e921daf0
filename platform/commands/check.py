"""`lamina check`: builds everything abstractly and says what a run would be, computing nothing."""

from collections.abc import Sequence
from typing import Any

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import CONFIG_FLAGS, Flag
from lamina.platform.errors import UserError

FLAGS = {
    **CONFIG_FLAGS,
    "workdir": Flag("", "a run folder: whether this config could go on there"),
    "compile": Flag(True, "whether to compile a step, for the memory of activations"),
}

USAGE = f"""lamina check --config=PATH_OR_NAME[:ARG] [--config.key=value ...]

Prints the resolved config, the parameters with their shapes, dtypes and shardings, bytes per
device, steps, epochs and FLOPs, and draws the learning rate. Nothing is trained and nothing
written. Where the data set isn't on this machine, its `stand_in` is taken.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("check", arguments, FLAGS)
    parsing.no_positional("check", given)
    config, original, trust = parsing.load_config(given)

    from lamina.platform import config as configs
    from lamina.platform import run as runs
    from lamina.platform.programs import incremental
    from lamina.platform.programs import table as programs
    from lamina.platform.reporting import tables, writers
    from lamina.platform.training import compiled, evaluation, experiment

    program = programs.find(config)
    resolved = program.resolve(config, trust)
    if given.flags["workdir"]:
        runs.check_resumable(given.flags["workdir"], program, resolved)
    print("Config\n" + _lines(configs, resolved, original, config))
    dataset, missing = experiment.open_stand_in(resolved.data, trust)
    if missing:
        print(f"\nThe data set isn't here; its stand-in is taken. ({missing})")
    if resolved.program == "incremental":
        parts = incremental.prepare(resolved, trust, None, True, dataset).parts
    else:
        parts = experiment.assemble(resolved, trust, dataset=dataset)
        evaluation.choose(parts)
    writers.check_trackers(resolved.trackers)
    print("\nParameters")
    tables.show(tables.parameter_table(compiled.parameter_rows(parts)))
    activations = compiled.activation_rows(parts)
    if activations:
        print("\nActivations")
        tables.show(tables.activation_table(activations))
    print("\nRun")
    for name, value in _figures(parts, not missing, given.flags["compile"]):
        print(f"  {name:<34} {value}")
    if resolved.program == "train":
        print("\nLearning rate\n" + _learning_rate(resolved, trust, parts.steps))
    described = program.describe(resolved, trust, dataset)
    if described:
        print(f"\n{resolved.program.capitalize()}")
        print("\n".join(f"  {line}" for line in described))
    return 0


def _learning_rate(resolved: Any, trust: Sequence[str], steps: int) -> str:
    """Returns a drawing of the learning rate over the run's steps."""
    import numpy as np

    from lamina.platform.reporting import text_chart
    from lamina.platform.training import optimizing

    rate = optimizing.learning_rate(resolved, trust, steps)
    places = np.unique(np.linspace(0, steps - 1, min(steps, 72)).astype(np.int32))
    lines = text_chart.draw(np.asarray(rate.of_step(places), np.float32).tolist())
    left, last = " " * (lines[0].index("┤") + 1), f"step {steps - 1}"
    lines.append(f"{left}{'step 0':<{max(len(places) - len(last), 7)}}{last}")
    if rate.controllers:
        lines.append("(before what the schedule lowers it by while it runs)")
    return "\n".join(f"  {line}" for line in lines)


def _lines(configs: Any, resolved: Any, original: Any, config: Any) -> str:
    """Returns the resolved config, a key a line, with what isn't from the file marked."""
    file, command = configs.flatten(original), configs.flatten(config)
    lines = []
    for key, value in configs.flatten(resolved).items():
        if key in command and command[key] != file.get(key):
            note = f"  <- command line (file: {file.get(key, 'default')!r})"
        else:
            note = "" if key in command else "  (default)"
        lines.append(f"  {key} = {value!r}{note}")
    return "\n".join(lines)


def _figures(parts: Any, real_data: bool, compile_step: bool) -> list[tuple[str, str]]:
    from lamina.platform.training import compiled, flops, layout
    from lamina.sharding import mesh as meshes

    c, train = parts.config, parts.dataset.splits["train"]
    jitted, arguments = compiled.single_step(parts)
    traced = jitted.trace(*arguments)
    step_flops = flops.count_jaxpr(traced.jaxpr)
    kind = parts.mesh.devices.flat[0].device_kind
    params = (parts.state.params, parts.state.frozen)
    rows: list[tuple[str, str]] = [
        ("devices", f"{parts.mesh.size} x {kind} ({meshes.describe(parts.mesh)})"),
        ("seeds", f"{tuple(c.seeds)} ({parts.seeds.lowering})"),
        ("training examples", f"{len(train):,}" if real_data else "unknown: the data aren't here"),
        ("steps", f"{parts.steps:,}"),
        (
            "epochs",
            f"{parts.steps * c.data.batch_size / len(train):.2f}" if real_data else "unknown",
        ),
        ("FLOPs per step", f"{step_flops:.3e}"),
        ("FLOPs of the training", f"{step_flops * parts.steps:.3e}"),
        ("parameters, bytes per device", f"{layout.bytes_per_device(params):,}"),
        (
            "optimizer state, bytes per device",
            f"{layout.bytes_per_device(parts.state.optimizer_state):,}",
        ),
        ("train state, bytes per device", f"{layout.bytes_per_device(parts.state):,}"),
    ]
    rows += _islands(parts)
    if compile_step:
        rows.append(("activations, bytes per device", f"{_temporary_bytes(traced):,}"))
    return rows


def _islands(parts: Any) -> list[tuple[str, str]]:
    """Returns what islands exchange, and what they would if each sent its whole gradient."""
    import jax

    from lamina.platform.training import efficiency, layout

    c, steps = parts.config, parts.steps
    if not (found := efficiency.traffic(parts, steps).get("communication")):
        return []
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(parts.state.params)) // parts.seeds.number
    per_step = found["bytes_per_step"]
    rows = f"{c.data.batch_size // found['islands']} rows of a batch each"
    return [
        ("islands", f"{found['islands']} ({c.islands.name}, {rows})"),
        (
            "island state, bytes per device",
            f"{layout.bytes_per_device(parts.state.islands):,}",
        ),
        ("meetings of the islands", f"{found['rounds']:,}"),
        (
            "bytes that an island sends a step",
            f"{per_step:,.0f} (a gradient is {whole:,}: {whole / max(per_step, 1):.3g} times that)",
        ),
    ]


def _temporary_bytes(traced: Any) -> int:
    """Compiles with little optimisation of the machine code, on which memory doesn't depend."""
    import jax

    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quickly if jax.default_backend() == "cpu" else None
    try:
        memory = traced.lower().compile(compiler_options=options).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the step doesn't compile: {error}") from error
    return int(memory.temp_size_in_bytes) if memory is not None else 0
