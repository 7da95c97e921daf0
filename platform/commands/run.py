"""`lamina run`: trains, or goes on with a run that was stopped."""

import os
from collections.abc import Callable, Sequence

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import CONFIG_FLAGS, Flag
from lamina.platform.distributed import cluster, supervisor
from lamina.platform.errors import DivergedError, InterruptedRun, UserError

FLAGS = {
    **CONFIG_FLAGS,
    "workdir": Flag("", "the run folder (local or gs://); the same command resumes"),
    "coordinator": Flag("", "HOST:PORT of process 0, for several processes started by hand"),
    "num_processes": Flag(0, "how many processes there are; 1 alone: don't look for others"),
    "process_id": Flag(-1, "which of them this is, from 0"),
}

USAGE = f"""lamina run --config=PATH_OR_NAME[:ARG] --workdir=DIR [--config.key=value ...]

Runs an experiment. If DIR holds the same run, goes on where it was stopped; if that is done,
prints its result. A run that failed goes on from its last checkpoint; one that diverged is not
repeated. A finished run takes more seeds: --config.seeds=0,1,2 trains those that are new.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("run", arguments, FLAGS)
    parsing.no_positional("run", given)
    flags = given.flags
    if not flags["workdir"]:
        raise UserError("--workdir is missing: the folder for this run, such as runs/quickstart")
    found = cluster.find(
        flags["coordinator"], flags["num_processes"], flags["process_id"], os.environ
    )
    if found is None:
        return train(given, lambda: None)
    return supervisor.supervise(found, flags["workdir"], lambda join: train(given, join))


def train(given: parsing.Arguments, join: Callable[[], None]) -> int:
    """Runs what was asked for in this process, and returns its exit code.

    Args:
        given: the command's arguments.
        join: joins the other processes of the run.

    Raises:
        InterruptedRun: a signal asked to stop.
        DivergedError: the loss of every seed is no longer finite.
    """
    config, _, trust = parsing.load_config(given)
    use_compilation_cache()
    join()

    import jax

    from lamina.platform import run as runs
    from lamina.platform.reporting import tables

    result = runs.run(config, given.flags["workdir"], trust=trust)
    if result.status == "interrupted":
        raise InterruptedRun(result.message)
    if result.status == "diverged":
        raise DivergedError(result.message)
    if jax.process_index() == 0:
        final = {name: entry._asdict() for name, entry in result.final.items()}
        held_out = {name: entry for name, entry in final.items() if not name.startswith("train/")}
        tables.show(tables.result_table(held_out or final, result.seeds))
        print(f"report: {os.path.join(result.workdir, 'report.html')}")
    return 0


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `$LAMINA_CACHE` (default: `~/.cache/lamina`).

    A setting of jax's own (`JAX_COMPILATION_CACHE_DIR`) goes before it.
    """
    import jax

    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        default = os.path.join(os.path.expanduser("~"), ".cache", "lamina")
        folder = os.environ.get("LAMINA_CACHE", default)
        if folder:
            jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
